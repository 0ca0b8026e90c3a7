"""Loops over float32 arrays (numba) that read and write each tensor once, bit-equal to the tensor functions of `ops`.

The arithmetic of a value is written out in the order of `ops`, and the compiler may not change it. Free is only the
order of sums that are exact, that float64 makes exact enough to be rounded alike, or that end in a gradient.

Arrays are flat. A tensor is (n0, n1, n2, width): groups (n0, n1), such as image and head, of n2 rows. A loop does
groups or rows `start` to `stop`. It is made of short loops over one row, since any two arrays might overlap, and a loop
over more than a few arrays is therefore not vectorised.
"""

import platform
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import config, float32, njit
from numba.extending import intrinsic, overload

Array = np.ndarray
Layout = tuple[tuple[int, int, int], tuple[int, int, int]]  # (n1, n2, width), strides of n0, n1, n2
# scale as (n1, n2), or (n1, width) where that is True; bias_in (n1, width); Qn; Qp
Quantizer = tuple[Array, bool, Array, np.float32, np.float32]

ZERO, HALF, ONE, TWO, NAN = (np.float32(value) for value in (0, 0.5, 1, 2, np.nan))
TINY = np.finfo(np.float32).tiny
LARGE = np.float32(2**60)  # far from where products overflow; its inverse, from where remainders underflow

# Not where `fused` would be a call of a function (x86-64 without this instruction), nor where nothing is compiled.
_FUSES = not config.DISABLE_JIT and (
    platform.machine().lower() not in ("x86_64", "amd64") or get_host_cpu_features().get("fma", False)
)


def _can_keep() -> bool:
    """Whether numba may write compiled code to this folder or the user's; where not, it refuses to be asked."""
    try:
        njit(cache=True)(lambda: None)
    except RuntimeError:
        return False
    return True


_KEEP = _can_keep()
compiled = njit(nogil=True, cache=_KEEP, error_model="numpy")  # Python's error model tests every divisor


@njit(nogil=True, cache=_KEEP, fastmath={"reassoc", "nsz"})
def added(total, term) -> Any:
    """A sum whose order is free."""
    return total + term


@compiled
def summed(terms) -> np.float32:
    total = ZERO
    for c in range(terms.size):
        total = added(total, terms[c])
    return total


@compiled
def clamped(v, low, high) -> np.float32:
    v = low if v < low else v  # NaN stays
    return high if v > high else v


@intrinsic
def fused(typing, a, b, c) -> Any:
    """a b + c, rounded once."""
    return a(a, a, a), lambda context, builder, signature, values: builder.fma(*values)


def stored(value: np.float32, row: Array) -> np.float32 | np.int32:
    """What to write into `row`, float32 or int32, so that its memory read as float32 has the value."""
    return value.view(row.dtype)


@overload(stored)
def _(value, row) -> Callable[..., Any]:
    if row.dtype == float32:
        return lambda value, row: value
    return lambda value, row: np.float32(value).view(np.int32)


# --- LSQ


@compiled
def _divide(x, shift, scale, v) -> None:
    for c in range(x.size):
        v[c] = (x[c] + shift[c]) / scale[c]


@compiled
def _round(v, low, high, minus, values) -> np.float32:
    total = ZERO
    for c in range(v.size):
        q = np.rint(clamped(v[c], low, high))
        total = added(total, q)
        values[c] = q - minus
    return total


@compiled
def _mark(v, marks) -> None:
    for c in range(v.size):
        marks[c] = marks[c] if v[c] == v[c] else NAN


