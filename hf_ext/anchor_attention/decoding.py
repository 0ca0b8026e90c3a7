"""Where a row is one document: decoding behind a cache, and masks given by the user. There, anchor is sdpa."""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_ext.anchor_attention.reference import masked_attention
from hf_ext.anchor_attention.support import BEHIND_A_CACHE, unsupported


def refuse_packed(module: torch.nn.Module, position_ids: Tensor | None) -> None:
    """Behind a cache or a learned prefix a row is one document; several would see each other, and silently.

    A position 0 behind another tells that, unless nothing but padding stands before it, whose positions are all 1 (or
    all 0, which are no position "behind another").
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return
    before, here = position_ids[:, :-1], position_ids[:, 1:]
    only_padding = (before != 1).cumsum(1) == 0
    if ((here == 0) & (before != 0) & ~only_padding).any():
        raise unsupported(module, BEHIND_A_CACHE)


def as_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Decoding, and masks given by the user: what the host's sdpa does; (B, Lq, Hq, Dv).

    The host's function refuses softcap and ignores sinks, so these two take the written-out formula.
    """
    if softcap is None and sinks is None:
        return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling)[0]
    visible = _visible(module, mask, query.shape[2], key.shape[2], query.device)
    out = masked_attention(
        *(query, key, value, visible), scaling=scaling, softcap=softcap, sinks=sinks, dropout=dropout
    )
    return out.transpose(1, 2).contiguous()


def _visible(module: torch.nn.Module, mask: Tensor | None, queries: int, keys: int, device: Any) -> Tensor:
    """The host's mask as a boolean one."""
    if mask is None:  # the host's convention: one query sees all keys, several see those up to their own index
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device)
        return mask if queries == 1 else mask.tril()
    if mask.dtype == torch.bool:
        return mask
    hidden = mask <= torch.finfo(mask.dtype).min / 2
    if not ((mask == 0) | hidden).all():
        raise unsupported(module, "softcap or sinks together with a mask of weights; give a mask of 0 and -inf")
    return ~hidden
