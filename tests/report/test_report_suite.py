"""Figures and tables of a benchmark suite: speeds over dense, trade-offs, predictions, advice."""

from __future__ import annotations

import re

import pytest

from blrlab.report import words
from blrlab.report.device_pictures import advice_pictures, device_pictures, prediction_pictures
from blrlab.report.groups import split_runs
from blrlab.report.page import page
from blrlab.report.plots.advice import MOST, advice_figure
from blrlab.report.plots.bounds import bounds_figure
from blrlab.report.plots.heat import contour, tint
from blrlab.report.plots.loss import loss_figure
from blrlab.report.plots.overview import overview_figure
from blrlab.report.plots.pareto import pareto_figure, pareto_panels
from blrlab.report.plots.sizes import sizes_figure
from blrlab.report.plots.speedup import speedup_figure
from blrlab.report.run_pictures import run_pictures
from blrlab.report.sentences import prediction_sentences
from blrlab.report.summary.advice import advices, choose, in_words, thinned
from blrlab.report.summary.bounds import by_shape, predictions
from blrlab.report.summary.latency import by_layer
from blrlab.report.summary.pareto import bases, layer_counts, metric_of, model_time, models
from blrlab.report.summary.sizes import sizes
from blrlab.report.summary.speed import geometric_mean, speeds
from blrlab.report.tables.data import overview_data
from blrlab.report.tables.latency import latency_table
from blrlab.report.tables.quality import quality_tables
from blrlab.report.tables.speed import means_table, side_by_side, speed_table, win


def words_of(canvas):
    return re.findall(r"<text[^>]*>([^<]*)</text>", "".join(canvas.parts))


def titles_of(canvas):
    return re.findall(r"<title>([^<]*)</title>", "".join(canvas.parts))


def bench_of(records):
    return [r for r in records if r["kind"] == "bench"]


@pytest.fixture
def four(build):
    """Two layers, dense at 100 and 200 us, Monarch at 50 and 400."""
    return [
        build.bench_row("dense", "torch_eager", "own", "c_fc", 100.0),
        build.bench_row("monarch", "triton_x", "own", "c_fc", 50.0),
        build.bench_row("dense", "torch_eager", "own", "c_proj", 200.0),
        build.bench_row("monarch", "triton_x", "own", "c_proj", 400.0),
    ]


def test_geometric_mean_wins_and_spread_by_hand(four):
    (speed,) = speeds(by_layer(four))
    assert (speed.op, speed.impl, speed.tokens) == ("monarch", "triton_x", 256.0)
    assert speed.mean == pytest.approx(1.0)
    assert (speed.wins, speed.clear, len(speed.timings)) == (1, 1, 2)
    assert speed.timings[0].spread == pytest.approx((96 / 54, 108 / 48))
    assert [win(t) for t in speed.timings] == ["clear", "slower"]
    assert geometric_mean([]) is None


def test_a_win_is_clear_only_below_denses_p20(build):
    dense = build.bench_row("dense", "xla", "own", "c_fc", 100.0, p20=90.0, p80=110.0)

    def verdict(**times):
        row = build.bench_row("monarch", "xla", "own", "c_fc", 80.0, **times)
        (speed,) = speeds(by_layer([dense, row]))
        return win(speed.timings[0])

    assert verdict(p20=70.0, p80=89.0) == "clear"
    assert verdict(p20=70.0, p80=91.0) == "within the spread"
    assert verdict(p20=None, p80=None) == "spread not known"


def test_quantised_weights_are_a_contender_and_not_what_is_compared_with(four, build):
    quantised = build.bench_row("dense", "int8_weight_only", "own", "c_fc", 25.0)
    found = {s.impl: s.mean for s in speeds(by_layer([*four, quantised]))}
    assert found == {"int8_weight_only": pytest.approx(4.0), "triton_x": pytest.approx(1.0)}
    rows = side_by_side(list(by_layer([*four, quantised]).values()), with_tokens=False).rows
    assert [best for *_, best in rows] == ["Monarch Triton x", "dense PyTorch"]


