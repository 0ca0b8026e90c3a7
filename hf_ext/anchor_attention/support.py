"""Which models can carry AnchorAttention, and the words in which the others are refused."""

import inspect
from typing import Any

NAMES = ("anchor",)

MIXES = "its layers mix the tokens of a row outside attention, so documents would leak into one another"
SWALLOWS = "it does not hand position_ids to the attention function"
COMPOSITE = (
    "in a composite model, name it for the text part alone: "
    'attn_implementation={"text_config": "anchor", "vision_config": "sdpa"}'
)
READS_MASK = "a part of it other than attention reads the mask"

# Types whose class flags claim support although they break: found by running each of them on packed rows.
REFUSED_TYPES = {
    "axk2": READS_MASK,
    "ctrl": SWALLOWS,
    "deepseek_v32": READS_MASK,
    "doge": READS_MASK,
    "glm_moe_dsa": READS_MASK,
    "gpt_bigcode": SWALLOWS,
    "hy_v4": READS_MASK,
    "lfm2": MIXES,
    "lfm2_moe": MIXES,
    "lfm3": MIXES,
    "llama4": MIXES,
    "llama4_text": MIXES,
    "minimax": MIXES,
    "moshi": SWALLOWS,
    "persimmon": SWALLOWS,
}
# Types without the host's flag that were proven exact all the same.
PROVEN_TYPES = ("biogpt", "stablelm")

LAYER_TYPES = ("full_attention", "sliding_attention")


class AnchorUnsupportedError(ValueError):
    """The model, or what it asks of attention, cannot be computed as AnchorAttention."""


class MaskTouchedError(AnchorUnsupportedError, AttributeError):
    """A model looked into the mask itself. An AttributeError as well, so that `hasattr(mask, ...)` is just False."""


def refusal(who: str, reason: str) -> str:
    return (
        f'attn_implementation="anchor" is not supported by {who}: {reason}. '
        f'Use attn_implementation="sdpa", or a model whose layers all call the attention function.'
    )


def who(model_class: str, config: Any) -> str:
    return f"{model_class} (model_type {getattr(config, 'model_type', None)!r})"


def check_at_load(model: Any, name: str) -> None:
    """Refuse `model` if it is about to get one of our names and cannot carry it.

    Raises:
        AnchorUnsupportedError: with the class, the model type and the reason.
    """
    if name in NAMES:
        reason = why_unsupported(type(model), model.config)
        if reason:
            raise AnchorUnsupportedError(refusal(who(type(model).__name__, model.config), reason))


def why_unsupported(model_class: type, config: Any) -> str | None:
    model_type = getattr(config, "model_type", None)
    if model_type in REFUSED_TYPES:
        return REFUSED_TYPES[model_type]
    if getattr(model_class, "_is_stateful", False):
        return MIXES
    foreign = sorted({str(kind) for kind in getattr(config, "layer_types", None) or ()} - {*LAYER_TYPES})
    if foreign:
        return f"it has layers of other kinds than {' and '.join(LAYER_TYPES)}: {', '.join(foreign)}"
    if not getattr(model_class, "_supports_attention_backend", False) and model_type not in PROVEN_TYPES:
        return "its attention layers do not go through the host's table of attention functions"
    if model_class.can_generate() and "position_ids" not in inspect.signature(model_class.forward).parameters:
        return f"{SWALLOWS}: {model_class.__name__}.forward has no such argument"
    return None
