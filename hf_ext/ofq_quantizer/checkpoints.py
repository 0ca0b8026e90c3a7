"""Layers that came into a model after its conversion: full precision here, quantised in a model built from its file."""

from typing import Any

from torch import Tensor, nn
from transformers.utils import logging

from hf_ext.ofq_quantizer.layers import QuantWeight
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer

logger = logging.get_logger(__name__)

CURE = "give the number of classes (num_classes=, num_labels=) when the model is created, or quantise it after that"


def later_layers(model: nn.Module) -> list[str]:
    """The linear layers and convolutions that no conversion has seen, such as the head of `reset_classifier`."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and not isinstance(module, QuantWeight)
        and not hasattr(module, "left_as_is")
    ]


def tell_of_missing_quantizers(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """A hook before `load_state_dict`: warn where a checkpoint quantises less than this model.

    One of the unquantised model lacks all quantisers, and one for other classes the whole head: both are meant.
    """
    if not any(key.startswith(prefix) and key.endswith("_quantizer.scale_norm") for key in state_dict):
        return
    lacking = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer)
        and f"{prefix}{name}.scale_norm" not in state_dict
        and _has_any(state_dict, f"{prefix}{name.rpartition('.')[0]}.")
    ]
    if lacking:
        logger.warning(
            f"this checkpoint has quantisers, but not {lacking[0]}"
            + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
            + ": the layer was of full precision where it was saved, and is quantised here, so that the outputs are "
            f"others. Calibrate or train this model; or, where it was saved, {CURE}"
        )


def _has_any(state_dict: dict[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) for key in state_dict)
