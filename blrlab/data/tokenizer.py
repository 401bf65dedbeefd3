"""Tokens from text: raw bytes, a BPE trained on the text, or the tokenizer of a checkpoint."""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from blrlab.errors import InputError, one_of

KINDS = ("byte", "bpe", "checkpoint")
SEPARATOR = "<|endoftext|>"
# What checkpoints end a text with: GPT-2, Llama 3, Llama.
SEPARATORS = (SEPARATOR, "<|end_of_text|>", "</s>")
SPACE = "\u2581"  # as SentencePiece writes it
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # its tokens for single bytes
GROUP = 64  # documents encoded at once: their tokens take far more memory than the result


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A way to cut text into tokens.

    Attributes:
      kind: byte, bpe or checkpoint.
      model: the tokenizer of the `tokenizers` library; None for bytes, whose separator is the NUL byte.
      separator: the token between documents.
    """

    kind: str
    model: tokenizers.Tokenizer | None = None
    separator: str = SEPARATOR

    @property
    def unit(self) -> str:
        """What one token is, for the units of a loss: byte or token."""
        return "byte" if self.model is None else "token"

    @property
    def vocab_size(self) -> int:
        """The number of different tokens."""
        return 256 if self.model is None else self.model.get_vocab_size()

    def encode(self, documents: Iterable[bytes]) -> np.ndarray:
        """Return the tokens of all documents, a separator after each, as one array of the smallest dtype."""
        dtype = np.min_scalar_type(self.vocab_size - 1)
        if self.model is None:
            return np.frombuffer(b"".join(document + b"\0" for document in documents), np.uint8)
        ends = self.model.token_to_id(self.separator)
        texts = (document.decode("utf-8", errors="replace") for document in documents)
        found = []
        while group := list(itertools.islice(texts, GROUP)):
            encoded = self.model.encode_batch_fast(group, add_special_tokens=False)
            found += [np.array([*part.ids, ends], dtype) for part in encoded]
        return np.concatenate(found)

    def byte_lengths(self) -> np.ndarray:
        """Return how many bytes of text each token stands for, [vocab_size]; a separator counts as one byte."""
        if self.model is None:
            return np.ones(256, np.int32)
        lengths = np.ones(self.vocab_size, np.int32)
        vocabulary = self.model.get_vocab()
        for token, index in vocabulary.items():
            if token in BYTES or token in SEPARATORS:
                continue
            # A byte-level BPE writes every byte of a token as one character; SentencePiece writes text.
            pieces = BYTES[0] in vocabulary
            lengths[index] = len(token.replace(SPACE, " ").encode()) if pieces else len(token)
        return lengths


def make(kind: str, texts: Sequence[bytes], vocab_size: int, checkpoint: Path | None) -> Tokenizer:
    """Make a tokenizer.

    Args:
      kind: byte, bpe or checkpoint.
      texts: what a BPE is trained on.
      vocab_size: the most tokens a BPE may have.
      checkpoint: the folder whose `tokenizer.json` is used, for `checkpoint`.

    Raises:
      InputError: the kind is unknown, or the checkpoint has no usable tokenizer.
    """
    one_of(kind, KINDS, "tokenizer")
    if kind == "byte":
        return Tokenizer(kind)
    if kind == "bpe":
        return Tokenizer(kind, _train(texts, vocab_size))
    if checkpoint is None:
        raise InputError("data.tokenizer=checkpoint needs a checkpoint: set init_from, or use byte or bpe.")
    return load(kind, checkpoint / "tokenizer.json")


def load(kind: str, path: Path) -> Tokenizer:
    """Read a tokenizer from a `tokenizer.json`.

    Raises:
      InputError: the file is missing, damaged, or not a BPE that knows single bytes, with a separator token.
    """
    if kind == "byte":
        return Tokenizer(kind)
    if not path.is_file():
        raise InputError(f"no tokenizer at {path}.")
    try:
        model = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path} is damaged: {error}") from None
    separator = next((token for token in SEPARATORS if model.token_to_id(token) is not None), None)
    if separator is None:
        raise InputError(f"{path} has no token to set between documents, none of {', '.join(SEPARATORS)}.")
    vocabulary = set(model.get_vocab())
    if not (vocabulary >= set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) or vocabulary >= set(BYTES)):
        raise InputError(f"{path} is not a byte-level BPE, nor one of SentencePiece: it lacks tokens for single bytes.")
    return Tokenizer(kind, _plain(model), separator)


def _train(texts: Sequence[bytes], vocab_size: int) -> tokenizers.Tokenizer:
    if vocab_size < 257:
        raise InputError(f"data.vocab_size is {vocab_size}; a BPE needs at least 257 tokens.")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator((text.decode("utf-8", errors="replace") for text in texts), trainer)
    return _plain(model)


def _plain(model: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Let a separator that is written out in a text be text, not the end of a document."""
    model.encode_special_tokens = True
    return model
