"""Whether a model answers a prompt in a batch as it does alone, of models that are not known to."""

from typing import Any

import torch
from torch import Tensor

from hf_ext.mcq_bias.batches import Batch, asked, left_padded
from hf_ext.mcq_bias.families import FAMILIES

# Of the largest logit, how far rounding may take a row of a batch from the same row alone.
ROUNDING, ROUNDING_HALF = 3e-3, 0.05


class Trial:
    """Tries one prompt of the first batch, and of the first one with padding, alone. Two forwards of one prompt each.

    The known families need none. Others may count positions in their own way (RoBERTa), let padding into their state
    (RWKV), or see what follows a token (BERT); prompt tuning puts its tokens before the padding.
    """

    def __init__(self, model: Any) -> None:
        self._is_known = model.config.model_type in FAMILIES
        self._due = set() if self._is_known and not hasattr(model, "get_base_model") else {"plain", "padded"}

    def check(self, model: Any, batch: Batch, encoded: list[list[int]], vocabulary: Tensor, half: bool) -> None:
        """
        Args:
            model: inside `evaluating_eagerly`.
            batch: just computed.
            encoded: tokens of all prompts.
            vocabulary: (B, V) the last position's logits in the batch.
            half: whether they were computed in half precision.

        Raises:
            ValueError: the logits are not those of the prompt alone, or depend on later tokens; with the `model_type`.
        """
        if not self._due:
            return
        kind = "plain" if bool(batch.inputs["attention_mask"].all()) else "padded"
        if kind not in self._due:
            return
        self._due -= {"plain", kind}
        place = min(range(len(batch.rows)), key=lambda place: len(encoded[batch.rows[place]]))
        row = batch.rows[place]
        ids = torch.tensor([encoded[row]], device=vocabulary.device)
        with asked([row], len(encoded)):
            alone = _last_logits(model, input_ids=ids)
            allowed = (ROUNDING_HALF if half else ROUNDING) * alone[-1].abs().max().item()
            if not self._is_known and ids.shape[1] > 1:
                _require_causal(model, ids, alone, allowed)
            miss = _miss(vocabulary[place], alone[-1])
            if miss <= allowed:
                return
            unpadded = _last_logits(model, **left_padded([encoded[row]], vocabulary.device))
        if not _miss(unpadded[-1], alone[-1]) <= allowed:
            kind = "plain"
        raise ValueError(
            f"{_named(model)} has other logits for prompt {row} {_WHY[kind]} than alone, by {miss:.3g}{_CURE[kind]}"
        )


def _require_causal(model: Any, ids: Tensor, alone: Tensor, allowed: float) -> None:
    """
    Raises:
        ValueError: the logits at the last token but one of ids (1, T) are others without the last.
    """
    if not _miss(_last_logits(model, input_ids=ids[:, :-1])[-1], alone[-2]) <= allowed:
        raise ValueError(
            f"{_named(model)} is not causal: its logits at a token depend on the next one. Load a decoder: "
            "AutoModelForCausalLM, for BERT and its kin with is_decoder=True"
        )


def _named(model: Any) -> str:
    return f"this {type(model).__name__} (model_type {model.config.model_type!r})"


def _last_logits(model: Any, **inputs: Tensor) -> Tensor:
    """(at least 2, V), of the one row's last tokens."""
    return model(**inputs, use_cache=False, logits_to_keep=2, return_dict=True).logits[0]


def _miss(found: Tensor, expected: Tensor) -> float:
    return (found - expected).abs().max().item()


_WHY = {"plain": "with position_ids counted from 0", "padded": "in a batch with padding on the left"}
_CURE = {
    "plain": ": it counts positions in a way of its own, and cannot be scored here",
    "padded": ": it lets padding in, as recurrent states and prompt learning (virtual tokens) do. Give batch_size=1",
}
