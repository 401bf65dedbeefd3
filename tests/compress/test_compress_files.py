"""A checkpoint in, a checkpoint of factors out: the numbers are those of `fit`, and a kill costs one matrix."""

import contextlib
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blrlab import compress, factors, records
from blrlab.compress import __main__ as command
from blrlab.compress import deal, folder, naming, request, streaming
from blrlab.errors import InputError
from blrlab.models.hf import stored
from blrlab.models.hf.stored import Content

MLP = "--layers=model.layers.*.mlp.*"
SMALL = [MLP, "--format=low_rank", "--rank=6"]
MLP_PATHS = {f"model.layers.{n}.mlp.{name}_proj" for n in (0, 1) for name in ("gate", "up", "down")}


def _run(checkpoint, out, *flags):
    return command.main([f"--checkpoint={checkpoint}", f"--out={out}", *flags])


def _tensors(folder):
    """Read a checkpoint with the library that wrote it, by its index."""
    from safetensors.torch import load_file

    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return load_file(folder / "model.safetensors")
    where = json.loads(index.read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in set(where.values())}
    assert sorted(where) == sorted(name for held in files.values() for name in held)
    return {name: files[file][name] for name, file in where.items()}


def _layers(folder):
    """Read the factors with blrlab_ops, as JAX arrays."""
    from blrlab_ops import files

    found = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        for path, (kernel, bias) in files.load(shard).items():
            exact = {name: jnp.asarray(factor.float().numpy()) for name, factor in kernel.items()}
            found[path] = exact, bias, next(iter(kernel.values())).dtype
    return found


def _rows(folder):
    return {row["path"]: row for row in records.read(folder / "records.jsonl") if row["kind"] == "compress"}


@pytest.fixture
def fits(monkeypatch):
    """Count the fits, by path."""
    seen = []

    def counted(tree, path, *rest):
        seen.append(path)
        return compress.tree.compress_layer(tree, path, *rest)

    monkeypatch.setattr(streaming, "compress_layer", counted)
    return seen


def _let_finish():
    """Wait for the fits that an interrupted run has under way, which this process would still count."""
    for thread in threading.enumerate():
        if thread.name == deal.THREADS:
            thread.join()


@pytest.mark.parametrize(
    ("name", "pattern", "dtype"),
    [
        ("llama", "model.layers.*.mlp.*", ""),
        ("llama_bf16", "model.layers.*.mlp.*", ""),
        ("llama_bf16", "model.layers.1.*_proj", "float32"),
        ("llama", "*.down_proj", "bfloat16"),
        ("gpt2", "transformer.h.*", ""),
        ("gpt2", "transformer.h.*", "bfloat16"),
    ],
)
def test_the_factors_are_those_of_a_fit(checkpoints, tmp_path, name, pattern, dtype):
    out = tmp_path / "out"
    flags = ["--format=monarch", "--rank=8", "--blocks=4", f"--layers={pattern}", f"--dtype={dtype}"]
    assert _run(checkpoints / name, out, *flags, "--shard-gib=0.00001") == 0
    before, after, rows = _tensors(checkpoints / name), _tensors(out), _rows(out)
    found = _layers(out)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert set(found) == set(rows) - {"*"}
    assert set(found) == set(json.loads((out / "blrlab.json").read_text())["layers"])
    for number, (path, (kernel, bias, kept)) in enumerate(found.items()):
        weight = before.pop(f"{path}.weight")
        assert str(kept) == f"torch.{dtype}" if dtype else kept == weight.dtype
        oriented = weight if name == "gpt2" else weight.T  # Conv1D is W already
        given = jnp.asarray(oriented.float().numpy(), jnp.dtype(str(weight.dtype).removeprefix("torch.")))
        spec = factors.spec_of(kernel)
        key = jax.random.fold_in(jax.random.key(0), number)
        wanted = compress.fit(given, spec, key, dtype=dtype or None)
        for part, factor in wanted.kernel.items():
            np.testing.assert_allclose(kernel[part], factor.astype(jnp.float32), rtol=2e-3, atol=2e-4)
            assert f"{path}.{part}" in after
            del after[f"{path}.{part}"]
        exact = oriented.double().numpy()
        error = np.linalg.norm(exact - factors.to_dense(kernel)) / np.linalg.norm(exact)
        assert rows[path]["relative_error"] == pytest.approx(error, rel=2e-3)
        assert rows[path]["params_after"] == sum(factor.size for factor in kernel.values())
        assert (bias is None) == (f"{path}.bias" not in before)
        if bias is not None:  # a layer is of one dtype
            assert bias.dtype == kept
            assert _bits(bias) == _bits(before.pop(f"{path}.bias").to(kept))
            del after[f"{path}.bias"]
    # All other tensors, biases too, are what they were, bit for bit.
    assert set(after) == set(before)
    for tensor, numbers in before.items():
        assert after[tensor].dtype == numbers.dtype
        assert _bits(after[tensor]) == _bits(numbers)
    assert (out / "config.json").read_bytes() == (checkpoints / name / "config.json").read_bytes()
    assert not (out / "parts").exists()


