"""Budgets: what layers would lose, how a budget is spent, what targets mean, and plans as rules."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from blrlab import compress, factors
from blrlab.compress import Allowed, Option, Target, curves, losses
from blrlab.compress import statistics as sums
from blrlab.errors import InputError
from blrlab.factors import Spec

KEY = jax.random.key(0)
FEW = Allowed(("dense", "low_rank", "monarch"), blocks=(2, 3), multiple=2)  # known without fits, which compile long


@pytest.fixture(scope="module")
def trained():
    """Parameters of six layers of a small GPT-2 that was trained (the file's metadata says how)."""
    flat = load_file(Path(__file__).parent / "trained.safetensors")
    return unflatten_dict({path: jnp.asarray(each, jnp.float32) for path, each in flat.items()}, sep="/")


def _decaying(seed, size=(24, 36), decay=0.7):
    """A weight whose singular values fall by a factor each."""
    random = np.random.default_rng(seed)
    left, right = (np.linalg.qr(random.normal(size=(side, side)))[0] for side in size)
    values = decay ** np.arange(min(size))
    return jnp.asarray(left[:, : len(values)] * values @ right[: len(values)], jnp.float32)


def _model(**layers):
    return {name: {"kernel": weight} for name, weight in layers.items()}


def _statistics(features, seed=3):
    random = np.random.default_rng(seed)
    x = random.normal(size=(500, features)) * np.logspace(0, -1.5, features)
    return sums.add(sums.empty(features), jnp.asarray(x, jnp.float32))


# Curves


@pytest.mark.parametrize(("format", "blocks"), [("low_rank", (1, 1)), ("monarch", (2, 3))])
def test_a_spectrum_tells_what_a_fit_loses(format, blocks):
    weight = _decaying(0)
    ranks = (1, 2, 5, 8)
    found = curves.curve(weight, format, blocks, ranks, KEY)
    for rank in ranks:
        error = float(compress.fit(weight, Spec(format, 24, 36, blocks, rank), KEY).relative_error)
        assert found.at(rank) == pytest.approx(error**2, rel=1e-3)


def test_a_whitened_spectrum_tells_what_is_lost_of_the_output():
    weight, inputs = _decaying(0), _statistics(24)
    found = curves.curve(weight, "low_rank", (1, 1), (3, 6), KEY, inputs)
    for rank in (3, 6):
        error = float(compress.fit(weight, Spec("low_rank", 24, 36, rank=rank), KEY, inputs).output_error)
        assert found.at(rank) == pytest.approx(error**2, rel=0.05)  # damping counts rare inputs a little more


def test_what_a_bias_takes_up_is_not_lost():
    """Losses are shares of the whole output, as those of fits are that weigh layers against each other."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(500, 24)) + 2 * random.normal(size=24), jnp.float32)
    weight, inputs = _decaying(0, decay=0.9), sums.add(sums.empty(24), x)
    found = curves.curve(weight, "low_rank", (1, 1), (3, 6), KEY, inputs, has_bias=True)
    for rank in (3, 6):
        fit = compress.fit(weight, Spec("low_rank", 24, 36, rank=rank), KEY, inputs, has_bias=True)
        assert found.at(rank) == pytest.approx(float(fit.output_error) ** 2, rel=0.05)


@pytest.mark.parametrize(("format", "inputs"), [("blast", False), ("blast", True), ("monarch", True)])
def test_fitted_curves_are_near_the_fits_between_their_anchors(format, inputs, monkeypatch):
    monkeypatch.setattr(curves, "ANCHORS", 3)
    weight, statistics = _decaying(1), _statistics(24) if inputs else None
    ranks = range(1, 9)
    found = curves.curve(weight, format, (2, 3), tuple(ranks), KEY, statistics)
    lost = [found.at(rank) for rank in ranks]
    assert lost == sorted(lost, reverse=True)
    fit = compress.fit(weight, Spec(format, 24, 36, (2, 3), 5), KEY, statistics)  # anchors are 1, 3, 8
    error = float(fit.output_error if inputs else fit.relative_error)
    assert found.at(5) == pytest.approx(error**2, rel=0.25)


@pytest.mark.parametrize("weight", [jnp.zeros((24, 36)), jnp.ones((24, 36))], ids=["zeros", "constant"])
@pytest.mark.parametrize("format", ["low_rank", "monarch", "blast"])
def test_a_curve_of_little_rank_is_finite(format, weight):
    found = curves.curve(weight, format, (2, 3) if format != "low_rank" else (1, 1), (2,), KEY)
    assert 0 <= found.at(2) < 1e-6


# Losses


def test_what_was_measured_serves_every_budget(tmp_path, trained):
    paths = list(compress.linears(trained))[:2]
    sizes = compress.linears(trained)
    options = {path: FEW.specs(*sizes[path]) for path in paths}
    losses.save(losses.measure(trained, options, key=KEY), tmp_path / "losses.json")
    again = losses.load(tmp_path / "losses.json")
    for factor in (1.5, 3):
        target = Target("layer_factor", factor)
        found = compress.allocate(trained, target, FEW, paths=paths, measured=again)
        assert found == compress.allocate(trained, target, FEW, paths=paths, key=KEY)


def test_what_was_not_measured_is_named(trained):
    first, second = list(compress.linears(trained))[:2]
    some = losses.measure(trained, {first: Allowed(("low_rank",)).specs(*compress.linears(trained)[first])})
    target = Target("layer_factor", 2)
    with pytest.raises(InputError, match=f"{second} was not measured"):
        compress.allocate(trained, target, Allowed(("low_rank",)), paths=[first, second], measured=some)
    with pytest.raises(InputError, match="monarch of 4 x 4 blocks was not measured"):
        compress.allocate(trained, target, Allowed(("monarch",), (4,)), paths=[first], measured=some)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": [{"format": "blast"}]}', '{"a": [1]}'])
def test_a_damaged_file_of_losses_is_named(tmp_path, text):
    (tmp_path / "losses.json").write_text(text)
    with pytest.raises(InputError, match="is damaged"):
        losses.load(tmp_path / "losses.json")


# Spending

steps = st.lists(st.tuples(st.integers(1, 9), st.floats(0.05, 0.95)), min_size=1, max_size=4)


@given(layers=st.lists(steps, min_size=1, max_size=3), share=st.floats(0.1, 1.0), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_choice_is_within_the_budget_and_nearly_the_best(layers, share, seed):
    options, weights = {}, {}
    for number, found in enumerate(layers):
        cost, lost, path = 0, 1.0, f"layer {number}"
        weights[path] = float(np.random.default_rng(seed + number).uniform(0.1, 3))
        options[path] = []
        for rank, (more, ratio) in enumerate(found, 1):
            cost, lost = cost + more, lost * ratio
            options[path].append(Option(Spec("low_rank", 64, 64, rank=rank), cost, lost))
    least, most = (sum(pick(each.cost for each in found) for found in options.values()) for pick in (min, max))
    budget = least + share * (most - least)
    found = compress.choose(options, budget, weights)
    assert found.cost <= budget

    def best(budget):
        plans = itertools.product(*options.values())
        within = [plan for plan in plans if sum(each.cost for each in plan) <= budget]
        return min(
            (sum(weights[path] * each.lost for path, each in zip(options, plan, strict=True)) for plan in within),
            default=np.inf,
        )

    longest = max(each.cost - found[0].cost for found in options.values() for each in found)
    assert best(budget) * (1 - 1e-9) <= found.total <= best(budget - longest) * (1 + 1e-9)
    assert all(found.total <= total for total in found.uniform.values())
    assert found.total == pytest.approx(sum(weights[path] * found.lost[path] for path in options))


def test_too_small_a_budget_is_refused():
    options = {"a": [Option(Spec("low_rank", 8, 8, rank=1), 16, 0.5)]}
    with pytest.raises(InputError, match="cost 16 at the least, and the budget leaves 15"):
        compress.choose(options, 15, {"a": 1.0})


# Targets


@pytest.mark.parametrize("factor", [1.5, 3])
def test_a_layer_factor_is_kept(factor):
    params = _model(a=_decaying(0), b=_decaying(1, (36, 24), 0.95))
    small, losses = compress.compress(params, target=Target("layer_factor", factor), allowed=FEW)
    before, after = (sum(each) for each in zip(*((x.params_before, x.params_after) for x in losses), strict=True))
    assert factor <= before / after < factor * 1.25
    assert compress.parameter_count(small) == after


def test_a_model_factor_counts_all_parameters():
    params = _model(a=_decaying(0), b=_decaying(1)) | {"wte": jnp.zeros((20, 24))}
    found = compress.allocate(params, Target("model_factor", 1.5), FEW)
    _, factor = compress.compression_factors(params, found.specs)
    assert 1.5 <= factor < 1.65
    with pytest.raises(InputError, match="what is not given out has 480 of the model's 2,208 parameters"):
        compress.allocate(params, Target("model_factor", 5), FEW)


def test_bytes_are_those_of_the_dtypes():
    params = _model(a=_decaying(0), b=_decaying(1)) | {"wte": jnp.zeros((20, 24))}
    params["b"]["kernel"] = params["b"]["kernel"].astype(jnp.bfloat16)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    small, _ = compress.compress(params, target=Target("bytes", 0.6 * whole), allowed=FEW)
    assert 0.55 * whole < sum(leaf.nbytes for leaf in jax.tree.leaves(small)) <= 0.6 * whole


def _row(op, rank, us, impl="torch_bmm", **more):
    fields = {"kind": "bench", "op": op, "in_features": 24, "out_features": 36, "blocks": [2, 2], "tokens": 1}
    ranks = {"rank": 2 * rank if op == "monarch" else rank or None, "block_rank": rank if op == "monarch" else None}
    return {**fields, **ranks, "impl": impl, "p50": us, "passed": True, **more}


def test_microseconds_are_those_of_verified_records():
    rows = [
        _row("dense", 0, 10.0),
        _row("low_rank", 4, 3.0),
        _row("low_rank", 8, 6.0),
        _row("low_rank", 8, 5.0, "triton_streaming"),
        _row("low_rank", 8, 1.0, "paper_low_rank"),
        _row("low_rank", 8, 1.0, "int8_streaming", quantisation_error=0.01),
        _row("low_rank", 8, 1.0, "broken", passed=False),
        _row("low_rank", 8, 1.0, tokens=16),
        _row("monarch", 3, 4.0),
        {"kind": "env"},
        _row("monarch", 3, 9.0) | {"layer": "*", "in_features": None, "blocks": None},
    ]
    times = compress.latencies(rows, 1)
    low_rank = {rank: Spec("low_rank", 24, 36, rank=rank) for rank in (4, 8)}
    monarch = Spec("monarch", 24, 36, (2, 2), 3)
    assert times == {Spec("dense", 24, 36): 10.0, low_rank[4]: 3.0, low_rank[8]: 5.0, monarch: 4.0}
    params = _model(easy=_decaying(0, decay=0.5), hard=_decaying(1, decay=0.99))
    allowed = Allowed(("dense", "low_rank"), multiple=4)
    found = compress.allocate(params, Target("microseconds", 13), allowed, latencies=times)
    assert found.specs == {"easy": low_rank[4], "hard": Spec("dense", 24, 36)}
    assert found.cost == 13
    with pytest.raises(InputError, match="needs the measured times"):
        compress.allocate(params, Target("microseconds", 13), allowed)
    with pytest.raises(InputError, match=r"easy: none of monarch fits a layer of \(24, 36\)"):
        compress.allocate(params, Target("microseconds", 13), Allowed(("monarch",), (3,), 5), latencies=times)


def test_ranks_are_multiples_and_blocks_those_that_divide():
    specs = Allowed(blocks=(4, 5), multiple=16).specs(256, 512)
    assert {spec.blocks for spec in specs} == {(1, 1), (4, 4)}
    assert {spec.rank % 16 for spec in specs} == {0}
    assert max(factors.parameter_count(spec) for spec in specs) == 256 * 512
    assert {spec.format for spec in specs} == {"dense", "low_rank", "monarch", "blast"}


# Plans


def test_a_plan_is_rules_that_can_be_saved_edited_and_used(tmp_path):
    params = _model(**{"h[0]": _decaying(0), "b": _decaying(1), "c": _decaying(2, (24, 37))})
    found = compress.allocate(params, Target("layer_factor", 1.7), FEW)
    file = tmp_path / "plan.json"
    compress.save(found.specs, file)
    read = compress.plan(compress.linears(params), compress.load(file), {"rank": 7, "block_rank": 7, "blocks": 9})
    assert read == found.specs
    edited = json.loads(file.read_text())
    assert len(file.read_text().splitlines()) == len(edited) + 2
    edited[0][1] = {"format": "low_rank", "rank": 3}
    file.write_text(json.dumps(edited))
    assert compress.plan(compress.linears(params), compress.load(file), {})[edited[0][0].replace("[[]", "[")].rank == 3


@pytest.mark.parametrize("text", ["", "{}", "[]", '["a"]', "[[1, 2, 3]]"])
def test_what_is_no_list_of_rules_is_refused(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=r"plan\.json"):
        compress.load(tmp_path / "plan.json")
    with pytest.raises(InputError, match=r"no rules at .*missing\.json"):
        compress.load(tmp_path / "missing.json")


# On trained weights


def test_a_budget_loses_less_than_equal_shares_on_trained_weights(trained):
    """Measured by fits, not by the curves that it was chosen by."""
    trained, factor = {"h_2": trained["h_2"]}, 2
    allowed = Allowed(("dense", "low_rank", "monarch", "blast"), blocks=(4,), multiple=8)
    found = compress.allocate(trained, Target("layer_factor", factor), allowed)

    def lost(specs):
        _, losses = compress.compress(trained, specs)
        return sum(loss.relative_error**2 for loss in losses)

    assert compress.compression_factors(trained, found.specs)[0] >= factor
    reached = lost(found.specs)
    assert reached == pytest.approx(found.total, rel=0.15)
    for format, blocks in (("low_rank", 1), ("monarch", 4), ("blast", 4)):
        equal = {}
        for path, (i, o) in compress.linears(trained).items():
            specs = Allowed((format,), (blocks,), 8).specs(i, o)
            equal[path] = [spec for spec in specs if factors.parameter_count(spec) <= i * o / factor][-1]
        assert reached < 0.95 * lost(equal), format


# Sensitivities


def test_sensitivities_tell_which_layer_matters():
    params = _model(quiet=_decaying(0, decay=0.9), loud=_decaying(1, decay=0.9), deaf=_decaying(2, decay=0.9))
    share = {"quiet": 1.0, "loud": 30.0, "deaf": 0.0}

    def loss(tree):
        changes = {path: jnp.linalg.norm(tree[path]["kernel"] - params[path]["kernel"]) for path in share}
        return 5.0 + sum(share[path] * float(change) ** 2 for path, change in changes.items())

    specs = {path: Spec("low_rank", 24, 36, rank=4) for path in share}
    found = compress.sensitivities(params, specs, loss)
    assert found["loud"] / found["quiet"] == pytest.approx(30, rel=1e-2)
    assert 0 < found["deaf"] < found["quiet"]
    equal, weighted = (
        compress.allocate(params, Target("layer_factor", 2.5), FEW, weights=weights) for weights in (None, found)
    )
    assert weighted.lost["loud"] < equal.lost["loud"]


def test_where_no_layer_matters_all_count_alike():
    params = _model(a=_decaying(0), b=_decaying(1))
    specs = {path: Spec("low_rank", 24, 36, rank=4) for path in params}
    assert compress.sensitivities(params, specs, lambda tree: 3.0) == {"a": 1.0, "b": 1.0}
    losses = iter([3.0, float("nan")])
    with pytest.raises(InputError, match="a: the model's loss is no finite number"):
        compress.sensitivities(params, specs, lambda tree: next(losses))


def test_the_size_of_a_weight_changes_no_curve():
    small, large = (curves.curve(_decaying(0) * size, "low_rank", (1, 1), (2, 5), KEY) for size in (1.0, 1e25))
    np.testing.assert_allclose(large.lost, small.lost, rtol=1e-3)


# What is refused


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_that_are_no_weights_are_told(weight):
    with pytest.raises(InputError, match="a has weight"):
        compress.allocate(_model(a=_decaying(0)), Target("layer_factor", 2), FEW, weights={"a": weight})
    with pytest.raises(InputError, match="b has weight"):
        compress.allocate(_model(a=_decaying(0)), Target("layer_factor", 2), FEW, weights={"b": 1.0})


def test_statistics_that_are_none_are_told():
    params, target = _model(a=_decaying(0)), Target("layer_factor", 2)
    for inputs, said in (
        (_statistics(23), "a: the statistics are of 23 inputs, and the layer has 24"),
        (sums.empty(24), "a: no calibration input reached the layer"),
        (_statistics(24)._replace(scatter=jnp.full((24, 24), jnp.nan)), "a: its calibration inputs hold NaN"),
    ):
        with pytest.raises(InputError, match=said):
            compress.allocate(params, target, FEW, statistics={"a": inputs})


def test_times_of_two_devices_are_told():
    rows = [_row("dense", 0, 10.0, device="one"), _row("low_rank", 4, 3.0, device="two")]
    with pytest.raises(InputError, match="the times are of one, None and two, None"):
        compress.latencies(rows, 1)


def test_wrong_requests_are_told():
    params = _model(a=_decaying(0))
    specs = {"a": Spec("low_rank", 24, 36, rank=2)}
    for given_specs, target in ((None, None), (specs, Target("layer_factor", 2))):
        with pytest.raises(InputError, match="either specs or a target"):
            compress.compress(params, given_specs, target=target)
    with pytest.raises(InputError, match=r'unknown target "layer_factr".*Did you mean "layer_factor"'):
        Target("layer_factr", 2)
    for value in (0, -1, float("nan")):
        with pytest.raises(InputError, match="is not positive"):
            Target("bytes", value)
    with pytest.raises(InputError, match='unknown format "lowrank"'):
        Allowed(("lowrank",))
    with pytest.raises(InputError, match="must be 1 or more"):
        Allowed(multiple=0)
    with pytest.raises(InputError, match="no format is allowed"):
        Allowed(())
    with pytest.raises(InputError, match="at the least"):
        compress.allocate(params, Target("layer_factor", 100), FEW)
    with pytest.raises(InputError, match="nowhere has no dense kernel"):
        compress.allocate(params, Target("layer_factor", 2), FEW, paths=["nowhere"])
    with pytest.raises(InputError, match="no dense layer"):
        compress.allocate({"wte": jnp.zeros((3, 4))}, Target("layer_factor", 2), FEW)
    with pytest.raises(InputError, match="a cannot be compressed: its weight holds NaN or infinity"):
        compress.allocate(_model(a=_decaying(0).at[3, 3].set(jnp.nan)), Target("layer_factor", 2), FEW)