def test_the_dense_twin_of_a_batched_product_is_plain_torch(build):
    rows = [
        build.bench_row("dense", "torch_eager", "own", "c_fc", 100.0),
        build.bench_row("monarch", "torch_bmm", "own", "c_fc", 50.0),
    ]
    (timings,) = by_layer(rows).values()
    assert [t.over_same_backend for t in timings] == [1.0, 2.0]


def test_whole_models_and_layers_never_share_a_mean(four, build):
    model = [{**r, "layer": "*", "phase": "decode", "batch": 1, "p50": 10 * r["p50"]} for r in four[:2]]
    layers = by_layer([*four, *model])
    assert [len(s.timings) for s in speeds(layers)] == [2]
    (whole,) = speeds(layers, whole_models=True)
    assert whole.mean == pytest.approx(2.0)
    assert "own whole model decode batch 1" in latency_table("a box", [*four, *model]).cells("layer")


def test_speed_bars_have_a_row_per_contender_and_a_bar_per_layer(build):
    rows = [r for r in bench_of(build.suite(1)) if r["layer"] != "*"]
    found = speeds(by_layer(rows))
    canvas = speedup_figure(found)
    said = words_of(canvas)
    assert {"1 token", "4,096 tokens", "Monarch Triton one launch", "dense int8 weights", "1x"} <= set(said)
    assert len(titles_of(canvas)) == sum(len(s.timings) for s in found)
    assert any(
        re.search(r"gpt2s c_fc, BLAST Triton three stage, 16 tokens: [\d.]+x dense \([\d.]+-", t)
        for t in titles_of(canvas)
    )
    assert speedup_figure([]) is None


def test_overview_has_a_cell_per_contender_and_tokens(build):
    found = speeds(by_layer(bench_of(build.suite(2))))
    canvas = overview_figure(found)
    assert len(titles_of(canvas)) == len({(s.op, s.impl) for s in found}) * 5
    assert overview_figure([s for s in found if s.tokens == 1]) is None


def test_means_are_a_table_by_tokens(four):
    table = means_table("a box", four)
    assert table.rows == (("256", "Monarch", "Triton x", "1.00x", "0.50x", "2.00x", "2", "1", "1"),)
    assert means_table("a box", four[:1]) is None


def test_a_profilers_speed_is_in_the_means_and_counts_no_win(four, build):
    fast = build.bench_row("monarch", "xla", "own", "c_fc", 25.0, method="JAX's profiler")
    table = means_table("a box", [*four, fast])
    assert table.rows[0] == ("256", "Monarch", "XLA", "4.00x", "4.00x", "4.00x", "1", "-", "-")
    assert words.PROFILED in table.notes
    (speed, _) = speeds(by_layer([*four, fast]))
    assert [win(t) for t in speed.timings] == ["not counted"]


def test_a_profilers_time_is_no_part_of_a_pareto(records, build):
    profiler = [{**r, "method": "JAX's profiler", "impl": "xla", "p50": 1.0} for r in records if r["kind"] == "bench"]
    assert all(r["p50"] != 1.0 for basis in bases(split_runs([*records, *profiler])) for r in basis.rows)


def test_dtypes_never_share_a_mean_and_are_named(four):
    half = [{**r, "dtype": "float16", "p50": r["p50"] / (4 if r["op"] == "monarch" else 1)} for r in four]
    found = speeds(by_layer([*four, *half]))
    assert [(s.dtype, s.mean) for s in found] == [("float16", pytest.approx(4.0)), ("float32", pytest.approx(1.0))]
    table = means_table("a box", [*four, *half])
    assert table.cells("dtype") == ["float16", "float32"]
    assert table.breaks == {0, 1}
    assert {"256 tokens, float16", "256 tokens, float32"} <= set(words_of(speedup_figure(found)))
    assert [row[:2] for row in overview_data("all", found).rows] == [
        ("Monarch Triton x, float16", "4.00x"),
        ("Monarch Triton x, float32", "1.00x"),
    ]


