"""The split into training and validation text, and the hash that says which text it was."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blrlab.data.text import Document, Text, split

NAMES = st.text("abcdefgh/._", min_size=1, max_size=6)
DOCUMENTS = st.dictionaries(NAMES, st.binary(min_size=1, max_size=40), min_size=2, max_size=12)
FRACTIONS = st.floats(0.01, 0.99)


def sides(text: Text) -> tuple[set[str], set[str]]:
    return {name for name, _ in text.train}, {name for name, _ in text.valid}


@given(DOCUMENTS, FRACTIONS)
def test_every_file_is_on_one_side_and_no_side_is_empty(files: dict[str, bytes], fraction: float) -> None:
    documents = sorted(files.items())
    found = split(documents, fraction)
    train, valid = sides(found)
    assert train
    assert valid
    assert not train & valid
    assert sorted(found.train + found.valid) == documents
    assert list(found.train) == sorted(found.train), "the order of the documents is kept on each side"
    assert list(found.valid) == sorted(found.valid)


@given(DOCUMENTS, FRACTIONS)
def test_validation_text_is_as_long_as_asked_to_within_one_file(files: dict[str, bytes], fraction: float) -> None:
    _, valid = sides(split(list(files.items()), fraction))
    held, total = sum(len(files[name]) for name in valid), sum(map(len, files.values()))
    longest = max(map(len, files.values()))
    assert held < fraction * total + longest
    everything_but_one = len(valid) == len(files) - 1
    assert held >= fraction * total or everything_but_one


@given(DOCUMENTS, FRACTIONS, st.randoms(use_true_random=False))
def test_the_side_of_a_file_does_not_depend_on_the_order_of_files(files: dict[str, bytes], fraction, random) -> None:
    documents = list(files.items())
    shuffled = documents.copy()
    random.shuffle(shuffled)
    assert sides(split(documents, fraction)) == sides(split(shuffled, fraction))


@given(DOCUMENTS, FRACTIONS, st.data())
def test_the_side_of_a_file_does_not_depend_on_what_is_in_it(files: dict[str, bytes], fraction, data) -> None:
    """Only names and sizes count."""
    other = {name: data.draw(st.binary(min_size=len(was), max_size=len(was))) for name, was in files.items()}
    assert sides(split(list(files.items()), fraction)) == sides(split(list(other.items()), fraction))


@given(DOCUMENTS, DOCUMENTS, FRACTIONS)
def test_more_files_never_swap_the_sides_of_two_old_ones(
    files: dict[str, bytes], more: dict[str, bytes], fraction: float
) -> None:
    """The order of a hash decides: of the old files validation may gain or lose, but never both."""
    _, before = sides(split(list(files.items()), fraction))
    _, after = sides(split(list((more | files).items()), fraction))
    kept = after & set(files)
    assert kept <= before or before <= kept


def test_a_small_new_file_moves_few_old_ones() -> None:
    old = [(f"module_{number}.py", b"x" * 100) for number in range(200)]
    _, before = sides(split(old, 0.1))
    assert 15 <= len(before) <= 25
    for number in range(50):
        new = f"new_{number}.py"
        _, after = sides(split([*old, (new, b"y" * 100)], 0.1))
        assert len((after - {new}) ^ before) <= 1


@pytest.mark.parametrize(("size", "fraction", "valid"), [(10, 0.1, 1), (10, 0.01, 1), (1000, 0.3, 300), (2, 0.99, 1)])
def test_a_single_document_is_cut_near_its_end(size: int, fraction: float, valid: int) -> None:
    content = b"0123456789" * (size // 10) or b"01"
    found = split([("book", content)], fraction)
    assert found == Text((("book", content[:-valid]),), (("book", content[-valid:]),))


BASE = Text((("a", b"one"), ("b", b"two")), (("c", b"three"),))
OTHERS = {
    "content": Text((("a", b"one"), ("b", b"twO")), (("c", b"three"),)),
    "name": Text((("a", b"one"), ("B", b"two")), (("c", b"three"),)),
    "split": Text((("a", b"one"),), (("b", b"two"), ("c", b"three"))),
    "order": Text((("b", b"two"), ("a", b"one")), (("c", b"three"),)),
    "border between files": Text((("a", b"onet"), ("b", b"wo")), (("c", b"three"),)),
    "border between name and content": Text((("a", b"one"), ("bt", b"wo")), (("c", b"three"),)),
    "swapped sides": Text((("c", b"three"),), (("a", b"one"), ("b", b"two"))),
    "one file less": Text((("a", b"one"),), (("c", b"three"),)),
}


def test_the_digest_is_the_same_for_the_same_text_in_every_process() -> None:
    again: tuple[Document, ...] = (("a", b"one"), ("b", b"two"))
    assert Text(again, (("c", b"three"),)).digest() == BASE.digest()
    written_out = b"parta\0003\0oneb\0003\0twopartc\0005\0three"
    assert BASE.digest() == hashlib.sha256(written_out).hexdigest()


@pytest.mark.parametrize("what", OTHERS)
def test_the_digest_tells_texts_apart(what: str) -> None:
    digests = {BASE.digest(), *(other.digest() for other in OTHERS.values())}
    assert OTHERS[what].digest() != BASE.digest()
    assert len(digests) == len(OTHERS) + 1
