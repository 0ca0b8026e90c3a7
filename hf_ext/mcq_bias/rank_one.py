"""Edits of rank one: tried by hooks while the model stays as it is, delivered as a LoRA adapter."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class RankOne:
    """At strength s the layer `module`, of inputs x, gives s (x . read) write more.

    read: (in,), write: (out,), both in at least float32.
    """

    module: str
    read: Tensor
    write: Tensor


@contextmanager
def tried(model: nn.Module, edits: Sequence[RankOne], strength: float) -> Iterator[None]:
    """Inside, `model` computes as with the adapter of `as_adapter`; not one of its weights is touched."""

    def add(edit: RankOne) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            more = (inputs[0].to(edit.read.dtype) @ edit.read)[..., None] * (strength * edit.write)
            return (output + more).to(output.dtype)

        return model.get_submodule(edit.module).register_forward_hook(hook)

    handles = [add(edit) for edit in edits]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_adapter(model: nn.Module, edits: Sequence[RankOne], strength: float) -> PeftModel:
    """`model`, wrapped in place with a frozen LoRA adapter of rank one on the edited layers and no others."""
    known = set(model.modules())
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        # Whole names: in GPT-2 "c_proj" is the end of the MLP as well as of the attention.
        target_modules=[edit.module for edit in edits],
        fan_in_fan_out=isinstance(model.get_submodule(edits[0].module), Conv1D),
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial weights, which are replaced
        adapted = get_peft_model(model, config)
    for module in set(adapted.modules()) - known:
        module.training = model.training
    for edit in edits:
        layer = model.get_submodule(edit.module)
        # Parameters of our own, in the precision of the edit: PEFT would leave float32 in a float64 model.
        for part, weight in ((layer.lora_A, edit.read[None]), (layer.lora_B, strength * edit.write[:, None])):
            part["default"].weight = nn.Parameter(weight.clone(), requires_grad=False)
    return adapted
