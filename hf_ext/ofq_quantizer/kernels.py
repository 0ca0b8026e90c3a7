"""Loops for float32 on a CPU that read and write each tensor once, bit-equal to the tensor functions of `ops`.

The arithmetic of a value is written out in the order of `ops`, and the compiler may not change it. Free is only the
order of sums that are exact, that float64 makes exact enough to be rounded alike, or that end in a gradient. A tensor
is seen as (n0, n1, n2, width): groups (n0, n1), such as image and head, of n2 rows. For the integer arithmetic of
deployment as for training: `quantized`, `weight_codes`, `row_dots`, `product`, `scaled`.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import float32, njit
from numba.extending import overload
from torch import Tensor

SMALLEST_SCALE = 1e-5
TINY = float(np.finfo(np.float32).tiny)

_ZERO, _HALF, _ONE, _TWO = (np.float32(value) for value in (0, 0.5, 1, 2))
_ROUNDER = np.float32(1.5 * 2**23)  # adding and subtracting it rounds half to even
_compiled = njit(nogil=True, cache=True, error_model="numpy")  # which divides by zero


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
    """The integers of a quantised tensor.

    values: (rows, width) float32 or int8; int8 of unsigned 8-bit integers is 128 less.
    scale: float32, (rows,) or for a scale a channel (groups, width); NaN where there was one, which int8 cannot hold.
    sums: (rows,) float32, the sum of a row.
    """

    values: Tensor
    scale: Tensor
    sums: Tensor


def code_range(bits: int, positive: bool) -> tuple[int, int]:
    """(Qn, Qp) of LSQ."""
    return (0, 2**bits - 1) if positive else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


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


# --- loops


@njit(nogil=True, cache=True, fastmath={"reassoc", "nsz"})
def _add(a, b):
    """A term of a sum whose order is free."""
    return a + b


def _stored(value: np.float32, row: np.ndarray) -> np.float32 | np.int32:
    """What to write into `row` so that its memory, read as float32, has the value."""
    return np.float32(value).view(row.dtype)


@overload(_stored)
def _(value, row) -> Callable[..., Any]:
    if row.dtype == float32:
        return lambda value, row: value
    return lambda value, row: np.float32(value).view(np.int32)


@_compiled
def _rounded(v: np.float32, low: np.float32, high: np.float32) -> np.float32:
    v = low if v < low else v  # NaN stays
    v = high if v > high else v
    return (v + _ROUNDER) - _ROUNDER


# A loop over more than a few arrays is not vectorised, since any two might overlap: hence short loops over one row.


@_compiled
def _divide(x, shift, scale, v) -> None:
    for c in range(x.size):
        v[c] = (x[c] + shift[c]) / scale[c]


@_compiled
def _round(v, low, high, minus, out) -> np.float32:
    total = _ZERO
    for c in range(v.size):
        q = _rounded(v[c], low, high)
        total = _add(total, q)
        out[c] = q - minus
    return total


@_compiled
def _mark(v, marks) -> None:
    for c in range(v.size):
        marks[c] = marks[c] if v[c] == v[c] else np.float32(np.nan)


@_compiled
def _quantize(start, stop, x, shape, strides, scale, by_channel, shift, low, high, minus, out, marks, sums) -> None:
    n1, n2, width = shape
    same, v = np.empty(width, np.float32), np.empty(width, np.float32)
    for group in range(start, stop):
        i = group % n1
        o, channels, own = group // n1 * strides[0] + i * strides[1], slice(i * width, (i + 1) * width), same
        s, b = same, shift[channels]
        if by_channel:
            s, own = scale[channels], marks[group * width : (group + 1) * width]
            own[:] = s
        for t in range(n2):
            r = group * n2 + t
            if not by_channel:
                same[:] = scale[i * n2 + t]
            _divide(x[o : o + width], b, s, v)
            sums[r] = _round(v, low, high, minus, out[r * width : (r + 1) * width])
            if by_channel:
                _mark(v, own)
            else:
                marks[r] = scale[i * n2 + t] + (sums[r] - sums[r])
            o += strides[2]


@_compiled
def _rescale(v, low, high, scale, offset, out) -> None:
    for c in range(v.size):
        out[c] = _rounded(v[c], low, high) * scale[c] + offset[c]


@_compiled
def _dequantize(start, stop, x, shape, strides, scale, by_channel, shift, low, high, offset, out) -> None:
    n1, n2, width = shape
    same, v = np.empty(width, np.float32), np.empty(width, np.float32)
    for group in range(start, stop):
        i = group % n1
        o, channels = group // n1 * strides[0] + i * strides[1], slice(i * width, (i + 1) * width)
        s, b, b_out = scale[channels] if by_channel else same, shift[channels], offset[channels]
        for r in range(group * n2, (group + 1) * n2):
            if not by_channel:
                same[:] = scale[i * n2 + r - group * n2]
            _divide(x[o : o + width], b, s, v)
            _rescale(v, low, high, s, b_out, out[r * width : (r + 1) * width])
            o += strides[2]


@_compiled
def _mask(v, low, high, gain, g, terms) -> None:
    for c in range(v.size):
        d, inside = g[c] * gain, (v[c] >= low) & (v[c] <= high)
        terms[c] = d * (_rounded(v[c], low, high) - (v[c] if inside else _ZERO))
        g[c] = d if inside else _ZERO


@_compiled
def _accumulate(total, gain, terms) -> None:
    for c in range(terms.size):
        total[c] += terms[c] * gain


@_compiled
def _sum(terms) -> np.float32:
    total = _ZERO
    for c in range(terms.size):
        total = _add(total, terms[c])
    return total


@_compiled
def _gradient(
    start, stop, x, shape, strides, scale, by_channel, shift, low, high, gain, g, by_scale, to_in, to_out
) -> None:
    n1, n2, width = shape
    same, v, terms = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for group in range(start, stop):
        i = group % n1
        o, channels = group // n1 * strides[0] + i * strides[1], slice(i * width, (i + 1) * width)
        own = slice(group * width, (group + 1) * width)
        s, b, sum_in, sum_out = scale[channels] if by_channel else same, shift[channels], to_in[own], to_out[own]
        for r in range(group * n2, (group + 1) * n2):
            if not by_channel:
                same[:] = scale[i * n2 + r - group * n2]
            d = g[r * width : (r + 1) * width]
            _divide(x[o : o + width], b, s, v)
            _accumulate(sum_out, gain, d)
            _mask(v, low, high, gain, d, terms)
            _accumulate(sum_in, _ONE, d)
            if by_channel:
                _accumulate(by_scale[own], _ONE, terms)
            else:
                by_scale[r] = _sum(terms)
            o += strides[2]


@_compiled
def _statsq(start, stop, w, columns, n, coefficient, high, integers, out, step):
    for r in range(start, stop):
        row, new = w[r * columns : (r + 1) * columns], out[r * columns : (r + 1) * columns]
        total = 0.0
        for c in range(columns):
            total = _add(total, np.float64(abs(row[c])))
        s = np.float32(total) / np.float32(columns) * coefficient
        s = s + (s - s)
        step[r] = s / (_TWO * n)
        factor = _ONE if integers else step[r]
        s = s / n
        s = np.float32(TINY) if s < TINY else s
        for c in range(columns):
            v = row[c] / s
            v = -n if v < -n else v
            v = high if v > high else v
            new[c] = ((((v - _HALF) + _ROUNDER) - _ROUNDER) * _TWO + _ONE) * factor


@_compiled
def _dots(start, stop, codes, vectors, width, period, out):
    for r in range(start, stop):
        i = r // period % (vectors.size // width)
        row, vector = codes[r * width : (r + 1) * width], vectors[i * width : (i + 1) * width]
        total = 0.0
        for c in range(width):
            total = _add(total, np.float64(np.float32(row[c]) * vector[c]))
        out[r] = total


@_compiled
def _scaled(start, stop, sums, width, correction, scale, step, offset) -> None:
    for r in range(start, stop):
        row, s = sums[r * width : (r + 1) * width], scale[r]
        for c in range(width):
            row[c] = _stored((np.float32(row[c]) + correction[c]) * s * step[c] + offset[c], row)


# --- what they do for `ops`


def quantized(x: Tensor, a: Activation, dtype: torch.dtype = torch.float32) -> Codes:
    """The integers of x (..., width) as n0 n1 n2 rows in `dtype`."""
    flat, shape, strides, groups = _layout(x, a)
    rows, width, by_channel = groups * shape[1], shape[2], _by_channel(a)
    values = torch.empty(rows, width, dtype=dtype)
    scale, sums = torch.empty((groups, width) if by_channel else rows), torch.empty(rows)
    minus = np.float32(code_shift(a, dtype))
    run(_quantize, groups, flat, shape, strides, *_how(a, shape), minus, *map(memory, (values, scale, sums)))
    return Codes(values, scale, sums)


def dequantized(x: Tensor, a: Activation) -> Tensor:
    """round(..) * scale + bias_out in the shape of x, contiguous."""
    flat, shape, strides, groups = _layout(x, a)
    values = torch.empty(x.shape)
    run(_dequantize, groups, flat, shape, strides, *_how(a, shape), _channels(a.bias_out, shape), memory(values))
    return values


def gradients(x: Tensor, a: Activation, g: Tensor, gain: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dx, and sums in the layout of scale and shifts, from g gain = dL/dx^. g must be contiguous, and is overwritten.

    Returns (x's shape), (n1, n2, 1) or for a scale a channel (n1, 1, width), and twice (n1, 1, width).
    """
    flat, shape, strides, groups = _layout(x, a)
    n1, n2, width = shape
    by_scale = torch.zeros(groups, *((1, width) if _by_channel(a) else (n2, 1)))
    sums = torch.zeros(2, groups, 1, width)
    outputs = map(memory, (g, by_scale, *sums))
    run(_gradient, groups, flat, shape, strides, *_how(a, shape), np.float32(gain), *outputs)
    by_scale, sum_in, sum_out = (part.unflatten(0, (-1, n1)).sum(0) for part in (by_scale, *sums))
    return g, by_scale, sum_in, sum_out


