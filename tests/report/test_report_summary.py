"""Numbers against ones worked out by hand."""

from __future__ import annotations

import pytest

from blrlab.report.groups import bench_by_device, labels, sections, split_runs
from blrlab.report.plots.axes import spread
from blrlab.report.plots.loss import curves, smoothed, thinned
from blrlab.report.sentences import headlines, latency_sentences, won_back
from blrlab.report.summary.compression import layer_kinds
from blrlab.report.summary.latency import best_timings, by_layer, verified_time, why_no_time
from blrlab.report.summary.quality import quality_rows, share_won_back, variants
from blrlab.report.tables.compression import compression_table


def only_run(records):
    (run,) = split_runs(records)
    return run


def test_share_won_back_by_hand():
    assert share_won_back(1.5, 2.5, 1.75) == pytest.approx(0.75)
    assert share_won_back(1.25, 2.5, 1.875) == pytest.approx(0.5)
    assert share_won_back(1.5, 2.5, 1.25) == pytest.approx(1.25)
    assert share_won_back(1.5, 2.0, 2.25) == pytest.approx(-0.5)


@pytest.mark.parametrize(
    "losses", [(2.0, 2.0, 1.9), (2.1, 2.0, 1.9), (None, 2.0, 1.9), (1.0, None, 1.9), (1.0, 2.0, None)]
)
def test_there_is_no_share_where_nothing_was_lost_or_known(losses):
    assert share_won_back(*losses) is None


def test_won_back_says_both_shares_or_why_not():
    known = {"dense": 1.5, "dense_continued": 1.25, "compressed": 2.5, "healed": 1.75}
    said = won_back(known, "the twin")
    assert said == "75 % of the loss won back against the dense model, 60 % against the twin"
    assert "nothing was lost against the dense model" in won_back({**known, "compressed": 1.5, "healed": 1.4})
    worse = won_back({**known, "healed": 3.0}, "the twin")
    assert worse == (
        "none of the loss won back against the dense model (healing added 0.500), "
        "none against the twin (healing added 0.500)"
    )
    better = won_back({**known, "healed": 1.375}, "the twin")
    assert better == ("all of the loss won back against the dense model (healed 0.125 below it), 90 % against the twin")
    assert "no loss of the twin" in won_back({k: v for k, v in known.items() if k != "dense_continued"}, "the twin")
    assert won_back({"dense": 1.5, "compressed": 2.5}) == ""


def test_a_run_that_was_not_healed_is_not_asked_for_it(build):
    records = [build.env(), *build.evaluation("dense", 1.5), *build.evaluation("compressed", 2.5)]
    (said,) = headlines(split_runs(records)[0])
    assert said.endswith("; validation loss 1.500 -> 2.500 nats/byte on compression.")


def test_headline_is_the_whole_answer(records):
    assert headlines(only_run(records)) == [
        "Monarch cut the factored layers 3.10x (model 2.70x); validation loss 1.520 -> 2.310 nats/byte on "
        "compression -> 1.550 after healing: 96 % of the loss won back against the dense model, 91 % against "
        "the dense model trained on for the same steps."
    ]


def test_headline_names_unequal_steps(records, build):
    longer = [*records, *build.train("dense_continued", 160, 1.5, 1.46)]
    assert "trained on (to step 160, healing to step 150)" in headlines(only_run(longer))[0]


def test_quality_takes_the_latest_value_and_its_change(records, build):
    rows = quality_rows(only_run([*records, *build.evaluation("healed", 1.625)]), "valid")
    assert [row.stage for row in rows] == ["dense", "dense_continued", "compressed", "healed"]
    assert [row.change for row in rows] == [
        None,
        pytest.approx(-0.045),
        pytest.approx(0.79),
        pytest.approx(0.105),
    ]
    assert [row.parameters for row in rows] == [3_421_184, 3_421_184, 1_267_105, 1_267_105]
    assert rows[0].bits_per_byte == pytest.approx(1.52 / 0.6931471805599453)


def test_two_algorithms_of_one_run_are_two_variants(records, build):
    more = [*records, *build.evaluation("compressed", 2.1, algorithm="whitened")]
    run = only_run(more)
    assert variants(run) == [("monarch", "plain"), ("monarch", "whitened")]
    assert [row.loss for row in quality_rows(run, "valid")] == [1.52, 1.475, 2.31, 1.55, 2.1]


def test_errors_of_outputs_have_a_column_where_there_are_any(records):
    table = compression_table([only_run(records)])
    assert not [column for column in table.columns if "output" in column.title]
    rows = [{**r, "output_error": 0.25} if r.get("layer") == "c_fc" else r for r in records]
    table = compression_table([only_run(rows)])
    assert table.cells("of\noutput") == ["-" if layer != "c_fc" else "0.250" for layer in table.cells("layer")]
    assert any("what layers return" in note for note in table.told())


