"""What a user did that cannot work, said in one sentence."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """A wrong input. The message names the value, what is allowed and the fix; a command exits with 2."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `' Did you mean "x"?'` for the nearest known word, or an empty string."""
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f' Did you mean "{near[0]}"?' if near else ""


def one_of(word: str, known: Iterable[str], what: str) -> str:
    """Return `word` if it is known.

    Raises:
      InputError: naming the allowed words.
    """
    known = tuple(known)
    if word in known:
        return word
    raise InputError(f'unknown {what} "{word}": it is one of {", ".join(known)}.{did_you_mean(word, known)}')


def home_expanded(path: str) -> Path:
    """Return a path with `~` and `~user` filled in.

    Raises:
      InputError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InputError(f'no home folder for "{path}".') from None
