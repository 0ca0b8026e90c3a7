"""Positions that restart at every document, rewritten to anchor ids: row indices, and 0 where a segment starts."""

import torch
from torch import Tensor


def closing_run(flags: Tensor) -> Tensor:
    """(B, L) bool, where it holds from this column to the end of the row."""
    return (~flags).flip(-1).cumsum(-1).flip(-1) == 0


def starts_of(position_ids: Tensor, padding: Tensor) -> Tensor:
    """(B, L) bool: column 0 and every position 0 start a segment.

    position_ids (B, L), padding (B, L) bool. Padding is one segment, so that it needs one start.
    """
    starts = position_ids == 0
    starts[:, 0] = True
    starts[:, 1:] &= ~(padding[:, 1:] & padding[:, :-1])
    return starts


def anchor_ids(starts: Tensor) -> Tensor:
    """(B, L) bool -> (B, L) int64: row indices, except 0 at every start (section 2 of the replica layout)."""
    return torch.arange(starts.shape[1], device=starts.device).expand(starts.shape).masked_fill(starts, 0)
