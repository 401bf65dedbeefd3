"""Specs: what may be asked for, and the sentence for what may not."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from blrlab import factors
from blrlab.errors import InputError
from blrlab.factors import Spec, from_total_rank, spec


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lowrank", 8, 8), ['unknown format "lowrank"', "dense, low_rank, monarch, blast"]),
        (("Dense", 8, 8), ['unknown format "Dense"', "dense, low_rank, monarch, blast"]),
        (("dense", 0, 8), ["a layer of 0 x 8 has no weights"]),
        (("dense", 8, -1), ["a layer of 8 x -1 has no weights"]),
        (("monarch", 12, 20, (5, 2), 3), ["5 input blocks do not divide 12", "1, 2, 3, 4, 6, 12 do"]),
        (("blast", 12, 20, (3, 8), 3), ["8 output blocks do not divide 20", "1, 2, 4, 5, 10, 20 do"]),
        (("blast", 12, 20, (24, 2), 3), ["24 input blocks do not divide 12", "1, 2, 3, 4, 6, 12 do"]),
        (("monarch", 12, 20, (0, 2), 3), ["0 input blocks do not divide 12"]),
        (("monarch", 12, 20, (3, -2), 3), ["-2 output blocks do not divide 20"]),
        (("monarch", 13, 20, (2, 2), 3), ["2 input blocks do not divide 13", "1, 13 do"]),
        (("monarch", 12, 20, (3, 2)), ["monarch needs a rank of at least 1, not 0"]),
        (("blast", 12, 20, (3, 2), -4), ["blast needs a rank of at least 1, not -4"]),
        (("low_rank", 12, 20), ["low_rank needs a rank of at least 1, not 0"]),
        (("dense", 12, 20, (1, 1), 4), ["a dense layer has no rank", "rank 4"]),
        (("low_rank", 12, 20, (2, 2), 4), ["low_rank has no blocks", "(2, 2)"]),
        (("dense", 12, 20, (2, 2)), ["dense has no blocks", "(2, 2)"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_in_a_sentence(arguments, said):
    with pytest.raises(InputError) as caught:
        Spec(*arguments)
    sentence = str(caught.value)
    assert all(part in sentence for part in said), sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_block_counts_are_named_up_to_64():
    assert spec.divisors(768)[-3:] == (32, 48, 64)
    assert spec.divisors(7) == (1, 7)


def test_published_ranks_are_shared_out_over_the_blocks():
    found = from_total_rank("monarch", 768, 2304, (4, 4), 192)
    assert found == Spec("monarch", 768, 2304, (4, 4), 48)
    assert factors.parameter_count(found) == 192 * (768 + 2304)
    assert from_total_rank("blast", 768, 2304, (6, 6), 190) == Spec("blast", 768, 2304, (6, 6), 190)
    assert from_total_rank("blast", 768, 2304, (2, 6), 190).rank == 190
    assert from_total_rank("low_rank", 768, 2304, (1, 1), 190) == Spec("low_rank", 768, 2304, rank=190)


@pytest.mark.parametrize(
    ("blocks", "rank", "said"),
    [
        ((4, 4), 190, ["rank 190", "4 blocks", "188 and 192"]),
        ((4, 4), 3, ["rank 3", "4 and 8"]),
        ((4, 4), 0, ["rank 0", "4 and 8"]),
        ((4, 4), -8, ["rank -8 is not a positive multiple", "4 and 8"]),
        ((4, 6), 192, ["b x b blocks, not 4 x 6", "block_rank"]),
        ((5, 5), 190, ["5 input blocks do not divide 768 features"]),
    ],
    ids=str,
)
def test_a_rank_that_cannot_be_shared_out_is_refused(blocks, rank, said):
    with pytest.raises(InputError) as caught:
        from_total_rank("monarch", 768, 2304, blocks, rank)
    assert all(part in str(caught.value) for part in said), str(caught.value)


@pytest.mark.parametrize(
    ("made", "total", "sizes"),
    [
        (Spec("monarch", 768, 2304, (4, 4), 48), 192, (192, 576)),
        (Spec("monarch", 768, 2304, (4, 6), 48), None, (192, 384)),
        (Spec("blast", 768, 2304, (6, 4), 190), 190, (128, 576)),
        (Spec("low_rank", 768, 2304, rank=190), 190, (768, 2304)),
        (Spec("dense", 768, 2304), 0, (768, 2304)),
    ],
    ids=str,
)
def test_total_rank_and_block_sizes(made, total, sizes):
    assert made.total_rank == total
    assert made.block_sizes == sizes


def test_specs_are_values():
    made = Spec("blast", 12, 20, (3, 2), 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.rank = 6
    assert {made: 1}[Spec("blast", 12, 20, (3, 2), 5)] == 1
    assert made != dataclasses.replace(made, rank=6)
    with pytest.raises(InputError):
        dataclasses.replace(made, blocks=(5, 2))


def test_blocks_may_come_as_a_list():
    """As a config file or JSON gives them; a spec must stay hashable all the same."""
    assert hash(Spec("blast", 12, 20, [3, 2], 5)) == hash(Spec("blast", 12, 20, (3, 2), 5))


def test_a_spec_is_a_static_argument():
    traced = []

    @functools.partial(jax.jit, static_argnums=0)
    def count(made, x):
        traced.append(made)
        return x * factors.parameter_count(made)

    specs = [Spec("blast", 12, 20, (3, 2), rank) for rank in (5, 5, 6)]
    assert [float(count(made, jnp.ones(()))) for made in specs] == [190, 190, 228]
    assert traced == [specs[0], specs[2]]


def test_a_format_is_a_module_of_its_functions():
    assert factors.FORMATS == ("dense", *sorted(set(factors.FORMATS) - {"dense"}, key=factors.FORMATS.index))
    for name in factors.FORMATS:
        module = getattr(factors, name)
        assert all(callable(getattr(module, part)) for part in ("shapes", "init", "apply", "to_dense", "project"))
