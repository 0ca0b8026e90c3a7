"""From positions (or document ids) to a table of segments, whatever the layout and the padding."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SegmentTable:
    """Which tokens stand in which segment. Every engine reads this, and only this.

    The tokens of all B rows are numbered `row * L + column`. Slots hold them segment after segment, each in row order.

    Args:
        shape: (B, L).
        lengths: number of slots of every segment.
        rows: number of slots of every row.
        tokens: (slots,) the token in each slot; None if the slots are just all tokens in order.
        slots: (B * L,) the slot with a token's output; the number of slots for a token that has none (padding);
            None together with `tokens`.
        gaps: whether neighbouring slots of a segment may hold tokens that are not neighbours (a shared anchor and its
            document, say): then a window, which counts columns, is not a window of slots.
    """

    shape: tuple[int, int]
    lengths: list[int]
    rows: list[int]
    tokens: Tensor | None = None
    slots: Tensor | None = None
    gaps: bool = False

    def token_of_slot(self, device: torch.device) -> Tensor:
        return torch.arange(sum(self.rows), device=device) if self.tokens is None else self.tokens

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)

    @cached_property
    def bounds(self) -> Tensor:
        """(segments + 1,) int32 on the CPU: the slot at which each segment starts, and the number of slots."""
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gave the first time: engines keep here what every layer of a forward would derive again."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[Hashable, Any]:
        return {}


def build_table(
    shape: tuple[int, int],
    position_ids: Tensor,
    attention_mask: Tensor | None = None,
    anchor_doc_ids: Tensor | None = None,
) -> SegmentTable:
    """The segments of `shape` = (B, L) tokens, from `anchor_doc_ids` where given, else from `position_ids`.

    Raises:
        ValueError: a tensor whose shape does not fit, or document ids that are not in order.
    """
    _check_integers("position_ids", position_ids, shape, broadcast=True)
    if shape[1] == 0:
        raise ValueError(f"the rows hold no tokens: (batch, length) = {tuple(shape)}")
    if attention_mask is not None:
        _check_shape("attention_mask", attention_mask, shape)
    if anchor_doc_ids is not None:
        _check_integers("anchor_doc_ids", anchor_doc_ids, shape)
        return segments_from_documents(anchor_doc_ids, attention_mask)
    return segments_from_positions(position_ids.expand(shape), attention_mask)


def segments_from_positions(position_ids: Tensor, attention_mask: Tensor | None = None) -> SegmentTable:
    """Replica layout: a segment starts at column 0 and wherever the position is 0.

    Args:
        position_ids: (B, L), integers.
        attention_mask: (B, L), 1 = real token; masked tokens get no slot, so nobody sees them.
    """
    opens = position_ids == 0
    opens[:, 0] = True
    if attention_mask is None:
        return _contiguous(opens.cpu())
    opens, real = torch.stack([opens, attention_mask.bool()]).cpu()  # one copy from the device for both
    if real.all():
        return _contiguous(opens)
    tokens = real.flatten().nonzero().flatten()
    segment = opens.flatten().cumsum(0)[tokens]
    return _gathered(segment, tokens, torch.ones_like(tokens).bool(), position_ids)


def segments_from_documents(anchor_doc_ids: Tensor, attention_mask: Tensor | None = None) -> SegmentTable:
    """Shared layout: every document becomes a segment that begins with a virtual replica of its row's anchor.

    Args:
        anchor_doc_ids: (B, L): 0 for the anchor, which opens the row; then 1, 2, ... for the documents.
        attention_mask: (B, L), 1 = real token.

    Raises:
        ValueError: an anchor after the first document, negative ids, or a document in two pieces, with its row.
    """
    ids = anchor_doc_ids.cpu()
    length = ids.shape[1]
    real = torch.ones_like(ids).bool() if attention_mask is None else attention_mask.bool().cpu()
    segments: list[Tensor] = []
    replicas: list[int] = []  # of every segment: how many slots at its head repeat the row's anchor
    for row in range(ids.shape[0]):
        documents, sizes = ids[row].unique_consecutive(return_counts=True)
        if documents.min() < 0 or len(documents.unique()) < len(documents) or 0 in documents[1:]:
            raise ValueError(
                "anchor_doc_ids must hold the anchor (0) first and then every document (1, 2, ...) in one piece; "
                f"row {row} holds the documents {documents.tolist()} with {sizes.tolist()} tokens"
            )
        pieces = [columns[real[row, columns]] + row * length for columns in torch.arange(length).split(sizes.tolist())]
        anchor = pieces[0] if documents[0] == 0 else pieces[0][:0]
        for document, piece in zip(documents.tolist(), pieces, strict=True):
            segments.append(torch.cat([anchor, piece]) if document else piece)
            replicas.append(len(anchor) if document else 0)
    sizes = torch.tensor([len(segment) for segment in segments])
    segment = torch.arange(len(segments)).repeat_interleave(sizes)
    rank = torch.arange(len(segment)) - (sizes.cumsum(0) - sizes)[segment]
    return _gathered(segment, torch.cat(segments), rank >= torch.tensor(replicas)[segment], anchor_doc_ids)


def _contiguous(opens: Tensor) -> SegmentTable:
    starts = opens.flatten().nonzero().flatten()
    lengths = torch.diff(starts, append=torch.tensor([opens.numel()])).tolist()
    return SegmentTable(tuple(opens.shape), lengths, rows=[opens.shape[1]] * opens.shape[0])


def _gathered(segment: Tensor, tokens: Tensor, own: Tensor, like: Tensor) -> SegmentTable:
    """Slot i holds `tokens[i]` in segment `segment[i]`; it is the one with the token's output where `own[i]`."""
    slots = torch.full((like.numel(),), len(tokens))
    slots[tokens[own]] = torch.arange(len(tokens))[own]
    lengths = segment.unique_consecutive(return_counts=True)[1].tolist()
    rows = torch.bincount(tokens // like.shape[1], minlength=like.shape[0]).tolist()
    gaps = bool(((segment.diff() == 0) & (tokens.diff() != 1)).any())
    return SegmentTable(tuple(like.shape), lengths, rows, tokens.to(like.device), slots.to(like.device), gaps)


def _check_integers(name: str, tensor: Tensor, shape: tuple[int, int], broadcast: bool = False) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor of integers, not {type(tensor).__name__}")
    if tensor.dtype in (torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{name} must hold integers, not {tensor.dtype}")
    _check_shape(name, tensor, shape, broadcast)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, int], broadcast: bool = False) -> None:
    rows, length = shape
    if tensor.ndim != 2 or tensor.shape[1] != length or tensor.shape[0] not in ((1, rows) if broadcast else (rows,)):
        raise ValueError(
            f"{name} must be (batch, length) = ({rows}, {length}), {'or (1, length), ' if broadcast else ''}"
            f"not {tuple(tensor.shape)}"
        )