def _bits(tensor):
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def test_rules_give_layers_their_own_formats(checkpoints, tmp_path):
    rules = [
        ["model.layers.1.*", {"format": "dense"}],
        ["*.down_proj", {"format": "blast", "rank": 4, "blocks": [4, 2]}],
        ["*.q_proj", {"rank": 5}],
    ]
    file, out = tmp_path / "rules.json", tmp_path / "out"
    file.write_text(json.dumps(rules))
    assert _run(checkpoints / "llama", out, f"--rules={file}", "--format=low_rank") == 0
    found = {path: factors.spec_of(kernel) for path, (kernel, *_) in _layers(out).items()}
    assert found == {
        "model.layers.0.mlp.down_proj": factors.Spec("blast", 96, 48, (4, 2), 4),
        "model.layers.0.self_attn.q_proj": factors.Spec("low_rank", 48, 48, rank=5),
    }
    whole = _rows(out)["*"]
    before = sum(tensor.numel() for tensor in _tensors(checkpoints / "llama").values())
    after = sum(tensor.numel() for tensor in _tensors(out).values())
    assert (whole["params_before"], whole["params_after"]) == (before, after)
    assert whole["model_factor"] == pytest.approx(before / after)
    assert whole["layer_factor"] == pytest.approx((96 * 48 + 48 * 48) / (4 * (96 + 48 + 8) + 5 * 96))


def test_a_net_names_layers_and_ranks(checkpoints, tmp_path):
    out = tmp_path / "out"
    assert _run(checkpoints / "gpt2", out, "--net=gpt2s", "--format=low_rank") == 0
    rows = _rows(out)
    names = ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")  # attn.c_proj is of other proportions than what is published
    assert set(rows) - {"*"} == {f"transformer.h.{n}.{name}" for n in (0, 1) for name in names}
    assert {row["rank"] for path, row in rows.items() if path != "*"} == {192 * 24 // 768}


class Killed(BaseException):
    """As if the process had ended."""


def _killed_at(monkeypatch, number, late):
    """Kill at the start or the end of the number-th write of anything; return how many there were."""
    count = [0]

    def wrap(place, name):
        write = getattr(place, name)

        def counted(*arguments):
            count[0] += 1
            if count[0] == number and not late:
                raise Killed
            write(*arguments)
            if count[0] == number:
                raise Killed

        monkeypatch.setattr(place, name, counted)

    for place, name in ((stored, "write"), (records, "append"), (records, "write_text"), (folder.shutil, "copyfile")):
        wrap(place, name)
    return count


@pytest.mark.parametrize("late", [False, True])
def test_a_kill_at_any_write_costs_one_matrix(checkpoints, tmp_path, monkeypatch, fits, late):
    flags = [*SMALL, "--shard-gib=0.000015"]
    assert _run(checkpoints / "llama", tmp_path / "whole", *flags) == 0
    wanted, number = _tensors(tmp_path / "whole"), 0
    while True:
        number += 1
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        fits.clear()
        with monkeypatch.context() as patch:
            count = _killed_at(patch, number, late)
            with contextlib.suppress(Killed):
                _run(checkpoints / "llama", out, *flags)
            _let_finish()
            if count[0] < number:
                break
        kept = {
            json.loads(stored.look(path)[1]["blrlab_records"])[0]["path"] for path in out.glob("parts/*.safetensors")
        }
        fits.clear()
        assert _run(checkpoints / "llama", out, *flags) == 0
        assert not kept & set(fits)
        found = _tensors(out)
        assert set(found) == set(wanted)
        assert all(found[name].equal(tensor) for name, tensor in wanted.items())
        rows = [row["path"] for row in records.read(out / "records.jsonl") if row["kind"] == "compress"]
        assert sorted(rows) == sorted({*MLP_PATHS, "*"})
        assert not list(out.glob("**/*.tmp"))
    assert number > 20


def test_what_is_finished_is_not_computed_again(checkpoints, tmp_path, monkeypatch, fits, capsys):
    out = tmp_path / "out"

    def stopping(self, row, kernel, add=folder.Folder.add):
        add(self, row, kernel)
        if len(self.rows) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder.Folder, "add", stopping)
        assert _run(checkpoints / "llama", out, *SMALL) == command.EXIT_STOPPED
    _let_finish()
    assert "the same command goes on" in capsys.readouterr().err
    assert len(_rows(out)) == 4
    # A kill in the middle of a write leaves this much.
    (out / "parts" / "00005.safetensors.tmp").write_bytes(b"\x10\0\0")
    (out / "model-00001-of-00001.safetensors.tmp").write_bytes(b"\x10\0\0")
    with (out / "records.jsonl").open("a") as file:
        file.write('{"kind": "compress", "path": "model.la')
    finished = set(_rows(out))
    fits.clear()
    assert _run(checkpoints / "llama", out, *SMALL) == 0
    assert set(fits) == MLP_PATHS - finished
    assert len(fits) == 2
    assert set(_rows(out)) == MLP_PATHS | {"*"}
    fits.clear()
    assert _run(checkpoints / "llama", out, *SMALL) == 0
    assert not fits
    assert "6 of 6 matrices are in" in capsys.readouterr().out


