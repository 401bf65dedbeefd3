"""Compression of a parameter tree: what changes, what it costs, and that numpy finds the same errors."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze

from blrlab import compress, factors
from blrlab.compress import Loss
from blrlab.errors import InputError
from blrlab.factors import Spec
from blrlab.models import gpt2

SPECS = {
    "mlp/down": Spec("monarch", 20, 12, (2, 3), 2),
    "attn": Spec("low_rank", 12, 20, rank=5),
    "mlp/up": Spec("blast", 12, 20, (3, 2), 5),
    "mlp/gate": Spec("dense", 12, 20),
}


def _tree():
    random = np.random.default_rng(0)

    def numbers(*size):
        return jnp.asarray(random.normal(size=size), jnp.float32)

    def layer(i, o):
        return {"kernel": numbers(i, o), "bias": numbers(o)}

    return {
        "attn": layer(12, 20),
        "mlp": {"up": {"kernel": numbers(12, 20)}, "down": layer(20, 12), "gate": layer(12, 20)},
        "left": layer(12, 20),
        "norm": {"scale": jnp.ones(12)},
        "embed": {"embedding": jnp.ones((30, 12))},
    }


@pytest.fixture(scope="module")
def done():
    """A tree, its compressed twin, the losses, and the losses as they were reported."""
    tree, seen = _tree(), []
    small, losses = compress.compress(tree, SPECS, jax.random.key(7), seen.append)
    return tree, small, losses, seen


def _at(tree, path):
    for name in path.split("/"):
        tree = tree[name]
    return tree


def _by_hand(kernel, spec):
    """Multiply a kernel out in float64."""
    if spec.format == "dense":
        return np.asarray(kernel, np.float64)
    V, U = (np.asarray(kernel[name], np.float64) for name in ("V", "U"))
    if spec.format == "low_rank":
        return V @ U
    if spec.format == "monarch":
        return np.block([list(row) for row in V @ U])
    S = np.asarray(kernel["S"], np.float64)
    return np.block([[V[l] * S[l, k] @ U[k] for k in range(len(U))] for l in range(len(V))])


def test_only_the_named_layers_change(done):
    tree, small, _, _ = done
    for path, spec in SPECS.items():
        assert factors.spec_of(_at(small, path)["kernel"]) == spec
    rest, wanted = copy.deepcopy((small, tree))
    for path in SPECS:
        del _at(rest, path)["kernel"], _at(wanted, path)["kernel"]
    assert jax.tree.structure(rest) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, rest, wanted)


def test_a_dense_spec_keeps_the_weight(done):
    tree, small, losses, _ = done
    np.testing.assert_array_equal(small["mlp"]["gate"]["kernel"], tree["mlp"]["gate"]["kernel"])
    assert losses[-1].relative_error == 0


def test_the_given_tree_is_left_as_it_is(done):
    tree, _, _, _ = done
    jax.tree.map(np.testing.assert_array_equal, tree, _tree())
    assert all(not isinstance(_at(tree, path)["kernel"], dict) for path in SPECS)


def test_losses_are_in_the_order_of_the_specs_and_reported_once(done):
    _, _, losses, seen = done
    assert [loss.path for loss in losses] == list(SPECS)
    assert seen == losses


def test_losses_say_what_became_of_a_layer(done):
    _, _, losses, _ = done
    for loss in losses:
        assert isinstance(loss, Loss)
        assert loss.spec == SPECS[loss.path]
        assert loss.params_before == 240
        assert loss.seconds > 0
    algorithms = {loss.spec.format: loss.algorithm for loss in losses}
    assert algorithms == {"low_rank": "svd", "monarch": "block_svd", "blast": "alternating", "dense": "none"}
    counts = {"attn": 5 * 32, "mlp/down": 2 * (3 * 20 + 2 * 12), "mlp/up": 5 * (32 + 6), "mlp/gate": 240}
    assert {loss.path: loss.params_after for loss in losses} == counts
    assert {loss.spec.format for loss in losses if loss.sweeps} == {"blast"}
    assert all(loss.output_error is None for loss in losses)


def test_errors_are_those_that_numpy_finds(done):
    tree, small, losses, _ = done
    for loss in losses:
        weight = np.asarray(_at(tree, loss.path)["kernel"], np.float64)
        product = _by_hand(_at(small, loss.path)["kernel"], loss.spec)
        wanted = np.linalg.norm(weight - product) / np.linalg.norm(weight)
        assert loss.relative_error == pytest.approx(wanted, rel=1e-5)
        assert loss.spec.format == "dense" or 0.05 < wanted < 0.8


def test_errors_of_closed_forms_are_the_tails_of_the_singular_values(done):
    tree, _, losses, _ = done
    found = {loss.spec.format: loss.relative_error for loss in losses}
    low = np.asarray(tree["attn"]["kernel"], np.float64)
    values = np.linalg.svd(low, compute_uv=False)
    assert found["low_rank"] == pytest.approx(np.linalg.norm(values[5:]) / np.linalg.norm(low), rel=1e-5)
    weight = np.asarray(tree["mlp"]["down"]["kernel"], np.float64)
    blocks = weight.reshape(2, 10, 3, 4).transpose(0, 2, 1, 3)
    tails = np.linalg.svd(blocks, compute_uv=False)[..., 2:]
    assert found["monarch"] == pytest.approx(np.linalg.norm(tails) / np.linalg.norm(weight), rel=1e-5)


def test_the_key_decides_the_random_starts(done):
    tree, small, _, _ = done
    again, _ = compress.compress(tree, SPECS, jax.random.key(7))
    jax.tree.map(np.testing.assert_array_equal, again, small)
    other, _ = compress.compress(tree, SPECS, jax.random.key(8))
    assert not np.array_equal(other["mlp"]["up"]["kernel"]["V"], small["mlp"]["up"]["kernel"]["V"])
    default, zero = (compress.compress(tree, SPECS, key)[0] for key in (None, jax.random.key(0)))
    jax.tree.map(np.testing.assert_array_equal, default, zero)


def test_layers_of_one_spec_have_their_own_starts():
    spec, weight = SPECS["mlp/up"], _tree()["attn"]["kernel"]
    small, _ = compress.compress({"a": {"kernel": weight}, "b": {"kernel": weight}}, {"a": spec, "b": spec})
    assert not np.array_equal(small["a"]["kernel"]["V"], small["b"]["kernel"]["V"])


def test_frozen_and_numpy_trees_are_taken(done):
    tree, small, _, _ = done
    for given in (freeze(tree), jax.tree.map(np.asarray, tree)):
        found, _ = compress.compress(given, SPECS, jax.random.key(7))
        jax.tree.map(np.testing.assert_array_equal, found, small)
    assert isinstance(freeze(tree), FrozenDict)


def test_expand_is_the_inverse_up_to_the_error(done):
    tree, small, _, _ = done
    wide = compress.expand(small)
    assert jax.tree.map(jnp.shape, wide) == jax.tree.map(jnp.shape, tree)
    for path, spec in SPECS.items():
        np.testing.assert_allclose(
            _at(wide, path)["kernel"], _by_hand(_at(small, path)["kernel"], spec), rtol=0, atol=1e-5
        )
    jax.tree.map(np.testing.assert_array_equal, wide["left"], tree["left"])
    jax.tree.map(np.testing.assert_array_equal, compress.expand(tree), tree)
    assert isinstance(small["attn"]["kernel"], dict)


def test_shapes_are_the_real_ones(done):
    tree, small, _, _ = done
    for given in (tree, jax.eval_shape(lambda: tree)):
        found = compress.shapes_of(given, SPECS)
        assert found == jax.eval_shape(lambda: small)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_narrow_weights_stay_narrow_and_their_error_is_of_what_is_stored(dtype):
    weight = _tree()["attn"]["kernel"].astype(dtype)
    small, (loss,) = compress.compress({"a": {"kernel": weight}}, {"a": Spec("low_rank", 12, 20, rank=12)})
    assert {leaf.dtype for leaf in jax.tree.leaves(small)} == {jnp.dtype(dtype)}
    exact, product = np.asarray(weight, np.float64), _by_hand(small["a"]["kernel"], loss.spec)
    wanted = np.linalg.norm(exact - product) / np.linalg.norm(exact)
    assert loss.relative_error == pytest.approx(wanted, rel=1e-3)
    assert 0 < wanted < 2 * float(jnp.finfo(dtype).eps)
    assert compress.shapes_of({"a": {"kernel": weight}}, {"a": loss.spec}) == jax.eval_shape(lambda: small)


def _spoilt(path, number):
    tree = _tree()
    layer = _at(tree, path)
    layer["kernel"] = layer["kernel"].at[3, 4].set(number)
    return tree


@pytest.mark.parametrize("path", list(SPECS))
def test_a_weight_with_nan_names_its_path(path):
    with pytest.raises(InputError, match=f"^{path} cannot be compressed: its weight holds NaN or infinity"):
        compress.compress(_spoilt(path, np.nan), SPECS, jax.random.key(7))


@pytest.mark.parametrize("number", [np.inf, -np.inf], ids=str)
@pytest.mark.parametrize(
    "spec",
    [Spec("low_rank", 12, 20, rank=4), Spec("monarch", 12, 20, (2, 2), 2), Spec("blast", 12, 20, (2, 2), 3)],
    ids=lambda spec: spec.format,
)
def test_a_weight_with_infinity_is_refused_before_its_svd_which_would_not_end(spec, number, monkeypatch):
    def project(weight, spec, key=None):
        raise AssertionError("LAPACK's singular value decomposition of a matrix with infinity may run for ever")

    monkeypatch.setattr(factors, "project", project)
    with pytest.raises(InputError, match=r"^attn cannot be compressed: its weight holds NaN or infinity"):
        compress.compress(_spoilt("attn", number), {"attn": spec})


@pytest.mark.parametrize("path", list(SPECS))
def test_a_weight_of_zeros_is_compressed_without_an_error(path):
    spec = SPECS[path]
    tree = {"a": {"kernel": jnp.zeros((spec.in_features, spec.out_features))}}
    small, (loss,) = compress.compress(tree, {"a": spec})
    assert loss.relative_error == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(small))
    np.testing.assert_array_equal(_by_hand(small["a"]["kernel"], spec), 0)


@pytest.mark.parametrize("path", ["nothing", "mlp", "mlp/none", "norm", "embed", "attn/kernel", "attn/kernel/deep", ""])
def test_a_path_without_a_dense_kernel(path):
    for run in (compress.compress, compress.shapes_of):
        with pytest.raises(InputError, match=f"^{path} has no dense kernel to compress.$"):
            run(_tree(), {path: SPECS["attn"]})


def test_what_is_factored_already_is_not_compressed_again(done):
    _, small, _, _ = done
    with pytest.raises(InputError, match="attn has no dense kernel"):
        compress.compress(small, {"attn": SPECS["attn"]})


@pytest.mark.parametrize("run", [compress.compress, compress.shapes_of], ids=["compress", "shapes_of"])
def test_a_spec_of_another_size_names_the_layer(run):
    with pytest.raises(InputError, match=r"^left.*12, 20.*20 x 12"):
        run(_tree(), {"left": Spec("low_rank", 20, 12, rank=3)})


def test_nothing_to_compress_is_no_error():
    tree = _tree()
    small, losses = compress.compress(tree, {})
    assert losses == []
    jax.tree.map(np.testing.assert_array_equal, small, tree)
    assert compress.compression_factors(tree, {}) == (1.0, 1.0)


def test_parameters_are_counted_in_arrays_and_shapes():
    assert compress.parameter_count(_tree()) == 5 * 240 + 20 + 12 + 20 + 20 + 12 + 360
    assert compress.parameter_count(jax.eval_shape(_tree)) == compress.parameter_count(_tree())
    assert compress.parameter_count({"a": jnp.zeros(()), "b": jnp.zeros((0, 3))}) == 1


def test_compression_factors_by_hand(done):
    tree, small, _, _ = done
    after = 160 + 168 + 190 + 240
    layer, model = compress.compression_factors(tree, SPECS)
    assert layer == pytest.approx(4 * 240 / after)
    assert model == pytest.approx(1644 / (1644 - 4 * 240 + after))
    assert model == pytest.approx(compress.parameter_count(tree) / compress.parameter_count(small))


@pytest.mark.parametrize(
    ("format", "factored"),
    [
        ("monarch", 12 * 192 * (768 + 2304 + 2 * (768 + 3072))),
        ("low_rank", 12 * 192 * (768 + 2304 + 2 * (768 + 3072))),
        ("blast", 12 * 192 * (768 + 2304 + 36 + 2 * (768 + 3072 + 36))),
    ],
)
def test_compression_factors_of_gpt2_small_at_its_published_ranks(format, factored):
    shapes = gpt2.parameter_shapes(gpt2.Config())
    rules = [("*/attn/c_attn", {}), ("*/mlp/*", {})]
    specs = compress.plan(compress.linears(shapes), rules, {"format": format, "rank": 0, "blocks": 0}, "gpt2s")
    dense = 12 * (768 * 2304 + 2 * 768 * 3072)
    layer, model = compress.compression_factors(shapes, specs)
    assert layer == pytest.approx(dense / factored)
    assert model == pytest.approx(124_439_808 / (124_439_808 - dense + factored))
    assert round(layer, 2) == (3.14 if format != "blast" else 3.11)
    assert round(model, 2) == 1.74
    assert compress.parameter_count(compress.shapes_of(shapes, specs)) == 124_439_808 - dense + factored
