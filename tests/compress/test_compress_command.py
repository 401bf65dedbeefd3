"""The command: one sentence for every wrong input, several devices, and times of random weights."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from blrlab import records
from blrlab.compress import __main__ as command
from blrlab.compress import streaming

ROOT = pathlib.Path(__file__).resolve().parents[2]
MLP = "--layers=model.layers.*.mlp.*"
TWO_DEVICES = """
import sys, time
import jax, jax.numpy as jnp
from blrlab.compress.__main__ import main
from blrlab.compress.deal import deal

def work(job, device):
    time.sleep(0.05)
    return job, *jnp.zeros(()).devices()

assert len(jax.local_devices()) == 2
found = list(deal(range(8), work, jax.local_devices()))
assert sorted(job for job, _ in found) == list(range(8))
assert len({device for _, device in found}) == 2
sys.exit(main(sys.argv[1:]))
"""


def _says(capsys, *flags):
    """Run a command that cannot work, and return its one sentence."""
    assert command.main(list(flags)) == command.EXIT_INPUT
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([MLP, "--rank=6", "--format=blats"], 'unknown format "blats": it is one of .* Did you mean "blast"'),
        ([MLP, "--rank=6", "--algorithm=sdv"], 'unknown algorithm "sdv"'),
        ([MLP, "--rank=6", "--format=low_rank", "--algorithm=precgd"], 'unknown algorithm "precgd": .* svd'),
        (
            [MLP, "--format=monarch", "--rank=6", "--blocks=4"],
            r"model\.layers\.0\.mlp\.\w+ .*rank 6 is not a positive multiple",
        ),
        ([MLP, "--format=low_rank", "--rank=40"], r"model\.layers\.0\.mlp\.\w+ .*rank 40 has 5,760 .*a rank of 32 has"),
        ([MLP, "--format=monarch", "--rank=8", "--blocks=5"], r"model\.layers\.0\.mlp\.\w+ .*5 input blocks do not"),
        ([MLP, "--rank=6"], 'nothing is published for "down_proj" of net ""'),
        ([MLP, "--net=llama7c"], 'unknown net "llama7c"'),
        (["--layers=*.upp_proj", "--rank=6"], r'the rule "\*.upp_proj" matches no layer'),
        (["--rank=6"], "no net is given: give --layers, --rules or another --net"),
        (["--net=gpt2s"], 'nothing is published for a layer of it by the net "gpt2s"'),
        ([MLP, "--format=dense"], "nothing to compress"),
        ([MLP, "--rank=-1"], "--rank is -1"),
        ([MLP, "--rank=6", "--blocks=4y4"], '--blocks is like 16 or 8x16, not "4y4"'),
        ([MLP, "--rank=6", "--dtype=float8"], 'unknown dtype "float8"'),
        ([MLP, "--rank=6", "--shard-gib=0"], "--shard-gib is 0"),
        ([MLP, "--rank=6", "--shard-gib=inf"], "--shard-gib is inf"),
        ([MLP, "--rank=6", f"--seed={2**70}"], "--seed is"),
        ([MLP, "--rules=none.json"], "--rules and --layers both"),
        (["--rules=none.json"], "no rules at none.json"),
        (["--random=llama7b"], "--random takes no --checkpoint"),
    ],
)
def test_a_wrong_input_is_one_sentence(checkpoints, tmp_path, capsys, flags, sentence):
    import re

    out = tmp_path / "out"
    said = _says(capsys, f"--checkpoint={checkpoints / 'llama'}", f"--out={out}", *flags)
    assert re.search(sentence, said), said
    assert not out.exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{}"), "does not tell its model_type"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no header"), "is damaged"),
        (lambda folder: _put(folder, np.nan), "model.layers.1.mlp.up_proj cannot be compressed: its weight holds NaN"),
        (lambda folder: _put(folder, np.inf), "model.layers.1.mlp.up_proj cannot be compressed: its weight holds NaN"),
    ],
)
def test_a_wrong_checkpoint_is_one_sentence(checkpoints, tmp_path, capsys, change, sentence):
    folder = tmp_path / "llama"
    shutil.copytree(checkpoints / "llama", folder)
    change(folder)
    flags = ["--format=low_rank", "--rank=6", "--layers=*.up_proj"]
    assert sentence in _says(capsys, f"--checkpoint={folder}", f"--out={tmp_path / 'out'}", *flags)


def _put(folder, value):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors")


def test_a_folder_of_other_files_is_left_alone(checkpoints, tmp_path, capsys):
    llama = f"--checkpoint={checkpoints / 'llama'}"
    (tmp_path / "notes.txt").write_text("mine")
    for out, sentence in ((checkpoints / "llama", "the checkpoint's own folder"), (tmp_path, "such as notes.txt")):
        before = sorted(entry.name for entry in out.iterdir())
        said = _says(capsys, llama, f"--out={out}", MLP, "--format=low_rank", "--rank=6", "--fresh")
        assert sentence in said
        assert sorted(entry.name for entry in out.iterdir()) == before


def test_factors_are_not_compressed_again_nor_over_themselves(checkpoints, tmp_path, capsys):
    out, flags = tmp_path / "out", [MLP, "--format=low_rank", "--rank=6"]
    assert command.main([f"--checkpoint={checkpoints / 'llama'}", f"--out={out}", *flags]) == 0
    before = {entry.name: entry.read_bytes() for entry in out.iterdir()}
    for other in (out, tmp_path / "other"):
        said = _says(capsys, f"--checkpoint={out}", f"--out={other}", "--layers=*.q_proj", *flags[1:], "--fresh")
        assert "holds factors already" in said
    assert {entry.name: entry.read_bytes() for entry in out.iterdir()} == before


def test_two_devices_find_what_one_does(checkpoints, tmp_path):
    flags = [f"--checkpoint={checkpoints / 'llama_bf16'}", MLP, "--format=low_rank", "--rank=6"]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "ops"))),
    }
    child = [sys.executable, "-c", TWO_DEVICES, *flags, f"--out={tmp_path / 'two'}"]
    done = subprocess.run(child, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert command.main([*flags, f"--out={tmp_path / 'one'}"]) == 0
    from safetensors.torch import load_file as load

    one, two = (load(tmp_path / name / "model-00001-of-00001.safetensors") for name in ("one", "two"))
    assert set(one) == set(two)
    assert all(one[name].equal(tensor) for name, tensor in two.items())
    assert records.read(tmp_path / "two" / "records.jsonl")[0]["devices"] == 2


def test_times_of_random_weights_are_labelled_as_extrapolated(tmp_path, capsys):
    flags = ["--random=gpt2s", "--format=low_rank", "--rank=8", "--algorithm=randomized_svd"]
    assert command.main([*flags, "--each=2", "--dtype=float32", f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "EXTRAPOLATED, not measured: all 36 matrices of gpt2s would take" in said
    env, *rows, whole = records.read(tmp_path / "records.jsonl")
    assert env["kind"] == "env"
    assert [row["layer"] for row in rows] == ["c_attn", "c_attn", "c_fc", "c_fc", "c_proj", "c_proj"]
    assert all(row["weights"] == "random" and 0 < row["relative_error"] < 1 for row in rows)
    assert whole["kind"] == "extrapolation"
    assert (whole["matrices"], whole["measured"]) == (36, 6)
    warm = sum(12 * row["seconds"] for row in rows[1::2])
    first = sum(max(one["seconds"] - two["seconds"], 0) for one, two in zip(rows[::2], rows[1::2], strict=True))
    assert whole["seconds"] == pytest.approx(warm + first)


def test_out_of_memory_is_a_sentence_and_other_errors_are_not_hidden(monkeypatch, capsys):
    def fail(*given, **named):
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(streaming, "time_random", fail)
    message = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes."
    assert command.main(["--random=gpt2s", "--format=monarch"]) == 2
    assert capsys.readouterr().err.startswith("blrlab.compress: out of memory: ")
    message = "INTERNAL: a fault"
    with pytest.raises(jax.errors.JaxRuntimeError, match="a fault"):
        command.main(["--random=gpt2s", "--format=monarch"])


def test_an_extrapolation_counts_compilation_once():
    times = {"qkvo": [9.0, 2.0, 4.0, 3.0], "gate_up": [7.0, 5.0], "down": [6.0]}
    rows = [
        {"layer": layer, "seconds": each, "format": "blast", "algorithm": "alternating"}
        for layer, found in times.items()
        for each in found
    ]
    import jax

    found = streaming.extrapolated("llama7b", rows, jax.local_devices()[:1])
    assert found["matrices"] == 224
    assert found["seconds"] == pytest.approx(128 * 3 + 64 * 5 + 32 * 6 + (9 - 3) + (7 - 5))
    assert found["compile_seconds"] == pytest.approx(8)
    assert json.loads(json.dumps(found)) == found


def test_a_random_weight_has_a_decaying_spectrum():
    import jax
    import jax.numpy as jnp

    weight = streaming.random_weight(jax.random.key(0), 200, 300, jnp.dtype(jnp.float32))
    values = np.linalg.svd(weight, compute_uv=False)
    assert values[0] > 5 * values[100]
    assert values[-1] > 0.01 * values[0]
