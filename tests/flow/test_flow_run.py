"""From config to records to report, and what a second run of the same work folder does."""

import json

import pytest

from blrlab import records
from blrlab.experiments import run

FORMATS = ("low_rank", "monarch", "blast")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A work folder in which every stage has run."""
    folder = tmp_path_factory.mktemp("work") / "run"
    assert run.main([*tiny, f"--workdir={folder}"]) == 0
    return folder


def test_run_leaves_records_and_report(finished):
    found = records.read(finished / "records.jsonl")
    assert {record["kind"] for record in found} == {"env", "train", "compress", "eval", "bench"}
    stages = {record["stage"] for record in found if record["kind"] == "eval"}
    assert stages == {"dense", "dense_continued", "compressed", "healed"}
    assert {record["phase"] for record in found if record["kind"] == "train"} == {
        "dense",
        "heal",
        "dense_continued",
    }
    hashes = {record["data_hash"] for record in found if "data_hash" in record}
    assert hashes == {next(record["data"]["hash"] for record in found if record.get("data"))}
    timed = {(row["op"], row["impl"]) for row in found if row["kind"] == "bench" and row["p50"]}
    assert timed == {(op, impl) for op in ("dense", "monarch") for impl in ("xla", "torch_eager")}
    assert "<svg" in (finished / "report.html").read_text()
    assert json.loads((finished / "config.json").read_text())["scale"] == "small"


def test_errors_are_recorded_for_every_factored_layer(finished):
    rows = [row for row in records.read(finished / "records.jsonl") if row["kind"] == "compress"]
    assert [row["path"] for row in rows] == ["h_0/attn/c_attn", "h_0/mlp/c_fc", "h_0/mlp/c_proj", "*"]
    layers, whole = rows[:-1], rows[-1]
    # What is fitted to inputs may be farther from the weights than nothing is.
    assert all(0 < row["output_error"] < 1 and row["relative_error"] > 0 for row in layers)
    saved = sum(row["params_before"] - row["params_after"] for row in layers)
    assert whole["params_before"] - whole["params_after"] == saved > 0


def test_second_run_does_nothing_new(finished, tiny, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/stage.json")}
    assert run.main([*tiny, f"--workdir={finished}"]) == 0
    out = capsys.readouterr().out
    assert "step" not in out
    after = {path: path.stat().st_mtime_ns for path in finished.glob("*/stage.json")}
    assert before == after
    assert out.splitlines()[-1] == f"done: {finished / 'report.html'}"


def test_a_lost_result_is_made_again(finished, tiny, capsys):
    (finished / "report.html").unlink()
    assert run.main([*tiny, f"--workdir={finished}"]) == 0
    assert (finished / "report.html").exists()
    assert "eval: done before" in capsys.readouterr().out


def test_new_records_make_a_new_report(finished, tiny, capsys):
    before = (finished / "report.html").stat().st_mtime_ns
    assert run.main([*tiny, f"--workdir={finished}", "--config.bench.seconds=0.002"]) == 0
    out = capsys.readouterr().out
    assert "bench.seconds: 0.001 -> 0.002: running again from bench on" in out
    assert "heal: done before" in out
    assert (finished / "report.html").stat().st_mtime_ns > before


def test_how_often_is_logged_changes_nothing(finished, tiny, capsys):
    arguments = [*tiny, f"--workdir={finished}", "--config.train.log_every=3", "--config.heal.checkpoint_every=5"]
    assert run.main([*arguments, "--config.stages=dense,heal"]) == 0
    assert "step" not in capsys.readouterr().out


@pytest.mark.parametrize("format", FORMATS)
def test_another_format_keeps_the_dense_model(finished, tiny, capsys, format):
    arguments = [*tiny, f"--workdir={finished}", f"--config.factors.format={format}"]
    dense = (finished / "dense" / "stage.json").stat().st_mtime_ns
    assert run.main(arguments) == 0
    out = capsys.readouterr().out
    assert "dense: step" not in out
    assert "dense_continued: step" not in out
    assert (finished / "dense" / "stage.json").stat().st_mtime_ns == dense
    if format != "monarch":
        assert f"-> {format}: running again from compress on" in out
    found = records.read(finished / "records.jsonl")
    assert {record["op"] for record in found if record["kind"] == "bench"} == {"dense", format}
    assert {record["format"] for record in found if record["kind"] == "compress"} == {format}


@pytest.mark.parametrize("mode", ["whitened", "sequential"])
def test_calibration_inputs_are_those_of_the_training_text(finished, tiny, capsys, mode):
    flags = [f"--config.compress.mode={mode}", "--config.compress.windows=6", "--config.compress.batch=4"]
    arguments = [*tiny, f"--workdir={finished}", *flags, "--config.stages=compress,eval"]
    assert run.main(arguments) == 0
    out = capsys.readouterr().out
    assert "dense: step" not in out
    assert ", of the output 0." in out
    found = records.read(finished / "compress" / "records.jsonl")
    layers = [row for row in found if row["path"] != "*"]
    assert {row["algorithm"] for row in layers} == {f"block_svd {mode}"}
    assert all(0 < row["output_error"] < 1 for row in layers)
    evaluated = [row for row in records.read(finished / "eval" / "records.jsonl") if row["stage"] == "compressed"]
    assert {row["algorithm"] for row in evaluated} == {f"block_svd {mode}"}


def test_a_change_of_the_dense_model_is_refused(finished, tiny, capsys):
    before = sorted(path.stat().st_mtime_ns for path in finished.rglob("*"))
    assert run.main([*tiny, f"--workdir={finished}", "--config.train.steps=13"]) == 2
    assert "train.steps: 12 -> 13" in capsys.readouterr().err
    assert before == sorted(path.stat().st_mtime_ns for path in finished.rglob("*"))


def test_dense_format_and_restricted_stages(tiny, tmp_path, capsys):
    folder = tmp_path / "run"
    arguments = [*tiny, f"--workdir={folder}", "--config.factors.format=dense"]
    assert run.main([*arguments, "--config.stages=compress"]) == 2
    assert "starts from dense" in capsys.readouterr().err
    assert not folder.exists()
    assert run.main([*arguments, "--config.stages=data,dense"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"done: {folder / 'records.jsonl'}"
    assert run.main([*arguments, "--config.stages=compress,eval,bridge,bench,report"]) == 0
    found = records.read(folder / "records.jsonl")
    assert {record["stage"] for record in found if record["kind"] == "eval"} == {"dense", "compressed"}
    losses = {record["stage"]: record["value"] for record in found if record.get("metric") == "loss"}
    assert losses["dense"] == losses["compressed"]


def test_pretrained_checkpoint(tiny, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 24, "n_positions": 32, "vocab_size": 300}
    settings = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    transformers.GPT2LMHeadModel(settings).save_pretrained(tmp_path / "model")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["alpha beta"], trainer)
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    arguments = [*tiny, f"--workdir={tmp_path / 'run'}", f"--config.init_from={tmp_path / 'model'}"]
    assert run.main([*arguments, "--config.stages=data,dense,compress,heal,eval"]) == 0
    out = capsys.readouterr().out
    assert f"parameters from {tmp_path / 'model'}" in out
    assert "nats/token" in out
    assert "dense: step" not in out


def test_layers_alone_need_no_model(tmp_path):
    folder = tmp_path / "run"
    fields = {"bench.impls": "torch_eager", "bench.layers": "c_fc", "bench.tokens": "2", "bench.seconds": 0.001}
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    assert run.main(["--config=configs/layers.py:small", f"--workdir={folder}", *arguments]) == 0
    found = records.read(folder / "records.jsonl")
    assert {record["kind"] for record in found} == {"env", "bench", "bound", "advice"}
    assert {(row["op"], row["impl"]) for row in found if row["kind"] == "bench"} == {
        (op, "torch_eager") for op in ("dense", "low_rank", "monarch", "blast")
    }
    assert {row["device"] for row in found if row["kind"] == "bound"} == {"a40", "orin_nano_8gb", "h100_sxm"}


def test_a_budget_becomes_a_plan_that_compresses(finished, tiny, capsys):
    """A plan is a file of rules: what is edited in it runs compress again, and nothing before."""
    budget = {"target": "layer_factor", "value": 1.5, "formats": "dense,low_rank,monarch", "blocks": "2", "multiple": 2}
    flags = [*tiny, f"--workdir={finished}", *(f"--config.budget.{name}={value}" for name, value in budget.items())]
    assert run.main([*flags, "--config.stages=allocate"]) == 0
    plan = finished / "allocate" / "plan.json"
    said = capsys.readouterr().out
    assert f"--config.rules_file={plan}" in said
    rows = records.read(finished / "allocate" / "records.jsonl")
    layers, totals = ([row for row in rows if (row["path"] == "*") is whole] for whole in (False, True))
    assert [row["path"] for row in layers] == [path for path, _ in json.loads(plan.read_text())]
    assert all(0 <= row["lost"] < 1 and row["weight"] > 0 for row in layers)
    best = totals[0]
    assert best["plan"] == "budget"
    assert best["cost"] <= best["budget"]
    assert {row["plan"] for row in totals[1:]} >= {"low_rank"}
    assert all(best["total"] <= row["total"] for row in totals)

    assert run.main([*flags, "--config.stages=allocate", "--config.budget.value=1.2"]) == 0
    said = capsys.readouterr().out
    assert "curves: done before" in said  # what layers lose is measured for any budget
    assert " measured" not in said
    larger = records.read(finished / "allocate" / "records.jsonl")[len(layers)]
    assert larger["budget"] > best["budget"]
    assert larger["total"] < best["total"]
    assert run.main([*flags, "--config.stages=allocate"]) == 0
    assert records.read(finished / "allocate" / "records.jsonl") == rows

    capsys.readouterr()
    assert run.main([*flags, "--config.stages=compress", f"--config.rules_file={plan}"]) == 0
    whole = records.read(finished / "compress" / "records.jsonl")[-1]
    assert whole["layer_factor"] >= 1.5
    assert "allocate" in {row["kind"] for row in records.read(finished / "records.jsonl")}  # a plan leaves it as it is
    assert run.main([*flags, "--config.stages=compress", f"--config.rules_file={plan}"]) == 0
    assert "compress: done before" in capsys.readouterr().out
    rules = json.loads(plan.read_text())
    edited = finished.parent / "edited.json"
    edited.write_text(json.dumps([[rules[0][0], {"format": "low_rank", "rank": 3}], *rules[1:]]))
    assert run.main([*flags, "--config.stages=compress", f"--config.rules_file={edited}"]) == 0
    said = capsys.readouterr().out
    assert "running again from compress on" in said
    assert records.read(finished / "compress" / "records.jsonl")[0]["rank"] == 3


def test_a_budget_in_microseconds_takes_bench_records(finished, tiny, capsys):
    flags = [*tiny, f"--workdir={finished}", "--config.stages=allocate", "--config.budget.sensitivity=False"]
    flags += ["--config.budget.target=microseconds", "--config.budget.value=1e9"]
    assert run.main(flags) == 2
    assert "needs budget.records" in capsys.readouterr().err
    timed = [row for row in records.read(finished / "records.jsonl") if row["kind"] == "bench"]
    file = finished.parent / "bench.jsonl"
    records.rewrite(file, timed)
    flags += [f"--config.budget.records={file}"]
    assert run.main(flags) == 2
    assert "has no verified time at 1 tokens" in capsys.readouterr().err
