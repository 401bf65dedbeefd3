"""Experiments on models other than GPT-2: from config to report, tiny."""

import json

import jax
import pytest
from flax.core import FrozenDict

from blrlab import records
from blrlab.experiments import defaults, run
from blrlab.models import hf, llama, vit

TRAINING = {
    "train.steps": 6,
    "train.batch": 4,
    "train.warmup": 1,
    "heal.steps": 4,
    "heal.batch": 4,
    "heal.warmup": 1,
    "compress.windows": 8,
    "compress.batch": 4,
    "eval.windows": 12,
    "eval.batch": 5,
    "bench.impls": "xla",
    "bench.nets": "own",
    "bench.seconds": 0.001,
}
LLAMA = {"model.width": 32, "model.inner": 86, "model.heads": 4, "model.kv_heads": 2, "model.layers": 2}
VIT = {"model.width": 24, "model.inner": 96, "model.heads": 4, "model.layers": 2, "model.image_size": 8}
VIT_SIZES = vit.Config(8, 4, 1, 10, 2, 4, 24, 96)
BLOCKS = {"factors.blocks": 2, "factors.rank": 4}


def _flags(config, **fields):
    return [f"--config={config}", *(f"--config.{name}={value}" for name, value in fields.items())]


def _llama(text, **fields):
    data = {"data.source": "folder", "data.path": text, "model.context": 16}
    rules = "(('*/q_proj', {}), ('*/k_proj', {}), ('*/mlp/down_proj', {'format': 'blast'}))"
    return _flags("configs/llama7b_monarch.py:small", **TRAINING | LLAMA | BLOCKS | data | {"rules": rules} | fields)


def _vit(**fields):
    pytest.importorskip("sklearn")
    return _flags("configs/vit_b_blast.py:small", **TRAINING | VIT | BLOCKS | fields)


def _evaluated(folder):
    rows = [row for row in records.read(folder / "records.jsonl") if row["kind"] == "eval"]
    return {(row["stage"], row["metric"]): row["value"] for row in rows}


