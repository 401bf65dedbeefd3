"""The sentences for wrong words."""

import pytest

from blrlab.errors import InputError, did_you_mean, one_of

FORMATS = ("dense", "low_rank", "monarch", "blast")


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("monrach", ' Did you mean "monarch"?'),
        ("lowrank", ' Did you mean "low_rank"?'),
        ("xyz", ""),
        ("", ""),
    ],
)
def test_the_nearest_known_word_is_offered(word: str, hint: str) -> None:
    assert did_you_mean(word, iter(FORMATS)) == hint


def test_a_known_word_is_returned_also_from_an_iterator() -> None:
    assert [one_of(word, iter(FORMATS), "format") for word in FORMATS] == list(FORMATS)


def test_an_unknown_word_is_told_what_is_allowed() -> None:
    with pytest.raises(InputError) as caught:
        one_of("monrach", FORMATS, "format")
    assert str(caught.value) == (
        'unknown format "monrach": it is one of dense, low_rank, monarch, blast. Did you mean "monarch"?'
    )


def test_an_input_error_is_a_value_error() -> None:
    assert issubclass(InputError, ValueError)
