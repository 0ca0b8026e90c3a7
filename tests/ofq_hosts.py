"""Small image models of transformers, of its own and of timm inside."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    SwinForImageClassification,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 3}
IMAGE = {"image_size": 16, "patch_size": 8}
WINDOWS = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 2]}
TIMM = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 3,
    "pretrained_cfg": {"input_size": [3, 32, 32], "num_classes": 3},
    "model_args": {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3},
}
MODELS = {
    "vit": lambda **more: ViTForImageClassification(ViTConfig(**SIZES | IMAGE | more)),
    "deit": lambda **more: DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES | IMAGE | more)),
    "swin": lambda **more: SwinForImageClassification(SwinConfig(**WINDOWS | {"num_labels": 3} | more)),
    "timm": lambda: TimmWrapperForImageClassification(TimmWrapperConfig.from_dict(copy.deepcopy(TIMM))),
}


def stock(kind: str, **more: Any) -> nn.Module:
    """No parameter at its initial value, on a grid that is coarse enough for sums of magnitudes to be exact."""
    torch.manual_seed(0)
    model = MODELS[kind](**more).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter)).mul_(2**10).round_().div_(2**10)
    return model


def images(model: nn.Module, count: int = 12) -> Tensor:
    size = getattr(model.config, "image_size", 32)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
