"""What transformers calls: the mask function (once a forward) and the attention function (once a layer)."""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_ext import compat
from hf_ext.anchor_attention.compiled import compiled_attention
from hf_ext.anchor_attention.engines import as_autocast, engine_for, segment_attention
from hf_ext.anchor_attention.frame import forward_of, once, open_frame
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.reference import masked_attention
from hf_ext.anchor_attention.segments import build_table
from hf_ext.anchor_attention.support import (
    COMPOSITE,
    CONTINUOUS,
    LOOKS_AHEAD,
    NAMES,
    AnchorUnsupportedError,
    MaskTouchedError,
    name_of,
    refusal,
    who,
)

UNTOLD = -1  # the window of a layer that says nothing of one; None is a layer without
CONTEXT_PARALLEL = (
    "context parallelism (cp_size) leaves each process a part of every row, in which documents cannot be told apart. "
    "DeepSpeed's Ulysses sequence parallelism (sp_size) works: it gathers the rows before attention"
)

BEHIND_A_CACHE = (
    "packed documents came together with cached keys or a learned prefix, behind which they could not be told apart"
)
NO_HOOK = (
    "its name was written into the config of a finished model, which has no hook to let positions run on. Use "
    "model.set_attn_implementation, or give the name when the model is made"
)


class AnchorMask:
    """Stands where a mask tensor would. It carries what the attention function needs, once a forward.

    Whoever treats it as a tensor is a layer that computes attention by itself and would ignore the documents; every
    such touch raises `MaskTouchedError`.

    padding: (B, L) bool, True = real token, or None. window: the width the host's mask call asked for, or None.
    looks_ahead: scalar bool, to be checked when a compiled graph runs; None once it is.
    documents: (B, L) `anchor_doc_ids` that the model was given, for layers that do not hand them on; or None.
    """

    # `generate` with a static cache makes the masks itself, asks `contiguous()` of each, and hands them to the model,
    # whose own mask call tells finished masks by their four dimensions and passes this one on to `anchor_mask`.
    ndim = 4

    __slots__ = ("_model", "_name", "documents", "looks_ahead", "padding", "window")

    def __init__(
        self,
        padding: Tensor | None,
        window: int | None,
        model: str,
        name: str,
        looks_ahead: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> None:
        self.padding, self.window, self._model, self._name = padding, window, model, name
        self.looks_ahead, self.documents = looks_ahead, documents

    def _touched(self, what: str) -> MaskTouchedError:
        reason = f"its layers use the attention mask themselves ({what})"
        return MaskTouchedError(refusal(self._model, reason, self._name))

    def contiguous(self) -> "AnchorMask":
        return self

    def __getitem__(self, index: Any) -> "AnchorMask":
        """Layers that share keys take the queries they need, which in training are all of them."""
        if isinstance(index, tuple) and all(part in (slice(None), slice(0, None)) for part in index):
            return self
        raise self._touched("mask[...], to keep some of the queries, as generate does here")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own protocols (copy, pickle) ask before the slots are filled
            raise AttributeError(name)
        raise self._touched(f"mask.{name}")

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        mask = next(x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, cls))
        raise mask._touched(f"torch.{getattr(function, '__name__', function)}")


def _refuse(operator: str) -> Any:
    def refuse(self: AnchorMask, *_: Any) -> Any:
        raise self._touched(operator)

    return refuse


_BINARY = ["add", "sub", "mul", "truediv", "matmul", "and", "or", "xor"]
_OTHER = ["setitem", "eq", "ne", "lt", "le", "gt", "ge", "invert", "neg", "iter", "len"]
for _operator in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHER):
    setattr(AnchorMask, f"__{_operator}__", _refuse(f"__{_operator}__"))


def anchor_mask(
    batch_size: int,
    *,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    config: Any = None,
    **arguments: Any,
) -> AnchorMask | Tensor | None:
    """The mask function, registered beside `anchor_attention_forward` and called with the keywords of `sdpa_mask`.

    Whole rows (training, evaluation, prefill of an empty cache) get an AnchorMask. Everything else (decoding,
    continued prefill, static caches) gets sdpa's mask: there, one row is one document.

    Raises:
        AnchorUnsupportedError: the host asks for a mask in which a token sees a later one, the model is traced, its
            rows are packed and stand behind a cache, or its hook is missing.
    """
    open_frame()
    if isinstance(attention_mask, AnchorMask):
        return attention_mask
    model, name = who("the model", config), name_of(config)
    if torch.jit.is_tracing():
        reason = "torch.jit.trace would freeze the documents of its example into the graph"
        raise AnchorUnsupportedError(refusal(model, reason, name))
    forward = forward_of(config)
    documents = None if forward is None else forward.documents
    q_length, q_offset = compat.query_span(arguments)
    if q_length == kv_length and kv_offset == 0 and int(q_offset) == 0:
        if forward is None and name == CONTINUOUS:
            raise AnchorUnsupportedError(refusal(model, NO_HOOK, name))
        looks_ahead = _looks_ahead(mask_function, batch_size, q_length, arguments.get("device", "cpu"))
        if looks_ahead is not None and not torch.compiler.is_compiling():
            if looks_ahead:
                raise AnchorUnsupportedError(refusal(model, LOOKS_AHEAD, name))
            looks_ahead = None
        if attention_mask is not None:
            attention_mask = attention_mask.bool()
        return AnchorMask(attention_mask, local_size, model, name, looks_ahead, documents)
    if documents is not None:
        raise AnchorUnsupportedError(refusal(model, BEHIND_A_CACHE, name))
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        config=config,
        **arguments,
    )


