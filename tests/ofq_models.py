"""Small models of every family of timm, and the equations of OFQ written out in float64."""

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from hf_ext import compat

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
VIT = {"img_size": 32, "patch_size": 8} | SIZES
PATCH14 = {"img_size": 28} | SIZES
SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 10}
SWIN["drop_path_rate"] = 0.0
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("vit_tiny_patch16_224", VIT),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", VIT),
    "deit3": ("deit3_small_patch16_224", VIT),
    "dinov2": ("vit_small_patch14_reg4_dinov2", PATCH14),
    "dinov2_swiglu": ("vit_giant_patch14_dinov2", PATCH14),
    "siglip": ("vit_base_patch16_siglip_224", VIT),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
    "beit": ("beit_base_patch16_224", VIT),
    "eva02": ("eva02_tiny_patch14_224", PATCH14),
    "eva02_split": ("eva02_base_patch14_224", PATCH14),
    "swinv2": ("swinv2_tiny_window8_256", SWIN | {"window_size": 4}),
}


local_dir = pytest.mark.skipif(
    not hasattr(timm.models._hub, "load_model_config_from_path"), reason="this timm reads no local directory"
)


def build(family: str = "vit", seed: int = 0, **kwargs: Any) -> nn.Module:
    """In eval mode, no parameter at its initial value, and attention that prefers some tokens."""
    architecture, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    model = compat.create_timm_model(architecture, False, **sizes | kwargs)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def images(model: nn.Module, count: int = 2, seed: int = 0) -> Tensor:
    size = model.patch_embed.img_size[0]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer of the blocks, but the networks that turn positions into biases."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("blocks.", "layers.")) and "cpb_mlp" not in name
    }


def codes_of(weight: Tensor, bits: int = 2) -> tuple[Tensor, Tensor]:
    """StatsQ: codes in [-n, n-1] and the scale of each row."""
    n, weight = 2 ** (bits - 1), weight.double()
    scale = 2 * weight.abs().mean(1, keepdim=True)
    return ((weight / scale).clamp(-1, 1 - 1e-6) * n - 0.5).round(), scale


def statsq_of(weight: Tensor, bits: int = 2) -> Tensor:
    """The gradient is the identity."""
    codes, scale = codes_of(weight, bits)
    rounded = (codes + 0.5) / 2 ** (bits - 1) * scale
    return weight.double() + (rounded - weight).detach()


def lsq_of(x: Tensor, scale: Tensor, bits: int = 2, positive: bool = False) -> Tensor:
    """`scale` broadcasts against `x`; gradients straight through the rounding, the scale's with its factor g."""
    low, high = (0, 2**bits - 1) if positive else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scale = scale.double()
    g = (high * x.numel() / scale.numel()) ** -0.5
    scale = scale * g + (scale * (1 - g)).detach()
    v = (x.double() / scale).clamp(low, high)
    return scale * (v + (v.round() - v).detach())


def initial_scale(x: Tensor, bits: int, positive: bool, kept: int | None) -> Tensor:
    """LSQ's first scale: the mean over all dimensions but `kept`."""
    high = 2**bits - 1 if positive else 2 ** (bits - 1) - 1
    dims = [i for i in range(x.ndim) if kept is None or i != kept % x.ndim]
    return (4 if positive else 2) * x.double().abs().mean(dims).reshape(-1) / high**0.5
