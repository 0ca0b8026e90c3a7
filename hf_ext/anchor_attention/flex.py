"""The engine for what the varlen kernels lack: torch's flex_attention, with a block mask made from the segments."""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from hf_ext.anchor_attention.kernel import HALF, Kernel
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.segments import SegmentTable

BLOCK = 128  # slots in a block of queries and of keys


@cache
def flex_kernels() -> list[Kernel] | str:
    """flex_attention, or why it cannot run here."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    if "seq_lengths" not in inspect.signature(flex.BlockMask.from_kv_blocks).parameters:
        return f"torch {torch.__version__} makes no block masks for rows of any length (2.7 does)"
    has = frozenset({"sliding window", "gaps in the window", "softcap", "sinks"})
    return [Kernel("flex_attention", flex_engine, has, dtypes=(*HALF, torch.float32))]


def flex_engine(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, options: Options) -> Tensor:
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    softcap, window, device = options.softcap, options.sliding_window, query.device
    arguments: dict[str, Any] = {
        "score_mod": None if softcap is None else lambda score, b, h, i, j: softcap * torch.tanh(score / softcap),
        "block_mask": table.once(("blocks", window, device), lambda: block_mask(table, window, device)),
        "scale": options.scaling,
        "enable_gqa": q.shape[1] != k.shape[1],
    }
    if options.sinks is None:
        out = _attention()(q, k, v, **arguments)
    else:
        out, lse = _with_lse(q, k, v, arguments)
        # exp(lse) / (exp(lse) + exp(sink)): what the softmax leaves to the keys beside one more column.
        out = out * torch.sigmoid(lse - options.sinks.to(lse.dtype)[None, :, None])[..., None].to(out.dtype)
    return out[0].transpose(0, 1)


def block_mask(table: SegmentTable, window: int | None, device: torch.device) -> flex.BlockMask:
    """Causal in each segment, written down by blocks of queries and keys: nothing of size (slots, slots).

    In a "full" block every query sees every key; in a "partial" one the segment, order and window of each pair decide.
    """
    slots = sum(table.lengths)
    start = table.bounds[:-1].long().repeat_interleave(torch.tensor(table.lengths))  # of the segment of every slot
    first = torch.arange(0, slots, BLOCK)  # query of every block
    last = (first + BLOCK - 1).clamp(max=slots - 1)
    seen = start[first]
    if window is not None:
        seen = torch.maximum(seen, first - window + 1)  # slots never run ahead of columns
    low, here = seen // BLOCK, torch.arange(len(first))
    # Full: blocks of earlier keys that lie in the segment of all the block's queries (and in all their windows).
    full_from = (start[last] + BLOCK - 1) // BLOCK
    if window is not None:
        full_from = here if table.gaps else torch.maximum(full_from, (last - window + 1 + BLOCK - 1) // BLOCK)
    full_from = torch.minimum(full_from, here)

    blocks = torch.arange(len(first))
    full = (blocks >= full_from[:, None]) & (blocks < here[:, None])
    partial = (blocks >= low[:, None]) & (blocks <= here[:, None]) & ~full
    starts, token = start.to(device), table.token_of_slot(device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        together = (i >= j) & (starts[i] == starts[j])
        return together if window is None else together & (token[i] - token[j] < window)

    return flex.BlockMask.from_kv_blocks(
        *_counted(partial, device),
        *_counted(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(slots, slots),
    )


def _counted(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """bool (query blocks, key blocks) -> how many of each row are set, and their indices ahead of the others'."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return tuple(x.int()[None, None].to(device) for x in (blocks.sum(-1), order))


@cache
def _attention() -> Any:
    """Compiled: uncompiled, it writes out all scores."""
    return torch.compile(flex.flex_attention)


def _with_lse(q: Tensor, k: Tensor, v: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    if hasattr(flex, "AuxRequest"):
        out, extra = _attention()(q, k, v, return_aux=flex.AuxRequest(lse=True), **arguments)
        return out, extra.lse
    return _attention()(q, k, v, return_lse=True, **arguments)
