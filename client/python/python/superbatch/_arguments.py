"""Checks of arguments: a wrong one is refused by name, with what was given and what to give
instead.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ._errors import Error, invalid

SHOWN_MAX = 80


def shown(value: Any) -> str:
    """The value as one would write it, where that is short."""
    text = repr(value)
    return text if len(text) <= SHOWN_MAX else f"a {type(value).__name__}"


def wrong(name: str, value: Any, instead: str) -> Error:
    return invalid(name, f"cannot be {shown(value)}; {instead}")


def whole(name: str, value: Any, *, least: int = 0, bits: int = 64) -> int:
    """A whole number, of Python or of NumPy, from `least` to what the protocol's field of so many
    bits holds.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if least <= number < 1 << bits:
        return number
    raise wrong(name, value, f"give a whole number of at least {least}")


def seconds(name: str, value: Any) -> float:
    if isinstance(value, Real):
        return float(value)
    raise wrong(name, value, "give a number of seconds")


def text(name: str, value: Any, instead: str) -> str:
    if isinstance(value, str):
        return value
    raise wrong(name, value, instead)


def path(name: str, value: Any) -> str:
    """A file's path as a string."""
    try:
        return os.fsdecode(value)
    except TypeError:
        raise wrong(name, value, "give a file's path") from None


def secret(name: str, value: Any) -> str:
    """A string that no message may quote."""
    if isinstance(value, str):
        return value
    raise invalid(name, f"cannot be a {type(value).__name__}; give a string")


def items(name: str, value: Any) -> Sequence[Any]:
    """What is to be a list of several things, and not one of them."""
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return value
    example = repr(value) if len(repr(value)) <= SHOWN_MAX else "..."
    raise wrong(name, value, f"give a list: [{example}]")


def file_uri(name: str, path: os.PathLike) -> str:
    """The URI of an absolute path. Patterns in it stay patterns."""
    path = Path(os.fsdecode(path))
    if not path.is_absolute():
        raise wrong(
            name,
            path,
            "give an absolute path (the service may run in another folder), or a URI as a string",
        )
    uri = path.as_uri()
    for mark in "{}*":
        uri = uri.replace(quote(mark), mark)
    return uri
