"""The closing tables as a terminal shows them."""

from __future__ import annotations

import io
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from blrlab.report import print_report


def printed(records, width=100):
    stream = io.StringIO()
    print_report(records, Console(width=width, file=stream))
    return stream.getvalue()


def in_one_line(records):
    return re.sub(r"\s+", " ", printed(records, 240))


@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_the_console(records, build, width):
    hostile = {**build.compression()[0], "path": "h_0/" + "x" * 300, "layer": "y" * 300}
    said = printed([*records, hostile], width)
    assert max(cell_len(line) for line in said.splitlines()) <= width


@pytest.mark.parametrize("width", [80, 100])
def test_rows_are_not_wrapped(records, width):
    lines = printed(records, width).split("Speed over dense")[0].splitlines()
    rows = [line for line in lines if "torch.compile" in line or "none [" in line]
    assert len(rows) == 18
    assert sum(bool(re.search(r"\d\.\d\d( FAIL)?$", row)) for row in rows) == 18


def test_narrow_drops_columns_and_keeps_the_answer(records):
    narrow, wide = printed(records, 80), printed(records, 100)
    assert "p20-p80" in wide
    assert "p20-p80" not in narrow
    for needed in ("p50", "fastest", "budget", "worst", "perplexity"):
        assert needed in narrow


def test_quality_has_units_and_differences(records):
    said = printed(records)
    assert re.search(r"nats/byte +vs dense +per byte +per byte", said)
    assert re.search(r"^healed +Monarch +1\.550 +\+0\.030 +4\.711 +2\.236 +1\.27 M +2\.70x$", said, re.MULTILINE)
    assert "96 % of the loss won back" in in_one_line(records)
    assert "91 % against the dense model trained on for the same steps." in in_one_line(records)


def test_compression_has_a_row_per_kind_and_both_factors(records):
    said = in_one_line(records)
    assert re.search(
        r"c_attn 4 256 x 768 Monarch 4 x 4 64 \(16 a block\) 0\.\d{3} 0\.\d{3} 786 k -> 262 k 3\.00x", said
    )
    assert "Factored layers 3.10x smaller, whole model 2.70x smaller, 3.42 M -> 1.27 M parameters" in said


def test_reasons_are_numbered_once_and_a_failed_gate_has_no_speed(records, build):
    for record in records:
        if record.get("passed") is False:
            record["p50"] = 77.7
    said = in_one_line(records)
    assert said.lower().count(build.interpreted.lower()) == 1
    assert said.count("none [1]") == 6
    assert "torch.compile 4 x 4 64 none [2]" in said
    assert "2.97 FAIL" in said
    assert "[2] Failed its accuracy gate: error 2.2e-06 over the budget 7.4e-07." in said
    assert "77.7" not in said


def test_a_gate_that_failed_on_its_other_measure_shows_no_passing_share(build):
    failed = build.bench_row("dense", "xla", "own", "c_fc", None, passed=False, error=1.0, error_budget=2.0)
    said = in_one_line([failed])
    assert "0.50" not in said
    assert "FAIL" in said


def test_losses_of_different_data_never_share_a_table(records, build):
    other = [
        build.env(config="gpt2_blast", data={"hash": "feedbeef"}),
        *build.evaluation("dense", 7.125, "feedbeef"),
    ]
    said = printed([*records, *other])
    first, second = said.split("data feedbeef")
    assert "7.125" not in first
    assert "7.125" in second
    assert "1.520" not in second


def test_runs_on_the_same_data_share_a_table_under_their_names(records, build):
    blast = [{**r, "config": "gpt2_blast"} if r["kind"] == "env" else r for r in records]
    said = printed([*records, *blast])
    assert said.count("Quality on valid") == 1
    assert re.search(r"^gpt2_monarch +dense .*1\.520", said, re.MULTILINE)
    assert re.search(r"^gpt2_blast +dense .*1\.520", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("kind", "missing", "said"),
    [
        ("bench", "Latency", "No layer was timed in these records."),
        ("compress", "worst", "Monarch cut the factored layers 3.10x (model 2.70x)"),
        ("eval", "Quality", "its loss is not evaluated"),
        ("env", "nothing at all", "96 % of the loss won back"),
        ("train", "same steps", "91 % against the dense model trained on."),
    ],
)
def test_what_is_absent_is_left_out(records, kind, missing, said):
    told = in_one_line([r for r in records if r["kind"] != kind])
    assert missing not in told
    assert said in told


