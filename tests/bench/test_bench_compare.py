"""Comparing two benchmarks: verdicts, exit codes, what cannot be compared, and sentences for wrong input."""

import json
import subprocess
import sys

import pytest

from blrlab import records
from blrlab.bench import compare, pairs

ROW = {
    "kind": "bench", "op": "monarch", "impl": "triton_two_stage", "net": "gpt2s", "layer": "c_fc", "in_features": 768,
    "out_features": 3072, "blocks": [4, 4], "rank": 192, "block_rank": 48, "tokens": 384, "dtype": "bfloat16",
    "unit": "us", "p20": 9.9, "p50": 10.0, "p80": 10.1, "method": "CUDA graph", "passed": True, "device": "A40",
    "torch": "2.11.0", "triton": "3.6.0", "jax": None, "driver": "580",
}  # fmt: skip
UNTIMED = dict.fromkeys(("p20", "p50", "p80", "method"))


def row(factor: float = 1.0, **fields) -> dict:
    """A row whose times are `factor` times the usual ones."""
    return {**ROW, **{name: factor * ROW[name] for name in ("p20", "p50", "p80")}, **fields}


@pytest.fixture
def run(tmp_path, capsys):
    """Write A and B, run the command on them; return (exit status, what it printed, what it complained)."""

    def run(a: list[dict], b: list[dict], *flags: str) -> tuple[int, str, str]:
        for name, rows in (("a", a), ("b", b)):
            records.rewrite(tmp_path / f"{name}.jsonl", rows)
        status = compare.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), *flags])
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.mark.parametrize(
    ("factor", "verdict", "status"),
    [
        (1.0, pairs.WITHIN, 0),
        (1.015, pairs.WITHIN, 0),
        (1.04, pairs.SLOWER, 0),
        (1.06, pairs.SLOWER, 1),
        (0.5, pairs.FASTER, 0),
    ],
)
def test_a_row_is_judged_by_its_spread_and_the_threshold(run, factor, verdict, status):
    found, out, _ = run([row()], [row(factor)], "--json")
    (each,) = json.loads(out)["rows"]
    assert (found, each["verdict"], each["regressed"]) == (status, verdict, bool(status))
    assert each["speed_up"] == pytest.approx(1 / factor)
    assert each["spread"] == pytest.approx([9.9 / 10.1 / factor, 10.1 / 9.9 / factor])


def test_a_slow_median_whose_ranges_overlap_is_no_regression(run):
    status, out, _ = run([row(p80=20.0)], [row(1.5)])
    assert status == 0
    assert "within spread" in out


@pytest.mark.parametrize(("threshold", "status"), [("1.05", 1), ("1.5", 0), ("1", 1)])
def test_the_threshold_is_the_users(run, threshold, status):
    assert run([row()], [row(1.2)], f"--threshold={threshold}")[0] == status


@pytest.mark.parametrize(
    ("a", "b", "verdict", "status"),
    [
        ({}, {**UNTIMED, "passed": False, "reason": "its error is over its budget"}, pairs.LOST, 1),
        ({}, {**UNTIMED, "passed": None, "reason": "no CUDA"}, pairs.LOST, 1),
        ({}, {"passed": False}, pairs.LOST, 1),
        (UNTIMED, {**UNTIMED, "passed": False}, pairs.LOST, 1),
        (UNTIMED, UNTIMED, pairs.UNTIMED, 0),
        ({**UNTIMED, "passed": False}, {**UNTIMED, "passed": False}, pairs.UNTIMED, 0),
        ({**UNTIMED, "passed": None}, {}, pairs.GAINED, 0),
    ],
)
def test_what_passed_and_no_longer_does_or_has_no_time_is_a_regression(run, a, b, verdict, status):
    found, out, _ = run([row(**a)], [row(**b)])
    assert found == status
    assert verdict in out
    if "reason" in b:
        assert b["reason"] in out


def test_means_are_geometric_for_each_op_and_impl_and_in_total(run):
    a = [row(), row(layer="c_proj"), row(op="blast")]
    b = [row(0.5), row(2.0, layer="c_proj"), row(0.125, op="blast")]
    _, out, _ = run(a, b, "--json")
    means = {(each["op"], each["impl"]): (each["speed_up"], each["rows"]) for each in json.loads(out)["means"]}
    assert means["monarch", "triton_two_stage"] == (pytest.approx(1.0), 2)
    assert means["blast", "triton_two_stage"] == (pytest.approx(8.0), 1)
    assert means["all", "all"] == (pytest.approx(2.0), 3)


def test_of_duplicate_rows_the_last_counts(run):
    _, out, _ = run([row(9.0), row()], [row(7.0), row(), row(2.0)], "--json")
    (each,) = json.loads(out)["rows"]
    assert (each["a_p50"], each["b_p50"]) == (10.0, 20.0)


