"""One set of factors on both sides: made in Flax, written, read by Flax and by torch, with the same numbers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from flax.traverse_util import flatten_dict
from safetensors import safe_open

from blrlab import compress
from blrlab.compress import __main__ as compress_command
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import gpt2, hf, llama
from blrlab.models.generation import generate

CONFIGS = {
    "gpt2": gpt2.Config(61, 32, 2, 3, 24, dropout=0.0),
    "llama": llama.Config(61, 32, 2, 4, 2, 24, 40, tied=True),
}
SPECS = {
    "gpt2": {
        "h_0/attn/c_attn": Spec("monarch", 24, 72, (2, 3), 4),
        "h_0/mlp/c_proj": Spec("low_rank", 96, 24, rank=9),
        "h_1/mlp/c_fc": Spec("blast", 24, 96, (3, 4), 7),
    },
    "llama": {
        "layers_0/self_attn/v_proj": Spec("monarch", 24, 12, (2, 3), 3),
        "layers_0/mlp/gate_proj": Spec("low_rank", 24, 40, rank=9),
        "layers_1/mlp/down_proj": Spec("blast", 40, 24, (4, 3), 7),
    },
}
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 20))
KINDS = list(CONFIGS)


@functools.cache
def _compressed(kind):
    """A model whose dense weights were compressed to `SPECS`."""
    params = hf.FAMILIES[kind].init(CONFIGS[kind], jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf * 4 if leaf.ndim == 2 else leaf, params)
    return compress.compress(params, SPECS[kind])[0]


def _logits(kind, params, specs=None):
    model = hf.FAMILIES[kind].model(CONFIGS[kind], FrozenDict(SPECS[kind] if specs is None else specs))
    return np.asarray(model.apply({"params": params}, TOKENS))


@pytest.fixture(params=KINDS)
def written(request, tmp_path):
    kind = request.param
    hf.save(tmp_path / kind, hf.FAMILIES[kind], CONFIGS[kind], _compressed(kind))
    return kind, tmp_path / kind


def test_a_factored_checkpoint_comes_back_as_it_was(written):
    kind, folder = written
    family, config = hf.describe(folder, dropout=0.0)
    params, specs = hf.load(folder, family, config)
    assert (family.name, config) == (kind, CONFIGS[kind])
    assert specs == SPECS[kind]
    jax.tree.map(np.testing.assert_array_equal, params, _compressed(kind))
    np.testing.assert_array_equal(_logits(kind, params), _logits(kind, _compressed(kind)))


def test_the_specs_are_beside_it(written):
    kind, folder = written
    told = json.loads((folder / "blrlab.json").read_text())
    by_name = {"gpt2": "transformer.h.1.mlp.c_fc", "llama": "model.layers.1.mlp.down_proj"}[kind]
    spec = list(SPECS[kind].values())[2]
    assert len(told["layers"]) == 3
    assert told["layers"][by_name] == {
        "format": "blast",
        "in_features": spec.in_features,
        "out_features": spec.out_features,
        "blocks": list(spec.blocks),
        "rank": 7,
        "block_rank": None,
    }


@pytest.mark.parametrize("impl", ["ref", "torch_bmm", None])
def test_torch_computes_what_flax_does(written, impl):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from blrlab_ops.nn import load_factored

    kind, folder = written
    model = load_factored(folder, impl=impl)
    with torch.no_grad():
        found = model(torch.from_numpy(TOKENS)).logits.numpy()
    wanted = _logits(kind, _compressed(kind))
    assert wanted.std() > 0.1
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_torch_generates_what_flax_does(written):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from blrlab_ops.nn import load_factored

    kind, folder = written
    model = load_factored(folder)
    model.generation_config.eos_token_id = None
    prompt = TOKENS[:, :8]
    with torch.no_grad():
        wanted = model.generate(torch.from_numpy(prompt), max_new_tokens=12, do_sample=False, pad_token_id=0)
    flax = hf.FAMILIES[kind].model(CONFIGS[kind], FrozenDict(SPECS[kind]))
    assert generate(flax, _compressed(kind), jnp.asarray(prompt), 12).tolist() == wanted[:, 8:].tolist()


def test_the_factors_of_a_file_are_read_by_the_kernels_package(written):
    pytest.importorskip("torch")
    from blrlab_ops import files

    kind, folder = written
    found = files.load(folder / "model.safetensors")
    names = json.loads((folder / "blrlab.json").read_text())["layers"]
    assert set(found) == set(names)
    for name, (factors, bias) in found.items():
        assert (bias is not None) == (kind == "gpt2")
        assert {part: tuple(tensor.shape) for part, tensor in factors.items()} == {
            part: tuple(tensor.shape) for part, tensor in _by_name(kind, name).items()
        }


def _by_name(kind, name):
    path = name.removeprefix("transformer.").removeprefix("model.")
    path = path.replace("h.", "h_").replace("layers.", "layers_").replace(".", "/")
    flat = flatten_dict(_compressed(kind), sep="/")
    return {part: flat[f"{path}/kernel/{part}"] for part in "VSU" if f"{path}/kernel/{part}" in flat}


def test_shards_hold_a_layer_whole(tmp_path):
    hf.save(tmp_path / "llama", hf.FAMILIES["llama"], CONFIGS["llama"], _compressed("llama"), shard_bytes=9000)
    shards = sorted((tmp_path / "llama").glob("*.safetensors"))
    assert len(shards) > 2
    homes = {}
    for shard in shards:
        with safe_open(shard, "numpy") as file:
            for name in file.keys():  # noqa: SIM118
                homes.setdefault(name.rpartition(".")[0], set()).add(shard)
    assert all(len(found) == 1 for found in homes.values())
    family, config = hf.describe(tmp_path / "llama")
    params, _ = hf.load(tmp_path / "llama", family, config)
    jax.tree.map(np.testing.assert_array_equal, params, _compressed("llama"))


def test_a_narrow_export_is_rounded_once(tmp_path):
    hf.save(tmp_path / "gpt2", hf.FAMILIES["gpt2"], CONFIGS["gpt2"], _compressed("gpt2"), dtype="bfloat16")
    assert json.loads((tmp_path / "gpt2" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    family, config = hf.describe(tmp_path / "gpt2", dropout=0.0)
    params, _ = hf.load(tmp_path / "gpt2", family, config)
    kept, _ = hf.load(tmp_path / "gpt2", family, config, dtype=None)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype("bfloat16")}
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), _compressed("gpt2"))
    jax.tree.map(np.testing.assert_array_equal, params, rounded)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_compression_command_writes_is_read(kind, tmp_path, capsys):
    params = hf.FAMILIES[kind].init(CONFIGS[kind], jax.random.key(0))
    hf.save(tmp_path / "dense", hf.FAMILIES[kind], CONFIGS[kind], params)
    flags = ["--format=blast", "--rank=4", "--blocks=4", "--layers=*.mlp.*"]
    where = [f"--checkpoint={tmp_path / 'dense'}", f"--out={tmp_path / 'small'}"]
    assert compress_command.main([*where, *flags]) == 0, capsys.readouterr().err
    family, config = hf.describe(tmp_path / "small", dropout=0.0)
    small, specs = hf.load(tmp_path / "small", family, config)
    assert len(specs) == (4 if kind == "gpt2" else 6)
    assert {spec.format for spec in specs.values()} == {"blast"}
    found = _logits(kind, small, specs)
    wanted = _logits(kind, compress.expand(small), {})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_an_export_needs_an_empty_folder(written):
    kind, folder = written
    with pytest.raises(InputError, match="is not empty"):
        hf.save(folder, hf.FAMILIES[kind], CONFIGS[kind], _compressed(kind))


def test_an_export_holds_numbers_that_weights_have(tmp_path):
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.int8), _compressed("gpt2"))
    with pytest.raises(InputError, match="is int8; a checkpoint holds float32, float16, bfloat16"):
        hf.save(tmp_path / "gpt2", hf.FAMILIES["gpt2"], CONFIGS["gpt2"], params)


def test_factors_that_do_not_fit_together(written):
    from safetensors.numpy import load_file, save_file

    _, folder = written
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".S"))
    tensors[name] = tensors[name][:, :, :-1].copy()
    save_file(tensors, folder / "model.safetensors")
    family, config = hf.describe(folder)
    with pytest.raises(InputError):
        hf.load(folder, family, config)