def statsq(
    weight: Tensor, bits: int, coefficient: float, dtype: torch.dtype = torch.float32, *, integers: bool
) -> tuple[Tensor, Tensor]:
    """Odd integers (rows, columns) in `dtype`, or their products with the steps; and the steps (rows,)."""
    weight = weight.contiguous()
    (rows, columns), n = weight.shape, 2 ** (bits - 1)
    values, step = torch.empty(rows, columns, dtype=dtype), torch.empty(rows)
    how = np.float32(n), np.float32(coefficient), np.float32(n * (1 - 1e-6)), integers
    run(_statsq, rows, memory(weight), columns, *how, memory(values), memory(step))
    return values, step


def row_dots(values: Tensor, vectors: Tensor, period: int) -> Tensor:
    """Products of rows of values (rows, width), float32 or int8, with vectors (n, width), in turn for `period` rows."""
    (rows, width), out = values.shape, torch.empty(len(values))
    run(_dots, rows, memory(values), memory(vectors.contiguous()), width, period, memory(out))
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
    run(_scaled, rows, memory(sums), width, *map(memory, (correction, scale, step, offset)))
    return sums.view(torch.float32)


def code_shift(a: Activation, dtype: torch.dtype) -> int:
    """What is subtracted from the integers to hold them in `dtype`."""
    return 128 if dtype == torch.int8 and code_range(a.bits, a.positive)[1] > 127 else 0