@pytest.mark.parametrize(
    "field",
    [
        {"tokens": 1},
        {"rank": 96},
        {"blocks": [8, 8]},
        {"phase": "decode"},
        {"batch": 8},
        {"dtype": "float16"},
        {"net": "x"},
    ],
    ids=str,
)
def test_rows_of_another_measurement_are_not_paired_but_counted(run, field):
    status, out, _ = run([row(), row(layer="only_a", **field)], [row(), row(9.0, **field)])
    assert status == 0
    assert "1 compared: 1 within spread; 0 regressed" in out
    assert "Only in A, 1: " in out
    assert "only_a" in out
    assert "Only in B, 1: " in out


def test_a_phase_and_a_batch_of_a_model_are_shown(run):
    model = {"layer": "*", "phase": "decode", "batch": 8, "in_features": None, "out_features": None}
    _, out, _ = run([row(**model)], [row(**model)])
    assert "gpt2s model decode" in out
    assert "8 x 384" in out


def test_differing_versions_and_methods_are_said(run):
    _, out, _ = run([row(), row(layer="c_proj")], [row(torch="2.13.0"), row(layer="c_proj", method="host clock")])
    assert "1 row differs in torch: 2.11.0 in A, 2.13.0 in B." in out
    assert "in method: CUDA graph in A, host clock in B." in out


def test_differing_devices_are_refused_unless_asked_for(run):
    status, _, err = run([row()], [row(device="H100")])
    assert status == 2
    assert "A was measured on A40, B on H100" in err
    assert "--across-devices" in err
    status, out, _ = run([row()], [row(0.2, device="H100")], "--across-devices")
    assert status == 0
    assert "in device: A40 in A, H100 in B." in out


def test_rows_of_several_devices_pair_with_their_own(run):
    both = [row(), row(0.2, device="H100")]
    status, out, _ = run(both, both[::-1], "--json")
    assert status == 0
    assert [each["speed_up"] for each in json.loads(out)["rows"]] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("flags", "layers"),
    [
        (["--only=monarch"], ["c_fc"]),
        (["--only=blast,dense"], ["qkv", "fc1"]),
        (["--only=torch_*", "--only=gpt2s"], ["qkv"]),
        (["--only=layer=c_*"], ["c_fc"]),
        (["--only=net=vit_b"], ["fc1"]),
    ],
)
def test_only_narrows_by_pattern(run, flags, layers):
    rows = [
        row(),
        row(op="blast", impl="torch_bmm", layer="qkv"),
        row(op="dense", impl="torch_eager", net="vit_b", layer="fc1"),
    ]
    _, out, _ = run(rows, rows, *flags, "--json")
    assert [each["layer"] for each in json.loads(out)["rows"]] == layers


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--threshold=0.9"], "from 1 up"),
        (["--threshold=nan"], "from 1 up"),
        (["--only=monach"], 'Did you mean "monarch"?'),
        (["--only=nett=x"], 'unknown field of --only "nett"'),
    ],
)
def test_wrong_flags_are_one_sentence(run, flags, said):
    status, out, err = run([row()], [row()], *flags)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("b", "said"),
    [
        ([{"kind": "env"}], "holds no benchmark rows"),
        ([], "holds no benchmark rows"),
        ([row(layer="other")], "no measurement in common"),
        ([row(dtype="float16")], "measured in bfloat16, B in float16"),
        ([{"kind": "bench", "op": "dense"}], "a benchmark row has no impl"),
    ],
    ids=["no rows", "empty", "in common", "dtype", "damaged"],
)
def test_wrong_files_are_one_sentence(run, b, said):
    status, out, err = run([row()], b)
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_missing_or_damaged_file_is_one_sentence(tmp_path, capsys):
    there, damaged = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    records.rewrite(there, [row()])
    damaged.write_text("{\n")
    for path, said in (
        (tmp_path / "none.jsonl", "does not exist"),
        (damaged, "line 1 is damaged"),
        (tmp_path, "records.jsonl"),
    ):
        assert compare.main([str(there), str(path)]) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1


def test_folders_are_read_and_nothing_heavy_is_loaded(tmp_path):
    records.rewrite(tmp_path / "records.jsonl", [row()])
    code = (
        "import sys; from blrlab.bench import compare; status = compare.main(sys.argv[1:]); "
        "sys.exit(status or 10 * any(name in sys.modules for name in ('torch', 'jax')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path)], check=False, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(["--help"])
    assert stopped.value.code == 0
    assert "python -m blrlab.bench.compare runs/main" in capsys.readouterr().out
