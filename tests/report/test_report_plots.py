"""What stands in the figures."""

from __future__ import annotations

import pytest

from blrlab.report.groups import split_runs
from blrlab.report.plots.errors import error_figure
from blrlab.report.plots.latency import latency_figures
from blrlab.report.plots.loss import loss_figure
from blrlab.report.plots.roofline import roofline_figure
from blrlab.report.plots.style import BACKEND_COLOURS, FORMAT_COLOURS, STAGE_COLOURS


def words_of(axes):
    return [text.get_text() for text in axes.texts]


def test_loss_has_both_continuations_the_evaluations_and_the_unigram_line(records):
    (run,) = split_runs(records)
    whole, later = loss_figure(run).axes
    assert whole.get_xlim()[1] > 550
    assert "byte frequencies alone: 3.29" in words_of(whole)
    assert words_of(later) == [
        "dense, trained on\n1.475 evaluated",
        "healing\n1.550 evaluated",
        "compressed 2.310",
    ]
    assert later.get_ylabel() == "loss (nats per byte)"
    marks = {(line.get_xdata()[0], line.get_ydata()[0]) for line in whole.lines if line.get_marker() == "o"}
    assert marks == {(400, 1.52), (400, 2.31), (550, 1.55), (550, 1.475)}


def test_unigram_entropy_is_no_measure_of_losses_per_token(records):
    records[0]["data"]["unit"] = "token"
    (run,) = split_runs(records)
    assert not any("frequencies" in word for axes in loss_figure(run).axes for word in words_of(axes))


def test_errors_have_a_panel_per_kind_and_a_point_per_block(records):
    panels = error_figure(split_runs(records)).axes
    assert [axes.get_title(loc="left") for axes in panels] == [
        "c_attn  256 x 768",
        "c_fc  256 x 1024",
        "c_proj  1024 x 256",
    ]
    assert [list(axes.lines[0].get_xdata()) for axes in panels] == [[0, 1, 2, 3]] * 3
    errors = [r["relative_error"] for r in records if r.get("layer") == "c_attn" and r["kind"] == "compress"]
    assert list(panels[0].lines[0].get_ydata()) == errors


def test_two_formats_are_two_named_lines(records, build):
    blast = [build.env(config="gpt2_blast"), *build.compression("blast")]
    axes = error_figure(split_runs([*records, *blast])).axes[0]
    assert sorted(words_of(axes)) == ["BLAST", "Monarch"]
    assert [line.get_color() for line in axes.lines] == [FORMAT_COLOURS["monarch"], FORMAT_COLOURS["blast"]]


def test_latency_has_a_bar_per_time_and_a_reason_for_every_other(build):
    figures = latency_figures(build.bench())
    assert list(figures) == ["own", "gpt2s"]
    panels = figures["own"].axes
    assert [len(axes.patches) for axes in panels] == [6, 6, 5]
    said = [" ".join(words_of(axes)).replace("\n", " ") for axes in panels]
    assert all(build.interpreted in words for words in said)
    assert "failed its accuracy gate" in said[2]
    assert [label.get_text() for label in panels[0].get_yticklabels()][:2] == ["dense  XLA", "dense  PyTorch"]


def test_a_net_without_any_time_has_no_latency_figure(build):
    rows = [build.bench_row("monarch", "triton", "own", "c_fc", None, reason=build.interpreted)]
    assert latency_figures(rows) == {}
    assert roofline_figure(rows, build.env()["peaks"]) is None


def test_roofline_points_stand_at_measured_intensity_and_speed(build):
    row = build.bench_row("dense", "xla", "own", "c_fc", 200.0, flops=4e6, bytes=1e6, bound_us=100.0)
    figure = roofline_figure([row], {"flops_per_s": 1e11, "bytes_per_s": 1e10})
    points = {line.get_marker(): (line.get_xdata()[0], line.get_ydata()[0]) for line in figure.axes[0].lines}
    assert points["s"] == pytest.approx((4.0, 2e10))
    assert points["_"] == pytest.approx((4.0, 4e10))
    assert "dense c_fc" in words_of(figure.axes[0])
    assert "100 GFLOP/s" in words_of(figure.axes[0])


def test_layers_of_one_intensity_are_named_together(build):
    rows = [build.bench_row("dense", "xla", "own", "c_fc", 9.0, flops=4, bytes=1) for _ in "abc"]
    rows = [{**row, "layer": layer} for row, layer in zip(rows, "abc", strict=True)]
    peaks = {"flops_per_s": 1e11, "bytes_per_s": 1e10}
    assert "dense all layers" in words_of(roofline_figure(rows, peaks).axes[0])
    assert "dense a, b" in words_of(roofline_figure(rows[:2], peaks).axes[0])


def test_every_measured_layer_is_named_on_the_roofline(build):
    figure = roofline_figure(build.bench(), build.env()["peaks"])
    for axes in figure.axes:
        named = " ".join(words_of(axes))
        assert all(
            f"{op} {layer}" in named or f", {layer}" in named
            for op in ("dense", "Monarch")
            for layer in ("c_attn", "c_fc", "c_proj")
        )


@pytest.mark.parametrize("peaks", [{}, {"flops_per_s": 1e11}, {"flops_per_s": 0, "bytes_per_s": 1e10}])
def test_there_is_no_roofline_without_peaks(build, peaks):
    assert roofline_figure(build.bench(), peaks) is None


@pytest.mark.parametrize("width", [4.0, 9.6])
def test_figures_have_the_width_asked_for(records, build, width):
    runs = split_runs(records)
    figures = [
        loss_figure(runs[0], width),
        error_figure(runs, width),
        roofline_figure(build.bench(), build.env()["peaks"], width),
    ]
    assert {figure.get_size_inches()[0] for figure in figures} == {width}


def test_no_data_no_figure():
    (run,) = split_runs([{"kind": "env"}])
    assert loss_figure(run) is None
    assert error_figure([run]) is None
    assert latency_figures([]) == {}


@pytest.mark.parametrize("palette", [BACKEND_COLOURS, FORMAT_COLOURS])
def test_no_two_share_a_colour(palette):
    assert len(set(palette.values())) == len(palette)
    assert STAGE_COLOURS["dense"] == FORMAT_COLOURS["dense"]
