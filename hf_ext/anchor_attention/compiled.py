"""The operation as one node of a compiled graph: its segments are data, by which no graph can branch."""

import torch
from torch import Tensor

from hf_ext import compat
from hf_ext.anchor_attention.engines import segment_attention
from hf_ext.anchor_attention.frame import once
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.segments import build_table
from hf_ext.anchor_attention.support import LOOKS_AHEAD, AnchorUnsupportedError, refusal


@torch.library.custom_op("hf_ext::anchor_attention", mutates_args=())
def compiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    anchor_doc_ids: Tensor | None,
    sinks: Tensor | None,
    looks_ahead: Tensor | None,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """`anchor_attention` without dropout, for torch.compile; the result is (B, L, Hq, Dv).

    looks_ahead: scalar bool, whether the host's mask lets a token see a later one, or a row begins behind others; both
    are refused. A graph keeps nothing of a forward but tensors, so the backward computes the forward once more.
    """
    if looks_ahead is not None and once(bool, looks_ahead):
        raise AnchorUnsupportedError(refusal("the compiled model", LOOKS_AHEAD))
    shape = (query.shape[0], query.shape[2])
    table = once(build_table, shape, position_ids, attention_mask, anchor_doc_ids)
    options = Options(scaling, sliding_window, softcap, sinks=sinks)
    return segment_attention(query, key, value, table, options).transpose(1, 2).contiguous()


@compiled_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@torch.library.custom_op("hf_ext::anchor_attention_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor | None,
    anchor_doc_ids: Tensor | None,
    sinks: Tensor | None,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> list[Tensor]:
    """Gradients of query, key, value and, where given, sinks."""
    shape = (query.shape[0], query.shape[2])
    table = once(build_table, shape, position_ids, attention_mask, anchor_doc_ids)
    with torch.inference_mode(False), compat.recording_inside_an_operator():
        leaves = [x.detach().requires_grad_() for x in (query, key, value, sinks) if x is not None]
        options = Options(scaling, sliding_window, softcap, sinks=None if sinks is None else leaves[3])
        out = segment_attention(*leaves[:3], table, options).transpose(1, 2)
        return [x.contiguous() for x in torch.autograd.grad(out, leaves, gradient)]


@_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> list[Tensor]:
    sinks = rest[3]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (query, key, value, sinks)
        if isinstance(x, Tensor)
    ]


def _keep(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[8:]


def _gradients(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, *sinks = _backward(gradient, *ctx.saved_tensors, *ctx.options)
    return query, key, value, None, None, None, sinks[0] if sinks else None, None, None, None, None


compiled_attention.register_autograd(_gradients, setup_context=_keep)
