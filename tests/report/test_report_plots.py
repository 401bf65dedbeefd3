"""What stands in the figures."""

from __future__ import annotations

import re

import pytest

from blrlab.report.groups import split_runs
from blrlab.report.plots.axes import Box, Scale, around, spread
from blrlab.report.plots.canvas import Canvas, cut, text_width
from blrlab.report.plots.errors import error_figure
from blrlab.report.plots.latency import bars_figure, lines_figure
from blrlab.report.plots.loss import loss_figure, marks, unigram
from blrlab.report.plots.roofline import roofline_figure, roofline_points
from blrlab.report.plots.style import BACKEND_COLOURS, COLOURS, FORMAT_COLOURS, STAGE_COLOURS, backend_colours
from blrlab.report.summary.latency import by_layer
from blrlab.report.summary.roofline import foremost, point, roof


def words_of(canvas):
    return re.findall(r"<text[^>]*>([^<]*)</text>", "".join(canvas.parts))


def titles_of(canvas):
    return re.findall(r"<title>([^<]*)</title>", "".join(canvas.parts))


def bars_of(net, records, width=924.0):
    layers = [timings for timings in by_layer(records).values() if timings[0].record["net"] == net]
    return bars_figure(layers, width)


def test_loss_has_both_continuations_the_evaluations_and_the_unigram_line(records):
    (run,) = split_runs(records)
    said = words_of(loss_figure(run))
    for expected in (
        "byte frequencies alone: 3.29",
        "dense, trained on",
        "1.475 evaluated",
        "healing",
        "1.550 evaluated",
        "compressed 2.310",
        "dense 1.520",
        "loss (nats per byte)",
    ):
        assert expected in said


def test_evaluations_stand_where_their_phase_ends(records):
    (run,) = split_runs(records)
    from blrlab.report.plots.loss import curves

    found = {(step, loss) for step, loss, _ in marks(run, curves(run))}
    assert found == {(400, 1.52), (400, 2.31), (550, 1.55), (550, 1.475)}


def test_unigram_entropy_is_no_measure_of_losses_per_token(records):
    records[0]["data"]["unit"] = "token"
    (run,) = split_runs(records)
    assert unigram(run) is None
    assert not any("frequencies" in word for word in words_of(loss_figure(run)))


def test_errors_have_a_panel_per_kind_and_a_point_per_block(records):
    canvas = error_figure(split_runs(records))
    said, titles = words_of(canvas), titles_of(canvas)
    assert {"c_attn  256 x 768", "c_fc  256 x 1024", "c_proj  1024 x 256"} <= set(said)
    assert len(titles) == 12
    error = next(r["relative_error"] for r in records if r.get("layer") == "c_attn" and r["kind"] == "compress")
    assert f"c_attn  256 x 768, block 0: {error:.3f}" in titles


def test_two_formats_are_two_named_lines(records, build):
    blast = [build.env(config="gpt2_blast"), *build.compression("blast")]
    canvas = error_figure(split_runs([*records, *blast]))
    assert words_of(canvas).count("BLAST") == words_of(canvas).count("Monarch") == 3
    drawn = "".join(canvas.parts)
    assert all(f"s-{FORMAT_COLOURS[form]}" in drawn for form in ("monarch", "blast"))


def test_latency_has_a_bar_per_time_and_a_reason_for_every_other(build):
    canvas = bars_of("own", build.bench())
    assert "".join(canvas.parts).count("<rect") == 17
    said, titles = words_of(canvas), titles_of(canvas)
    assert titles.count(build.interpreted) == 3
    assert sum("failed its accuracy gate" in title for title in titles) == 1
    assert sum(word.startswith("failed its accuracy gate") for word in said) == 1
    assert "dense PyTorch" in said
    assert "us, 256 tokens, float32" in said