def test_batches_of_whole_models_never_share_a_mean(four):
    model = [
        {**r, "layer": "*", "phase": "decode", "batch": n, "p50": r["p50"] * (1 if r["op"] == "dense" else n)}
        for n in (1, 2)
        for r in four[:2]
    ]
    found = speeds(by_layer(model), whole_models=True)
    assert [(s.batch, s.mean) for s in found] == [(1.0, pytest.approx(2.0)), (2.0, pytest.approx(1.0))]
    assert {"256 tokens, batch 1", "256 tokens, batch 2"} <= set(words_of(speedup_figure(found)))
    assert speed_table("whole", found).cells("batch") == ["1", "2"]


def test_uneven_means_count_their_layers(four, build):
    other = build.bench_row("blast", "triton_y", "own", "c_fc", 50.0)
    found = speeds(by_layer([*four, other]))
    assert dict(overview_data("all", found).rows) == {"Monarch Triton x": "1.00x (2)", "BLAST Triton y": "2.00x (1)"}
    assert dict(overview_data("all", found[:1]).rows) == {"Monarch Triton x": "1.00x"}


def test_contour_and_tint():
    assert contour([[2.0, 0.5], [2.0, 2.0]]) == [((1.0, 0.0), (1.0, 1.0)), ((1.0, 1.0), (2.0, 1.0))]
    assert contour([[None, 0.5]]) == []
    assert tint(2.0)[0] == "blue"
    assert tint(0.5)[0] == "orange"
    assert tint(4.0)[1] > tint(2.0)[1] == tint(0.5)[1]
    assert tint(None) == ("rule", 0.3)


def test_advice_is_drawn_told_and_put_in_order(build):
    record = build.advice("blast", "gpt2s", "c_fc", 16)
    backwards = {k: v[::-1] if isinstance(v, list) and k != "blocks" else v for k, v in record.items()}
    for key in ("speedup", "bound_speedup", "algorithm"):
        backwards[key] = [row[::-1] for row in backwards[key]]
    (found,), (turned,) = (advices(split_runs([r]))[build.gpu] for r in (record, backwards))
    assert (found.ranks, found.speedup, found.widest) == (turned.ranks, turned.speedup, turned.widest)
    canvas = advice_figure([found])
    assert len(titles_of(canvas)) == len(record["tokens"]) * len(record["ranks"])
    assert titles_of(canvas)[0].startswith("1 token, rank 64: ")
    assert "widest rank that beats dense" in words_of(canvas)


@pytest.mark.parametrize(
    ("widest", "told"),
    [
        ([256, 256, 128, None], "up to rank 256 at 1 to 8 tokens, 128 at 64 tokens; not at 512 tokens."),
        ([256, 128, 256, 256], "up to rank 256 at 1 token, 128 at 8 tokens, 256 at 64 to 512 tokens."),
        ([None] * 4, "to beat dense at no number of tokens and none of the ranks."),
    ],
)
def test_advice_in_words(build, widest, told):
    record = {**build.advice("monarch", "gpt2s", "c_fc", 4), "widest_rank": widest, "tokens": [1, 8, 64, 512]}
    ((found,),) = advices(split_runs([record])).values()
    assert in_words(found).endswith(told)
    assert in_words(found).startswith("As Monarch 4 x 4, gpt2s c_fc is predicted ")


def test_advice_of_many_steps_names_the_ends_the_widest_and_the_narrowest(build):
    changes = {"widest_rank": [96, 128, 64, 32, 48, 56], "tokens": [1, 2, 4, 8, 16, 32]}
    ((found,),) = advices(split_runs([{**build.advice("monarch", "gpt2s", "c_fc", 4), **changes}])).values()
    told = "up to rank 96 at 1 token, 128 at 2 tokens, 32 at 8 tokens, 56 at 32 tokens, others between."
    assert in_words(found).endswith(told)


def test_phones_see_some_of_many_ranks(build):
    record = build.advice("monarch", "gpt2s", "c_fc", 4)
    count = 20
    record |= {"ranks": list(range(16, 336, 16)), "speedup": [[1.5] * count] * 6, "layer_factor": [2.0] * count}
    ((found,),) = advices(split_runs([record])).values()
    less = thinned(found, 10, 9)
    assert (len(less.tokens), len(less.ranks), less.ranks[0], less.ranks[-1]) == (6, 9, 16, 320)
    assert len(re.findall("<rect", "".join(advice_figure([found], 332.0).parts))) == 6 * 9


