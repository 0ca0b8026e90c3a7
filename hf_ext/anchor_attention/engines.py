"""The operation itself, and which engine computes it.

An engine is a function of query (slots, Hq, D), key (slots, Hkv, D), value (slots, Hkv, Dv), a SegmentTable and
Options, and returns (slots, Hq, Dv).
"""

import os
from collections.abc import Callable
from difflib import get_close_matches
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ext.anchor_attention.dense import dense_engine
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.sdpa import sdpa_engine
from hf_ext.anchor_attention.segments import SegmentTable, build_table

ENGINE_VARIABLE = "HF_EXT_ANCHOR_ENGINE"

Engine = Callable[[Tensor, Tensor, Tensor, SegmentTable, Options], Tensor]
ENGINES: dict[str, tuple[Engine, str]] = {
    "sdpa": (sdpa_engine, "any device and dtype, memory linear in length"),
    "dense": (dense_engine, "writes out (length, length) masks, for checks; only when named"),
}


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
    _check_shapes(query, key, value, table, options.sinks)
    engine, _ = ENGINES[current_engine()]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    if table.tokens is not None:
        # index_select: the backward of advanced indexing is several times slower.
        q, k, v = (x.index_select(0, table.tokens) for x in (q, k, v))
    out = engine(q, k, v, table, options) if table.lengths else _nothing(q, k, v, options.sinks)
    if table.slots is not None:
        out = torch.cat([out, out.new_zeros(1, *out.shape[1:])]).index_select(0, table.slots)
    return out.unflatten(0, table.shape).transpose(1, 2)


def _nothing(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """The output for no slots at all (all tokens masked), tied to its inputs so that they get gradients of zero."""
    tie = sum(x.sum() * 0 for x in (q, k, v, sinks) if x is not None)
    return q.new_zeros(0, q.shape[1], v.shape[2]) + tie


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, table: SegmentTable, sinks: Tensor | None) -> None:
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
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be (Hq,) = ({heads},), not {tuple(sinks.shape)}")


class EngineStatus(NamedTuple):
    """usable: whether it can run here. reason: why it was chosen, or why it was not."""

    usable: bool
    reason: str


def available_engines() -> dict[str, EngineStatus]:
    """Every engine, whether it can run here, and why it is chosen or not."""
    chosen = current_engine()
    return {
        name: EngineStatus(True, f"chosen{_chosen_by()}: {about}" if name == chosen else about)
        for name, (_, about) in ENGINES.items()
    }


def current_engine() -> str:
    """Name of the engine that runs: the one set by `use_engine`, else by HF_EXT_ANCHOR_ENGINE, else auto's choice.

    Raises:
        ValueError: the environment variable names no engine.
    """
    name = _named or _checked(os.environ.get(ENGINE_VARIABLE) or "auto", f"environment variable {ENGINE_VARIABLE}")
    return "sdpa" if name == "auto" else name


class use_engine:
    """Set the engine of this process; as a context manager, until the block ends.

    Args:
        name: "auto", "sdpa" or "dense". "auto" also overrides the environment variable.

    Raises:
        ValueError: an unknown name, with the allowed ones and the nearest match.
    """

    def __init__(self, name: str) -> None:
        global _named
        self._former, _named = _named, _checked(name, "use_engine")

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        global _named
        _named = self._former


_named: str | None = None


def _chosen_by() -> str:
    if _named is not None:
        return "" if _named == "auto" else " by use_engine"
    return f" by {ENGINE_VARIABLE}" if os.environ.get(ENGINE_VARIABLE, "auto") != "auto" else ""


def _checked(name: str, source: str) -> str:
    allowed = ["auto", *ENGINES]
    if name not in allowed:
        near = get_close_matches(str(name), allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{source}: there is no engine {name!r}; allowed are {', '.join(allowed)}.{hint}")
    return name
