"""transformers: its attention tables, the keywords of its mask functions, and the check of names at load."""

import sys
from collections.abc import Callable, Mapping, MutableMapping
from functools import wraps
from importlib import metadata
from inspect import signature
from typing import Any

from packaging.version import Version

from hf_ext.compat.names import RegistrationError, is_from, source_of


def reads_attention_from_config() -> bool:
    """Whether `attn_implementation` in a config.json takes effect: from transformers 5.5 on; before, it is ignored."""
    return Version(metadata.version("transformers")) >= Version("5.5.0")


def attention_tables() -> tuple[MutableMapping[str, Callable], MutableMapping[str, Callable]]:
    """The host's tables of attention functions and of mask functions, shared by all its model classes."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping


def eager_attention(module: Any) -> Callable:
    """The attention function that transformers would call for `module` under "eager".

    It is in none of the host's tables: each modelling file has its own.

    Raises:
        ValueError: its file has none, so that its attention is not exchangeable.
    """
    for kind in type(module).__mro__:
        file = sys.modules.get(kind.__module__)
        if hasattr(file, "eager_attention_forward"):
            return file.eager_attention_forward
    raise ValueError(f"{type(module).__module__} has no eager attention function for {type(module).__name__}")


def attention_scaling(module: Any, scaling: float | None, width: int) -> float:
    """The factor of the scores, from the keyword `scaling` of an attention function; width: of a head.

    The GPT-2 of transformers 4 passes none, and leaves it to the function. Goes when 5.0 is the lowest version.
    """
    if scaling is not None:
        return scaling
    scaling = width**-0.5 if getattr(module, "scale_attn_weights", True) else 1.0
    return scaling / (module.layer_idx + 1) if getattr(module, "scale_attn_by_inverse_layer_idx", False) else scaling


def heads_masked(weights: Any, options: Mapping[str, Any]) -> Any:
    """Attention weights (B, H, L, T) times the keyword `head_mask` of an attention function.

    The GPT-2 of transformers 4 passes it. Goes when 5.0 is the lowest version.
    """
    mask = options.get("head_mask")
    return weights if mask is None else weights * mask


def hands_no_positions(model_class: type) -> bool:
    """Whether the layers of `model_class` are never handed its position_ids, whatever its flags say.

    So in the GPT-2 of transformers 4, known by its argument `head_mask`. Goes when 5.0 is the lowest version.
    """
    base = next((kind for kind in model_class.__mro__ if kind.__name__ == "GPT2PreTrainedModel"), None)
    return base is not None and "head_mask" in signature(sys.modules[base.__module__].GPT2Model.forward).parameters


def query_span(mask_arguments: Mapping[str, Any]) -> tuple[int, Any]:
    """(number of queries, index of the first one) from the keywords of a mask function.

    Up to transformers 5.0 they arrive as `cache_position`, from 5.5 on as `q_length` and `q_offset` (which may be a
    tensor). Goes when 5.5 is the lowest version.
    """
    if "cache_position" in mask_arguments:
        positions = mask_arguments["cache_position"]
        return positions.shape[0], positions[0]
    return mask_arguments["q_length"], mask_arguments["q_offset"]


def is_causal_by_construction(mask_function: Callable) -> bool:
    """Whether it is the host's causal mask, or an intersection with it: then no token can see a later one.

    Read off the function, as trying it out would wait for the device. While torch.compile traces, which reads no
    closures, only the causal mask itself is recognised.
    """
    import torch
    from transformers.masking_utils import and_masks, causal_mask_function

    if mask_function is causal_mask_function:
        return True
    if (
        torch.compiler.is_compiling()
        or getattr(mask_function, "__code__", None) is not and_masks(causal_mask_function).__code__
    ):
        return False
    [parts] = [cell.cell_contents for cell in mask_function.__closure__]
    return any(is_causal_by_construction(part) for part in parts)


_LOAD_CHECK = "get_correct_attn_implementation"
_wrapped: tuple[Callable, Callable] | None = None  # (the host's method, our wrapper), while ours is in place


def wrap_load_check(check: Callable[[Any, str], None]) -> None:
    """Have `check(model, name)` run whenever transformers has accepted an attention name for a model.

    `PreTrainedModel.__init__` and `set_attn_implementation` both pass through the wrapped method; `check` raises to
    refuse. Idempotent.
    """
    global _wrapped
    from transformers import PreTrainedModel

    original = getattr(PreTrainedModel, _LOAD_CHECK)
    if _wrapped is not None and original is not _wrapped[0]:
        return  # ours is in place, perhaps inside somebody's wrapper

    if is_from(original, __file__):
        original = original.__wrapped__  # left by an earlier import of this module

    @wraps(original)
    def get_correct_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> str:
        name = original(self, *args, **kwargs)
        check(self, name)
        return name

    setattr(PreTrainedModel, _LOAD_CHECK, get_correct_attn_implementation)
    _wrapped = original, get_correct_attn_implementation


def unwrap_load_check() -> None:
    """Put the host's method back.

    Raises:
        RegistrationError: somebody wrapped ours in theirs, which stays.
    """
    global _wrapped
    from transformers import PreTrainedModel

    if _wrapped is None:
        return
    original, ours = _wrapped
    current = getattr(PreTrainedModel, _LOAD_CHECK)
    if current not in (ours, original):
        raise RegistrationError(
            f"PreTrainedModel.{_LOAD_CHECK} was replaced by {source_of(current)} after hf_ext wrapped it; hf_ext "
            "leaves it. Undo that, then unregister again."
        )
    setattr(PreTrainedModel, _LOAD_CHECK, original)
    _wrapped = None


def enable_checkpointing(model: Any, use_reentrant: bool = False) -> None:
    """Recompute layers in backward. Older versions lack the first name, and transformers 6 will lack the second."""
    how = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
