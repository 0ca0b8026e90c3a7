"""How much does attention change when only the positions shift? (arXiv 2411.13476, section 3, Eqs. 4 and 5.)

Attention over relative positions should not see a shift of all positions. With rounded phases it does, and the first
key most of all.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.masking_utils import eager_mask

from hf_ext.anchor_attention.check import hosted_model, lent
from hf_ext.anchor_attention.models import OWN_ATTENTION
from hf_ext.anchor_attention.support import unsupported
from hf_ext.checks import is_integer


@dataclass
class RopeDrift:
    """What a shift of all positions changes in attention (arXiv 2411.13476, Eqs. 4 and 5).

    Args:
        d: Eq. 4, summed over layers and heads, mean over the batch.
        d_logit: Eq. 5, likewise; queries that do not see the first key (window) count nothing.
        per_head: (layers, heads) float64, sums to `d`; 0 where a layer has fewer heads than another.
        first_key_share: the part of `d` that comes from the first key; nan if `d` is 0.
    """

    d: float
    d_logit: float
    per_head: Tensor
    first_key_share: float


def rope_drift(model: nn.Module, input_ids: Tensor, shift_a: int = 0, shift_b: int = 16) -> RopeDrift:
    """How far attention changes when all positions are shifted, which exact rotary embeddings would not show.

    Runs `input_ids` at positions `shift_a + [0, L)` and at `shift_b + [0, L)`, causally, through the attention that
    the host writes out itself (eager), in evaluation mode. With P the weights and A the scaled logits of the first
    key (softcapped where the model does), i a query, j a key, both from 1 to L (arXiv 2411.13476, Eqs. 4 and 5):

        d       = sum_j 1 / (L - j + 1) sum_i |P_ij(a) - P_ij(b)|
        d_logit = 1 / L sum_i |A_i1(a) - A_i1(b)|

    Sums are in float64. The weights of both runs are kept, 2 * layers * heads * B * L^2 numbers: short rows are enough.

    Args:
        model: the model, or whatever wraps one. It is left as it was, also after an error.
        input_ids: (B, L), L of at least 2.
        shift_a, shift_b: position of the first token in either run, at least 0.

    Raises:
        ValueError: input of another shape, a negative shift, positions beyond `max_position_embeddings`.
        AnchorUnsupportedError: positions do not reach queries and keys, or attention cannot be watched.
    """
    inner = hosted_model(model)
    farthest = _check_input(inner, input_ids, shift_a, shift_b)
    ids = input_ids.to(inner.device)
    a = _attention_at(inner, ids, shift_a)
    b = _attention_at(inner, ids, shift_b)
    if not a:
        raise unsupported(inner, OWN_ATTENTION)
    if shift_a != shift_b and all(torch.equal(x.first_key, y.first_key) for x, y in zip(a, b, strict=True)):
        raise unsupported(inner, f"position_ids (up to {farthest}) do not reach its queries and keys")
    length = ids.shape[1]
    counts = torch.arange(length, 0, -1, dtype=torch.float64, device=ids.device)
    by_key = [
        (x.weights.double() - y.weights.double()).abs().sum(-2).mean(0) / counts for x, y in zip(a, b, strict=True)
    ]
    logits = [(x.logits - y.logits).abs().sum(-1).mean(0) / length for x, y in zip(a, b, strict=True)]
    per_head = pad_sequence([x.sum(-1).cpu() for x in by_key], batch_first=True)
    d, of_first = per_head.sum().item(), sum(x[:, 0].sum().item() for x in by_key)
    return RopeDrift(d, sum(x.sum().item() for x in logits), per_head, of_first / d if d else float("nan"))


def _check_input(model: nn.Module, input_ids: Tensor, *shifts: int) -> int:
    """The last position that will be used."""
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point():
        kind = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids must be a tensor of token ids, not {kind}")
    if input_ids.ndim != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (B, L) with L of at least 2, not {tuple(input_ids.shape)}")
    for shift in shifts:
        if not is_integer(shift) or shift < 0:
            raise ValueError(f"shift_a and shift_b must be integers of at least 0, not {shift!r}")
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise unsupported(model, "its forward takes no position_ids")
    last = max(shifts) + input_ids.shape[1] - 1
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and last >= limit:
        raise ValueError(
            f"a shift of {max(shifts)} takes {input_ids.shape[1]} tokens to position {last}, but "
            f"max_position_embeddings is {limit}: use a smaller shift or shorter rows"
        )
    return last


@dataclass
class _Layer:
    """What one attention call computed: weights (B, H, L, L), logits of the first key (B, H, L) float64, 0 where it
    is hidden, and that key (B, Hkv, D)."""

    weights: Tensor
    logits: Tensor
    first_key: Tensor


def _attention_at(model: nn.Module, input_ids: Tensor, shift: int) -> list[_Layer]:
    seen: list[_Layer] = []

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **keywords: Any) -> Any:
        # The host hands its written-out function to nobody; it stands beside the layer that would call it.
        eager = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
        if eager is None:
            raise unsupported(module, "its file has no eager_attention_forward")
        out, weights = eager(module, query, key, value, mask, **keywords)
        seen.append(_Layer(weights, _first_logits(query, key, mask, **keywords), key[:, :, 0]))
        return out, weights

    positions = torch.arange(shift, shift + input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    with lent(model, attention, eager_mask):
        model(input_ids=input_ids, position_ids=positions)
    return seen


def _first_logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> Tensor:
    """As they enter the softmax; (B, Hq, L), rounded as the host rounds them."""
    first = key[:, :, :1].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query @ first.mT)[..., 0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.double() if mask is None else logits.double().masked_fill(mask[..., 0] != 0, 0.0)