@compiled
def quantize(
    start: int,
    stop: int,
    x: Array,
    layout: Layout,
    how: Quantizer,
    minus: np.float32,
    values: Array,
    marks: Array,
    sums: Array,
) -> None:
    """values, float32 or int8: the integers less `minus`. sums: of the integers of a row.

    marks: the scale of each row, or of each channel of each group; NaN where a value is NaN, which int8 cannot hold.
    """
    (n1, n2, width), (s0, s1, s2) = layout
    scale, by_channel, shift, low, high = how
    same, v = np.empty(width, np.float32), np.empty(width, np.float32)
    for group in range(start, stop):
        i = group % n1
        o, channels = group // n1 * s0 + i * s1, slice(i * width, (i + 1) * width)
        s, b, own = same, shift[channels], same
        if by_channel:
            s, own = scale[channels], marks[group * width : (group + 1) * width]
            own[:] = s
        for t in range(n2):
            r = group * n2 + t
            if not by_channel:
                same[:] = scale[i * n2 + t]
            _divide(x[o : o + width], b, s, v)
            sums[r] = _round(v, low, high, minus, values[r * width : (r + 1) * width])
            if by_channel:
                _mark(v, own)
            else:
                marks[r] = scale[i * n2 + t] + (sums[r] - sums[r])
            o += s2


@compiled
def _rescale(v, low, high, scale, offset, out) -> None:
    for c in range(v.size):
        out[c] = np.rint(clamped(v[c], low, high)) * scale[c] + offset[c]


@compiled
def dequantize(start: int, stop: int, x: Array, layout: Layout, how: Quantizer, offset: Array, out: Array) -> None:
    """out: the integers times the scale, plus offset (n1, width)."""
    (n1, n2, width), (s0, s1, s2) = layout
    scale, by_channel, shift, low, high = how
    same, v = np.empty(width, np.float32), np.empty(width, np.float32)
    for group in range(start, stop):
        i = group % n1
        o, channels = group // n1 * s0 + i * s1, slice(i * width, (i + 1) * width)
        s, b, b_out = scale[channels] if by_channel else same, shift[channels], offset[channels]
        for t in range(n2):
            r = group * n2 + t
            if not by_channel:
                same[:] = scale[i * n2 + t]
            _divide(x[o : o + width], b, s, v)
            _rescale(v, low, high, s, b_out, out[r * width : (r + 1) * width])
            o += s2


@compiled
def _mask(v, low, high, gain, g, terms) -> None:
    for c in range(v.size):
        d, inside = g[c] * gain, (v[c] >= low) & (v[c] <= high)
        terms[c] = d * (np.rint(clamped(v[c], low, high)) - (v[c] if inside else ZERO))
        g[c] = d if inside else ZERO


@compiled
def _accumulate(total, gain, terms) -> None:
    for c in range(terms.size):
        total[c] += terms[c] * gain


@compiled
def gradient(
    start: int,
    stop: int,
    x: Array,
    layout: Layout,
    how: Quantizer,
    gain: np.float32,
    g: Array,
    by_scale: Array,
    to_in: Array,
    to_out: Array,
) -> None:
    """g = dL/dx^ / gain becomes dL/dx.

    by_scale: what each row, or each channel of each group, adds to dL/dscale without its factor; to_in and to_out
    (n0, n1, width): what each group adds to the gradients of the shifts.
    """
    (n1, n2, width), (s0, s1, s2) = layout
    scale, by_channel, shift, low, high = how
    same, v, terms = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(width, np.float32)
    for group in range(start, stop):
        i = group % n1
        o, channels = group // n1 * s0 + i * s1, slice(i * width, (i + 1) * width)
        own = slice(group * width, (group + 1) * width)
        s, b, sum_in, sum_out = scale[channels] if by_channel else same, shift[channels], to_in[own], to_out[own]
        for t in range(n2):
            r = group * n2 + t
            d = g[r * width : (r + 1) * width]
            if not by_channel:
                same[:] = scale[i * n2 + t]
            _divide(x[o : o + width], b, s, v)
            _accumulate(sum_out, gain, d)
            _mask(v, low, high, gain, d, terms)
            _accumulate(sum_in, ONE, d)
            if by_channel:
                _accumulate(by_scale[own], ONE, terms)
            else:
                by_scale[r] = summed(terms)
            o += s2


# --- StatsQ: n = 2^(bits - 1)