def test_only_timings(build):
    said = in_one_line(build.bench())
    assert "Nothing was trained, compressed or evaluated in these records." in said
    assert "on 6 of 6 layers" in said


def test_only_dense(records, build):
    said = in_one_line([build.env(), *build.evaluation("dense", 1.52)])
    assert "Validation loss: dense 1.520 nats/byte; no compressed model is recorded." in said


def test_nothing_was_lost(build):
    stages = [
        *build.evaluation("dense", 2.0),
        *build.evaluation("compressed", 2.0),
        *build.evaluation("healed", 1.9),
    ]
    assert "nothing was lost against the dense model" in in_one_line([build.env(), *stages])


def test_no_records():
    assert printed([]).strip() == "There is nothing to report: no records were given."


def test_a_diverged_loss_is_not_taken_for_an_absent_one(build):
    rows = [{**r, "value": float("nan")} for r in build.evaluation("dense", 1.0)]
    assert "not finite" in printed([build.env(), *rows])


def test_brackets_of_a_record_are_text_and_no_markup(records):
    for record in records:
        record |= {key: "[bold]box[/bold]" for key in ("device", "net") if key in record}
    said = printed(records)
    assert "Latency of layers on [bold]box[/bold]" in said
    assert "[bold]box[/bold] c_fc" in said


def test_whole_models_show_images_weights_and_how_many_blocks_were_verified(build):
    layer = next(r for r in build.bench() if r["kind"] == "bench" and r["passed"])
    sizes = {"weight_bytes": 173_000_000, "cache_bytes": None, "peak_bytes": 5_000_000, "tokens_per_s": 394_000}
    whole = {**layer, "net": "vit_b", "layer": "*", "phase": "forward", "batch": 4, "impl": "best", **sizes}
    shown = printed([build.env(), {**whole, "images_per_s": 2000.0, "verified_layers": 2}], 240)
    assert "Latency of whole models on" in shown
    assert re.search(r"a second +a second +budget +verified +MB +MB", shown)
    assert re.search(r"best kernels.* 394 k +2 k .* 2 +173\.0 +5\.0", shown)
    assert "blocks verified: so many" in shown
    both = printed([build.env(), layer, whole], 240)
    assert "Latency of layers and whole models on" in both
    assert "images" not in both


def test_columns_of_the_new_records_are_shown_where_there_is_room_and_empty_ones_never(build):
    rows = [build.env(), *(r for r in build.suite(1) if r["kind"] == "bench" and r["layer"] == "c_fc")]
    wide, narrow, old = printed(rows, 240), printed(rows, 90), printed(build.bench(), 240)
    assert re.search(r"warm +launched +bound +bound +sheet +x dense +x dense +error / +tuning +peak", wide)
    assert "clock MHz 1755" in wide
    assert "launched" not in narrow.split("Speed over")[0]
    assert all(word not in old for word in ("warm", "tuning", "clock", "sheet"))


def test_a_win_within_the_spread_is_marked(build):
    dense = build.bench_row("dense", "xla", "own", "c_fc", 100.0)
    near = build.bench_row("monarch", "xla", "own", "c_fc", 95.0)
    far = build.bench_row("monarch", "torch", "own", "c_fc", 50.0)
    said = in_one_line([dense, near, far])
    assert "1.05x~" in said
    assert "2.00x~" not in said
    assert "on 1 of 1 layer (1 clearly)" in said
    assert "(1 within the spread)" in in_one_line([dense, near])


def test_predictions_and_advice_are_tables(build):
    rows = [
        build.prediction("monarch", "two_stage", "gpt2s", "c_fc", 16, 2),
        build.advice("blast", "gpt2s", "c_fc", 16),
    ]
    said = in_one_line(rows)
    assert "Predicted times on NVIDIA H100 80GB HBM3, dtype bfloat16" in said
    assert re.search(r"gpt2s c_fc 768 x 3072 16 Monarch two stage 16 x 16", said)
    assert "not measurements" in said
    assert "As BLAST 16 x 16, gpt2s c_fc is predicted to beat dense" in said


def test_many_predictions_are_thinned_to_the_fastest(build):
    said = in_one_line([r for r in build.suite(2) if r["kind"] == "bound"])
    assert "Of 120 predictions, the fastest algorithm of every op is shown." in said
    assert "Monarch plain" not in said
