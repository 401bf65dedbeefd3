"""Tokens: bytes, a trained BPE and a checkpoint's, and the bytes each token stands for."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from blrlab.data import tokenizer
from blrlab.data.tokenizer import SEPARATOR, Tokenizer
from blrlab.errors import InputError

TEXTS = [
    b"def apply(kernel, x):\n    return x @ kernel\n" * 20,
    "Größe, naïve, Ελλάδα, 漢字, привет, 🙂\n".encode() * 20,
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return tokenizer.make("bpe", TEXTS, 400, None)


def decode(made: Tokenizer, tokens: np.ndarray) -> str:
    assert made.model is not None
    return made.model.decode(tokens.tolist(), skip_special_tokens=False)


@given(st.lists(st.binary(max_size=30), max_size=4))
def test_bytes_are_their_own_tokens_with_a_nul_after_each_document(documents: list[bytes]) -> None:
    made = tokenizer.make("byte", [], 50257, None)
    tokens = made.encode(documents)
    assert tokens.tobytes() == b"".join(document + b"\0" for document in documents)
    assert made.byte_lengths()[tokens].sum() == len(tokens)
    assert (tokens.dtype, made.vocab_size, made.unit, made.model) == (np.uint8, 256, "byte", None)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_a_bpe_gives_every_text_back(bpe: Tokenizer, documents: list[str]) -> None:
    tokens = bpe.encode(document.encode() for document in documents)
    assert decode(bpe, tokens) == "".join(document + SEPARATOR for document in documents)


@given(st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_byte_lengths_add_up_to_the_bytes_of_the_text(bpe: Tokenizer, documents: list[str]) -> None:
    encoded = [document.encode() for document in documents]
    tokens = bpe.encode(encoded)
    assert bpe.byte_lengths()[tokens].sum() == sum(map(len, encoded)) + len(encoded)


@pytest.mark.parametrize("text", TEXTS, ids=["code", "many scripts"])
def test_a_bpe_learns_tokens_of_several_bytes(bpe: Tokenizer, text: bytes) -> None:
    tokens = bpe.encode([text])
    lengths = bpe.byte_lengths()
    assert len(tokens) < len(text) / 2
    assert lengths[tokens].sum() == len(text) + 1
    assert (lengths >= 1).all()
    assert lengths.shape == (bpe.vocab_size,)


def test_every_document_ends_with_one_separator(bpe: Tokenizer) -> None:
    assert bpe.model is not None
    ends = bpe.model.token_to_id(SEPARATOR)
    tokens = bpe.encode([b"one", b"", b"two"])
    places = np.flatnonzero(tokens == ends)
    assert places.tolist() == [len(bpe.encode([b"one"])) - 1, len(bpe.encode([b"one"])), len(tokens) - 1]
    assert bpe.byte_lengths()[ends] == 1


def test_a_separator_written_in_a_text_is_text(bpe: Tokenizer) -> None:
    """Else a document would end in its middle, and its bytes would not be counted."""
    assert bpe.model is not None
    text = f"before {SEPARATOR} after".encode()
    tokens = bpe.encode([text])
    assert (tokens == bpe.model.token_to_id(SEPARATOR)).sum() == 1
    assert bpe.byte_lengths()[tokens].sum() == len(text) + 1


@pytest.mark.parametrize(
    ("content", "decoded"),
    [
        (b"a\xffb", "a\ufffdb"),
        (b"\xff\xfe", "\ufffd\ufffd"),
        ("漢".encode()[:2], "\ufffd"),
        (b"caf\xe9 x", "caf\ufffd x"),
    ],
)
def test_bytes_that_are_not_utf8_become_replacement_characters(bpe: Tokenizer, content: bytes, decoded: str) -> None:
    assert decode(bpe, bpe.encode([content])) == decoded + SEPARATOR


@pytest.mark.parametrize("size", [257, 260, 300])
def test_the_vocabulary_is_as_large_as_asked_and_holds_every_byte(size: int) -> None:
    made = tokenizer.make("bpe", TEXTS, size, None)
    tokens = made.encode([bytes(range(128)), "ÿĀ".encode()])
    assert made.vocab_size == size
    assert tokens.dtype == np.uint16
    assert tokens.max() < size
    assert made.byte_lengths()[tokens].sum() == 128 + 4 + 2


def test_training_is_deterministic(bpe: Tokenizer) -> None:
    again = tokenizer.make("bpe", TEXTS, 400, None)
    assert again.model is not None
    assert bpe.model is not None
    assert again.model.to_str() == bpe.model.to_str()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16)])
def test_tokens_take_the_smallest_dtype(vocab_size: int, dtype: type) -> None:
    vocab = {f"t{number}": number for number in range(vocab_size - 1)} | {SEPARATOR: vocab_size - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="t0"))
    tokens = Tokenizer("checkpoint", model).encode([b"t5"])
    assert (tokens.dtype, tokens.tolist()) == (dtype, [5, vocab_size - 1])


def test_a_checkpoint_has_its_own_tokenizer(bpe: Tokenizer, tmp_path: Path) -> None:
    assert bpe.model is not None
    bpe.model.save(str(tmp_path / "tokenizer.json"))
    made = tokenizer.make("checkpoint", [], 7, tmp_path)
    assert (made.kind, made.unit, made.vocab_size) == ("checkpoint", "token", bpe.vocab_size)
    assert np.array_equal(made.encode(TEXTS), bpe.encode(TEXTS))
    assert np.array_equal(made.byte_lengths(), bpe.byte_lengths())


def word_level(separator: str = SEPARATOR) -> str:
    vocab = {"[UNK]": 0, "word": 1, separator: 2}
    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]")).to_str()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no tokenizer at"),
        ("", "is damaged"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ('{"model": {"type": "Nonsense"}}', "is damaged"),
        (word_level("<end>"), "has no token to set between documents, none of <|endoftext|>, <|end_of_text|>, </s>"),
        (word_level(), "byte-level"),
    ],
    ids=["missing", "empty", "half", "a list", "no such model", "no separator", "not byte-level"],
)
def test_a_checkpoint_without_a_usable_tokenizer_is_an_error(
    tmp_path: Path, content: str | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        tokenizer.make("checkpoint", [], 300, tmp_path)
    assert sentence in str(caught.value)
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_a_sentencepiece_tokenizer_is_read(tmp_path: Path) -> None:
    """As Llama has it: pieces of text with a bar for the space, tokens for single bytes, </s> at the end."""
    words = ["<unk>", "<s>", "</s>", *tokenizer.BYTES, "\u2581", "a", "b", "\u2581a", "ab"]
    model = tokenizers.models.BPE(
        {word: index for index, word in enumerate(words)},
        [("\u2581", "a"), ("a", "b")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    found = tokenizer.make("checkpoint", [], 0, tmp_path)
    assert found.separator == "</s>"
    text = " ab a\u00e9\n".encode()
    tokens, lengths = found.encode([text, b"b"]), found.byte_lengths()
    assert tokens[-2:].tolist() == [words.index("b"), 2]
    first = tokens[: tokens.tolist().index(2)]
    assert lengths[first].sum() == len(text)
    assert lengths[2] == 1


@pytest.mark.parametrize(
    ("kind", "vocab_size", "sentence"),
    [
        ("bytes", 300, 'unknown tokenizer "bytes": it is one of byte, bpe, checkpoint. Did you mean "byte"?'),
        ("bpe", 256, "data.vocab_size is 256; a BPE needs at least 257 tokens."),
        (
            "checkpoint",
            300,
            "data.tokenizer=checkpoint needs a checkpoint: set init_from, or use byte or bpe.",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_made_is_an_error(kind: str, vocab_size: int, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        tokenizer.make(kind, TEXTS, vocab_size, None)
    assert str(caught.value) == sentence