def test_advice_at_the_blocks_that_are_timed_is_preferred(build):
    several = [build.advice("blast", "gpt2s", "c_fc", blocks) for blocks in (2, 4, 8, 16, 32)]
    ((found,), (beside,)) = (
        [choose(members, 1)[0][0].op for members in advices(split_runs(records)).values()]
        for records in (several, [*several, build.prediction("blast", "plain", "gpt2s", "c_fc", 16, 4)])
    )
    assert (found, beside) == ("BLAST 8 x 8", "BLAST 16 x 16")


def test_the_best_advice_is_drawn_and_the_rest_named(build):
    records = [r for r in build.suite(9) if r["kind"] == "advice"]
    ((device, found),) = advices(split_runs(records)).items()
    shown, others = choose(found, 9)
    assert (len(shown), len(shown) + len(others)) == (9, len(records))
    (picture,) = advice_pictures(device, found)
    assert "Left out here, and in the tables: gpt2s c_attn low rank" in picture.caption
    assert [len(data.rows) for data in picture.data] == [6] * MOST


@pytest.mark.parametrize("broken", [{"tokens": None}, {"speedup": [[None]]}, {"ranks": ["x"]}, {"speedup": "no"}])
def test_damaged_advice_is_left_out(build, broken):
    assert advices(split_runs([{**build.advice("blast", "gpt2s", "c_fc", 4), **broken}])) == {}


def test_ragged_advice_is_drawn_where_it_is_whole(build):
    record = build.advice("blast", "gpt2s", "c_fc", 4)
    record |= {"speedup": record["speedup"][:2], "algorithm": None, "widest_rank": [64], "layer_factor": []}
    ((found,),) = advices(split_runs([record])).values()
    assert found.speedup[2] == (None,) * 7
    assert advice_figure([found]) is not None


def test_predictions_are_bars_in_the_colour_of_their_term(build):
    rows = [build.prediction("monarch", name, "gpt2s", "c_fc", 16, n) for name, n in (("plain", 4), ("two_stage", 2))]
    ((_, found),) = predictions(split_runs(rows)).items()
    canvas = bounds_figure(list(by_shape(found).values()))
    assert {
        "Monarch plain 16 x 16",
        "Monarch two stage 16 x 16",
        "launches",
        "predicted us, 16 tokens, bfloat16",
    } <= set(words_of(canvas))
    assert re.search(r"gpt2s c_fc, Monarch plain 16 x 16, 16 tokens: [\d.]+ us \(tensor cores", titles_of(canvas)[0])
    assert bounds_figure([]) is None


def test_predictions_are_counted_in_words(build):
    rows = [build.prediction("monarch", name, "gpt2s", "c_fc", 16, 2) for name in ("plain", "two_stage")]
    rows[0]["speedup"], rows[1]["speedup"] = 0.5, 1.5
    other = {**rows[0], "tokens": 1}
    assert prediction_sentences("a box", [*rows, other]) == [
        "On a box, Monarch is predicted to beat dense on 1 of 2 pairs of layer and tokens: 0.50x to 1.50x its speed."
    ]
    assert prediction_sentences("a box", []) == []


def test_several_ranks_of_one_algorithm_are_told_apart(build):
    row = build.prediction("blast", "fused", "gpt2s", "c_fc", 16, 1)
    ((_, found),) = predictions(split_runs([row, {**row, "rank": 64}])).items()
    assert {"BLAST fused 16 x 16 r 64", f"BLAST fused 16 x 16 r {row['rank']}"} <= set(
        words_of(bounds_figure(list(by_shape(found).values())))
    )


def test_pictures_of_predictions_say_how_many_are_left_out(build):
    ((device, found),) = predictions(split_runs([r for r in build.suite(4) if r["kind"] == "bound"])).items()
    (picture,) = prediction_pictures(device, found)
    assert "51 more layers and numbers of tokens are in the tables." in picture.caption


