"""Calibrated models of both hosts, ready to be deployed."""

import hashlib
import json
from typing import Any

import torch
from ofq_models import FAMILIES, build, images
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from hf_ext.ofq_quantizer import OFQConfig, activation_quantizers, calibrate, quantize

VIT = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "num_labels": 5}
SWIN = {"patch_size": 2, "embed_dim": 24, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "num_labels": 5}
HF = {
    "hf_vit": lambda: ViTForImageClassification(ViTConfig(**VIT, image_size=32, patch_size=8)),
    "hf_swin": lambda: SwinForImageClassification(SwinConfig(**SWIN, image_size=32)),
}
QKR, WIDE, ONE_SCALE = {"qk_reparam": True}, {"w_bits": 4, "a_bits": 8}, {"activation_scale": "tensor"}


def full(kind: str, **sizes: Any) -> tuple[nn.Module, Tensor]:
    """A model of full precision, no parameter at its initial value, and images for it."""
    if kind in FAMILIES:
        model = build(kind, **sizes)
        return model, images(model)
    torch.manual_seed(0)
    model = HF[kind]().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    return model, torch.randn(2, 3, 32, 32)


def quantized(
    kind: str = "vit", sizes: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **config: Any
) -> tuple[nn.Module, Tensor]:
    """Calibrated, and with shifts as after training."""
    model, x = full(kind, **sizes or {})
    model, x = quantize(model.to(dtype), OFQConfig(**config)), x.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for quantizer in activation_quantizers(model).values():
        for shift in (quantizer.bias_in, quantizer.bias_out):
            if shift is not None:
                shift.data = 0.1 * torch.randn(shift.shape, generator=generator)  # float32 in any model
    return calibrate(model, [x]), x


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output if isinstance(output, Tensor) else output.logits


def distance(model: nn.Module, other: nn.Module, x: Tensor) -> float:
    return (logits(model, x) - logits(other, x)).abs().max().item()


def resealed(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a packed folder as if it had been written so."""
    fields = {name: value for name, value in config.items() if name != "config_sha256"}
    return fields | {"config_sha256": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}
