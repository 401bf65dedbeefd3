"""What is benchmarked: a model's own layers with its own factors, and published ones, at any number of tokens."""

import numpy as np
import pytest
import torch
from blrlab_ops import shapes
from blrlab_ops.testing import Case

from blrlab.bench import problem as problems
from blrlab.bench.problem import Group, custom_case, dense_weight, fields, given_group, named_groups, total_rank
from blrlab.errors import InputError

CPU = torch.device("cpu")
FORMATS = ("dense", "low_rank", "monarch", "blast")
DTYPES = ("float32", "bfloat16", "float16")


def wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def by_blocks(case: Case, kernel) -> np.ndarray:
    """Multiply out in NumPy and float64, block by block, from the format's definition."""
    if case.format == "dense":
        return wide(kernel)
    V, U = wide(kernel["V"]), wide(kernel["U"])
    (b1, b2), S = case.blocks, wide(kernel["S"]) if case.format == "blast" else None
    p, q = case.in_features // b1, case.out_features // b2
    weight = np.zeros((case.in_features, case.out_features))
    for row in range(b1):
        for column in range(b2):
            block = {
                "low_rank": lambda: V @ U,
                "monarch": lambda row=row, column=column: V[row, column] @ U[row, column],
                "blast": lambda row=row, column=column: V[row] @ np.diag(S[row, column]) @ U[column],
            }[case.format]()
            weight[row * p : (row + 1) * p, column * q : (column + 1) * q] = block
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS)
def test_the_dense_weight_is_the_very_numbers_multiplied_out_in_float64(problem, format: str, dtype: str) -> None:
    layer = problem(format, dtype)
    weight = dense_weight(layer.kernel)
    assert (weight.dtype, tuple(weight.shape)) == (torch.float64, (24, 36))
    np.testing.assert_allclose(weight.numpy(), by_blocks(layer.case, layer.kernel), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_formats_of_a_group_meet_the_same_input_in_one_dtype(group, dtype: str) -> None:
    found = group(*FORMATS, dtype=dtype).problems(CPU)
    assert [each.op for each in found] == list(FORMATS)
    for each in found:
        assert each.x is found[0].x
        assert (each.net, each.layer, each.dtype) == ("own", "c_fc", dtype)
        assert {str(leaf.dtype) for leaf in problems.leaves(each.kernel)} == {f"torch.{dtype}"}
        assert tuple(each.x.shape) == (7, 24)
        assert tuple(dense_weight(each.kernel).shape) == (24, 36)


@pytest.mark.parametrize("format", FORMATS)
def test_bytes_of_weights_are_counted_by_element(problem, format: str) -> None:
    elements = {"dense": 24 * 36, "low_rank": 5 * (24 + 36), "monarch": 4 * (2 * 24 + 3 * 36), "blast": 5 * (60 + 6)}
    assert problem(format, "float32").weight_bytes == 4 * elements[format]
    assert problem(format, "bfloat16").weight_bytes == 2 * elements[format]


def test_random_layers_keep_the_size_of_activations() -> None:
    sizes = (("dense", (1, 1), 0), ("low_rank", (1, 1), 64), ("monarch", (4, 4), 16), ("blast", (4, 4), 64))
    cases = tuple(Case(format, 500, 256, 384, blocks, rank) for format, blocks, rank in sizes)
    for each in Group("custom", "a", "float32", cases).problems(CPU):
        assert float(each.x.var()) == pytest.approx(1.0, abs=0.05), "inputs have unit variance"
        assert float((each.x @ dense_weight(each.kernel).float()).var()) == pytest.approx(1.0, rel=0.1), each.op


def test_a_seed_gives_the_same_numbers_and_another_seed_others(group) -> None:
    (first,), (again,), (other,) = (group("blast", seed=seed).problems(CPU) for seed in (3, 3, 4))
    assert torch.equal(first.x, again.x)
    assert torch.equal(first.kernel["S"], again.kernel["S"])
    assert not torch.equal(first.x, other.x)
    assert not torch.equal(first.kernel["S"], other.kernel["S"])


@pytest.mark.parametrize("format", ["low_rank", "monarch", "blast"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_given_layer_keeps_its_factors_beside_what_they_multiply_out_to(problem, format: str, dtype: str) -> None:
    own = problem(format, dtype)
    layer = given_group("own", "c_proj", {name: leaf.requires_grad_() for name, leaf in own.kernel.items()}, 5)
    assert (layer.net, layer.layer, layer.dtype, layer.tokens) == ("own", "c_proj", dtype, 5)
    dense, factored = layer.problems(CPU)
    assert dense.case == Case("dense", 5, 24, 36, (1, 1), 0)
    assert factored.case == own.case._replace(tokens=5)
    assert factored.kernel.keys() == own.kernel.keys()
    for name, leaf in own.kernel.items():
        assert torch.equal(factored.kernel[name], leaf)
        assert not factored.kernel[name].requires_grad, "it is cut from autograd"
    assert (dense.dtype, factored.dtype) == (dtype, dtype)
    weight = dense_weight(own.kernel).detach()
    assert float((dense.kernel.double() - weight).norm() / weight.norm()) <= torch.finfo(getattr(torch, dtype)).eps
    assert dense.x is factored.x


def test_given_layers_differ_in_their_inputs_by_their_seed(problem) -> None:
    kernel = problem("monarch").kernel
    first, second = (given_group("own", "c_fc", kernel, 9, seed).problems(CPU)[0].x for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("format", FORMATS)
def test_published_layers_have_the_published_sizes_ranks_and_blocks(format: str) -> None:
    known = shapes.layers("gpt2s")
    found = named_groups(["gpt2s"], [], [format], [0], "bfloat16")
    assert len(found) == len(known) == 3
    for each, layer in zip(found, known, strict=True):
        rank, blocks = layer.choice(format)
        (case,) = each.cases
        assert (each.net, each.layer, each.dtype, each.tokens) == ("gpt2s", layer.name, "bfloat16", layer.tokens)
        assert (case.format, case.in_features, case.out_features) == (format, layer.in_features, layer.out_features)
        assert case.blocks == (blocks, blocks)
        assert total_rank(case) == (rank or None)


def test_zero_tokens_are_the_published_ones_and_no_number_is_measured_twice() -> None:
    (published,) = named_groups(["llama7b"], ["qkvo"], ["dense"], [0], "float32")
    found = named_groups(["llama7b"], ["qkvo"], ["dense"], [16, 0, 1, published.tokens, 16], "float32")
    assert [each.tokens for each in found] == [1, 16, published.tokens]


def test_layers_are_kept_by_name_in_every_net() -> None:
    found = named_groups(["llama7b", "gpt2s"], ["c_fc", "qkvo"], FORMATS, [4], "float32")
    assert [(each.net, each.layer) for each in found] == [("llama7b", "qkvo"), ("gpt2s", "c_fc")]
    assert [case.format for case in found[0].cases] == list(FORMATS)


@pytest.mark.parametrize(
    ("nets", "layers", "ops", "sentence"),
    [
        (["gpt2"], [], ["dense"], 'unknown net "gpt2": .*Did you mean "gpt2s"'),
        (["gpt2s"], ["c_fd"], ["dense"], 'unknown layer of gpt2s "c_fd": .*Did you mean "c_fc"'),
        (["gpt2s"], ["qkvo"], ["dense"], 'unknown layer of gpt2s "qkvo": it is one of c_attn, c_fc, c_proj'),
        (["gpt2s"], [], ["monarc"], 'unknown op "monarc": .*Did you mean "monarch"'),
    ],
)
def test_unknown_names_are_told_the_nearest(nets, layers, ops, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        named_groups(nets, layers, ops, [0], "float32")


def test_a_layer_of_ones_own_is_cut_by_its_total_rank() -> None:
    assert custom_case("dense", 3, 24, 36, (3, 2), 12) == Case("dense", 3, 24, 36, (1, 1), 0)
    assert custom_case("low_rank", 3, 24, 36, (3, 2), 12) == Case("low_rank", 3, 24, 36, (1, 1), 12)
    assert custom_case("monarch", 3, 24, 36, (3, 2), 12) == Case("monarch", 3, 24, 36, (3, 2), 4)
    assert custom_case("blast", 3, 24, 36, (3, 2), 12) == Case("blast", 3, 24, 36, (3, 2), 12)


@pytest.mark.parametrize(
    ("op", "blocks", "rank", "sentence"),
    [
        ("monarch", (3, 2), 10, "monarch's rank 10 is not a multiple of its 3 blocks"),
        ("monarch", (5, 2), 10, "5 x 2 blocks do not divide a 24 x 36 layer"),
        ("blast", (2, 5), 10, "2 x 5 blocks do not divide a 24 x 36 layer"),
        ("low_rank", (1, 1), 0, "rank is 0: low_rank needs a positive one"),
        ("blast", (2, 2), -4, "rank is -4: blast needs a positive one"),
    ],
)
def test_a_layer_that_cannot_be_cut_is_a_sentence(op: str, blocks, rank: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        custom_case(op, 3, 24, 36, blocks, rank)


@pytest.mark.parametrize(
    ("case", "rank", "block_rank"),
    [
        (Case("dense", 7, 24, 36, (1, 1), 0), None, None),
        (Case("low_rank", 7, 24, 36, (1, 1), 5), 5, None),
        (Case("monarch", 7, 24, 36, (3, 3), 4), 12, 4),
        (Case("monarch", 7, 24, 36, (3, 2), 4), None, 4),
        (Case("blast", 7, 24, 36, (2, 3), 5), 5, None),
    ],
    ids=lambda value: getattr(value, "format", ""),
)
def test_a_record_says_the_rank_as_the_papers_count_it(case: Case, rank, block_rank) -> None:
    assert fields("own", "c_fc", case, "bfloat16") == {
        "op": case.format,
        "net": "own",
        "layer": "c_fc",
        "in_features": 24,
        "out_features": 36,
        "blocks": list(case.blocks),
        "rank": rank,
        "block_rank": block_rank,
        "tokens": 7,
        "dtype": "bfloat16",
    }
