"""The letters that name choices, and what users give for them."""

import re
from typing import Any

from hf_ext.checks import is_integer

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
    if not is_integer(index) or not 0 <= index < count:
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
    if not is_integer(value) or not FEWEST <= value <= MOST:
        raise ValueError(f"{name}={value!r} is no number of choices: an integer from {FEWEST} to {MOST}")
    return int(value)


def plain(value: Any) -> Any:
    """The number in an array or a tensor without dimensions, everything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
