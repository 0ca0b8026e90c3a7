"""Which models can carry AnchorAttention, and the words in which the others are refused."""

import inspect
import logging
import sys
from functools import cache
from typing import Any

from hf_ext import compat
from hf_ext.anchor_attention.models import (
    COMPOSITE,
    EXACT_TYPES,
    MIXES,
    OWN_ATTENTION,
    OWN_MASKS,
    REFUSED_TYPES,
    SHIFTED_TYPES,
    SWALLOWS,
    UNFLAGGED_TYPES,
)

CONTINUOUS = "anchor_continuous"
NAMES = ("anchor", CONTINUOUS)

LAYER_TYPES = ("full_attention", "sliding_attention")
LOOKS_AHEAD = (
    f"it lets a token see later ones, as bidirectional attention does ({COMPOSITE}), or a row that begins behind others"
)
BEHIND_A_CACHE = (
    "packed documents came together with cached keys or a learned prefix, behind which they could not be told apart"
)


class AnchorUnsupportedError(ValueError):
    """The model, or what it asks of attention, cannot be computed as AnchorAttention."""


class MaskTouchedError(AnchorUnsupportedError, AttributeError):
    """A model looked into the mask itself. An AttributeError as well, so that `hasattr(mask, ...)` is just False."""


def name_of(config: Any) -> str:
    """The name of ours that a model with `config` runs under, as its user typed it."""
    name = getattr(config, "_attn_implementation", None)
    return name if name in NAMES else NAMES[0]


def refusal(who: str, reason: str, name: str = NAMES[0]) -> str:
    return (
        f'attn_implementation="{name}" is not supported by {who}: {reason}. '
        f'Use attn_implementation="sdpa", or a model whose layers all call the attention function.'
    )


def who(model_class: str, config: Any) -> str:
    return f"{model_class} (model_type {getattr(config, 'model_type', None)!r})"


def unsupported(module: Any, reason: str) -> AnchorUnsupportedError:
    """For a layer that asks for what cannot be had."""
    config = getattr(module, "config", None)
    return AnchorUnsupportedError(refusal(who(type(module).__name__, config), reason, name_of(config)))


def check_at_load(model: Any, name: str) -> None:
    """Refuse `model` if it is about to get one of our names and cannot carry it; warn if nobody has tried its type.

    Raises:
        AnchorUnsupportedError: with the class, the model type and the reason.
    """
    if name in NAMES:
        reason = why_unsupported(type(model), model.config)
        if reason:
            raise AnchorUnsupportedError(refusal(who(type(model).__name__, model.config), reason, name))
        if model.can_generate():  # a model for text, and not the part inside it
            _caution(name, model.config.model_type)


@cache
def _caution(name: str, model_type: str) -> None:
    """Once a type."""
    warn = logging.getLogger(__name__).warning
    if model_type in SHIFTED_TYPES:
        warn(
            f"Models of type {model_type!r} number positions from padding_idx + 1. Packed rows are numbered from 0, so "
            f"the pretrained position embeddings are shifted, under every attn_implementation alike."
        )
    elif model_type not in EXACT_TYPES:
        warn(
            f'attn_implementation="{name}" has not been tried with models of type {model_type!r}. Before training, run '
            f"hf_ext.anchor_attention.check_model(model)."
        )


def why_unsupported(model_class: type, config: Any) -> str | None:
    model_type = getattr(config, "model_type", None)
    if model_type in REFUSED_TYPES:
        return REFUSED_TYPES[model_type]
    if getattr(model_class, "_is_stateful", False):
        return MIXES
    foreign = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - {*LAYER_TYPES})
    if foreign:
        return f"it has layers of other kinds than {' and '.join(LAYER_TYPES)}: {', '.join(foreign)}"
    hosts = vars(sys.modules[model_class.__module__])  # what its file takes from the host
    if model_type in UNFLAGGED_TYPES:
        through_table = "ALL_ATTENTION_FUNCTIONS" in hosts
    else:
        through_table = getattr(model_class, "_supports_attention_backend", False)
    if not through_table:
        return OWN_ATTENTION
    if model_class.can_generate() and "ALL_ATTENTION_FUNCTIONS" in hosts and "create_causal_mask" not in hosts:
        return OWN_MASKS
    if compat.hands_no_positions(model_class):
        return f"{SWALLOWS} in this version of transformers"
    if model_class.can_generate() and "position_ids" not in inspect.signature(model_class.forward).parameters:
        return f"{SWALLOWS}: {model_class.__name__}.forward has no such argument"
    return None
