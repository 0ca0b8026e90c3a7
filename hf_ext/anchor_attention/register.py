"""What AnchorAttention adds to transformers, and its undo."""

from hf_ext import compat
from hf_ext.anchor_attention.backend import anchor_attention_forward, anchor_mask
from hf_ext.anchor_attention.support import check_at_load


def add() -> None:
    """Attention and mask function together (with the first alone, the host drops its mask silently), then the check.

    Raises:
        RegistrationError: somebody else holds the name; then nothing is added.
    """
    attention, masks = compat.attention_tables()
    compat.claim_all(
        [(attention, "anchor", anchor_attention_forward), (masks, "anchor", anchor_mask)], host="transformers"
    )
    compat.wrap_load_check(check_at_load)


def remove() -> None:
    for table in compat.attention_tables():
        table.pop("anchor", None)
    compat.unwrap_load_check(check_at_load)
