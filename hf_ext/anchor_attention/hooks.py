"""What a forward under our names passes first: a check of its positions, and what its layers may not hand on."""

import inspect
from typing import Any

from torch import Tensor, nn

from hf_ext.anchor_attention.continuous import continued
from hf_ext.anchor_attention.frame import announce_forward
from hf_ext.anchor_attention.support import CONTINUOUS, NAMES


def place_hook(model: Any, name: str) -> None:
    """If `model` is about to get a name of ours, give it and the models inside it the hook, each once.

    `set_attn_implementation` announces the outer model only, and wrappers (PEFT, chunked losses) may call the inner.
    """
    if name in NAMES:
        for module in model.modules():
            if hasattr(module, "get_correct_attn_implementation") and not _has_hook(module):
                module.register_forward_pre_hook(before, with_kwargs=True)


def _has_hook(module: nn.Module) -> bool:
    return before in module._forward_pre_hooks.values()


def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The hook: new arguments of the forward where its positions have to run on, or None to leave them.

    A function of a module, so that models can be copied and pickled.

    Raises:
        ValueError: positions that do not fit the tokens; a row longer than the positions the model was made for.
    """
    name = module.config._attn_implementation
    if name not in NAMES:
        return None
    names = [*inspect.signature(type(module).forward).parameters][1 : len(args) + 1] if args else []
    given = dict(zip(names, args, strict=False)) | kwargs
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    _check_positions(module, given.get("position_ids"), tokens)
    announce_forward(module.config, given.get("anchor_doc_ids"), given.get("attention_mask"))
    positions = None if name != CONTINUOUS or _inner_does_it(module) else continued(module, given)
    if positions is None:
        return None
    if "position_ids" in names:
        return tuple(positions if x is given["position_ids"] else x for x in args), kwargs
    return args, kwargs | {"position_ids": positions}


def _inner_does_it(module: Any) -> bool:
    """Twice would change nothing, but wait twice for the device."""
    inner = module.base_model
    return inner is not module and _has_hook(inner) and inner.config._attn_implementation == CONTINUOUS


def _check_positions(module: Any, positions: Any, tokens: Any) -> None:
    """Here rather than in the attention function, since rotary embeddings come first and fail less clearly."""
    if not isinstance(positions, Tensor) or not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return
    rows, length = tokens.shape[:2]
    if positions.ndim == 3 and positions.shape[-1] == length and _is_multimodal(module.config.get_text_config()):
        return  # the host takes the row for text
    if positions.ndim != 2 or positions.shape[1] != length or positions.shape[0] not in (1, rows):
        raise ValueError(
            f"position_ids must be (batch, length) = ({rows}, {length}), or (1, {length}), not {tuple(positions.shape)}"
        )


def _is_multimodal(config: Any) -> bool:
    rope = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]
    return "mrope_section" in str(rope)
