"""The three forms once more, as identities on whole matrices in float64, and small models to hang adapters on."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_ext import BoneConfig, BoneLinear


def updated(init_weights: Any, weight: Tensor, block: Tensor) -> Tensor:
    """W' (out, in). The block-affine forms by (W'_ij + I) = (W_ij + I)(I + b)."""
    weight, block = weight.double(), block.double()
    r = block.shape[-1]
    if isinstance(init_weights, bool):
        return weight + block[torch.arange(weight.shape[1]) % len(block)].T
    unit = torch.eye(r, dtype=torch.float64)
    grid = weight.unflatten(0, (-1, r)).unflatten(2, (-1, r))
    which = {"bat": "iajb,ibc->iajc", "bat_row": "iajb,jbc->iajc"}[init_weights]
    grid = torch.einsum(which, grid + unit[None, :, None, :], block + unit) - unit[None, :, None, :]
    return grid.reshape(weight.shape)


class Net(nn.Module):
    """12 -> 24 -> 12 -> 12: a Linear, a Conv1D, and a Linear without bias."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(12, 24), Conv1D(12, 24), nn.Linear(12, 12, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


class Single(nn.Module):
    """One layer, so that it has a name to be targeted by."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.layer(*args, **kwargs)


def single(kind: str, fan_in: int, fan_out: int) -> Single:
    torch.manual_seed(3)
    layer = Conv1D(fan_out, fan_in) if kind == "conv1d" else nn.Linear(fan_in, fan_out, bias=kind == "linear")
    if kind == "conv1d":
        nn.init.normal_(layer.weight, std=0.4)
        nn.init.normal_(layer.bias)
    return Single(layer).double()


def config(init_weights: Any = True, r: int = 4, targets: Any = ("one", "two", "three"), **options: Any) -> BoneConfig:
    targets = list(targets) if isinstance(targets, tuple) else targets
    return BoneConfig(r=r, init_weights=init_weights, target_modules=targets, **options)


@torch.no_grad()
def fill(model: nn.Module, seed: int = 7) -> None:
    """Values that no initialisation gives, of a size that every comparison sees."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".bone_block." in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapted(base: nn.Module, **adapters: BoneConfig) -> PeftModel:
    """A copy of `base` with these adapters, filled; the first one is active."""
    (first, *others) = adapters.items()
    model = get_peft_model(copy.deepcopy(base), first[1], adapter_name=first[0])
    for name, options in others:
        model.add_adapter(name, options)
    fill(model)
    return model.eval()


def layers(model: nn.Module) -> Iterator[tuple[str, BoneLinear]]:
    """(path in the base model, layer)"""
    for path, module in model.named_modules():
        if isinstance(module, BoneLinear):
            yield path.removeprefix("base_model.model."), module


def wrapped(model: nn.Module) -> list[str]:
    return [path for path, _ in layers(model)]


def matrix(layer: nn.Module) -> Tensor:
    """(out, in)"""
    return layer.weight.T if isinstance(layer, Conv1D) else layer.weight


@torch.no_grad()
def merged(base: nn.Module, model: PeftModel, adapters: list[str]) -> nn.Module:
    """A float64 copy of `base` with the blocks of `model` worked into its weights in this order."""
    twin = copy.deepcopy(base).double()
    for path, layer in layers(model):
        weight = matrix(twin.get_submodule(path))
        new = weight
        for name in adapters:
            if name in layer.bone_block:
                new = updated(model.peft_config[name].init_weights, new, layer.bone_block[name])
        weight.copy_(new)
    return twin


def snapshot(model: nn.Module) -> dict[str, bytes]:
    """The bytes of everything that is not an adapter's, under the names of the base model."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): raw(tensor)
        for name, tensor in model.state_dict().items()
        if ".bone_block." not in name
    }


def raw(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
