"""What the benchmark commands' flags have in common."""

from collections.abc import Sequence
from pathlib import Path

from blrlab.errors import InputError, one_of


def words(text: str) -> list[str]:
    """Read words with commas between, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def counts(text: str, flag: str, least: int = 0) -> list[int]:
    """Read whole numbers with commas between, each once.

    Raises:
      InputError: something else is among them.
    """
    found = words(text)
    for word in found:
        if not word.isdecimal() or not least <= int(word) < 2**31:
            raise InputError(f'{flag} takes whole numbers from {least} on, with commas between, not "{word}".')
    return list(dict.fromkeys(map(int, found)))


def device(name: str) -> str:
    """Return cuda or cpu: the named device, else the first CUDA GPU, else the CPU.

    Raises:
      InputError: it is unknown or not there. Of several GPUs CUDA_VISIBLE_DEVICES picks one.
    """
    import torch

    kind, colon, index = name.partition(":")
    if not name:
        return "cuda" if torch.cuda.is_available() else "cpu"
    one_of(kind, ("cuda", "cpu"), "device")
    if colon and index != "0":
        raise InputError(f'no device "{name}": give {kind}, and CUDA_VISIBLE_DEVICES={index or 0} to pick a GPU.')
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("no CUDA GPU that PyTorch finds: leave --device out to measure the CPU.")
    return kind


def records_file(out: Path | None, default: Path) -> Path:
    """Return the file of records that --out names: itself, or records.jsonl in a folder."""
    out = out or default
    return out / "records.jsonl" if out.is_dir() or not out.suffix else out


def positive(value: float, flag: str) -> None:
    """Refuse what is no positive number.

    Raises:
      InputError: it is zero, negative or not a number.
    """
    if not value > 0:
        raise InputError(f"{flag} is {value:g}: it is a positive number.")


def without(arguments: Sequence[str], flag: str) -> list[str]:
    """Leave a flag without a value out of a command line."""
    return [word for word in arguments if word != flag]
