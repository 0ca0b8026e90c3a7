"""What is checked and put right between reading an adapter file and copying it into a model."""

import warnings
from collections.abc import Mapping
from copy import copy

from torch import Tensor, nn

from hf_ext.bone_adapter import checkpoint
from hf_ext.bone_adapter.config import BoneConfig
from hf_ext.bone_adapter.layer import BoneLayer


def own_tensors(state_dict: Mapping[str, Tensor], adapter_name: str) -> dict[str, Tensor]:
    """Without the tensors of other adapters, which PEFT up to 0.18 wrote into every file of a model with several.

    Their keys carry that adapter's name, and loading them would overwrite it.

    Raises:
        ValueError: there is no block at all.
    """
    own, foreign = checkpoint.split_foreign(state_dict)
    if not checkpoint.blocks_of(own):
        raise ValueError(f"The file of adapter {adapter_name!r} holds no bone_block tensor: it is empty or truncated.")
    warn_of_foreign(foreign)
    return own


def warn_of_foreign(names: list[str]) -> None:
    if names:
        warnings.warn(f"Ignored {len(names)} tensors of other adapters in this file: {_few(names)}.", stacklevel=3)


def adopt_development_form(
    model: nn.Module, config: BoneConfig, adapter_name: str, state_dict: Mapping[str, Tensor]
) -> None:
    """Files of November 2024 hold "bat" blocks and say init_weights=true, which only later meant the tile form."""
    if not checkpoint.is_development_file(config.init_weights, state_dict):
        return
    config = copy(config)  # others may hold it, too
    config.init_weights = "bat"
    model.peft_config[adapter_name] = config
    for module in model.modules():
        if isinstance(module, BoneLayer) and adapter_name in module.bone_block:
            module.change_form(adapter_name, "bat")


def check_tensors(model: nn.Module, adapter_name: str, state_dict: Mapping[str, Tensor]) -> None:
    """Refuse broken tensors before any is copied, and name those that nothing in the model takes.

    Raises:
        ValueError: a tensor with NaN or infinity, of another shape, or of integers.
    """
    expected = {
        f"{path}.bone_block.{adapter_name}": tuple(module.bone_block[adapter_name].shape)
        for path, module in model.named_modules()
        if isinstance(module, BoneLayer) and adapter_name in module.bone_block
    }
    # Without a PeftModel around it the model has no prefix, and the file still has.
    found = {key if key in expected else key.removeprefix("base_model.model."): t for key, t in state_dict.items()}
    problems = checkpoint.tensor_problems({key: t for key, t in found.items() if key in expected}, expected)
    if problems:
        raise ValueError(f"The file of adapter {adapter_name!r} cannot be loaded:\n" + "\n".join(problems))
    unknown = [key for key in found if key not in expected and ".bone_block" in key]
    if unknown:
        warnings.warn(f"Nothing in the model takes {len(unknown)} tensors of this file: {_few(unknown)}.", stacklevel=2)


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