def test_pareto_takes_whole_models_where_they_were_timed(build):
    runs = split_runs(build.evaluated_suite())
    assert metric_of(runs).label == "loss (nats/byte), lower is better"
    panels = pareto_panels(runs)
    assert [title for title, _, _ in panels] == [
        "Prefill, batch 1, 512 tokens, whole model",
        "Decode, batch 1, 1 token, whole model",
        "Size",
    ]
    names = [model.name for _, model in panels[0][2]]
    assert names[0] == "dense"
    assert "BLAST healed" in names
    assert {"dense", "BLAST healed"} <= set(words_of(pareto_figure(runs)))


def test_pareto_else_sums_the_layers_and_says_so(records):
    runs = split_runs(records)
    assert layer_counts(runs[0]) == {"c_attn": 4, "c_fc": 4, "c_proj": 4}
    (basis,) = bases(runs)
    assert basis.told == "Sum of its 12 factored layers, 256 tokens"
    dense = models(runs, metric_of(runs))[0]
    fastest = {
        layer: min(
            r["p50"] for r in records if r.get("net") == "own" and r.get("op") == "dense" and r["layer"] == layer
        )
        for layer in ("c_attn", "c_fc", "c_proj")
    }
    assert model_time(basis, dense) == pytest.approx(4 * sum(fastest.values()))


def test_pareto_has_no_time_where_ranks_differ_or_a_layer_is_missing(records):
    for record in records:
        if record["kind"] == "bench" and record["op"] == "monarch":
            record["rank"] = 63
    assert [title for title, _, _ in pareto_panels(split_runs(records))] == ["Size"]


def sized(build, algorithm, blocks, parameters, loss, healed=None):
    """A run that compressed the one dense model, of loss 1.2, to `parameters`."""
    layers = [{**row, "algorithm": algorithm, "blocks": [blocks, blocks]} for row in build.compression()]
    layers[-1] |= {"params_after": parameters, "blocks": None}
    factors = {"algorithm": algorithm, "model_factor": 3_421_184 / parameters}
    rows = [build.env(), *layers, *build.evaluation("dense", 1.2), *build.evaluation("compressed", loss, **factors)]
    rows += build.evaluation("healed", healed, **factors) if healed else []
    return [{**row, "run": f"runs/{algorithm}_{blocks}_{parameters}"} for row in rows]


def test_runs_at_several_sizes_are_lines_of_what_is_lost(build):
    tried = [
        ("block_svd", 4, 2_000_000, 1.30, 1.22),
        ("block_svd", 4, 1_000_000, 1.60),
        ("block_svd", 8, 1_000_000, 1.70),
        ("block_svd whitened", 4, 1_000_000, 1.25),
    ]
    runs = split_runs([row for one in tried for row in sized(build, *one)])
    found = sizes(runs)
    assert list(found) == [
        "Monarch, 4 blocks, block_svd",
        "Monarch, 8 blocks, block_svd",
        "Monarch, 4 blocks, block_svd whitened",
    ]
    line = found["Monarch, 4 blocks, block_svd"]
    assert [size.parameters for size in line] == [1_000_000, 2_000_000]
    assert [size.lost for size in line] == pytest.approx([0.4, 0.1])
    assert [size.healed for size in line] == [None, pytest.approx(0.02)]
    assert set(found) <= set(words_of(sizes_figure(runs)))
    # They are told apart there, and not as points of the general picture.
    assert pareto_panels(runs) == []
    titles = [picture.title for picture in run_pictures(runs, named=False)]
    assert "What is lost against size" in titles


def test_a_model_healed_below_the_dense_one_is_drawn_too(build):
    runs = split_runs(sized(build, "block_svd", 4, 2_000_000, 1.3, 1.1) + sized(build, "block_svd", 4, 1_000_000, 1.6))
    assert sizes_figure(runs) is not None


def test_images_are_told_by_right_answers_and_text_by_perplexity(build):
    rows = [build.env(), *build.compression()]
    shared = {"kind": "eval", "split": "validation", "examples": 359, "data_hash": "9f2c51d07ab34e81"}
    for metric, value, unit in (("loss", 0.359, "nats/image"), ("top1", 0.9276, ""), ("top5", 0.997, "")):
        rows.append({**shared, "stage": "dense", "metric": metric, "value": value, "unit": unit})
    (table,) = quality_tables("9f2c51d07ab34e81", "a GPU", split_runs(rows))
    titles = [column.title for column in table.columns]
    assert {"top-1", "top-5"} < set(titles)
    assert not [title for title in titles if title.startswith(("perplexity", "bits"))]
    assert table.cells("top-1") == ["92.8 %"]
    assert "359 images" in table.title
    (of_text,) = quality_tables("x", "a GPU", split_runs([build.env(), *build.evaluation("dense", 1.2)]))
    assert not {"top-1", "top-5"} & {column.title for column in of_text.columns}
    assert "512 windows" in of_text.title


