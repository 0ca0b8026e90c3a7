"""The engine for every device and dtype: `F.scaled_dot_product_attention` in each segment, memory linear in L."""

from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_ext.anchor_attention.dense import causal_window, masked_slots
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.segments import SegmentTable

# Up to this length, one call on a batch of padded segments beats one call a segment (measured on CPU).
SHORT = 64
# Slots of short segments computed together: more would only make the temporary copies leave the caches.
CHUNK = 2048
# Queries at once where a mask has to be written out.
BLOCK = 256


def sdpa_engine(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, options: Options) -> Tensor:
    window = options.sliding_window
    if window is None and options.softcap is None and options.sinks is None:
        return _plain(query, key, value, table.lengths, options)
    token = table.token_of_slot(query.device)
    segments = zip(*(x.split(table.lengths) for x in (query, key, value, token)), strict=True)
    return torch.cat([_in_blocks(*segment, window, options) for segment in segments])


# --- without a written mask


def _plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], options: Options) -> Tensor:
    """Neighbours of one length are one view of the input; runs of short ones are gathered and computed together."""
    if len(set(lengths)) == 1:
        return _equal_segments(q, k, v, lengths[0], options)
    if max(lengths) <= SHORT:
        return _short_segments(q, k, v, lengths, options)
    pieces = []  # (slots, length of each segment among them, or 0 for a run of short ones)
    for length, group in groupby(lengths, key=lambda length: max(length, SHORT)):
        pieces.append((sum(group), length if length > SHORT else 0))
    sizes = [size for size, _ in pieces]
    parts = list(zip(*(x.split(sizes) for x in (q, k, v)), strict=True))
    runs = [part for part, (_, length) in zip(parts, pieces, strict=True) if not length]
    if runs:
        merged = (torch.cat(column) for column in zip(*runs, strict=True))
        short = _short_segments(*merged, [length for length in lengths if length <= SHORT], options)
        done = iter(short.split([size for size, length in pieces if not length]))
    return torch.cat(
        [
            _equal_segments(*part, length, options) if length else next(done)
            for part, (_, length) in zip(parts, pieces, strict=True)
        ]
    )


def _equal_segments(q: Tensor, k: Tensor, v: Tensor, length: int, options: Options) -> Tensor:
    """Segments of one length, one after the other: a single call on views."""
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return _sdpa(q, k, v, options, is_causal=True).transpose(1, 2).flatten(0, 1)


def _short_segments(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], options: Options) -> Tensor:
    chunks: list[list[int]] = [[]]
    for length in lengths:
        if sum(chunks[-1]) + length > CHUNK:
            chunks.append([])
        chunks[-1].append(length)
    parts = zip(*(x.split([sum(chunk) for chunk in chunks]) for x in (q, k, v)), chunks, strict=True)
    return torch.cat([_padded_batches(*part, options) for part in parts])


def _padded_batches(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], options: Options) -> Tensor:
    """Segments of similar length share a batch, padded at their ends, where only padding can see the padding."""
    length = torch.tensor(lengths)
    start = length.cumsum(0) - length
    padded = _padded(length)
    order = padded.argsort(stable=True)
    # Padding repeats a segment's last token, so that a foreign value (an inf, say) cannot get in.
    gather = torch.cat(
        [
            (start[members, None] + torch.minimum(torch.arange(size), length[members, None] - 1)).flatten()
            for size, members in zip(*_groups(padded[order], order), strict=True)
        ]
    ).to(q.device)
    sizes, counts = padded[order].unique_consecutive(return_counts=True)
    batches = zip(*(x.index_select(0, gather).split((sizes * counts).tolist()) for x in (q, k, v)), strict=True)
    out = torch.cat([_equal_segments(*qkv, size, options) for qkv, size in zip(batches, sizes.tolist(), strict=True)])
    new_start = torch.empty_like(start)
    new_start[order] = padded[order].cumsum(0) - padded[order]
    slot = torch.arange(len(q)) + (new_start - start).repeat_interleave(length)
    return out.index_select(0, slot.to(q.device))


def _groups(keys: Tensor, values: Tensor) -> tuple[list[int], tuple[Tensor, ...]]:
    unique, counts = keys.unique_consecutive(return_counts=True)
    return unique.tolist(), values.split(counts.tolist())


def _padded(length: Tensor) -> Tensor:
    """Lengths up to 8 stay; longer ones go up to the next quarter between two powers of two."""
    step = 2 ** (length.float().log2().floor().long() - 2).clamp(min=0)
    return (length + step - 1) // step * step


# --- with a written mask


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, token: Tensor, window: int | None, options: Options) -> Tensor:
    """One segment with a window, softcap or sinks: queries in blocks, so that no mask is (length, length)."""
    block = max(BLOCK, window or 0)
    outputs = []
    for start in range(0, len(q), block):
        queries = slice(start, min(start + block, len(q)))
        # Slots never run ahead of columns: the window reaches at most `window - 1` slots back.
        keys = slice(0 if window is None else max(0, start - window + 1), queries.stop)
        arguments = (q[queries], k[keys], v[keys], token[queries], token[keys], options)
        if options.softcap is None and options.sinks is None:
            outputs.append(_sdpa_block(*arguments))
        else:
            # Recomputed in backward, else the weights of all blocks together would be the full matrix again.
            outputs.append(checkpoint(_explicit_block, *arguments, use_reentrant=False))
    return torch.cat(outputs)


def _explicit_block(q: Tensor, k: Tensor, v: Tensor, q_token: Tensor, k_token: Tensor, options: Options) -> Tensor:
    return masked_slots(q, k, v, causal_window(q_token, k_token, options.sliding_window), options)


def _sdpa_block(q: Tensor, k: Tensor, v: Tensor, q_token: Tensor, k_token: Tensor, options: Options) -> Tensor:
    visible = causal_window(q_token, k_token, options.sliding_window)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return _sdpa(q, k, v, options, attn_mask=visible)[0].transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, options: Options, **mask: Tensor | bool) -> Tensor:
    """q (N, Hq, n, D), k (N, Hkv, m, D), v (N, Hkv, m, Dv) -> (N, Hq, n, Dv)."""
    width = v.shape[-1]
    # The kernels with linear memory want D == Dv. Zeros change no score and no column that is kept.
    q, k, v = (F.pad(x, (0, max(q.shape[-1], width) - x.shape[-1])) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, dropout_p=options.dropout, scale=options.scaling, enable_gqa=q.shape[1] != k.shape[1], **mask
    )
    return out[..., :width]