def test_a_llama_from_text_to_report(text, tmp_path, capsys):
    assert run.main([*_llama(text), f"--workdir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert "14 factors in torch over the same memory" in out
    assert (tmp_path / "run" / "report.html").exists()
    rows = [row for row in records.read(tmp_path / "run" / "records.jsonl") if row["kind"] == "compress"]
    assert [row["path"] for row in rows] == [
        *(
            f"layers_{layer}/{name}"
            for layer in range(2)
            for name in ("mlp/down_proj", "self_attn/k_proj", "self_attn/q_proj")
        ),
        "*",
    ]
    assert {stage for stage, _ in _evaluated(tmp_path / "run")} == {"dense", "dense_continued", "compressed", "healed"}


def test_published_ranks_go_by_what_a_llama_s_layers_are_called():
    from blrlab.experiments import build

    made = build.experiment(defaults.llama("small"))
    specs = made.specs
    assert len(specs) == 4 * 7
    # Llama-7B has rank 1024 of 4096 and 1536 of 4096, in 16 blocks: a sixteenth of the width.
    assert specs["layers_0/self_attn/o_proj"].blocks == (16, 16)
    assert specs["layers_0/self_attn/o_proj"].total_rank == 64
    assert specs["layers_3/mlp/down_proj"].total_rank == 96
    assert specs["layers_3/mlp/gate_proj"].total_rank == 96


def test_a_llama_runs_its_blocks_as_one_program(text, tmp_path):
    stages = "data,dense,compress,heal,eval"
    rules = "(('*/q_proj', {}),)"
    for name, scan in (("plain", "False"), ("scan", "True")):
        flags = _llama(text, **{"model.scan": scan, "model.remat": scan, "stages": stages, "rules": rules})
        assert run.main([*flags, "--config.heal.distil=outputs", f"--workdir={tmp_path / name}"]) == 0
    plain, scanned = (_evaluated(tmp_path / name) for name in ("plain", "scan"))
    assert plain == pytest.approx(scanned, rel=1e-4)


def test_a_vit_from_digits_to_report(tmp_path, capsys):
    workdir = f"--workdir={tmp_path / 'run'}"
    assert run.main([*_vit(**{"train.mixup": 0.2}), workdir]) == 0
    out = capsys.readouterr().out
    assert "images of 10 classes" in out
    assert "images/s" in out
    assert (tmp_path / "run" / "report.html").exists()
    found = _evaluated(tmp_path / "run")
    assert {metric for _, metric in found} == {"loss", "top1", "top5"}
    assert all(0 <= value <= 1 for (_, metric), value in found.items() if metric != "loss")
    budget = ["--config.stages=allocate", "--config.budget.blocks=2", "--config.budget.multiple=2"]
    assert run.main([*_vit(**{"train.mixup": 0.2}), workdir, *budget]) == 0
    assert len(json.loads((tmp_path / "run" / "allocate" / "plan.json").read_text())) == 6
    distilled = ["--config.stages=heal,eval", "--config.heal.distil=logits"]
    assert run.main([*_vit(**{"train.mixup": 0.2}), workdir, *distilled]) == 0


@pytest.mark.parametrize("fused", [True, False])
def test_a_pretrained_vit_is_compressed(tmp_path, capsys, fused):
    family = hf.FAMILIES["vit"]
    hf.save(tmp_path / "vit", family, VIT_SIZES, family.init(VIT_SIZES, jax.random.key(0)))
    rules = "(('*/qkv', {}),)" if fused else "(('*/query', {}),)"
    fields = {"init_from": tmp_path / "vit", "model.fused": fused, "rules": rules, "stages": "data,dense,compress,eval"}
    assert run.main([*_vit(**fields), f"--workdir={tmp_path / 'run'}"]) == 0, capsys.readouterr().err
    assert ("dense", "top1") in _evaluated(tmp_path / "run")


def test_a_pretrained_llama_is_compressed(text, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    sizes = llama.Config(300, 32, 2, 4, 2, 32, 48)
    family = hf.FAMILIES["llama"]
    hf.save(tmp_path / "llama", family, sizes, family.init(sizes, jax.random.key(0)))
    made = tokenizers.ByteLevelBPETokenizer()
    made.train([str(path) for path in sorted(text.iterdir())], vocab_size=300, special_tokens=["<|end_of_text|>"])
    made.save(str(tmp_path / "llama" / "tokenizer.json"))
    fields = {"init_from": tmp_path / "llama", "stages": "data,dense,compress,eval"}
    assert run.main([*_llama(text, **fields), f"--workdir={tmp_path / 'run'}"]) == 0, capsys.readouterr().err
    assert ("compressed", "perplexity") in _evaluated(tmp_path / "run")


def test_factors_are_not_compressed_again(tmp_path, capsys):
    from blrlab import compress
    from blrlab.factors import Spec

    family = hf.FAMILIES["vit"]
    specs = {"layer_0/fc1": Spec("low_rank", 24, 96, rank=3)}
    params, _ = compress.compress(family.init(VIT_SIZES, jax.random.key(0)), FrozenDict(specs))
    hf.save(tmp_path / "vit", family, VIT_SIZES, params)
    fields = {"init_from": tmp_path / "vit", "stages": "data,dense"}
    assert run.main([*_vit(**fields), f"--workdir={tmp_path / 'run'}"]) == 2
    assert "holds factors already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model.classes": 9}, "the data has 10 classes, the model 9"),
        ({"model.classes": 0}, "model.classes is 0"),
        ({"model.channels": 2}, "model.channels is 2; pictures have 1 or 3"),
        ({"data.source": "folder"}, 'no folder of images at ""'),
        ({"data.source": "digit"}, 'Did you mean "digits"'),
        ({"data.smallest": 0}, "config.data.smallest is 0"),
        ({"train.mixup": -1}, "config.train.mixup is -1"),
        ({"train.smoothing": 1}, "config.train.smoothing is 1"),
        ({"model.family": "resnet"}, 'unknown model family "resnet"'),
        ({"model.patch": 3}, "patch of 3 does not divide its image_size of 8"),
        ({"train.batch": 5000}, "training images, less than one batch of 5000"),
    ],
    ids=str,
)
def test_what_a_vit_cannot_have(tmp_path, fields, said, capsys):
    assert run.main([*_vit(**fields), f"--workdir={tmp_path / 'run'}", "--config.stages=data,dense"]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_family_is_refused(tmp_path, text, capsys):
    family = hf.FAMILIES["vit"]
    hf.save(tmp_path / "vit", family, VIT_SIZES, family.init(VIT_SIZES, jax.random.key(0)))
    assert run.main([*_llama(text, init_from=tmp_path / "vit"), f"--workdir={tmp_path / 'run'}"]) == 2
    assert "is a vit checkpoint, and this config is for llama" in capsys.readouterr().err
