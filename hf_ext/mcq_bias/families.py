"""The supported model families: where the parts of a logit's sum lie, and how the final norm reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Family:
    """Where a decoder keeps what adds up to its logits.

    Args:
        norm_kind: "layer" (LayerNorm: centred, with a bias) or "rms".
        blocks_path, final_norm_path: inside the causal model.
        mlp_path, attention_path: of the projection that ends the MLP, and the attention, inside a block.
    """

    norm_kind: Literal["layer", "rms"]
    blocks_path: str
    final_norm_path: str
    mlp_path: str
    attention_path: str

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(model.get_submodule(self.blocks_path))

    def final_norm(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.final_norm_path)

    def mlp_projection(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.mlp_path)

    def attention_projection(self, block: nn.Module) -> nn.Module:
        return block.get_submodule(self.attention_path)

    def value_vectors(self, block: nn.Module) -> Tensor:
        """(F, d): what each MLP neuron adds to the residual stream at activation 1; a view of the weights."""
        return _rows_in(self.mlp_projection(block))

    def head_outputs(self, block: nn.Module) -> Tensor:
        """(H, head_dim, d): how each head writes its mixture of values; a view of the weights."""
        attention = block.get_submodule(self.attention_path.rpartition(".")[0])
        rows = _rows_in(self.attention_projection(block))
        return rows.view(-1, attention.head_dim, rows.shape[1])

    def readout(self, model: nn.Module, tokens: Tensor | None = None) -> Tensor:
        """(n, d): U[t] = gain * W_U[t], minus its mean over d for LayerNorm; all tokens by default.

        A logit is `x . U[t] / norm_scale(x)` plus a constant of the token. At least float32.
        """
        gain = at_least_float32(self.final_norm(model).weight)
        weight = output_head(model).weight
        rows = gain * at_least_float32(weight if tokens is None else weight[tokens])
        return rows - rows.mean(-1, keepdim=True) if self.norm_kind == "layer" else rows

    def direction(self, model: nn.Module, token_a: Tensor, token_b: Tensor) -> Tensor:
        """(n, d): U[a] - U[b], the direction along which the residual stream prefers token a to token b."""
        return self.readout(model, token_a) - self.readout(model, token_b)

    def norm_scale(self, model: nn.Module, x: Tensor) -> Tensor:
        """(n,): what the final norm divides its input x (n, d) by, sqrt(var(x) + eps) or sqrt(mean(x^2) + eps)."""
        x = x - x.mean(-1, keepdim=True) if self.norm_kind == "layer" else x
        return (x.square().mean(-1) + self.norm_epsilon(model)).sqrt()

    def norm_epsilon(self, model: nn.Module) -> float:
        norm = self.final_norm(model)
        return norm.eps if self.norm_kind == "layer" else norm.variance_epsilon


_LLAMA_LIKE = Family("rms", "model.layers", "model.norm", "mlp.down_proj", "self_attn.o_proj")
FAMILIES = {
    "gpt2": Family("layer", "transformer.h", "transformer.ln_f", "mlp.c_proj", "attn.c_proj"),
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen2": _LLAMA_LIKE,
    "qwen3": _LLAMA_LIKE,
}


def family_of(model: nn.Module) -> Family:
    """The family of a causal model.

    Raises:
        ValueError: what `require_supported` refuses; no language model head; a model with adapters, on several
            devices, wrapped by torch.compile, or whose projections are no plain matrices (quantisation).
    """
    # By their marks, since peft takes long to import.
    if hasattr(model, "get_base_model") or any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} has adapters, whose part is not in the matrices of the model: call "
            "merge_and_unload() or unload() on the PeftModel first"
        )
    family = require_supported(model)
    if any(hasattr(module, "_orig_mod") for module in model.modules()):
        raise ValueError(
            "this model holds what torch.compile returned, under whose names an adapter would not be found again: give "
            "the model as it was, and compile it in place, model.compile()"
        )
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        raise ValueError(
            f"the weights of this model are on {', '.join(devices)}: load it onto one device, device_map={{'': 0}}"
        )
    _require_plain(output_head(model), "the output head")
    for layer, block in enumerate(family.blocks(model)):
        for path in (family.mlp_path, family.attention_path):
            _require_plain(block.get_submodule(path), f"{family.blocks_path}.{layer}.{path}")
    return family


def require_supported(model: nn.Module) -> Family:
    """
    Raises:
        ValueError: another `model_type`, with the list; a wrapper around a model.
    """
    _refuse_wrapper(model)
    name = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if name not in FAMILIES:
        raise ValueError(f"model_type {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def output_head(model: Any) -> nn.Module:
    """The last layer of a causal model.

    Raises:
        ValueError: it has none, is no causal model, or a wrapper around one.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    masked = "MaskedLM" in type(model).__name__  # a decoder that forgot to be causal shows when it is tried
    if head is None or masked or getattr(model.config, "is_encoder_decoder", False):
        _refuse_wrapper(model)
        raise ValueError(f"{type(model).__name__} is no causal language model; load one with AutoModelForCausalLM")
    return head


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half precisions as float32, everything else as it is."""
    return tensor.to(torch.promote_types(torch.float32, tensor.dtype))


def _refuse_wrapper(model: nn.Module) -> None:
    """DistributedDataParallel and its like keep the model as `module`, a name that transformers does not use."""
    if isinstance(inner := getattr(model, "module", None), nn.Module):
        raise ValueError(
            f"this {type(model).__name__} wraps a {type(inner).__name__}: give the model itself, "
            "accelerator.unwrap_model(model) or model.module"
        )


def _require_plain(module: nn.Module, where: str) -> None:
    if type(module) not in (nn.Linear, Conv1D) or not module.weight.is_floating_point():
        raise ValueError(
            f"{where} is a {type(module).__module__}.{type(module).__name__}, and a plain matrix is needed: load the "
            "model without quantisation, and merge its adapters"
        )


def _rows_in(projection: nn.Module) -> Tensor:
    """(in, out): Conv1D keeps its weight so, Linear the other way round."""
    return projection.weight if isinstance(projection, Conv1D) else projection.weight.T