def test_a_net_without_any_time_has_no_latency_figure(build):
    rows = [build.bench_row("monarch", "triton", "own", "c_fc", None, reason=build.interpreted)]
    assert bars_of("own", rows) is None
    assert lines_figure(list(by_layer(rows).values())) is None
    assert roofline_figure(rows, build.env()["peaks"]) is None


def test_times_over_tokens_are_a_panel_per_layer(build):
    rows = [r for r in build.suite(1) if r["kind"] == "bench" and r["layer"] != "*"]
    canvas = lines_figure(list(by_layer(rows).values()))
    assert {"c_attn  768 x 2304", "c_fc  768 x 3072", "c_proj  3072 x 768"} <= set(words_of(canvas))
    assert len(titles_of(canvas)) == len(rows)
    one = [r for r in rows if r["tokens"] == 16]
    assert lines_figure(list(by_layer(one).values())) is None


def test_roofline_points_stand_at_measured_intensity_and_speed(build):
    row = build.bench_row("dense", "xla", "own", "c_fc", 200.0, flops=4e6, bytes=1e6, bound_us=100.0)
    found = point(row, roof({"flops_per_s": 1e11, "bytes_per_s": 1e10}))
    assert (found.intensity, found.speed, found.share) == (4.0, pytest.approx(2e10), 0.5)
    canvas = roofline_figure([row], {"flops_per_s": 1e11, "bytes_per_s": 1e10})
    assert "dense c_fc" in words_of(canvas)
    assert "matrix products 100 GFLOP/s" in words_of(canvas)
    (title,) = titles_of(canvas)
    for fact in ("own c_fc", "dense XLA", "256 tokens", "p50 200 us", "50 % of the roof"):
        assert fact in title


def test_the_roof_where_no_bound_is_recorded():
    known = {"passed": True, "p50": 1.0, "flops": 1e6, "bytes": 1e6}
    assert point(known, roof({"flops_per_s": 4e12, "bytes_per_s": 2e12})).share == pytest.approx(0.5)
    assert point({**known, "passed": False}, roof({"flops_per_s": 1.0, "bytes_per_s": 1.0})) is None
    assert point({**known, "bytes": None}, roof({"flops_per_s": 1.0, "bytes_per_s": 1.0})) is None


def test_roofline_names_every_ceiling_and_dashes_the_data_sheet(build):
    rows = [r for r in build.suite(1) if r["kind"] == "bench"]
    peaks = build.suite(1)[0]["peaks"]
    canvas = roofline_figure(rows, peaks)
    said = words_of(canvas)
    for ceiling in (
        "tensor cores 807 TFLOP/s, data sheet 989 TFLOP/s",
        "CUDA cores 58 TFLOP/s",
        "DRAM 2.91 TB/s",
        "L2 7.2 TB/s",
        "data sheet",
    ):
        assert ceiling in said
    # Slope and two flat roofs; the sheet's L2 is not known.
    assert "".join(canvas.parts).count('stroke-dasharray="5 4"') == 2 + 1
    assert "data sheet" not in words_of(roofline_figure(rows, {**peaks, "sheet": None}))


def test_roofline_of_many_layers_takes_some_tokens_and_keeps_the_fastest_full(build):
    rows = [r for r in build.suite(1) if r["kind"] == "bench" and r["layer"] != "*"]
    (points,) = roofline_points(rows, build.suite(1)[0]["peaks"]).values()
    assert {p.record["tokens"] for p in points} == {1, 64, 4096}
    assert len(foremost(points)) == 3 * 3 * 4
    said = words_of(roofline_figure(rows, build.suite(1)[0]["peaks"]))
    assert {"1 token", "64 tokens", "4,096 tokens"} <= set(said)


