"""What a forward pass shows of a model, without computing it: which layers run, on which shapes, after what."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.modes import evaluating

UNSIGNED = ("gelu", "relu", "silu", "quickgelu", "gelutanh", "newgelu", "fastgelu", "pytorchgelutanh")


@dataclass
class Trace:
    """Shapes of the inputs by module name, and the layers whose input is the output of a GELU, ReLU or SiLU."""

    shapes: dict[str, torch.Size] = field(default_factory=dict)
    unsigned: set[str] = field(default_factory=set)
    _activations: list[Tensor] = field(default_factory=list)  # kept, so that identities stay unique

    def saw_input(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is not None and name not in self.shapes:
            self.shapes[name] = x.shape
            if any(x is output for output in self._activations):
                self.unsigned.add(name)

    def saw_activation(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            self._activations.append(output)


def trace(model: nn.Module) -> Trace:
    """One forward of one image on the meta device, in evaluation mode; the model's own tensors are not touched.

    Raises:
        ValueError: the size of the images is unknown, or the model does not run on an image alone.
    """
    seen, handles = Trace(), []
    tensors = {name: tensor.detach().to("meta") for name, tensor in _tensors(model)}
    image = torch.empty(1, *image_shape(model), device="meta", dtype=next(model.parameters()).dtype)
    try:
        for name, module in model.named_modules():
            if type(module).__name__.lower().removesuffix("activation") in UNSIGNED:
                handles.append(module.register_forward_hook(seen.saw_activation))
            else:
                handles.append(module.register_forward_pre_hook(partial(seen.saw_input, name), with_kwargs=True))
        with evaluating(model):
            torch.func.functional_call(model, tensors, (image,), tie_weights=False)
    except (RuntimeError, TypeError, NotImplementedError, AssertionError) as error:
        raise ValueError(
            f"{type(model).__name__} does not run on one image of shape {tuple(image.shape)} ({error}); OFQ quantises "
            "models that map a batch of images to features or classes"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that the model was built for.

    Raises:
        ValueError: neither timm's nor transformers' way of telling it is there.
    """
    host = timm_model(model)
    if host is not None:
        channels, *size = host.pretrained_cfg.get("input_size", (3, 224, 224))
        patch = getattr(backbone(host), "patch_embed", None)
        size = getattr(patch, "img_size", None) or size
        first = next((module for module in host.modules() if isinstance(module, nn.Conv2d)), None)
        return (channels if first is None else first.in_channels, *size)
    config = getattr(model, "config", None)
    if not hasattr(config, "image_size"):
        raise ValueError(
            f"{type(model).__name__} does not tell the size of its images; OFQ takes models of timm and image "
            "models of transformers"
        )
    size = config.image_size
    return (getattr(config, "num_channels", 3), *(size if isinstance(size, list | tuple) else (size, size)))


def timm_model(model: nn.Module) -> nn.Module | None:
    """The model of timm that this is or wraps; None for others."""
    inner = getattr(model, "timm_model", model)
    return inner if hasattr(inner, "pretrained_cfg") else None


def backbone(host: nn.Module) -> nn.Module:
    """A model of timm without the wrapper that `features_only` puts around a vision transformer."""
    return getattr(host, "model", host)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
