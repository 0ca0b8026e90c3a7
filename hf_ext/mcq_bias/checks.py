"""The letters that name choices, and checks of what users give: letters, words, counts, names of options."""

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FEWEST, MOST = 2, len(LETTERS)  # choices
_LETTER = re.compile(r"^\s*\(?([A-Za-z])[).:]?\s*$")


def letter_index(text: str) -> int | None:
    """0 for "A", "(a)", " A. "; None for any other text than one letter."""
    match = _LETTER.match(text)
    return LETTERS.index(match[1].upper()) if match else None


def choice_index(name: str, value: Any, count: int = MOST) -> int:
    """The index that an index or a letter stands for.

    Raises:
        ValueError: it is none of the `count` choices.
    """
    index = letter_index(value) if isinstance(value, str) else value
    if not _is_integer(index) or not 0 <= index < count:
        raise ValueError(no_choice(name, value, count))
    return int(index)


def no_choice(name: str, value: Any, count: int) -> str:
    return f"{name}={value!r} is neither an index 0 to {count - 1} nor a letter A to {LETTERS[count - 1]}"


def anchor_index(anchor: Any) -> int:
    """
    Raises:
        ValueError: neither a letter nor an index 0 to 25.
    """
    return choice_index("anchor", anchor)


def check_num_choices(value: Any, name: str = "num_choices") -> int:
    """
    Raises:
        ValueError: no integer from 2 to 26.
    """
    if not _is_integer(value) or not FEWEST <= value <= MOST:
        raise ValueError(f"{name}={value!r} is no number of choices: an integer from {FEWEST} to {MOST}")
    return int(value)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """
    Raises:
        ValueError: no integer of at least `least`.
    """
    if not _is_integer(value) or value < least:
        raise ValueError(f"{name}={value!r} is no integer of at least {least}")


def check_word(name: str, value: Any, allowed: Sequence[str]) -> None:
    """
    Raises:
        ValueError: `value` is not one of `allowed`, with the nearest of them.
    """
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is none of {_listed(value, allowed)}")


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """
    Raises:
        ValueError: a key of `given` is not one of `known`, with the nearest of them.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            raise ValueError(f"unknown option {name!r} of {what}; known are {_listed(name, known)}")


def plain(value: Any) -> Any:
    """The number in an array or a tensor without dimensions, everything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _listed(value: Any, allowed: Sequence[str]) -> str:
    near = get_close_matches(str(value).lower(), allowed, n=1, cutoff=0.5)
    return ", ".join(map(repr, allowed)) + (f"; did you mean {near[0]!r}?" if near else "")


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
