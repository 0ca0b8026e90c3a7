"""What `loops` do for `ops` and `attention_ops`: for plain float32 tensors on a CPU.

Products are of int8 where the processor has instructions for it, else of float32: the sums are the same numbers.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_ext.ofq_quantizer import loops

SMALLEST_SCALE = 1e-5


class Activation(NamedTuple):
    """How a tensor is quantised: LSQ(x + bias_in) + bias_out.

    scale and shifts (or None) have the shapes with which they broadcast against the tensor.
    """

    scale: Tensor
    bias_in: Tensor | None
    bias_out: Tensor | None
    bits: int
    positive: bool


class Codes(NamedTuple):
    """The integers of a quantised tensor (n0, n1, n2, width), see `loops`.

    values: (n0 n1 n2, width) float32 or int8; in int8, unsigned integers of 8 bits are 128 less.
    scale: float32, (n0 n1 n2,) or for a scale a channel (n0 n1, width); NaN where a value is, which int8 cannot hold.
    sums: (n0 n1 n2,) float32, the sum of a row's integers.
    """

    values: Tensor
    scale: Tensor
    sums: Tensor


def code_range(bits: int, positive: bool) -> tuple[int, int]:
    """(Qn, Qp) of LSQ."""
    return (0, 2**bits - 1) if positive else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def code_shift(a: Activation, dtype: torch.dtype) -> int:
    """What is subtracted from the integers to hold them in `dtype`."""
    return 128 if dtype == torch.int8 and code_range(a.bits, a.positive)[1] > 127 else 0


def accept(*tensors: Tensor | None) -> bool:
    """Whether these are plain float32 tensors on a CPU that nobody traces."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and all(
        type(tensor) in (Tensor, torch.nn.Parameter) and tensor.device.type == "cpu" and tensor.dtype == torch.float32
        for tensor in tensors
        if tensor is not None
    )


def accept_activation(x: Tensor, a: Activation) -> bool:
    """Whether x, scale and shifts are that, and broadcast as they do in a linear layer and in an attention."""
    parts = [part for part in a[:3] if part is not None]
    by_channel = [part for part in parts if part is not a.scale or part.shape[-1] > 1]
    return (
        accept(x, *parts)
        and max(part.dim() for part in parts) <= min(3, x.dim())
        and all(part.dim() < 2 or part.shape[-2] == 1 for part in by_channel)
    )


@cache
def multiplies_int8() -> bool:
    """Whether the processor sums products of int8 exactly and fast (VNNI)."""
    return getattr(torch.cpu, "_is_vnni_supported", bool)()


# --- LSQ


def quantized(x: Tensor, a: Activation, dtype: torch.dtype = torch.float32) -> Codes:
    """The integers of x (..., width) in `dtype`."""
    flat, layout, groups = _layout(x, a)
    _, n2, width = layout[0]
    values, sums = torch.empty(groups * n2, width, dtype=dtype), torch.empty(groups * n2)
    scale = torch.empty((groups, width) if _by_channel(a) else groups * n2)
    minus = np.float32(code_shift(a, dtype))
    run(loops.quantize, groups, flat, layout, _how(a, layout), minus, *map(memory, (values, scale, sums)))
    return Codes(values, scale, sums)


def dequantized(x: Tensor, a: Activation) -> Tensor:
    """The integers times the scale, plus bias_out: of the shape of x, contiguous."""
    flat, layout, groups = _layout(x, a)
    out = torch.empty(x.shape)
    run(loops.dequantize, groups, flat, layout, _how(a, layout), _shift(a.bias_out, layout), memory(out))
    return out


