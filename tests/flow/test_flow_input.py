"""Wrong input: one clear sentence, exit code 2, nothing half-written, never a traceback."""

import os
import subprocess
import sys

import pytest

from blrlab.experiments import run

CONFIG = "--config=configs/gpt2_monarch.py:small"

WRONG = {
    "no config": ([], "no config"),
    "missing file": (["--config=configs/gpt2_monrch.py"], "Did you mean configs/gpt2_monarch.py?"),
    "unknown scale": (["--config=configs/gpt2_monarch.py:huge"], "it is one of small, full"),
    "unknown flag": ([CONFIG, "--wrkdir=x"], "Did you mean --workdir?"),
    "not a flag": ([CONFIG, "blast"], "is not a flag"),
    "no value": ([CONFIG, "--config.seed"], "needs a value"),
    "unknown key": ([CONFIG, "--config.factors.fromat=blast"], 'Did you mean "factors.format"?'),
    "a group": ([CONFIG, "--config.factors=blast"], "is a group of fields"),
    "wrong type": ([CONFIG, "--config.factors.rank=many"], "is a whole number"),
    "wrong float": ([CONFIG, "--config.train.learning_rate=fast"], "is a number"),
    "unknown format": ([CONFIG, "--config.factors.format=monach"], 'Did you mean "monarch"?'),
    "unknown backend": ([CONFIG, "--config.bench.impls=xla,torch_emm"], 'Did you mean "torch_bmm"?'),
    "bench tokens": ([CONFIG, "--config.bench.tokens=1,x"], "whole numbers"),
    "unknown roofline device": ([CONFIG, "--config.roofline.devices=a400"], "did you mean 'a40'"),
    "own layers of nothing": (
        ["--config=configs/layers.py:small", "--config.bench.nets=own"],
        "run the stage compress",
    ),
    "unknown net": ([CONFIG, "--config.bench.nets=gpt3"], "unknown net"),
    "unknown stage": ([CONFIG, "--config.stages=dense,compres"], 'Did you mean "compress"?'),
    "no stages": ([CONFIG, "--config.stages="], "stages is empty"),
    "unknown source": ([CONFIG, "--config.data.source=web"], "stdlib, folder, huggingface"),
    "unknown tokenizer": ([CONFIG, "--config.data.tokenizer=words"], "byte, bpe, checkpoint"),
    "tokenizer without model": ([CONFIG, "--config.data.tokenizer=checkpoint"], "set init_from"),
    "blocks do not divide": (
        [CONFIG, "--config.factors.blocks=5"],
        "h_0/attn/c_attn (192 x 576): 5 input blocks",
    ),
    "allowed blocks": ([CONFIG, "--config.factors.blocks=5"], "1, 2, 3, 4, 6, 8"),
    "rank does not divide": ([CONFIG, "--config.factors.rank=30"], "28 and 32 are"),
    "negative rank": ([CONFIG, "--config.factors.rank=-4"], "h_0/attn/c_attn"),
    "negative blocks": ([CONFIG, "--config.factors.blocks=-4"], "h_0/attn/c_attn"),
    "malformed rules": ([CONFIG, "--config.rules=(1, 2)"], "a rule is a pair"),
    "rule matches nothing": ([CONFIG, "--config.rules=(('*/c_fcc', {}),)"], "matches no layer"),
    "heads": ([CONFIG, "--config.model.heads=5"], "5 heads do not divide its width of 192"),
    "warm-up": ([CONFIG, "--config.train.warmup=400"], "does not fit into 400 steps"),
    "no batch": ([CONFIG, "--config.train.batch=0"], "config.train"),
    "small vocabulary": ([CONFIG, "--config.model.vocab_size=100"], "less than the 256 tokens"),
    "eval windows": ([CONFIG, "--config.eval.windows=0"], "eval.windows"),
    "calibration windows": ([CONFIG, "--config.compress.windows=0"], "compress.windows"),
    "unknown mode": ([CONFIG, "--config.compress.mode=whitend"], 'Did you mean "whitened"?'),
    "unknown algorithm": ([CONFIG, "--config.compress.blast=presgd"], 'Did you mean "precgd"?'),
    "algorithm without inputs": (
        [CONFIG, "--config.factors.format=blast", "--config.compress.mode=whitened", "--config.compress.blast=precgd"],
        "precgd fits weights alone",
    ),
    "model dtype": ([CONFIG, "--config.model.dtype=int8"], "unknown model dtype"),
    "rule of another format": ([CONFIG, "--config.rules=(('*/mlp/c_fc', {'format': 3}),)"], "unknown format"),
    "rule with a number as field": ([CONFIG, "--config.rules=(('*/mlp/c_fc', {3: 4}),)"], "unknown field"),
    "rule with a set": ([CONFIG, "--config.rules=(('*/mlp/c_fc', {'rank': {1}}),)"], "not a whole number"),
    "a plan that is not there": ([CONFIG, "--config.rules_file=nowhere.json"], "no rules at nowhere.json"),
    "an unknown target": ([CONFIG, "--config.budget.target=layers"], 'unknown target "layers"'),
    "a target of nothing": ([CONFIG, "--config.budget.value=0"], "is not positive"),
    "blocks that are no numbers": ([CONFIG, "--config.budget.blocks=4,x"], "budget.blocks is whole numbers"),
    "blocks that look like numbers": ([CONFIG, "--config.budget.blocks=²"], "budget.blocks is whole numbers"),
    "an unknown format in a budget": ([CONFIG, "--config.budget.formats=lowrank"], 'unknown format "lowrank"'),
    "no multiple": ([CONFIG, "--config.budget.multiple=0"], "must be 1 or more"),
    "no rules": ([CONFIG, "--config.rules=()"], "rules is empty"),
    "attention's projection": ([CONFIG, "--config.rules=(('*/attn/c_proj', {}),)"], "of other proportions"),
    "rate that is no number": ([CONFIG, "--config.train.learning_rate=nan"], "must lie between"),
    "negative rate": ([CONFIG, "--config.heal.learning_rate=-1"], "heal.learning_rate is -1.0"),
    "unknown distillation": ([CONFIG, "--config.heal.distil=logit"], 'Did you mean "logits"?'),
    "share of distillation": ([CONFIG, "--config.heal.distil_weight=1.5"], "must lie between 0 and 1."),
    "no temperature": ([CONFIG, "--config.heal.temperature=0"], "config.heal.temperature is 0.0"),
    "distillation of dense": ([CONFIG, "--config.train.distil=logits"], "unknown config field"),
    "unknown decay": ([CONFIG, "--config.heal.decay=prodct"], 'unknown heal.decay "prodct"'),
    "learning rates that are no switch": ([CONFIG, "--config.train.factor_rates=some"], "is true or false"),
    "no clipping norm": ([CONFIG, "--config.train.clip_norm=0"], "must lie between"),
    "compression's seed": ([CONFIG, "--config.compress.seed=-1"], "config.compress.seed"),
    "seed": ([CONFIG, "--config.seed=99999999999999999999"], "config.seed"),
    "share of validation": ([CONFIG, "--config.data.valid_fraction=1"], "config.data.valid_fraction"),
    "user without a home": ([CONFIG, "--config.init_from=~nobody-here/x"], "no home folder"),
    "long name": ([f"--config={'x' * 300}"], ""),
    "report of nothing": ([CONFIG, "--config.stages=report"], "nothing to report"),
    "missing checkpoint": ([CONFIG, "--config.init_from=./nowhere"], "it is not a folder"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(case, tmp_path, capsys):
    arguments, sentence = WRONG[case]
    folder = tmp_path / "run"
    assert run.main([*arguments, f"--workdir={folder}"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1
    assert sentence in captured.err
    assert not folder.exists()


def test_missing_and_empty_text(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file.txt").write_text("")
    for path, sentence in ((tmp_path / "nowhere", "no folder of text"), (tmp_path / "empty", "no text in")):
        flags = ["--config.data.source=folder", f"--config.data.path={path}"]
        assert run.main([CONFIG, f"--workdir={tmp_path / 'run'}", *flags]) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_text_too_short(tiny, tmp_path, capsys):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "file.txt").write_text("a few words")
    arguments = [*tiny, f"--workdir={tmp_path / 'run'}", f"--config.data.path={tmp_path / 'text'}"]
    assert run.main(arguments) == 2
    assert "less than one" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_rank_that_does_not_compress_is_warned_about(tiny, tmp_path, capsys):
    arguments = [*tiny, f"--workdir={tmp_path / 'run'}", "--config.stages=data", "--config.factors.rank=24"]
    assert run.main(arguments) == 0
    assert "warning: h_0/attn/c_attn: monarch has 2,304 parameters, dense 1,728" in capsys.readouterr().out


CONFIG_FILES = {
    "misspelt field": ("config.factors.fromat = 'blast'", "fromat"),
    "exception": ("raise KeyError('mine')", "mine"),
    "exit": ("raise SystemExit(3)", "3"),
    "incomplete": ("from ml_collections import ConfigDict; config = ConfigDict({'seed': 1})", "the config lacks"),
    "no config": ("config = 3", "not a ConfigDict"),
}


@pytest.mark.parametrize("case", CONFIG_FILES)
def test_a_wrong_config_file(case, tmp_path, capsys):
    line, sentence = CONFIG_FILES[case]
    head = "from blrlab.experiments import defaults\n\ndef get_config(scale):\n    config = defaults.gpt2(scale)\n"
    (tmp_path / "mine.py").write_text(f"{head}    {line}\n    return config\n")
    assert run.main([f"--config={tmp_path / 'mine.py'}:small", f"--workdir={tmp_path / 'run'}"]) == 2
    captured = capsys.readouterr().err
    assert sentence in captured
    assert len(captured.splitlines()) == 1


def test_a_folder_of_the_users_own_is_left_alone(tiny, tmp_path, capsys):
    precious = tmp_path / "run" / "data" / "precious.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("mine")
    assert run.main([*tiny, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "is in the way" in capsys.readouterr().err
    assert precious.read_text() == "mine"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"data"}


def test_workdir_is_a_file(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run.main([CONFIG, f"--workdir={tmp_path / 'file'}"]) == 2
    assert "is a file" in capsys.readouterr().err


def test_no_permission(tmp_path, capsys, monkeypatch):
    """root may write anywhere, so the answer of the system is set."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert run.main([CONFIG, f"--workdir={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err == f"error: no permission to write in {tmp_path}.\n"


def test_full_disk(tmp_path, capsys, monkeypatch):
    usage = os.statvfs(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": usage.f_bsize})())
    assert run.main([CONFIG, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "MB free" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_damaged_checkpoint(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*tiny, f"--workdir={folder}"]
    assert run.main([*arguments, "--config.stages=data,dense"]) == 0
    for path in (folder / "dense" / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"damaged")
    assert run.main([*arguments, "--config.stages=compress"]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_another_process_in_the_folder(tiny, tmp_path, capsys):
    import fcntl

    folder = tmp_path / "run"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.main([*tiny, f"--workdir={folder}"]) == 2
    assert "another process" in capsys.readouterr().err


def test_a_mistake_is_answered_before_jax_loads():
    program = (
        "import sys; from blrlab.experiments import run; "
        f"code = run.main([{CONFIG!r}, '--config.sed=1']); assert 'jax' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines() == ['error: unknown config field "sed". Did you mean "seed"?']
    assert done.returncode == 2


def test_importing_blrlab_and_configs_loads_no_jax():
    program = (
        "import sys, blrlab; from blrlab.experiments import command; "
        "command.load(['--config=configs/gpt2_blast.py:full']); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
