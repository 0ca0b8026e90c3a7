"""Ways to run torch code: in evaluation mode, without autocast, in the dtype that autocast asks for."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode and no gradients; afterwards every module has its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products on the device of x keep their dtype, also in a backward, which may run under another autocast."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    # A compiled backward is traced twice, the second time under the autocast of the forward: the graph must say it.
    needed = torch.is_autocast_enabled(kind) or torch.compiler.is_compiling()
    return torch.autocast(kind, enabled=False) if needed else nullcontext()


def product_dtype(x: Tensor, otherwise: torch.dtype | None = None) -> torch.dtype:
    """The dtype of a matrix product with x: as in nn.Linear, autocast decides, and leaves float64 alone.

    otherwise: the dtype without autocast; that of x where it is None.
    """
    kind, otherwise = x.device.type, otherwise or x.dtype
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast and otherwise != torch.float64 else otherwise
