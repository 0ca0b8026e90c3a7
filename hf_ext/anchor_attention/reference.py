"""AnchorAttention as arXiv 2411.13476 (section 4) defines it, with explicit masks: the specification of this package.

A row of L tokens is cut into segments. A query sees a key iff the key does not come later and both stand in the same
segment, or the key is the anchor. Everything is O(L^2); the engines are held to these results.
"""

import torch
from torch import Tensor


def same_segment(position_ids: Tensor) -> Tensor:
    """Replica layout: `position_ids (B, L)` restart at 0 with every segment -> bool (B, L, L).

    Column 0 opens a segment whatever its position is: a row may begin in the middle of a document.
    """
    opens = position_ids == 0
    opens[:, 0] = True
    segment = opens.cumsum(-1)
    return segment[:, :, None] == segment[:, None, :]


def same_document(anchor_doc_ids: Tensor) -> Tensor:
    """Shared layout: `anchor_doc_ids (B, L)`, 0 for the anchor and 1, 2, ... for the documents -> bool (B, L, L)."""
    key_document = anchor_doc_ids[:, None, :]
    return (anchor_doc_ids[:, :, None] == key_document) | (key_document == 0)


def visible_keys(together: Tensor, attention_mask: Tensor | None = None, sliding_window: int | None = None) -> Tensor:
    """Causal, minus padding, minus what lies outside the window -> bool (B, L, L) indexed [row, query, key].

    together: bool (B, L, L) of `same_segment` or `same_document`. attention_mask: (B, L), 1 = real token.
    sliding_window: a query sees the keys at most `sliding_window - 1` columns before it, the anchor not exempted.
    """
    column = torch.arange(together.shape[-1], device=together.device)
    distance = column[:, None] - column[None, :]
    visible = together & (distance >= 0)
    if sliding_window is not None:
        visible = visible & (distance < sliding_window)
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, :]
    return visible


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scaling * q k^T) v over the visible keys.

    query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), visible bool broadcastable to (B, 1, Lq, Lk),
    sinks (Hq,): a column of the softmax that carries no value. Returns (B, Hq, Lq, Dv). A query that sees no key
    gets 0. Half precision is computed in float32.
    """
    groups = query.shape[1] // key.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)

    scores = scaling * q @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    sees_nothing = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & ~sees_nothing, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[-2]].masked_fill(~visible, 0.0)
    weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ v).to(query.dtype)
