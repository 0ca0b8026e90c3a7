"""What the tests of training share: a small quantised model, images for it, the band around a threshold written out."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, default_data_collator

from hf_ext.ofq_quantizer.calibration import calibrate
from hf_ext.ofq_quantizer.config import OFQConfig
from hf_ext.ofq_quantizer.convert import quantize
from hf_ext.ofq_quantizer.ops import low_confidence

CLASSES = 5


def small_vit(seed: int = 0, architecture: str = "vit_tiny_patch16_224") -> nn.Module:
    """With weights so large that attention prefers some tokens: even probabilities would all be rounded to 0."""
    torch.manual_seed(seed)
    sizes = {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3, "num_classes": CLASSES}
    model = timm.create_model(architecture, **sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def quantized_vit(seed: int = 0, architecture: str = "vit_tiny_patch16_224", **config: Any) -> nn.Module:
    """Calibrated, in training mode."""
    model = quantize(small_vit(seed, architecture), OFQConfig(**config))
    return calibrate(model, [images(8)]).train()


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def labels(count: int) -> Tensor:
    return torch.arange(count) % CLASSES


def low_bit(model: nn.Module) -> dict[str, Tensor]:
    """The weights that StatsQ rounds, read off the names."""
    ends = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")
    found = {name: x for name, x in model.named_parameters() if name.endswith(ends) and "patch_embed" not in name}
    assert found
    return found


def near_threshold(weight: Tensor, boundary_range: float, bits: int = 2) -> Tensor:
    """|n w / s - j| <= boundary_range for an integer j between the outermost levels, in float64.

    What is so close to the edge that float32 may see it on the other side is decided as by `low_confidence`.
    """
    n, w = 2 ** (bits - 1), weight.detach().double()
    scale = 2 * w.abs().mean(1, keepdim=True)
    distance = ((n * w / scale).unsqueeze(-1) - torch.arange(1 - n, n)).abs().amin(-1)
    close = (distance - boundary_range).abs() < 1e-6
    assert close.float().mean() < 0.01
    return torch.where(close, low_confidence(weight.detach().float(), bits, boundary_range), distance <= boundary_range)


class Classifier(nn.Module):
    """A model of timm as Trainer calls models."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.vit(pixel_values)
        return {"logits": logits} | ({} if labels is None else {"loss": F.cross_entropy(logits, labels)})


def trainer(model: nn.Module, folder: Any, dataset: list[dict[str, Tensor]], **options: Any) -> Trainer:
    """One process on the CPU, nothing written but checkpoints; keywords of Trainer or of its arguments."""
    ours = {key: options.pop(key) for key in ("callbacks", "compute_loss_func") if key in options}
    silent = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}
    arguments = TrainingArguments(folder, **silent | {"lr_scheduler_type": "constant"} | options)
    return Trainer(model, arguments, train_dataset=dataset, data_collator=default_data_collator, **ours)