@cache
def multiplies_int8() -> bool:
    """Whether the processor sums products of int8 exactly and fast (VNNI)."""
    return getattr(torch.cpu, "_is_vnni_supported", bool)()


# --- how they are called


def memory(x: Tensor) -> np.ndarray:
    """A contiguous tensor as one row."""
    return x.numpy().reshape(-1)


def run(loop: Callable[..., None], count: int, *arguments: Any) -> None:
    """loop(start, stop, *arguments) for all of `count`, by as many threads as torch uses."""
    threads = min(torch.get_num_threads(), count)
    if threads < 2:
        return loop(0, count, *arguments)
    edges = [count * i // threads for i in range(threads + 1)]
    calls = [_pool(threads).submit(loop, *part, *arguments) for part in zip(edges[1:-1], edges[2:], strict=True)]
    loop(0, edges[1], *arguments)
    for call in calls:
        call.result()
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, thread_name_prefix="hf_ext_ofq")


os.register_at_fork(after_in_child=_pool.cache_clear)


def _layout(x: Tensor, a: Activation) -> tuple[np.ndarray, tuple[int, int, int], tuple[int, int, int], int]:
    """The memory of x, (n1, n2, width), strides of n0, n1, n2, and n0 n1. An axis beside the tokens is n1 or n0."""
    x = x.detach()
    if x.dim() > 3:
        x = x.flatten(0, -4)
    elif x.dim() == 3:
        x = x.unsqueeze(0 if any(part is not None and part.dim() == 3 for part in a[:3]) else 1)
    else:
        x = x.view(1, 1, -1, x.shape[-1]) if x.is_contiguous() else x.reshape(1, 1, -1, x.shape[-1])
    x = x if x.stride(3) == 1 else x.contiguous()
    n0, *shape = x.shape
    *strides, _ = x.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.as_strided((span,), (1,)).numpy(), tuple(shape), tuple(strides), n0 * shape[0]


def _how(a: Activation, shape: tuple[int, int, int]) -> tuple[Any, ...]:
    """scale, by_channel, shift, low, high for a loop."""
    low, high = code_range(a.bits, a.positive)
    return scales(a, shape), _by_channel(a), _channels(a.bias_in, shape), np.float32(low), np.float32(high)


def _by_channel(a: Activation) -> bool:
    return a.scale.shape[-1] > 1


def scales(a: Activation, shape: tuple[int, int, int]) -> np.ndarray:
    """s' as (n1, n2), or for a scale a channel (n1, width), in one row."""
    n1, n2, width = shape
    scale = a.scale.detach().clamp(min=SMALLEST_SCALE)
    return scale.expand(n1, *((1, width) if _by_channel(a) else (n2, 1))).reshape(-1).numpy()


def _channels(shift: Tensor | None, shape: tuple[int, int, int]) -> np.ndarray:
    n1, _, width = shape
    return (
        np.zeros(n1 * width, np.float32) if shift is None else shift.detach().expand(n1, 1, width).reshape(-1).numpy()
    )
