"""The mask function, which transformers calls before the layers of a forward, and what it gives instead of a mask."""

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import sdpa_mask

from hf_ext import compat
from hf_ext.anchor_attention.frame import Forward, forward_of, open_frame
from hf_ext.anchor_attention.support import (
    BEHIND_A_CACHE,
    CONTINUOUS,
    LOOKS_AHEAD,
    AnchorUnsupportedError,
    MaskTouchedError,
    name_of,
    refusal,
    who,
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
    behind = _any_nonzero(kv_offset, q_offset) if q_length == kv_length else True
    if behind is not True:
        if forward is None and name == CONTINUOUS:
            raise AnchorUnsupportedError(refusal(model, NO_HOOK, name))
        looks_ahead = _looks_ahead(mask_function, batch_size, q_length, arguments.get("device", "cpu"))
        if behind is not False:  # a token of a row that begins behind others would see the keys of later columns
            looks_ahead = behind if looks_ahead is None else behind | looks_ahead
        if looks_ahead is not None and not torch.compiler.is_compiling():
            if looks_ahead:
                raise AnchorUnsupportedError(refusal(model, LOOKS_AHEAD, name))
            looks_ahead = None
        return AnchorMask(_padding(attention_mask, forward), local_size, model, name, looks_ahead, documents)
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


def _any_nonzero(*offsets: int | Tensor) -> bool | Tensor:
    """A scalar tensor where offsets are data and a graph is made, which cannot branch by them."""
    nonzero = [offset != 0 for offset in offsets]
    data = [x for x in nonzero if isinstance(x, Tensor)]
    if not data or not torch.compiler.is_compiling():
        return any(nonzero)
    return any(x for x in nonzero if not isinstance(x, Tensor)) or torch.stack(data).any()


def _padding(attention_mask: Tensor | None, forward: Forward | None) -> Tensor | None:
    """The model's own 2-D mask where the host hands over a copy of it, so that all calls share one segment table."""
    if attention_mask is None:
        return None
    own = None if forward is None else forward.padding
    same = own is not None and (own.shape, own.device) == (attention_mask.shape, attention_mask.device)
    return own if same else attention_mask.bool()


def _looks_ahead(mask_function: Any, batch_size: int, length: int, device: Any) -> Tensor | None:
    """Whether a token sees a later one, scalar bool; None where that cannot be.

    Prefix-LM and image blocks make neighbours see each other, so neighbouring pairs are all that need testing.
    """
    if mask_function is None or compat.is_causal_by_construction(mask_function):
        return None
    query = torch.arange(length - 1, device=device)[None, :]
    row = torch.arange(batch_size, device=device)[:, None]
    return torch.as_tensor(mask_function(row, torch.zeros_like(row), query, query + 1)).any()
