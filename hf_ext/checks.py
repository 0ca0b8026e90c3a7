"""Checks of what users give, and what an error says of it: the value, what is allowed, what was probably meant."""

import json
import math
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A real, finite one that a float can hold."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def check_count(name: str, value: Any, least: int = 1) -> None:
    """
    Raises:
        ValueError: no integer of at least `least`.
    """
    if not is_integer(value) or value < least:
        raise ValueError(f"{name}={value!r} is no integer of at least {least}")


def check_flag(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: neither True nor False.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, not {value!r}")


def check_word(name: str, value: Any, allowed: Collection[Any], others: str = "") -> None:
    """
    Raises:
        ValueError: `value` is not one of `allowed`, with the nearest of them; `others`: what else would do, in words.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is none of {listed(value, allowed, others)}")


def refuse_unknown(given: Iterable[str], known: Collection[str], what: str, kind: str = "option") -> None:
    """
    Raises:
        ValueError: one of `given` is not `known`, with the nearest that is.
    """
    for name in given:
        if name not in known:
            raise ValueError(f"unknown {kind} {name!r} of {what}; known are {listed(name, known)}")


def read_object(file: Path, writer: str) -> dict[str, Any]:
    """The JSON object in a file that `writer` wrote.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}; a folder written by {writer} is expected")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged, or of something else: it is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is damaged, or of something else: it holds a {type(value).__name__}, not an object")
    return value


def listed(value: Any, allowed: Collection[Any], others: str = "") -> str:
    """The allowed values, others in words, and the one that was probably meant."""
    return f"{', '.join(map(repr, allowed))} {others}".rstrip() + did_you_mean(value, allowed)


def did_you_mean(value: Any, allowed: Collection[Any], likeness: float = 0.5) -> str:
    """The end of a sentence: "; did you mean 'anchor'?", or nothing."""
    near = nearest(value, allowed, likeness)
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(value: Any, allowed: Collection[Any], likeness: float = 0.5) -> Any:
    """The one of `allowed` that is spelled most like `value`, upper or lower case; None where none is that like."""
    spellings = {str(known).lower(): known for known in allowed}
    return next((spellings[near] for near in get_close_matches(str(value).lower(), spellings, 1, likeness)), None)