@compiled
def _scale_of(row, coefficient) -> np.float32:
    total = 0.0
    for c in range(row.size):
        total = added(total, np.float64(abs(row[c])))
    s = np.float32(total) / np.float32(row.size) * coefficient
    return s + (s - s)  # inf becomes NaN


@compiled
def _divisor(s, n) -> np.float32:
    s = s / n
    return TINY if s < TINY else s


@compiled
def _position(w, divisor, n, high) -> np.float32:
    return clamped(w / divisor, -n, high) - HALF


@compiled
def _levels(row, divisor, n, high, gap, new) -> None:
    for c in range(row.size):
        new[c] = (np.rint(_position(row[c], divisor, n, high)) + HALF) * gap


@compiled
def _levels_by_product(row, divisor, n, high, gap, new) -> None:
    """The same without divisions: the quotient is that of a division wherever a level depends on its last bit.

    That is next to the integers up to n, and to -2^-25: test_ofq_levels.py goes through all divisors there.
    """
    inverse = ONE / divisor
    for c in range(row.size):
        v = row[c] * inverse
        v = fused(fused(-divisor, v, row[c]), inverse, v)
        new[c] = fused(np.rint(clamped(v, -n, high) - HALF), gap, HALF * gap)


@compiled
def statsq(
    start: int,
    stop: int,
    w: Array,
    columns: int,
    n: np.float32,
    coefficient: np.float32,
    high: np.float32,
    integers: bool,
    out: Array,
    step: Array,
) -> None:
    """out: odd integers 2c + 1, float32 or int8, or their products with the steps s / 2n."""
    in_range = _FUSES and columns * n < coefficient * LARGE  # no |w| exceeds the row's sum
    for r in range(start, stop):
        row, new = w[r * columns : (r + 1) * columns], out[r * columns : (r + 1) * columns]
        s = _scale_of(row, coefficient)
        step[r] = s / (TWO * n)
        divisor, gap = _divisor(s, n), TWO if integers else TWO * step[r]
        if in_range and ONE / LARGE < divisor < LARGE:
            _levels_by_product(row, divisor, n, high, gap, new)
        else:
            _levels(row, divisor, n, high, gap, new)


@compiled
def near_threshold(
    start: int,
    stop: int,
    w: Array,
    columns: int,
    n: np.float32,
    coefficient: np.float32,
    high: np.float32,
    reach: np.float32,
    out: Array,
) -> None:
    """out: whether t lies within `reach` of a rounding threshold."""
    for r in range(start, stop):
        row, new = w[r * columns : (r + 1) * columns], out[r * columns : (r + 1) * columns]
        s = _scale_of(row, coefficient)
        divisor, within = _divisor(s, n), reach if s > ZERO else -ONE
        for c in range(columns):
            t = _position(row[c], divisor, n, high)
            new[c] = abs(t - (clamped(np.floor(t), -n, n - TWO) + HALF)) <= within


# --- products


@compiled
def dots(start: int, stop: int, values: Array, vectors: Array, width: int, period: int, out: Array) -> None:
    """Products of rows of values, float32 or int8, with vectors (n, width), in turn for `period` rows."""
    for r in range(start, stop):
        i = r // period % (vectors.size // width)
        row, vector = values[r * width : (r + 1) * width], vectors[i * width : (i + 1) * width]
        total = 0.0
        for c in range(width):
            total = added(total, np.float64(np.float32(row[c]) * vector[c]))
        out[r] = total


@compiled
def scale_sums(
    start: int,
    stop: int,
    sums: Array,
    width: int,
    correction: Array,
    scale: Array,
    step: Array,
    offset: Array,
) -> None:
    """sums, float32 or int32, become (sums + correction) * scale[row] * step + offset, float32 in the same memory."""
    for r in range(start, stop):
        row, s = sums[r * width : (r + 1) * width], scale[r]
        for c in range(width):
            row[c] = stored((np.float32(row[c]) + correction[c]) * s * step[c] + offset[c], row)