def test_layer_kinds_sum_and_average(records):
    kinds = {kind.layer: kind for kind in layer_kinds(only_run(records))}
    errors = [r["relative_error"] for r in records if r.get("layer") == "c_fc" and r["kind"] == "compress"]
    assert list(kinds) == ["c_attn", "c_fc", "c_proj"]
    assert kinds["c_fc"].layers == 4
    assert kinds["c_fc"].mean_error == pytest.approx(sum(errors) / 4)
    assert kinds["c_fc"].worst_error == max(errors)
    assert kinds["c_fc"].output_error is None
    assert (kinds["c_attn"].params_before, kinds["c_attn"].params_after) == (4 * 256 * 768, 4 * 64 * 1024)
    assert kinds["c_attn"].factor == pytest.approx(3.0)


def test_a_sum_over_some_layers_is_no_sum(records):
    next(r for r in records if r["kind"] == "compress")["params_after"] = None
    kind = layer_kinds(only_run(records))[0]
    assert kind.params_after is None
    assert kind.factor is None


def test_speed_over_the_fastest_dense_and_over_the_same_backend(build):
    rows = [
        build.bench_row("dense", "xla", "own", "c_fc", 100.0),
        build.bench_row("dense", "torch", "own", "c_fc", 80.0),
        build.bench_row("dense", "torch_compile", "own", "c_fc", 10.0, passed=False),
        build.bench_row("monarch", "xla", "own", "c_fc", 50.0),
        build.bench_row("monarch", "triton", "own", "c_fc", 160.0),
    ]
    (timings,) = by_layer(rows).values()
    found = {(t.record["op"], t.record["impl"]): (t.over_fastest_dense, t.over_same_backend) for t in timings}
    assert found["monarch", "xla"] == (1.6, 2.0)
    assert found["monarch", "triton"] == (0.5, None)
    assert found["dense", "torch"] == (1.0, 1.0)
    assert found["dense", "torch_compile"] == (None, None)
    assert [t.over_fastest_dense for t in best_timings(by_layer(rows), "monarch")] == [1.6]
    assert latency_sentences("a box", rows) == [
        "On a box, the fastest Monarch beat the fastest dense on 1 of 1 layer (1 clearly): 1.60x its speed."
    ]


@pytest.mark.parametrize("other", [{"tokens": 1}, {"dtype": "float16"}, {"net": "gpt2s"}, {"out_features": 2}])
def test_only_like_is_set_against_like(build, other):
    rows = [
        build.bench_row("dense", "xla", "own", "c_fc", 100.0),
        build.bench_row("monarch", "xla", "own", "c_fc", 50.0),
    ]
    rows[1] |= other
    assert best_timings(by_layer(rows), "monarch") == []
    assert "no verified time beside a dense one" in latency_sentences("a box", rows)[0]


PROFILER = {"method": "64 weight copies; JAX's profiler, the kernels' time on the device"}


def test_a_profilers_time_is_shown_and_neither_the_reference_nor_a_win(build):
    rows = [
        build.bench_row("dense", "torch", "own", "c_fc", 80.0),
        build.bench_row("dense", "xla", "own", "c_fc", 60.0, **PROFILER),
        build.bench_row("monarch", "xla", "own", "c_fc", 40.0, **PROFILER),
        build.bench_row("monarch", "triton", "own", "c_fc", 160.0),
    ]
    layers = by_layer(rows)
    found = {(t.record["op"], t.record["impl"]): t for timings in layers.values() for t in timings}
    assert found["dense", "torch"].over_fastest_dense == 1
    assert found["monarch", "triton"].over_fastest_dense == 0.5
    shown = found["monarch", "xla"]
    assert (shown.over_fastest_dense, shown.over_same_backend) == (2.0, 1.5)
    assert (shown.wins, shown.clear) == (False, None)
    assert [t.record["impl"] for t in best_timings(layers, "monarch")] == ["triton"]
    assert latency_sentences("a box", rows) == [
        "On a box, the fastest Monarch beat the fastest dense on 0 of 1 layer: 0.50x its speed."
    ]


def test_where_only_a_profilers_dense_is_known_there_is_no_reference(build):
    rows = [
        build.bench_row("dense", "xla", "own", "c_fc", 60.0, **PROFILER),
        build.bench_row("monarch", "triton", "own", "c_fc", 50.0),
    ]
    assert [t.over_fastest_dense for timings in by_layer(rows).values() for t in timings] == [None, None]
    assert "no verified time beside a dense one" in latency_sentences("a box", rows)[0]


