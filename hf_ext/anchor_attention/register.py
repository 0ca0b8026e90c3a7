"""What AnchorAttention adds to transformers, and its undo."""

from hf_ext import compat
from hf_ext.anchor_attention.backend import anchor_attention_forward, anchor_mask
from hf_ext.anchor_attention.support import check_at_load


def add() -> None:
    """The load check, then attention and mask function together: the host drops the mask of one without the other.

    Raises:
        RegistrationError: somebody else holds the name; then nothing is added.
    """
    entries = _entries()
    compat.wrap_load_check(check_at_load)
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


def _entries() -> list[compat.Entry]:
    attention, masks = compat.attention_tables()
    return [(attention, "anchor", anchor_attention_forward), (masks, "anchor", anchor_mask)]
