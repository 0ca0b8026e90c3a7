"""The letters that name choices."""

import re
from numbers import Integral
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LETTER = re.compile(r"^\s*\(?([A-Za-z])[).:]?\s*$")


def letter_index(text: str) -> int | None:
    """0 for "A", "(a)", " A. "; None for any other text than one letter."""
    match = _LETTER.match(text)
    return LETTERS.index(match[1].upper()) if match else None


def anchor_index(anchor: Any) -> int:
    """
    Raises:
        ValueError: neither a letter nor an index 0 to 25.
    """
    index = letter_index(anchor) if isinstance(anchor, str) else anchor
    if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= index < len(LETTERS):
        raise ValueError(f"anchor={anchor!r} is neither a letter A to Z nor an index 0 to 25")
    return int(index)
