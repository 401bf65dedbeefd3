"""What is benchmarked: a model's own layers with its own factors, and the published ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blrlab_ops import shapes

from blrlab import factors
from blrlab.bench import own_problems, published_problems
from blrlab.factors import Spec

KEY = jax.random.key(0)


def plain(layer) -> np.ndarray:
    """Multiply in NumPy and float64, block by block, from the format's definition."""
    if layer.spec.format == "dense":
        return np.asarray(layer.x, np.float64) @ np.asarray(layer.kernel, np.float64)
    wide = {name: np.asarray(factor, np.float64) for name, factor in layer.kernel.items()}
    V, U, S = wide["V"], wide["U"], wide.get("S")
    (b1, b2), (p, q) = layer.spec.blocks, layer.spec.block_sizes
    weight = np.zeros((b1 * p, b2 * q))
    for row in range(b1):
        for column in range(b2):
            block = {
                "low_rank": lambda: V @ U,
                "monarch": lambda row=row, column=column: V[row, column] @ U[row, column],
                "blast": lambda row=row, column=column: V[row] @ np.diag(S[row, column]) @ U[column],
            }[layer.spec.format]()
            weight[row * p : (row + 1) * p, column * q : (column + 1) * q] = block
    return np.asarray(layer.x, np.float64) @ weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", factors.FORMATS)
def test_the_reference_is_a_product_in_float64_of_the_very_numbers(problem, format: str, dtype: str) -> None:
    layer = problem(format, dtype)
    assert layer.reference.dtype == np.float64
    np.testing.assert_allclose(layer.reference, plain(layer), rtol=1e-10, atol=1e-10)
    assert layer.reference is layer.reference, "it is computed once"
    assert (jnp.ones(1) * np.float64(1)).dtype == jnp.float32, "and leaves JAX in 32 bits"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("format", factors.FORMATS)
def test_the_dense_counterpart_is_the_same_layer_multiplied_out(problem, format: str, dtype: str) -> None:
    layer = problem(format, dtype)
    wide = layer.dense()
    assert wide.spec == Spec("dense", 24, 36)
    assert (wide.kernel.shape, str(wide.kernel.dtype)) == ((24, 36), dtype)
    assert (wide.net, wide.layer, wide.tokens, wide.dtype) == (layer.net, layer.layer, 7, dtype)
    assert wide.x is layer.x
    difference = np.linalg.norm(wide.reference - layer.reference) / np.linalg.norm(layer.reference)
    assert difference <= 2 * float(jnp.finfo(dtype).eps)


FC, FC_WIDER = Spec("monarch", 8, 16, (2, 2), 3), Spec("monarch", 8, 16, (2, 2), 4)
PROJECTION, OUT = Spec("low_rank", 16, 8, rank=3), Spec("low_rank", 8, 8, rank=3)
SPECS = {
    "h_0/attn/c_attn": Spec("dense", 8, 24),
    "h_0/attn/c_proj": OUT,
    "h_0/mlp/c_fc": FC,
    "h_0/mlp/c_proj": PROJECTION,
    "h_1/attn/c_proj": OUT,
    "h_1/mlp/c_fc": FC_WIDER,
    "h_1/mlp/c_proj": PROJECTION,
    "h_2/mlp/c_fc": FC,
}
PICKED = {"h_0/attn/c_proj": OUT, "h_0/mlp/c_fc": FC, "h_0/mlp/c_proj": PROJECTION, "h_1/mlp/c_fc": FC_WIDER}


def model() -> dict:
    draw, params = np.random.default_rng(0), {}
    for path, spec in SPECS.items():
        block, part, name = path.split("/")
        sizes = factors.shapes(spec)
        kernel = (
            {factor: jnp.asarray(draw.normal(size=size), jnp.float32) for factor, size in sizes.items()}
            if isinstance(sizes, dict)
            else jnp.zeros(sizes)
        )
        params.setdefault(block, {}).setdefault(part, {})[name] = {"kernel": kernel, "bias": jnp.zeros(1)}
    return params


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_name_and_spec_of_a_model_is_taken_once_with_its_own_factors(dtype: str) -> None:
    params = model()
    found = list(own_problems(params, SPECS, 5, dtype, KEY))
    assert [(each.layer, each.spec) for each in found] == [
        (path.rsplit("/", 1)[1], spec) for path, spec in PICKED.items()
    ]
    for each, path in zip(found, PICKED, strict=True):
        block, part, name = path.split("/")
        own = params[block][part][name]["kernel"]
        assert each.kernel.keys() == own.keys()
        for factor, values in own.items():
            assert np.array_equal(each.kernel[factor], values.astype(dtype))
            assert str(each.kernel[factor].dtype) == dtype
        assert (each.net, each.tokens, each.dtype) == ("own", 5, dtype)
        assert each.x.shape == (5, each.spec.in_features)


def test_inputs_have_unit_variance_and_differ_from_layer_to_layer() -> None:
    found = list(own_problems(model(), SPECS, 4000, "float32", KEY))
    for each in found:
        assert float(np.var(each.x)) == pytest.approx(1.0, abs=0.05)
    (first, second) = (each for each in found if each.layer == "c_fc")
    assert not np.array_equal(first.x, second.x)
    again = list(own_problems(model(), SPECS, 4000, "float32", KEY))
    assert np.array_equal(found[0].x, again[0].x), "a key gives the same numbers"


@pytest.mark.parametrize("format", ["low_rank", "monarch", "blast"])
def test_published_layers_have_the_published_sizes_ranks_and_blocks(
    format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def zeros(key: jax.Array, spec: Spec) -> dict[str, jax.Array]:
        return {name: jnp.zeros(size) for name, size in factors.shapes(spec).items()}

    monkeypatch.setattr(factors, "init", zeros)
    found = list(published_problems("gpt2s", format, 0, "float32", KEY))
    known = shapes.layers("gpt2s")
    assert len(found) == len(known) == 3
    for each, layer in zip(found, known, strict=True):
        rank, blocks = layer.choice(format)
        assert (each.net, each.layer, each.tokens) == ("gpt2s", layer.name, layer.tokens)
        assert (each.spec.in_features, each.spec.out_features) == (layer.in_features, layer.out_features)
        assert (each.spec.format, each.spec.blocks, each.spec.total_rank) == (format, (blocks, blocks), rank)
        assert factors.spec_of(each.kernel) == each.spec


def test_published_layers_take_other_tokens_and_dtypes_and_keep_the_size_of_activations() -> None:
    first = next(iter(published_problems("gpt2s", "monarch", 16, "bfloat16", KEY)))
    assert (first.tokens, first.dtype) == (16, "bfloat16")
    assert {str(leaf.dtype) for leaf in first.kernel.values()} == {"bfloat16"}
    assert float(np.var(first.reference)) == pytest.approx(1.0, rel=0.2), "weights have variance 1 / i"


def test_an_unknown_net_is_an_error() -> None:
    with pytest.raises(ValueError, match="gpt3"):
        list(published_problems("gpt3", "monarch", 0, "float32", KEY))