def test_a_failed_gate_has_no_speed(build):
    failed = build.bench_row("monarch", "xla", "own", "c_fc", 5.0, passed=False, error=0.5, error_budget=0.25)
    assert verified_time(failed) is None
    assert why_no_time(failed) == "failed its accuracy gate: error 5.0e-01 over the budget 2.5e-01"
    assert verified_time({**failed, "passed": None}) is None
    assert verified_time({**failed, "passed": True, "p50": 0}) is None
    assert why_no_time({**failed, "passed": True}) is None


def test_a_later_time_replaces_an_earlier_one(build):
    rows = [build.bench_row("dense", "xla", "own", "c_fc", time) for time in (100.0, 90.0)]
    (timings,) = by_layer(rows).values()
    assert [t.p50 for t in timings] == [90.0]


def test_runs_part_by_hash_and_device_and_keep_their_own_records(build):
    other = build.env(config="gpt2_blast", data={"hash": "0000"})
    runs = split_runs([*build.full_run(), other, *build.compression("blast"), *build.evaluation("dense", 9.0, "0000")])
    assert [(run.config, run.data_hash) for run in runs] == [
        ("gpt2_monarch", "9f2c51d07ab34e81"),
        ("gpt2_blast", "0000"),
    ]
    assert {r["format"] for r in runs[1].of("compress") if r["path"] != "*"} == {"blast"}
    assert len(sections(runs)) == 2
    moved = split_runs([*build.full_run(), build.env(device="a GPU"), *build.compression()])
    assert [device for _, device in sections(moved)] == [build.device, "a GPU"]


def test_a_resumed_run_stays_one_run(records, build):
    assert len(split_runs([*records, build.env(time="later"), *build.evaluation("healed", 1.5)])) == 1


def test_a_later_machine_record_goes_on_with_the_config_before_it(records, build):
    later = {"kind": "env", "device": build.device, "commit": "5ca1ab1e", "peaks": {"flops_per_s": 7.0}}
    (run,) = split_runs([*records, later, *build.bench()])
    assert (run.config, run.env["commit"], run.env["peaks"]) == (
        "gpt2_monarch",
        "5ca1ab1e",
        {"flops_per_s": 7.0},
    )
    assert run.env["parameters"] == 3_421_184


def test_runs_of_two_folders_stay_apart_and_have_names_of_their_own(records):
    runs = split_runs([{**r, "run": folder} for folder in ("a", "b") for r in records])
    assert labels(runs) == ["a", "b"]
    assert list(bench_by_device(runs)) == [runs[0].device]


def test_healing_is_drawn_from_where_dense_ended(records):
    found = curves(only_run(records))
    assert [(phase, curve[0][0], curve[-1][0]) for phase, curve in found.items()] == [
        ("dense", 1, 400),
        ("dense_continued", 401, 550),
        ("heal", 401, 550),
    ]


def test_steps_that_count_on_are_not_moved_again(records):
    for record in records:
        if record.get("phase") == "heal":
            record["step"] += 400
    assert curves(only_run(records))["heal"][0][0] == 401


def test_smoothing_by_hand_keeps_a_line_and_thinning_its_end():
    assert smoothed([(0, 3.0), (1, 0.0), (2, 6.0), (3, 0.0)], 3) == [(0, 3.0), (1, 3.0), (2, 2.0), (3, 3.0)]
    curve = [(float(i), 1.0) for i in range(5000)]
    assert len(thinned(curve)) <= 801
    assert thinned(curve)[-1] == curve[-1]


def test_labels_are_moved_apart_in_order():
    placed = spread([0.5, 0.52, 0.9], 0.1)
    assert placed[1] - placed[0] == pytest.approx(0.1, rel=1e-3)
    assert placed == sorted(placed)
    assert placed[2] == 0.9


def test_counts_stand_beside_the_cost_model() -> None:
    from blrlab.report.tables.counters import counters_table

    row = {
        "kind": "counters", "net": "llama7b", "layer": "qkvo", "tokens": 1024, "op": "blast", "impl": "torch_bmm",
        "tensor_flops": 100, "counted_tensor_flops": 101, "cuda_flops": 0, "counted_cuda_flops": None,
        "dram_bytes": 50e6, "counted_dram_bytes": 45e6, "l2_bytes": 2e8, "counted_l2_bytes": 1e8, "l2_size": 30e6,
    }  # fmt: skip
    table = counters_table(
        "a GPU", [row | {"counted_tensor_flops": 1}, row, row | {"layer": "down", "dram_bytes": 9e7}]
    )
    assert table.rows[0][4:] == ("1.010", "-", "45", "0.900*", "100", "0.500")
    assert (len(table.rows), table.breaks) == (2, frozenset({0, 1}))
    assert table.rows[1][7] == "0.500", "it moves more than twice the L2"
