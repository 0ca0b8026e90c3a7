"""Checks of options: one of a few words, or a count."""

from collections.abc import Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any


def check_word(name: str, value: Any, allowed: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `value` is not one of `allowed`, with the nearest of them.
    """
    if value not in allowed:
        near = get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name}={value!r} is none of {', '.join(map(repr, allowed))}{hint}")


def check_count(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: no integer of at least 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} is no integer of at least 1")
