"""The operation itself: segments gathered from the rows, computed by an engine, put back."""

import torch
from torch import Tensor

from hf_ext.anchor_attention.choice import choose
from hf_ext.anchor_attention.kernel import Kernel, call_of, without_idle_window
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.segments import SegmentTable, build_table


def anchor_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    position_ids: Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
    attention_mask: Tensor | None = None,
    anchor_doc_ids: Tensor | None = None,
) -> Tensor:
    """AnchorAttention (arXiv 2411.13476, section 4): a query sees its own document's earlier tokens, and the anchor.

    Args:
        query: (B, Hq, L, D).
        key: (B, Hkv, L, D), where Hkv divides Hq.
        value: (B, Hkv, L, Dv).
        position_ids: (B, L) or (1, L); 0 starts a document (so does column 0).
        scaling: factor on q k^T; D ** -0.5 by default.
        sliding_window: a query sees that many columns, its own included; the anchor is not exempted.
        softcap: c in c * tanh(s / c), before masking.
        dropout: on the weights, applied as given: pass 0 in evaluation.
        sinks: (Hq,), one more column of the softmax, without a value.
        attention_mask: (B, L), 1 = real token. Masked keys are hidden; the output of masked queries is 0.
        anchor_doc_ids: (B, L), the shared layout: 0 for the row's one anchor, 1, 2, ... for its documents.

    Returns:
        (B, Hq, L, Dv), differentiable in query, key, value and sinks.

    Raises:
        ValueError: shapes that do not fit each other, or an option outside its range.
    """
    if query.ndim != 4:
        raise ValueError(f"query must be (B, Hq, L, D), not {tuple(query.shape)}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    options = Options(scaling, sliding_window, softcap, dropout, sinks)
    table = build_table((query.shape[0], query.shape[2]), position_ids, attention_mask, anchor_doc_ids)
    return segment_attention(query, key, value, table, options)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, options: Options) -> Tensor:
    """The engine in use, applied to a table of segments; shapes as in `anchor_attention`."""
    query, key, value = as_autocast(query, key, value)
    _check_inputs(query, key, value, table, options.sinks)
    options = without_idle_window(options, table)
    engine = engine_for(query, value, table, options)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if table.tokens is not None:
        # index_select: the backward of advanced indexing is several times slower.
        q, k, v = (x.index_select(0, table.tokens) for x in (q, k, v))
    out = engine.run(q, k, v, table, options) if table.lengths else _nothing(q, k, v, options.sinks)
    if table.slots is not None:
        out = torch.cat([out, out.new_zeros(1, *out.shape[1:])]).index_select(0, table.slots)
    return out.unflatten(0, table.shape).transpose(1, 2)


def engine_for(query: Tensor, value: Tensor, table: SegmentTable, options: Options) -> Kernel:
    """What computes such a call here. Raises as `choice.choose` does."""
    return choose(call_of(query, value, table, without_idle_window(options, table)))


def as_autocast(*tensors: Tensor) -> list[Tensor]:
    """Under autocast, rotary phases leave query and key in float32 beside a value in half precision."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return list(tensors)
    return [x if x.dtype == torch.float64 else x.to(torch.get_autocast_dtype(device)) for x in tensors]


def _nothing(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """The output for no slots at all (all tokens masked), tied to its inputs so that they get gradients of zero."""
    tie = sum(x.sum() * 0 for x in (q, k, v, sinks) if x is not None)
    return q.new_zeros(0, q.shape[1], v.shape[2]) + tie


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, sinks: Tensor | None) -> None:
    shapes = [tuple(x.shape) for x in (query, key, value)]
    batch, heads, length, width = shapes[0]
    key_heads = shapes[1][1]
    if (
        shapes[1] != (batch, key_heads, length, width)
        or shapes[2][:3] != (batch, key_heads, length)
        or len(shapes[2]) != 4
        or not key_heads
        or heads % key_heads
        or table.shape != (batch, length)
    ):
        raise ValueError(
            "query, key, value must be (B, Hq, L, D), (B, Hkv, L, D), (B, Hkv, L, Dv) with Hkv dividing Hq, "
            f"and the positions (B, L); they are {shapes[0]}, {shapes[1]}, {shapes[2]} and {table.shape}"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, not {query.dtype}, {key.dtype} and {value.dtype}")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be (Hq,) = ({heads},), not {tuple(sinks.shape)}")
