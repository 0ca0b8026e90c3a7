"""attn_implementation="anchor_continuous": the backend of "anchor", with restarting positions made to run on before.

For loops whose collator cannot be changed. Padding-free collators restart `position_ids` at every document, which under
"anchor" is intra-document attention; here the model is given anchor ids instead, and the first token of each document
is its anchor.
"""

import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from hf_ext.anchor_attention.positions import anchor_ids, closing_run, starts_of
from hf_ext.anchor_attention.support import CONTINUOUS

_WARNED: WeakSet[nn.Module] = WeakSet()


def continued(module: Any, given: dict[str, Any]) -> Tensor | None:
    """New `position_ids` (B, L) that run on, for a forward with the arguments `given`; None to leave them.

    Raises:
        ValueError: a row longer than the positions the model was made for, or multimodal positions that restart.
    """
    positions, mask, ids = (given.get(name) for name in ("position_ids", "attention_mask", "input_ids"))
    if given.get("past_key_values") is not None or not isinstance(positions, Tensor):
        return None
    if positions.ndim == 3:
        _refuse_multimodal(positions)
        return None
    # A mask of the user's own (4-D) says who sees whom; shapes that are wrong are the attention function's to refuse.
    if positions.ndim != 2 or not all(x is None or _fits(x, positions) for x in (mask, ids)):
        return None
    return _rewritten(module, positions, mask, ids)


def _refuse_multimodal(positions: Tensor) -> None:
    """(axes, B, L); the first axis is that of the text, where there is one."""
    if ((positions[0, :, 1:] == 0) & (positions[0, :, :-1] > 0)).any():
        raise ValueError(
            f'attn_implementation="{CONTINUOUS}" cannot rewrite multimodal position_ids {tuple(positions.shape)}, and '
            f'they restart inside a row. Use "anchor" with positions that run on (AnchorPacking, AnchorCollator)'
        )


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
    # Anchor ids pass: behind the first start they are row indices. What is before the second may begin anywhere, and
    # zeros at the end may be documents of one token.
    restart = ((new != positions) & (starts.cumsum(1) > 1) & ~padding).any(1, keepdim=True)
    limit = getattr(module.config, "max_position_embeddings", None)
    too_long = limit is not None and positions.shape[1] > limit
    if torch.compiler.is_compiling() and not too_long:
        return torch.where(restart, new, positions).to(positions.dtype)  # a graph cannot branch, nor warn
    flags = [restart.any()]
    if ids is not None:
        heads = starts & ~padding & restart
        first = ids.gather(1, heads.int().argmax(1, keepdim=True).expand(len(ids), 1))
        flags.append((heads & (ids != first)).any())
    restarts, *mixed = torch.stack(flags).tolist()  # the one wait for the device
    if not restarts:
        return None
    if too_long:
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
