"""Healing with the dense model as a teacher, and which stages the training of factors concerns."""

import pytest

from blrlab import records
from blrlab.experiments import build, command, run
from blrlab.experiments.workdir import NAMES, Workdir

CONFIG = "--config=configs/gpt2_monarch.py:small"


def fingerprints(folder, *flags):
    config = command.load([CONFIG, *flags])[0]
    workdir = Workdir(folder, build.relevant(command.flatten(config)), ("data", "dense", "compress", "heal"))
    return {name: workdir.fingerprint(name) for name in NAMES if name != "report"}


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["heal.distil=logits"], {"heal"}),
        (["heal.distil=logits", "heal.temperature=2"], {"heal"}),
        (["heal.distil=outputs", "heal.distil_weight=0.25"], {"heal"}),
        (["heal.factor_rates=true"], {"heal"}),
        (["heal.decay=product"], {"heal"}),
        (["heal.steps=7"], {"heal", "continue"}),
        (["heal.temperature=2", "heal.distil_weight=0.25"], set()),
        (["train.factor_rates=true", "train.decay=product"], set()),
    ],
    ids=lambda given: " ".join(sorted(given)) or "none",  # a set has no order
)
def test_only_healing_depends_on_the_teacher_and_on_how_factors_are_trained(tmp_path, flags, changed):
    before, after = fingerprints(tmp_path), fingerprints(tmp_path, *(f"--config.{flag}" for flag in flags))
    on_healing = {"eval", "sample", "bridge", "bench"} if changed else set()
    assert {name for name in before if before[name] != after[name]} - on_healing == changed
    # What is changed once more is another result once more.
    if changed and "temperature" in flags[-1]:
        assert after["heal"] != fingerprints(tmp_path, f"--config.{flags[0]}")["heal"]


@pytest.fixture(scope="module")
def healed(tiny, tmp_path_factory):
    """A work folder healed on the text alone, and the losses of that."""
    folder = tmp_path_factory.mktemp("work") / "run"
    assert run.main([*tiny, f"--workdir={folder}", "--config.stages=data,dense,compress,heal"]) == 0
    return folder, _losses(folder)


def _losses(folder):
    return [row["loss"] for row in records.read(folder / "heal" / "records.jsonl")]


@pytest.mark.parametrize("term", ["logits", "outputs"])
def test_healing_from_the_dense_model_is_recorded_and_leaves_the_rest(healed, tiny, capsys, term):
    folder, plain = healed
    kept = [folder / stage / "stage.json" for stage in ("data", "dense", "compress")]
    before = [file.stat().st_mtime_ns for file in kept]
    flags = [f"--config.heal.distil={term}", "--config.stages=dense,compress,heal"]
    assert run.main([*tiny, f"--workdir={folder}", *flags]) == 0
    assert "running again from heal on" in capsys.readouterr().out
    assert [file.stat().st_mtime_ns for file in kept] == before
    rows = records.read(folder / "heal" / "records.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(row["phase"] == "heal" and row["distil_loss"] > 0 for row in rows)
    assert _losses(folder) != plain
    assert not any("distil_loss" in row for row in records.read(folder / "dense" / "records.jsonl"))


@pytest.mark.parametrize("flag", ["heal.factor_rates=true", "heal.decay=product"])
def test_options_of_factors_reach_the_training(healed, tiny, flag):
    folder, plain = healed
    assert run.main([*tiny, f"--workdir={folder}", f"--config.{flag}", "--config.stages=heal"]) == 0
    assert _losses(folder) != plain


def test_how_labels_are_smoothed_reaches_the_healing_of_a_checkpoint():
    """A model that starts from a checkpoint trains nothing else, so no other stage would be made anew."""
    config, _, _, _ = command.load(["--config=configs/vit_b_blast.py", "--config.init_from=a"])
    found = build.relevant(command.flatten(config))
    assert "train.mixup" not in found
    assert found["heal.mixup"] == config.train.mixup
    config.train.mixup = 0.5
    changed = build.relevant(command.flatten(config))
    assert {name for name in found if found[name] != changed[name]} == {"heal.mixup"}