def _looks_ahead(mask_function: Any, batch_size: int, length: int, device: Any) -> Tensor | None:
    """Whether a token sees a later one, scalar bool; None where that cannot be.

    Prefix-LM and image blocks make neighbours see each other, so neighbouring pairs are all that need testing.
    """
    if mask_function is None or compat.is_causal_by_construction(mask_function):
        return None
    query = torch.arange(length - 1, device=device)[None, :]
    row = torch.arange(batch_size, device=device)[:, None]
    return torch.as_tensor(mask_function(row, torch.zeros_like(row), query, query + 1)).any()


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
        raise _unsupported(module, f"the layer asks for bidirectional or cross attention ({COMPOSITE})")
    if position_bias is not None:
        raise _unsupported(module, "the layer adds a position bias to its scores")
    if cache is not None:
        raise _unsupported(module, "continuous batching (a paged cache) is not available")
    if compat.context_parallelism_is_on():
        raise _unsupported(module, CONTEXT_PARALLEL)
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if isinstance(attention_mask, Tensor) or key.shape[2] != query.shape[2]:
        if key.shape[2] != query.shape[2]:
            _refuse_packed(module, position_ids)
        return _as_sdpa(module, query, key, value, attention_mask, dropout, scaling, softcap, s_aux), None
    if position_ids is None:
        raise _unsupported(module, "it does not hand position_ids to the attention function")

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
    return _eager(module, query, key, value, segments, options, framed=attention_mask is not None), None


def _eager(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[Tensor, Tensor | None, Tensor | None],
    options: Options,
    framed: bool = False,
) -> Tensor:
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
        return torch.compiler.disable(_eager)(module, query, key, value, segments, options)
    return compiled_attention(
        *(*as_autocast(query, key, value), *segments, options.sinks, looks_ahead),
        *(options.scaling, options.sliding_window, options.softcap),
    )


def _refuse_dropped_mask(
    module: torch.nn.Module, is_causal: bool | None, windows: list[int | None], documents: Tensor | None
) -> None:
    """The positions alone say who sees whom, if they are those of whole rows and the mask held nothing else."""
    if is_causal:  # accelerate's hooks hand this to every layer in place of the mask
        raise _unsupported(module, CONTEXT_PARALLEL)
    config = getattr(module, "config", None)
    forward = forward_of(config)
    if documents is None and forward is not None and forward.documents is not None:
        raise _unsupported(
            module, "anchor_doc_ids (the shared layout) do not reach its layers when the mask is dropped"
        )
    if name_of(config) == CONTINUOUS:
        raise _unsupported(
            module,
            "the mask was dropped, as under sequence parallelism, where each process would number its own part of a "
            f'row. Use attn_implementation="{NAMES[0]}" with rows of AnchorPacking or AnchorCollator',
        )
    window = getattr(config, "sliding_window", None)
    if window and not windows:
        raise _unsupported(
            module,
            f"its sliding window ({window}) is told to the mask alone, and the mask was dropped, as under sequence "
            "parallelism. Without a window (config.sliding_window = None) it works",
        )


def _refuse_packed(module: torch.nn.Module, position_ids: Tensor | None) -> None:
    """Behind a cache or a learned prefix a row is one document; several would see each other, and silently.

    A position 0 behind another tells that, unless nothing but padding stands before it, whose positions are all 1 (or
    all 0, which are no position "behind another").
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] == 1:
        return
    before, here = position_ids[:, :-1], position_ids[:, 1:]
    only_padding = (before != 1).cumsum(1) == 0
    if ((here == 0) & (before != 0) & ~only_padding).any():
        raise _unsupported(module, BEHIND_A_CACHE)


def _as_sdpa(
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
        raise _unsupported(module, "softcap or sinks together with a mask of weights; give a mask of 0 and -inf")
    return ~hidden


def _unsupported(module: torch.nn.Module, reason: str) -> AnchorUnsupportedError:
    config = getattr(module, "config", None)
    return AnchorUnsupportedError(refusal(who(type(module).__name__, config), reason, name_of(config)))
