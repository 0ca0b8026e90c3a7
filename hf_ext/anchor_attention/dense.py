"""The engine that writes its masks out: any feature, O(L^2) memory. The oracle of the other engines."""

import torch
from torch import Tensor

from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.reference import masked_attention
from hf_ext.anchor_attention.segments import SegmentTable


def dense_engine(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, options: Options) -> Tensor:
    """Row by row, over all slots of the row."""
    token = table.token_of_slot(query.device)
    segment = torch.arange(len(table.lengths)).repeat_interleave(torch.tensor(table.lengths)).to(query.device)
    rows = zip(*(x.split(table.rows) for x in (query, key, value, token, segment)), strict=True)
    return torch.cat(
        [
            masked_slots(q, k, v, causal_window(t, t, options.sliding_window) & (s[:, None] == s[None, :]), options)
            for q, k, v, t, s in rows
        ]
    )


def causal_window(query_token: Tensor, key_token: Tensor, window: int | None) -> Tensor:
    """bool (queries, keys), for tokens of one segment: there, token numbers differ as columns do."""
    distance = query_token[:, None] - key_token[None, :]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def masked_slots(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, options: Options) -> Tensor:
    """`reference.masked_attention` on (slots, heads, dim) tensors; visible: bool (queries, keys)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out = masked_attention(
        *(q, k, v, visible),
        scaling=options.scaling,
        softcap=options.softcap,
        sinks=options.sinks,
        dropout=options.dropout,
    )
    return out[0].transpose(0, 1)