def test_another_request_is_refused_until_fresh(checkpoints, tmp_path, fits, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    assert _run(checkpoints / "llama", out, *SMALL) == 0
    shutil.copytree(checkpoints / "llama", other)
    assert _run(other, out, *SMALL) == 0  # the same numbers elsewhere are the same checkpoint
    name = "model.layers.0.input_layernorm.weight"
    tensors = _tensors(other)
    tensors[name][24] += 1
    from safetensors.torch import save_file

    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    for checkpoint, flags, says in (
        (checkpoints / "llama", [*SMALL, "--rank=7"], "model.layers.0.mlp.down_proj has rank 6 there, and 7 now"),
        (
            checkpoints / "llama",
            [*SMALL, "--algorithm=randomized_svd"],
            "has algorithm svd there, and randomized_svd now",
        ),
        (
            checkpoints / "llama",
            [*SMALL, "--layers=*.up_proj"],
            "model.layers.0.mlp.down_proj is not to be compressed now",
        ),
        (checkpoints / "llama", [*SMALL, "--seed=1"], "seed is 0 there, and 1 now"),
        (other, SMALL, "the checkpoint is another one"),
    ):
        capsys.readouterr()
        assert _run(checkpoint, out, *flags) == command.EXIT_INPUT
        assert says in capsys.readouterr().err
    fits.clear()
    assert _run(other, out, *SMALL, "--fresh") == 0
    assert set(fits) == MLP_PATHS
    assert _tensors(out)[name].equal(tensors[name])


def test_a_folder_survives_what_is_lost_of_it(checkpoints, tmp_path, monkeypatch, fits):
    """A shard that was removed is made again, alone; a kill in the midst of --fresh leaves a folder to go on with."""
    out, flags = tmp_path / "out", [*SMALL, "--shard-gib=0.000015"]
    assert _run(checkpoints / "llama", out, *flags) == 0
    wanted = _tensors(out)
    lost = next(shard for shard in sorted(out.glob("model-*.safetensors")) if "mlp" in str(stored.look(shard)[0]))
    layers = {name.rpartition(".")[0] for name in stored.look(lost)[0] if "mlp" in name}
    lost.unlink()
    fits.clear()
    assert _run(checkpoints / "llama", out, *flags) == 0
    assert set(fits) == layers
    assert len(layers) < len(MLP_PATHS)
    assert all(_tensors(out)[name].equal(tensor) for name, tensor in wanted.items())

    def killed(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_text", killed)
        with pytest.raises(Killed):
            _run(checkpoints / "llama", out, *SMALL, "--rank=5", "--fresh")
    assert _run(checkpoints / "llama", out, *SMALL, "--rank=5", "--fresh") == 0
    assert {row["rank"] for path, row in _rows(out).items() if path != "*"} == {5}


def test_files_are_read_by_parts_and_written_with_wide_tensors_first(tmp_path, monkeypatch):
    from safetensors.numpy import load_file, save_file

    monkeypatch.setattr(stored, "PIECE", 64)
    numbers = np.arange(75, dtype=np.float32).reshape(5, 15)
    save_file({"a": numbers, "b": np.arange(3, dtype=np.int64)}, tmp_path / "one.safetensors")
    held, _ = stored.look(tmp_path / "one.safetensors")
    assert max(map(len, held["a"].pieces())) == 64
    np.testing.assert_array_equal(held["a"].read(), numbers)
    odd = Content("odd", "F16", (3,), [np.ones(3, np.float16).tobytes()])
    stored.write(tmp_path / "two.safetensors", [odd, held["a"], held["b"]], {"format": "pt"})
    again = load_file(tmp_path / "two.safetensors")
    np.testing.assert_array_equal(again["a"], numbers)
    np.testing.assert_array_equal(again["odd"], np.ones(3))
    tensors = stored.look(tmp_path / "two.safetensors")[0]
    assert [tensors[name].offset % 8 for name in ("b", "a", "odd")] == [0, 0, 4]
    with (tmp_path / "two.safetensors").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(InputError, match="is damaged or cannot be read"):
        stored.look(tmp_path / "two.safetensors")


def test_names_of_llama_7b_have_published_ranks():
    shapes = {"q_proj": (4096, 4096), "k_proj": (4096, 4096), "v_proj": (4096, 4096), "o_proj": (4096, 4096)}
    shapes |= {"gate_proj": (11008, 4096), "up_proj": (11008, 4096), "down_proj": (4096, 11008)}
    names = {f"model.layers.{n}.x.{name}.weight": size for n in range(32) for name, size in shapes.items()}
    names |= {"model.embed_tokens.weight": (32000, 4096), "lm_head.weight": (32000, 4096), "model.norm.weight": (4096,)}
    tensors = {name: stored.Stored(name, "BF16", size, None, 0, 0) for name, size in names.items()}
    layers = naming.linears(tensors, "llama")
    chosen = [path for path, layer in layers.items() if naming.has_published(path, layer, "llama7b")]
    assert len(chosen) == 224 == sum(streaming.COUNTS["llama7b"].values())
    called = [naming.called(path, "llama7b") for path in chosen]
    assert {name: called.count(name) for name in set(called)} == streaming.COUNTS["llama7b"]
    assert (layers["model.layers.3.x.up_proj"].in_features, layers["model.layers.3.x.up_proj"].out_features) == (
        4096,
        11008,
    )
    assert "model.embed_tokens" not in layers


def test_layers_of_images_models_go_by_the_papers_names():
    """Names of transformers, of diffusers, and of DiT's authors."""
    names = {
        "vit.encoder.layer.3.intermediate.dense": "fc1",
        "vit.encoder.layer.3.output.dense": "fc2",
        "vit.encoder.layer.3.attention.output.dense": "dense",
        "layer_3/attention/qkv": "qkv",
    }
    assert {path: naming.called(path, "vit_b") for path in names} == names
    names = {
        "transformer_blocks.7.norm1.linear": "adaln",
        "transformer_blocks.7.ff.net.0.proj": "fc1",
        "blocks.7.adaLN_modulation.1": "adaln",
        "blocks.7.attn.qkv": "qkv",
        "blocks.7.attn.proj": "proj",
    }
    assert {path: naming.called(path, "dit_xl") for path in names} == names


def test_a_checkpoint_of_diffusers_tells_its_class(tmp_path):
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    assert naming.model_type(tmp_path) == "DiTTransformer2DModel"


def test_a_shard_is_of_bounded_size(checkpoints):
    rules = [("model.layers.*.mlp.*", {})]
    wanted = request.read(str(checkpoints / "llama"), rules, {"format": "low_rank", "rank": 6}, shard_bytes=20_000)
    shards = request.shards(wanted)
    held = [name for shard in shards for name in (*shard.paths, *shard.copied)]
    assert len(held) == len(set(held)) == len(wanted.tensors)  # every weight is one layer's
    for shard in shards:
        own = sum(sum(map(np.prod, factors.shapes(wanted.specs[path]).values())) * 4 for path in shard.paths)
        size = own + sum(wanted.tensors[name].size for name in shard.copied)
        assert size <= 20_000 or len(shard.paths) + len(shard.copied) == 1
