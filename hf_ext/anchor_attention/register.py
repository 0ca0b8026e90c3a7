"""What AnchorAttention adds to transformers, and its undo."""

from typing import Any

from hf_ext import compat
from hf_ext.anchor_attention.backend import anchor_attention_forward
from hf_ext.anchor_attention.hooks import place_hook
from hf_ext.anchor_attention.mask import anchor_mask
from hf_ext.anchor_attention.support import NAMES, check_at_load


def add() -> None:
    """The load check, then attention and mask function together: the host drops the mask of one without the other.

    Raises:
        RegistrationError: somebody else holds a name; then nothing is added.
    """
    entries = _entries()
    compat.wrap_load_check(_at_load)
    try:
        compat.claim_all(entries, host="transformers")
    except compat.RegistrationError:
        compat.unwrap_load_check()
        raise


def remove() -> None:
    try:
        compat.release_all(_entries(), host="transformers")
    finally:
        compat.unwrap_load_check()


def _at_load(model: Any, name: str) -> None:
    check_at_load(model, name)
    place_hook(model, name)


def _entries() -> list[compat.Entry]:
    functions = zip(compat.attention_tables(), (anchor_attention_forward, anchor_mask), strict=True)
    return [(table, name, function) for table, function in functions for name in NAMES]
