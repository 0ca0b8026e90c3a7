"""Tiny models and Bone adapter directories made by hand, and the weights that the equations give for them."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

IDS = torch.arange(10).reshape(2, 5)

LLAMA = LlamaConfig(
    vocab_size=29,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    attention_bias=True,
    tie_word_embeddings=False,
)
GPT2 = GPT2Config(vocab_size=29, n_embd=24, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)


def model_of(config: Any) -> Any:
    """Weights and biases large enough that a wrong one is seen in the logits."""
    kind = {"llama": LlamaForCausalLM, "gpt2": GPT2LMHeadModel}[config.model_type]
    model = kind(copy.deepcopy(config)).eval()  # saving a model writes into its config
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or name.endswith(".bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def sizes(layer: nn.Module) -> tuple[int, int]:
    """(in, out)"""
    return tuple(layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1])


def block_of(layer: nn.Module, init_weights: Any, r: int, generator: torch.Generator) -> Tensor:
    fan_in, fan_out = sizes(layer)
    shape = {"bat": (fan_out // r, r, r), "bat_row": (fan_in // r, r, r)}.get(init_weights, (r, fan_out))
    return 0.1 * torch.randn(shape, generator=generator)


def adapter(base: nn.Module, init_weights: Any = True, r: int = 8, **options: Any) -> tuple[dict, dict[str, Tensor]]:
    """(config as PEFT 0.18 wrote it, tensors) for the layers whose names end in one of target_modules."""
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": init_weights,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "BONE",
        "peft_version": "0.18.1",
        "r": r,
        "revision": None,
        "task_type": "CAUSAL_LM",
        **options,
    }
    ends = tuple(f".{name}" for name in options["target_modules"])
    generator = torch.Generator().manual_seed(2)
    layers = {path: layer for path, layer in base.named_modules() if path.endswith(ends)}
    return config, {key(path): block_of(layer, init_weights, r, generator) for path, layer in layers.items()}


def key(path: str) -> str:
    return f"base_model.model.{path}.bone_block"


def path_of(name: str) -> str:
    return name.removeprefix("base_model.model.").removesuffix(".bone_block")


def write_adapter(folder: Path, config: dict, tensors: dict[str, Tensor], *, old: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if old:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def delta(weight: Tensor, block: Tensor, init_weights: Any) -> Tensor:
    """dW (out, in) in float64, entry by entry or block by block, as the paper writes it."""
    weight, block = weight.double(), block.double()
    change, r = torch.zeros_like(weight), block.shape[-1]
    if isinstance(init_weights, bool):
        for k in range(weight.shape[1]):
            change[:, k] = block[k % len(block)]
        return change
    for i in range(weight.shape[0] // r):
        for j in range(weight.shape[1] // r):
            at = slice(i * r, i * r + r), slice(j * r, j * r + r)
            b = block[i if init_weights == "bat" else j]
            change[at] = weight[at] @ b + b
    return change


@torch.no_grad()
def merged(base: nn.Module, config: dict, tensors: dict[str, Tensor]) -> nn.Module:
    """A copy of `base` with the adapter in its weights, and with the biases and modules that were saved beside it."""
    model = copy.deepcopy(base)
    for name, tensor in tensors.items():
        if name.endswith(".bone_block"):
            layer = model.get_submodule(path_of(name))
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            weight.add_(delta(weight, tensor, config["init_weights"]))
        else:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            model.get_parameter(name).copy_(tensor)
    return model