def test_layers_of_one_intensity_are_named_together(build):
    rows = [build.bench_row("dense", "xla", "own", "c_fc", 9.0, flops=4, bytes=1) for _ in "abc"]
    rows = [{**row, "layer": layer} for row, layer in zip(rows, "abc", strict=True)]
    peaks = {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    assert "dense all layers" in words_of(roofline_figure(rows, peaks))
    assert "dense a, b" in words_of(roofline_figure(rows[:2], peaks))


def test_every_measured_layer_is_named_on_the_roofline(build):
    named = " ".join(words_of(roofline_figure(build.bench(), build.env()["peaks"])))
    assert all(
        f"{op} {layer}" in named or f", {layer}" in named
        for op in ("dense", "Monarch")
        for layer in ("c_attn", "c_fc", "c_proj")
    )


@pytest.mark.parametrize("peaks", [{}, {"flops_per_s": 1e11}, {"flops_per_s": 0, "bytes_per_s": 1e10}])
def test_there_is_no_roofline_without_peaks(build, peaks):
    assert roofline_figure(build.bench(), peaks) is None


@pytest.mark.parametrize("width", [332.0, 924.0])
def test_figures_have_the_width_asked_for_and_write_nothing_outside(records, build, width):
    runs = split_runs(records)
    figures = [
        loss_figure(runs[0], width),
        error_figure(runs, width),
        roofline_figure(build.bench(), build.env()["peaks"], width),
        bars_of("own", build.bench(), width),
    ]
    for canvas in figures:
        assert canvas.width == width
        for part in canvas.parts:
            if part.startswith("<text") and "transform" not in part:
                x, y = (float(re.search(rf' {axis}="([-\d.]+)"', part).group(1)) for axis in "xy")
                assert -1 <= x <= width + 1
                assert 0 <= y <= canvas.height


def test_no_data_no_figure():
    (run,) = split_runs([{"kind": "env"}])
    assert loss_figure(run) is None
    assert error_figure([run]) is None
    assert bars_figure([]) is None
    assert lines_figure([]) is None


def test_backends_have_colours_whatever_their_names():
    names = ["triton_b", "triton_a", "hopper_x", "paper_monarch_left", "paper_blast", "torch_new", "xla", "other"]
    found = backend_colours(names)
    assert found == backend_colours(reversed(names))
    assert set(found.values()) <= set(COLOURS)
    assert found["triton_a"] != found["triton_b"]
    assert set(BACKEND_COLOURS.values()) | set(STAGE_COLOURS.values()) <= set(COLOURS)
    assert len(set(FORMAT_COLOURS.values())) == len(FORMAT_COLOURS)


@pytest.mark.parametrize(("low", "high", "log"), [(0, 1, False), (0.03, 7e4, True), (1, 1.2, True), (-3, 950, False)])
def test_ticks_lie_inside_and_are_few(low, high, log):
    ticks = Scale(low, high, 0, 100, log).ticks(6)
    assert 1 <= len(ticks) <= 8
    assert all(low <= tick <= high for tick in ticks)
    assert ticks == sorted(ticks)


def test_scales_by_hand():
    box = Box(10, 20, 110, 70)
    assert box.across(0, 10).at(5) == 60
    assert box.upwards(1, 100, log=True).at(10) == pytest.approx(45)
    assert around([1, 100], log=True, margin=0.5) == (pytest.approx(0.1), pytest.approx(1000))
    assert spread([1.0, 1.0], 2) == [0.0, 2.0]


def test_text_is_cut_to_its_room():
    assert cut("short", 100) == "short"
    assert cut("a name that is too long", 60).endswith("…")
    assert text_width(cut("a name that is too long", 60)) <= 60


def test_a_drawing_escapes_and_has_a_name():
    canvas = Canvas(100, 50)
    canvas.text((1, 2), "<b> & c")
    with canvas.titled("a < b"):
        canvas.mark((3, 4), "diamond", "blue")
    drawn = canvas.svg('the "name"', "caption")
    assert '<svg role="img" aria-label="the &quot;name&quot;" aria-describedby="caption" viewBox="0 0 100 50"' in drawn
    assert "&lt;b&gt; &amp; c" in drawn
    assert '<g><title>a &lt; b</title><path class="f-blue s-card"' in drawn
