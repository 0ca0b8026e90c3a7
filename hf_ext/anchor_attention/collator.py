"""Padding-free batches, whose positions restart at every document, to batches for AnchorAttention."""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from hf_ext.anchor_attention.packing import IGNORED, check_length_and_anchor
from hf_ext.anchor_attention.positions import anchor_ids, closing_run, starts_of
from hf_ext.checks import check_word

CURES = ("insert", "error")
_REBUILT = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class AnchorCollator:
    """Wraps a padding-free collator: every document begins with the anchor, and positions run on (arXiv 2411.13476).

    Use as `data_collator=AnchorCollator(anchor_token_id=tokenizer.bos_token_id)`, or around the collator of a trainer:
    `trainer.data_collator = AnchorCollator(trainer.data_collator, anchor_token_id=...)`. The inner collator gives
    `input_ids` (B, L) and `position_ids` (B, L) that restart at 0 at every document; here `position_ids` become row
    indices, except 0 at every anchor. Inserted anchors have the label -100; existing labels stay. Zeros at the end of
    a row that have the label -100 (or no labels at all) are padding: one segment, without an anchor. Where rows of one
    batch grow by different numbers of anchors, the shorter ones are padded like that, with the anchor.

    `cu_seq_lens_q/k`, `max_length_q/k` and `seq_idx` are rebuilt where present. Other tensors (B, L) of zeros and ones
    grow with the row: attention_mask is as beside the inserted token, every other mask 0. The inner batch stays as it
    is.

    Args:
        inner: the collator; `transformers.DataCollatorWithFlattening()` by default.
        anchor_token_id: the token every document begins with, usually `tokenizer.bos_token_id`.
        max_length: the longest row allowed, anchors included.
        on_missing_anchor: "insert" the anchor before a document that begins otherwise, or raise an "error".

    Raises:
        ValueError: an option out of range. In a call: no anchor (with "error"), a row longer than `max_length`, inner
            positions that do not restart at 0, or a tensor beside them that cannot grow with its row.
    """

    inner: Callable[..., Mapping[str, Any]] | None = None
    _: KW_ONLY
    anchor_token_id: int
    max_length: int | None = None
    on_missing_anchor: str = "insert"

    def __post_init__(self) -> None:
        if self.inner is None:
            from transformers import DataCollatorWithFlattening

            self.inner = DataCollatorWithFlattening()
        if not callable(self.inner):
            raise ValueError(f"inner must be a collator, a callable for lists of examples, not {self.inner!r}")
        check_length_and_anchor(2 if self.max_length is None else self.max_length, self.anchor_token_id)
        check_word("on_missing_anchor", self.on_missing_anchor, CURES)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = dict(self.inner(*args, **kwargs))
        ids, positions, labels = _checked(batch)
        padding = closing_run((positions == 0) & (labels == IGNORED))
        starts = starts_of(positions, padding)
        missing = starts & ~padding & (ids != self.anchor_token_id)
        if missing.any() and self.on_missing_anchor == "error":
            row, column = missing.nonzero()[0].tolist()
            raise ValueError(
                f"the document at row {row}, column {column} begins with token {ids[row, column]}, not with the anchor "
                f"{self.anchor_token_id}; tokenise with a BOS token, or allow on_missing_anchor='insert'"
            )
        growth = _Growth.of(starts, padding, missing)
        length = growth.source.shape[1]
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"a row has {length} tokens, {length - ids.shape[1]} of them inserted anchors and padding, and "
                f"max_length is {self.max_length}; raise it, or collate fewer or shorter documents"
            )
        if length > ids.shape[1]:
            batch = {name: self._grown(name, value, growth, ids.shape) for name, value in batch.items()}
        batch["position_ids"] = anchor_ids(growth.starts).to(positions.dtype)
        return batch | _boundaries(batch, growth.starts)

    def _grown(self, name: str, value: Any, growth: "_Growth", shape: torch.Size) -> Any:
        if name in _REBUILT or not isinstance(value, Tensor) or not _has_length(value, shape):
            return value
        fills = {"input_ids": self.anchor_token_id, "labels": IGNORED}
        if name in fills:
            return growth.apply(value, fills[name])
        if value.shape != shape or not ((value == 0) | (value == 1)).all():
            raise ValueError(
                f"anchors have to be inserted, and what {name}, a tensor {tuple(value.shape)}, should hold there is "
                f"unknown: only masks {tuple(shape)} of zeros and ones can grow. Give every document its anchor "
                "beforehand, or take it out of the batch"
            )
        return value.gather(1, growth.source) if name == "attention_mask" else growth.apply(value, 0)


