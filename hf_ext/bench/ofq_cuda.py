"""OFQ on a CUDA device, by CUDA events: a training step against full precision, eager and compiled."""

import copy
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from hf_ext.bench.harness import Row, compare_cuda
from hf_ext.ofq_quantizer import OFQConfig, calibrate, quantize

ARCHITECTURE = "deit_small_patch16_224"


def rows(quick: bool = False) -> Iterator[Row]:
    """Steps in float32 and bfloat16 autocast, eager and compiled."""
    if not torch.cuda.is_available():
        yield Row("OFQ on CUDA", "full precision", skipped="needs a CUDA device")
        return
    import timm

    images, repeats = (4, 3) if quick else (64, 10)
    yield from step_rows(timm.create_model(ARCHITECTURE), torch.randn(images, 3, 224, 224, device="cuda"), repeats)


def step_rows(plain: nn.Module, x: torch.Tensor, repeats: int) -> Iterator[Row]:
    """A training step of `plain` on images x, quantised and not, on the device of x."""
    plain = plain.to(x.device)
    ours = calibrate(quantize(copy.deepcopy(plain), OFQConfig()), [x])
    for compiled in (False, True):
        pair = [torch.compile(model, fullgraph=True) if compiled else model for model in (ours, plain)]
        for dtype in (None, torch.bfloat16):
            yield compare_cuda(
                f"{ARCHITECTURE}, {len(x)} images, W2A2, {dtype or 'float32'}{', compiled' if compiled else ''}: "
                "forward + backward",
                *(partial(step, model, x, dtype) for model in pair),
                peer_name="full precision",
                repeats=repeats,
            )


def step(model: nn.Module, x: torch.Tensor, dtype: torch.dtype | None) -> None:
    with torch.autocast(x.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = model(x).float().square().mean()
    loss.backward()
    model.zero_grad(set_to_none=True)
