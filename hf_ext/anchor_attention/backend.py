"""The attention function, which every layer of a transformers model calls."""

from typing import Any

import torch
from torch import Tensor

from hf_ext import compat
from hf_ext.anchor_attention.compiled import compiled_attention
from hf_ext.anchor_attention.decoding import as_sdpa, refuse_packed
from hf_ext.anchor_attention.engines import as_autocast, engine_for, segment_attention
from hf_ext.anchor_attention.frame import forward_of, once
from hf_ext.anchor_attention.mask import AnchorMask
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.segments import build_table
from hf_ext.anchor_attention.support import COMPOSITE, CONTINUOUS, LOOKS_AHEAD, NAMES, name_of, unsupported

UNTOLD = -1  # the window of a layer that says nothing of one; None is a layer without
CONTEXT_PARALLEL = (
    "context parallelism (cp_size) leaves each process a part of every row, in which documents cannot be told apart. "
    "DeepSpeed's Ulysses sequence parallelism (sp_size) works: it gathers the rows before attention"
)


def anchor_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: AnchorMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = UNTOLD,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    anchor_doc_ids: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function behind `attn_implementation="anchor"`, in the host's calling convention.

    query (B, Hq, L, D), key (B, Hkv, L, D), value (B, Hkv, L, Dv), position_ids (B, L) or (1, L), anchor_doc_ids
    (B, L) for the shared layout. Returns ((B, L, Hq, Dv), None). Other keywords of the host are not needed here.

    Raises:
        AnchorUnsupportedError: no position_ids, bidirectional attention, a position bias, a paged cache, context
            parallelism, or a mask that somebody dropped although it was needed.
        ValueError: positions whose shape does not fit the row.
    """
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise unsupported(module, f"the layer asks for bidirectional or cross attention ({COMPOSITE})")
    if position_bias is not None:
        raise unsupported(module, "the layer adds a position bias to its scores")
    if cache is not None:
        raise unsupported(module, "continuous batching (a paged cache) is not available")
    if compat.context_parallelism_is_on():
        raise unsupported(module, CONTEXT_PARALLEL)
    if kwargs.get("head_mask") is not None:
        raise unsupported(module, "head_mask is not available")
    scaling = compat.attention_scaling(module, scaling, query.shape[-1])
    if isinstance(attention_mask, Tensor) or key.shape[2] != query.shape[2]:
        if key.shape[2] != query.shape[2]:
            refuse_packed(module, position_ids)
        return as_sdpa(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
    if position_ids is None:
        raise unsupported(module, "it does not hand position_ids to the attention function")

    padding = looks_ahead = None
    windows = [] if sliding_window == UNTOLD else [sliding_window]
    if attention_mask is None:  # Ulysses sequence parallelism drops masks; it means "no padding"
        _refuse_dropped_mask(module, is_causal, windows, anchor_doc_ids)
    else:
        padding, looks_ahead = attention_mask.padding, attention_mask.looks_ahead
        anchor_doc_ids = attention_mask.documents if anchor_doc_ids is None else anchor_doc_ids
        windows.append(attention_mask.window)  # some hosts tell it to the layer, some only to the mask
    sliding_window = min([window for window in windows if window is not None], default=None)
    options = Options(scaling, sliding_window, softcap, dropout, s_aux)
    segments = position_ids, padding, anchor_doc_ids
    if torch.compiler.is_compiling():
        return _in_a_graph(module, query, key, value, segments, options, looks_ahead), None
    framed = attention_mask is not None
    return _eager(module, query, key, value, segments, options, looks_ahead, framed=framed), None


def _eager(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Tensor, Tensor | None, Tensor | None],
    options: Options,
    looks_ahead: Tensor | None,
    framed: bool = False,
) -> Tensor:
    if looks_ahead is not None and once(bool, looks_ahead):  # the mask comes out of a graph, which could not ask
        raise unsupported(module, LOOKS_AHEAD)
    table = once(build_table, (query.shape[0], query.shape[2]), *segments, framed=framed)
    compat.announce(name_of(getattr(module, "config", None)), engine=engine_for(query, value, table, options).name)
    return segment_attention(query, key, value, table, options).transpose(1, 2).contiguous()


def _in_a_graph(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Tensor, Tensor | None, Tensor | None],
    options: Options,
    looks_ahead: Tensor | None,
) -> Tensor:
    if options.dropout:
        torch._dynamo.graph_break("attention dropout under attn_implementation='anchor' is not compiled")
        return torch.compiler.disable(_eager)(module, query, key, value, segments, options, looks_ahead)
    return compiled_attention(
        *(*as_autocast(query, key, value), *segments, options.sinks, looks_ahead),
        *(options.scaling, options.sliding_window, options.softcap),
    )


def _refuse_dropped_mask(
    module: torch.nn.Module, is_causal: bool | None, windows: list[int | None], documents: Tensor | None
) -> None:
    """The positions alone say who sees whom, if they are those of whole rows and the mask held nothing else."""
    if is_causal:  # accelerate's hooks hand this to every layer in place of the mask
        raise unsupported(module, CONTEXT_PARALLEL)
    config = getattr(module, "config", None)
    forward = forward_of(config)
    if documents is None and forward is not None and forward.documents is not None:
        raise unsupported(module, "anchor_doc_ids (the shared layout) do not reach its layers when the mask is dropped")
    if name_of(config) == CONTINUOUS:
        raise unsupported(
            module,
            "the mask was dropped, as under sequence parallelism, where each process would number its own part of a "
            f'row. Use attn_implementation="{NAMES[0]}" with rows of AnchorPacking or AnchorCollator',
        )
    window = getattr(config, "sliding_window", None)
    if window and not windows:
        raise unsupported(
            module,
            f"its sliding window ({window}) is told to the mask alone, and the mask was dropped, as under sequence "
            "parallelism. Without a window (config.sliding_window = None) it works",
        )
