"""attn_implementation="anchor_continuous": the backend of "anchor", and a hook that lets restarting positions run on.

For loops whose collator cannot be changed. Padding-free collators restart `position_ids` at every document, which under
"anchor" is intra-document attention; here the model is given anchor ids instead, and the first token of each document
is its anchor.
"""

import inspect
import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from hf_ext.anchor_attention.positions import anchor_ids, closing_run, starts_of
from hf_ext.anchor_attention.support import CONTINUOUS

_WARNED: WeakSet[nn.Module] = WeakSet()


def place_hook(model: Any, name: str) -> None:
    """If `model` is about to get this name, give it and the models inside it the hook, each once.

    `set_attn_implementation` announces the outer model only, and wrappers (PEFT, chunked losses) may call the inner.
    """
    if name == CONTINUOUS:
        for module in model.modules():
            if hasattr(module, "get_correct_attn_implementation") and not _has_hook(module):
                module.register_forward_pre_hook(run_on, with_kwargs=True)


def _has_hook(module: nn.Module) -> bool:
    return run_on in module._forward_pre_hooks.values()


def run_on(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The hook: `args` and `kwargs` of the forward with `position_ids` (B, L) that run on, or None to leave them.

    A function of a module, so that models can be copied and pickled.

    Raises:
        ValueError: a row longer than the positions the model was made for.
    """
    if module.config._attn_implementation != CONTINUOUS or _inner_does_it(module):
        return None
    names = [*inspect.signature(type(module).forward).parameters][1 : len(args) + 1] if args else []
    given = dict(zip(names, args, strict=False)) | kwargs
    positions, mask, ids = (given.get(name) for name in ("position_ids", "attention_mask", "input_ids"))
    if given.get("past_key_values") is not None or not isinstance(positions, Tensor) or positions.ndim != 2:
        return None
    # A mask of the user's own (4-D) says who sees whom; shapes that are wrong are the attention function's to refuse.
    if not all(x is None or _fits(x, positions) for x in (mask, ids)):
        return None
    rewritten = _rewritten(module, positions, mask, ids)
    if rewritten is None:
        return None
    if "position_ids" in names:
        return tuple(rewritten if x is positions else x for x in args), kwargs
    return args, kwargs | {"position_ids": rewritten}


def _inner_does_it(module: Any) -> bool:
    """Twice would change nothing, but wait twice for the device."""
    inner = module.base_model
    return inner is not module and _has_hook(inner) and inner.config._attn_implementation == CONTINUOUS


def _fits(tensor: Any, positions: Tensor) -> bool:
    rows, length = positions.shape
    return isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.shape[1] == length and rows in (1, len(tensor))


def _rewritten(module: Any, positions: Tensor, mask: Tensor | None, ids: Tensor | None) -> Tensor | None:
    """A new tensor with the anchor ids of the rows whose positions restart; None if there are none."""
    padding = closing_run(positions == 0)
    starts = starts_of(positions, padding)
    if mask is not None:  # left padding is no document
        starts = starts & mask.bool()
    new = anchor_ids(starts)
    # Anchor ids pass: behind the first start they are row indices. What is before the second may begin anywhere.
    restart = ((new != positions) & (starts.cumsum(1) > 1)).any(1, keepdim=True)
    flags = [restart.any()]
    if ids is not None:
        heads = starts & ~padding & restart
        first = ids.gather(1, heads.int().argmax(1, keepdim=True).expand(len(ids), 1))
        flags.append((heads & (ids != first)).any())
    restarts, *mixed = torch.stack(flags).tolist()  # the one wait for the device
    if not restarts:
        return None
    limit = getattr(module.config, "max_position_embeddings", None)
    if limit is not None and positions.shape[1] > limit:
        raise ValueError(
            f'attn_implementation="{CONTINUOUS}" numbers a row of packed documents from one end to the other: this one '
            f"has {positions.shape[1]} tokens, and the model (max_position_embeddings) was made for {limit}. Use "
            "--per_device_train_batch_size 1 (a padding-free collator flattens the whole batch of a device into one "
            "row), shorter rows, or extend the model's rope first"
        )
    if any(mixed) and module not in _WARNED:
        _WARNED.add(module)
        warnings.warn(
            f'attn_implementation="{CONTINUOUS}" takes the first token of each document for its anchor, and the '
            "documents of this row begin with different tokens, so that they share no anchor. Tokenise with a BOS "
            'token (check the tokenizer\'s add_bos_token), or insert one: attn_implementation="anchor" and '
            "trainer.data_collator = hf_ext.AnchorCollator(trainer.data_collator, anchor_token_id=...)",
            stacklevel=2,
        )
    return torch.where(restart, new, positions).to(positions.dtype)
