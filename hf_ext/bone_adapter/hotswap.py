"""Another adapter's values in the place of a loaded one's, for servers that have compiled the model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from hf_ext.bone_adapter.checkpoint import (
    PREFIX,
    form_of,
    is_development_file,
    read_directory,
    split_foreign,
    tensor_problems,
)


def hotswap_adapter(model: nn.Module, path: str | Path, adapter_name: str = "default") -> None:
    """Copy the values of an adapter directory into a loaded adapter, in place.

    The parameters stay the same objects, so that nothing is compiled, captured or allocated again. Trained biases and
    modules_to_save are swapped as well.

    Args:
        model: a `PeftModel`, or a model with adapters injected; compiled or not.
        path: adapter directory of the same form, r and layers.
        adapter_name: the loaded adapter that takes the new values.

    Raises:
        ValueError: no such adapter, or it is merged; another form, r or set of layers; a broken file. Nothing is
            changed then.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    config, tensors = read_directory(path)
    loaded = getattr(model, "peft_config", {})
    if adapter_name not in loaded:
        raise ValueError(f"No adapter {adapter_name!r} in this model; there are {', '.join(loaded) or 'none'}.")
    if any(adapter_name in m.merged_adapters for m in model.modules() if isinstance(m, BaseTunerLayer)):
        raise ValueError(f"Adapter {adapter_name!r} is merged into the weights: unmerge_adapter() before the swap.")
    own, _ = split_foreign(tensors)
    if is_development_file(config.get("init_weights", True), own):
        raise ValueError(
            f"{path} holds bat blocks under init_weights: true, as in November 2024: upgrade_checkpoint it"
        )
    _refuse_another_kind(config, loaded[adapter_name], path)
    new = {name.removeprefix(PREFIX): tensor for name, tensor in own.items()}
    # The values of a state dict are the parameters' own memory.
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    live = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    if problems := _differences(new, live):
        raise ValueError(f"{path} cannot be swapped in for adapter {adapter_name!r}:\n" + "\n".join(problems))
    with torch.no_grad():
        for name, tensor in new.items():
            live[name].copy_(tensor)


def _refuse_another_kind(new: Mapping[str, Any], loaded: Any, path: str | Path) -> None:
    kind = new.get("peft_type"), form_of(new.get("init_weights", True)), new.get("r")
    wanted = loaded.peft_type.value, form_of(loaded.init_weights), loaded.r
    if kind != wanted:
        raise ValueError(
            f"{path} holds (method, form, r) = {kind}, and the loaded adapter is {wanted}: a swap needs the same. "
            "Load it beside the other with load_adapter."
        )


def _differences(new: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> list[str]:
    return [
        *(f"{name}: not in the file" for name in sorted(live.keys() - new.keys())),
        *(f"{name}: nothing in the model takes it" for name in sorted(new.keys() - live.keys())),
        *tensor_problems(new, {name: tuple(tensor.shape) for name, tensor in live.items()}),
    ]