def test_denoisers_are_told_by_their_error_and_bound(build):
    rows = [build.env(), *build.compression()]
    shared = {"kind": "eval", "split": "validation", "data_hash": "9f2c51d07ab34e81", "stage": "dense"}
    for metric, value, unit, examples in (
        ("loss", 0.0906, "mse + T/1000 vb", 359),
        ("mse", 0.0871, "per value", 359),
        ("vb", 0.0035, "bits/value", 359),
        ("fid", 12.5, "to 359 images", 5000),
    ):
        rows.append({**shared, "metric": metric, "value": value, "unit": unit, "examples": examples})
    (table,) = quality_tables("9f2c51d07ab34e81", "a GPU", split_runs(rows))
    cells = {title: table.cells(title) for title in ("loss\nmse + T/1000 vb", "noise\nMSE", "bound\nbits/value", "FID")}
    assert list(cells.values()) == [["0.091"], ["0.087"], ["0.004"], ["12.500"]]
    titles = {column.title for column in table.columns}
    assert not [title for title in titles if title.startswith(("perplexity", "bits", "top"))]
    assert "359 images" in table.title
    (run,) = split_runs([*rows, *build.train("dense", 40, 1.0, 0.1)])
    assert "loss (mse + T/1000 vb)" in words_of(loss_figure(run))
    (of_text,) = quality_tables("x", "a GPU", split_runs([build.env(), *build.evaluation("dense", 1.2)]))
    assert not {"FID", "noise\nMSE"} & {column.title for column in of_text.columns}


def test_one_size_is_no_line(build):
    runs = split_runs(sized(build, "block_svd", 4, 1_000_000, 1.3) + sized(build, "svd", 4, 2_000_000, 1.4))
    assert sizes(runs) == {}
    assert sizes_figure(runs) is None


def test_pareto_of_a_metric_that_rises(build):
    rows = [r for r in build.evaluated_suite() if r["kind"] != "bench"]
    for row in rows:
        if row["kind"] == "eval":
            row |= {"metric": "accuracy", "unit": ""}
    runs = split_runs(rows)
    assert metric_of(runs).label == "accuracy, higher is better"
    assert len(models(runs, metric_of(runs))) == 7


def test_there_is_no_pareto_without_factored_models(build):
    runs = split_runs([build.env(), *build.evaluation("dense", 1.0)])
    assert pareto_figure(runs) is None
    assert pareto_figure(split_runs([build.env()])) is None


def test_device_pictures_name_what_they_show(build):
    rows = bench_of(build.suite(2))
    pictures = device_pictures(build.gpu, rows, build.suite(1)[0]["peaks"])
    assert "Dashed: the data sheet of H100 SXM." in pictures[-1].caption
    titles = [picture.title for picture in pictures]
    for net in ("gpt2s", "gpt2xl"):
        assert f"Speed of {net} layers over dense on {build.gpu}" in titles
        assert f"Speed of {net} as a whole over dense on {build.gpu}" in titles
        assert f"Latency of {net} on {build.gpu} over tokens" in titles
    assert titles[-1] == f"Roofline of {build.gpu}"
    assert len(titles) == len(set(titles))


def test_a_large_suite_is_a_page_of_bearable_size(build):
    records = build.suite()
    assert len(bench_of(records)) > 1500
    text = page(records)
    assert len(text.encode()) < 6e6
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids)) > 40


def test_a_suite_with_holes_still_renders(build):
    records = build.suite(1)
    keys = {key for record in records for key in record} - {"kind"}
    for key in sorted(keys):
        page([{k: v for k, v in record.items() if k != key} for record in records[:60] + records[-25:]])
        page([{**record, key: "odd"} for record in records[:20] + records[-25:]])