@dataclass(frozen=True)
class _Growth:
    """How rows grow; all (B, new length).

    source: the column each token comes from; of a new one, the column of the token beside it. new: the tokens to be
    filled in. starts: where segments start.
    """

    source: Tensor
    new: Tensor
    starts: Tensor

    @classmethod
    def of(cls, starts: Tensor, padding: Tensor, missing: Tensor) -> "_Growth":
        batch, length = starts.shape
        longest = length + int(missing.sum(1).max())
        source = torch.full((batch, longest), length - 1)
        new = torch.ones(batch, longest, dtype=torch.bool)
        begins = torch.zeros_like(new)
        for row in range(batch):
            # Where each old token goes: behind the anchors inserted up to and including its own.
            moved = torch.arange(length) + missing[row].cumsum(0)
            anchors = moved[missing[row]] - 1
            source[row, moved], source[row, anchors] = torch.arange(length), missing[row].nonzero().flatten()
            new[row, moved] = False
            begins[row, moved] = starts[row] & ~missing[row]
            begins[row, anchors] = True
            filled = int(moved[-1]) + 1
            if filled < longest and not padding[row, -1]:
                begins[row, filled] = True
        return cls(source, new, begins)

    def apply(self, tensor: Tensor, fill: int) -> Tensor:
        return tensor.gather(1, self.source).masked_fill(self.new, fill)


def _checked(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids, position_ids and labels (B, L) of the inner batch, its positions counting from 0 in every document."""
    ids, positions = batch.get("input_ids"), batch.get("position_ids")
    if not isinstance(ids, Tensor) or not isinstance(positions, Tensor):
        raise ValueError(
            "the inner collator must give torch tensors input_ids and position_ids, the latter restarting at every "
            f"document; it gives {', '.join(f'{name} ({type(value).__name__})' for name, value in batch.items())}. "
            "DataCollatorWithFlattening(return_position_ids=True) does, and so does TRL's with padding_free=True"
        )
    labels = torch.full_like(ids, IGNORED) if batch.get("labels") is None else batch["labels"]
    if ids.ndim != 2 or not ids.shape == positions.shape == labels.shape or ids.shape[1] == 0:
        raise ValueError(
            "input_ids, position_ids and labels of the inner collator must all be (batch, length), and they are "
            f"{tuple(ids.shape)}, {tuple(positions.shape)} and {tuple(labels.shape)} (a document without tokens can be "
            "the cause; multimodal, 3-D, positions cannot be rewritten)"
        )
    if (positions[:, 0] != 0).any():
        raise ValueError(
            f"the positions of the inner collator begin with {positions[:, 0].tolist()}: every row must begin with "
            "position 0 (position_ids_start=0)"
        )
    jumps = (positions[:, 1:] != 0) & (positions[:, 1:] != positions[:, :-1] + 1)
    if jumps.any():
        row, column = jumps.nonzero()[0].tolist()
        raise ValueError(
            f"the positions of the inner collator must count by one from 0 in every document; in row {row}, position "
            f"{positions[row, column]} is followed by {positions[row, column + 1]}. (Rows of AnchorPacking are "
            "finished and need no AnchorCollator.)"
        )
    return ids, positions, labels


def _has_length(tensor: Tensor, shape: torch.Size) -> bool:
    return shape[1] in tensor.shape[1:] or tensor.shape == shape[1:]


def _boundaries(batch: Mapping[str, Any], starts: Tensor) -> dict[str, Any]:
    """The keywords of the flash kernels among `batch`, for the segments of all rows, one row after the other."""
    edges = torch.cat([starts.flatten().nonzero().flatten(), torch.tensor([starts.numel()])])
    longest = int(edges.diff().max())
    rebuilt = {
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": starts.cumsum(1) - 1,
    }
    return {name: _like(batch[name], value) for name, value in rebuilt.items() if name in batch}


def _like(old: Any, value: Any) -> Any:
    return torch.as_tensor(value).to(old.dtype) if isinstance(old, Tensor) else value