def gradients(x: Tensor, a: Activation, g: Tensor, gain: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dx in the memory of g, contiguous, where g gain = dL/dx^; and what scale, bias_in and bias_out get.

    The last three still have to be summed to the shapes of scale and shifts; the scale's lacks its factor.
    """
    flat, layout, groups = _layout(x, a)
    n1, n2, width = layout[0]
    by_scale = torch.zeros(groups, *((1, width) if _by_channel(a) else (n2, 1)))
    by_shift = torch.zeros(2, groups, 1, width)
    outputs = map(memory, (g, by_scale, *by_shift))
    run(loops.gradient, groups, flat, layout, _how(a, layout), np.float32(gain), *outputs)
    by_scale, sum_in, sum_out = (part.unflatten(0, (-1, n1)).sum(0) for part in (by_scale, *by_shift))
    return g, by_scale, sum_in, sum_out


# --- StatsQ


def statsq(
    weight: Tensor, bits: int, coefficient: float, dtype: torch.dtype = torch.float32, *, integers: bool
) -> tuple[Tensor, Tensor]:
    """Odd integers (rows, columns) in `dtype`, or their products with the steps; and the steps (rows,)."""
    out, step = torch.empty(weight.shape, dtype=dtype), torch.empty(len(weight))
    run(loops.statsq, len(weight), *_rows(weight, bits, coefficient), integers, memory(out), memory(step))
    return out, step


def near_threshold(weight: Tensor, bits: int, coefficient: float, reach: float) -> Tensor:
    """Where t lies within `reach` of a rounding threshold, bool (rows, columns)."""
    out = torch.empty(weight.shape, dtype=torch.bool)
    rows = _rows(weight, bits, coefficient)
    run(loops.near_threshold, len(weight), *rows, np.float32(reach), memory(out))
    return out


@torch.library.custom_op("hf_ext::ofq_statsq", mutates_args=())
def compiled_statsq(weight: Tensor, bits: int, coefficient: float) -> Tensor:
    """The quantised weight, for graphs that torch compiles itself: its own code is slower."""
    return statsq(weight, bits, coefficient, integers=False)[0]


@compiled_statsq.register_fake
def _(weight: Tensor, bits: int, coefficient: float) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def accept_compiled(weight: Tensor) -> bool:
    """Whether this is a float32 tensor on a CPU in such a graph, not in one that leaves this process."""
    leaves = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)  # came with torch 2.7
    inside = torch.compiler.is_compiling() and not leaves()
    return inside and weight.device.type == "cpu" and weight.dtype == torch.float32


# --- products


def row_dots(values: Tensor, vectors: Tensor, period: int) -> Tensor:
    """Products of rows of values (rows, width), float32 or int8, with vectors (n, width), in turn for `period` rows."""
    (rows, width), out = values.shape, torch.empty(len(values))
    run(loops.dots, rows, memory(values), memory(vectors), width, period, memory(out))
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """left (T, in) right (out, in)^T of integers: float32 as they are, int8 as int32."""
    if left.dtype == torch.float32:
        return left @ right.T
    return torch._int_mm(left, right.T) if len(left) else torch.empty(0, len(right), dtype=torch.int32)


def scaled(sums: Tensor, correction: Tensor | None, scale: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """((sums + correction) * scale[row] * step) + offset, float32, in the memory of sums (rows, width)."""
    rows, width = sums.shape
    correction, offset = (torch.zeros(width) if part is None else part for part in (correction, offset))
    run(loops.scale_sums, rows, memory(sums), width, *map(memory, (correction, scale, step, offset)))
    return sums.view(torch.float32)


# --- how loops are called


def memory(x: Tensor) -> np.ndarray:
    """A contiguous tensor as one row."""
    return x.numpy().reshape(-1)


def run(loop: Callable[..., None], count: int, *arguments: Any) -> None:
    """loop(start, stop, *arguments) for all of `count`, by as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        loop(0, count, *arguments)
        return
    first, *others = pairwise(count * i // threads for i in range(threads + 1))
    calls = [_pool(threads).submit(loop, *part, *arguments) for part in others]
    loop(*first, *arguments)
    for call in calls:
        call.result()


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="hf_ext_ofq")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads


def span(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The memory of x from its first to its last element as one row, and the strides; that of the last axis is 1."""
    x = x.detach()
    x = x if x.stride(-1) == 1 else x.contiguous()
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.as_strided((last + 1 if x.numel() else 0,), (1,)).numpy(), x.stride()


def scales(a: Activation, shape: tuple[int, int, int]) -> np.ndarray:
    """s' as (n1, n2), or for a scale a channel (n1, width), in one row."""
    n1, n2, width = shape
    scale = a.scale.detach().clamp(min=SMALLEST_SCALE)
    return scale.expand(n1, *((1, width) if _by_channel(a) else (n2, 1))).reshape(-1).numpy()


def _by_channel(a: Activation) -> bool:
    return a.scale.shape[-1] > 1


def _layout(x: Tensor, a: Activation) -> tuple[np.ndarray, loops.Layout, int]:
    """The memory of x, how it lies there, and n0 n1. The axis that a part of `a` has before the tokens' is n1."""
    if x.dim() > 3:
        x = x.flatten(0, -4)
    elif x.dim() == 3:
        x = x.unsqueeze(0 if any(part is not None and part.dim() == 3 for part in a[:3]) else 1)
    else:
        x = x.reshape(1, 1, -1, x.shape[-1])
    flat, (*strides, _) = span(x)
    return flat, (tuple(x.shape[1:]), tuple(strides)), x.shape[0] * x.shape[1]


def _how(a: Activation, layout: loops.Layout) -> loops.Quantizer:
    low, high = map(np.float32, code_range(a.bits, a.positive))
    return scales(a, layout[0]), _by_channel(a), _shift(a.bias_in, layout), low, high


def _shift(shift: Tensor | None, layout: loops.Layout) -> np.ndarray:
    n1, _, width = layout[0]
    return (
        np.zeros(n1 * width, np.float32) if shift is None else shift.detach().expand(n1, 1, width).reshape(-1).numpy()
    )


def _rows(weight: Tensor, bits: int, coefficient: float) -> tuple[Any, ...]:
    n = 2 ** (bits - 1)
    rest = map(np.float32, (n, coefficient, n * (1 - 1e-6)))
    return memory(weight.detach().contiguous()), weight.shape[1], *rest
