"""The attention of `attention_ops` for what the kernels accept: integer products, and a few images at a time, so that
their probabilities stay in the cache.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hf_ext.ofq_quantizer import kernels
from hf_ext.ofq_quantizer.kernels import Activation, code_range, memory, run, span
from hf_ext.ofq_quantizer.loops import ZERO, Array, added, clamped, compiled, stored, summed

# Entries of the probabilities of a few images.
_CHUNK = 2**18
# Below so many multiplications a head, the calls of an int8 product cost more than they save.
_WORTH_INT8 = 2**18

# --- loops, as in `loops`; sums are float32 or int32


@compiled
def _shifted(row, s, c, key_scale) -> None:
    for m in range(row.size):
        row[m] = stored((np.float32(row[m]) * s + c[m]) * key_scale[m], row)


@compiled
def _biased(row, s, c, key_scale, bias) -> None:
    for m in range(row.size):
        row[m] = stored((np.float32(row[m]) * s + c[m]) * key_scale[m] + bias[m], row)


@compiled
def _logits(
    start: int,
    stop: int,
    sums: Array,
    shape: tuple[int, int, int, int],
    query_scale: Array,
    offset: Array,
    key_scale: Array,
    bias: Array,
    strides: tuple[int, int, int],
) -> None:
    """sums (images, heads, n, m) become (sums * s_q + c) * s_k + bias in the same memory; an empty bias is none.

    query_scale (images, `left` heads, n), offset c and key_scale (images, heads, m); strides of the bias.
    """
    heads, left, n, m = shape
    for group in range(start, stop):
        image, head = group // heads, group % heads
        c, key = offset[group * m : (group + 1) * m], key_scale[group * m : (group + 1) * m]
        q, o = (image * left + head % left) * n, image * strides[0] + head * strides[1]
        for t in range(n):
            row = sums[(group * n + t) * m : (group * n + t + 1) * m]
            if bias.size:
                _biased(row, query_scale[q + t], c, key, bias[o : o + m])
            else:
                _shifted(row, query_scale[q + t], c, key)
            o += strides[2]


@compiled
def _output(row, correction, scale, shift, total, probs_scale, out) -> None:
    for c in range(row.size):
        out[c] = ((np.float32(row[c]) + correction[c]) * scale[c] + shift[c] * total) * probs_scale


@compiled
def _outputs(
    start: int,
    stop: int,
    sums: Array,
    shape: tuple[int, int, int],
    correction: Array,
    scale: Array,
    shift: Array,
    totals: Array,
    probs_scale: Array,
    out: Array,
) -> None:
    """out (images, n, heads, width) from sums (images, heads, n, width).

    correction and scale (images, heads, width), shift (heads, width), totals and probs_scale (images, heads, n).
    """
    heads, n, width = shape
    for group in range(start, stop):
        image, head = group // heads, group % heads
        own, b = slice(group * width, (group + 1) * width), shift[head * width : (head + 1) * width]
        c, s, o = correction[own], scale[own], (image * n * heads + head) * width
        for r in range(group * n, (group + 1) * n):
            row = sums[r * width : (r + 1) * width]
            _output(row, c, s, b, totals[r], probs_scale[r], out[o : o + width])
            o += heads * width


@compiled
def _divide(p, scale, v) -> None:
    for m in range(p.size):
        v[m] = p[m] / scale


@compiled
def _mask(v, high, scale, g, terms) -> None:
    for m in range(v.size):
        inside, q = (v[m] >= ZERO) & (v[m] <= high), np.rint(clamped(v[m], ZERO, high))
        terms[m] = g[m] * (q - (v[m] if inside else ZERO))
        g[m] = g[m] if inside else ZERO
        v[m] = q * scale


@compiled
def _dot(a, b) -> np.float32:
    total = ZERO
    for m in range(a.size):
        total = added(total, a[m] * b[m])
    return total


@compiled
def _finish(p, dot, v, g) -> None:
    for m in range(p.size):
        g[m] = p[m] * (g[m] - dot)
        p[m] = v[m]


@compiled
def _softmax_gradient(
    start: int, stop: int, p: Array, g: Array, m: int, scale: Array, high: np.float32, by_scale: Array
) -> None:
    """The probabilities p (rows, m) become p^, g = dL/dp^ becomes dL/dlogits.

    by_scale: what a row adds to dL/dscale without its factor. scale: for so many rows, and again.
    """
    v, terms = np.empty(m, np.float32), np.empty(m, np.float32)
    for r in range(start, stop):
        row, d, s = p[r * m : (r + 1) * m], g[r * m : (r + 1) * m], scale[r % scale.size]
        _divide(row, s, v)
        _mask(v, high, s, d, terms)
        by_scale[r] = summed(terms)
        _finish(row, _dot(row, d), v, d)


# --- what they do for `attention_ops`


def forward(q: Tensor, k: Tensor, v: Tensor, a: tuple[Activation, ...], scaling: float, bias: Tensor | None) -> Tensor:
    """(B, N, h*d); `a`: how q, k, v and the probabilities are quantised."""
    aq, ak, av, ap = a
    (batch, heads, m, width), n = v.shape, q.shape[2]
    dtype = _dtype(n * m * width)
    logits, values = _Logits(q, k, aq, ak, scaling, bias), kernels.quantized(v, _by_channel(av, v), dtype)
    codes, scale = values.values.view(v.shape), values.scale.view(batch, heads, width)
    shift = torch.zeros(heads * width) if av.bias_out is None else av.bias_out.detach().expand(heads, 1, width)
    code_shift, out = kernels.code_shift(ap, dtype), torch.empty(batch, n, heads * width)
    for images in logits.chunks():
        probs = kernels.quantized(logits(images).softmax(-1), ap, dtype)
        sums = _product(probs.values.view(-1, heads, n, m), codes[images].transpose(-2, -1))
        correction = codes[images].sum(-2, dtype=torch.float32) * code_shift
        parts = map(memory, (correction, scale[images], shift, probs.sums, probs.scale, out[images]))
        run(_outputs, len(sums) * heads, memory(sums), (heads, n, width), *parts)
    return out


def backward(
    g: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: tuple[Activation, ...],
    scaling: float,
    bias: Tensor | None,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """dL/d (q^, k^, v^), the first two without the factor `scaling`; and of the probabilities' scale, and of the bias.

    That of the scale still has to be summed to its shape, and lacks its factor.
    """
    aq, ak, av, ap = a
    heads, n, m = v.shape[1], q.shape[2], k.shape[2]
    logits = _Logits(q, k, aq, ak, scaling, bias)
    left, right, values = kernels.dequantized(q, aq), kernels.dequantized(k, ak), kernels.dequantized(v, av)
    dq, dk, dv = torch.empty_like(left), torch.empty_like(right), torch.empty_like(values)
    by_scale, dbias = torch.empty(len(q), heads, n, 1), torch.zeros(bias.shape) if needs_bias else None
    scale, high = kernels.scales(ap, (heads, n, m)), np.float32(code_range(ap.bits, ap.positive)[1])
    for images in logits.chunks():
        d = g[images].unflatten(2, (heads, -1)).transpose(1, 2).contiguous()
        p, dl = logits(images).softmax(-1), d @ values[images].transpose(-2, -1)
        run(_softmax_gradient, p.numel() // m, memory(p), memory(dl), m, scale, high, memory(by_scale[images]))
        torch.matmul(p.transpose(-2, -1), d, out=dv[images])
        torch.matmul(dl.transpose(-2, -1), left[images], out=dk[images])
        if q.shape[1] == heads:
            torch.matmul(dl, right[images], out=dq[images])
        else:
            torch.sum(dl @ right[images], 1, keepdim=True, out=dq[images])
        if needs_bias:
            part = dbias[images] if dbias.dim() == 4 and len(dbias) > 1 else dbias
            part += dl.sum_to_size(part.shape)
    return dq, dk, dv, by_scale, dbias


class _Logits:
    """`logits(images)`: those of some images, (B, h, N, M), computed when they are asked for."""

    def __init__(
        self, q: Tensor, k: Tensor, aq: Activation, ak: Activation, scaling: float, bias: Tensor | None
    ) -> None:
        (batch, heads, m, width), (_, left, n, _) = k.shape, q.shape
        dtype = _dtype(n * m * width)
        query, key = kernels.quantized(q, aq, dtype), kernels.quantized(k, ak, dtype)
        self.q, self.k = query.values.view(q.shape), key.values.view(k.shape)
        self.query_scale = query.scale.view(batch, left * n)
        self.key_scale = (key.scale * scaling).view(batch, heads * m)
        self.c = torch.zeros(batch, heads * m)
        if aq.bias_out is not None:
            vectors = aq.bias_out.detach().reshape(-1, width)
            self.c = kernels.row_dots(key.values, vectors, m).view(batch, heads * m)
        self.bias = None if bias is None else bias.expand(batch, heads, n, m)

    def __call__(self, images: slice) -> Tensor:
        (heads, m), (left, n) = self.k.shape[1:3], self.q.shape[1:3]
        sums = _product(self.q[images], self.k[images])
        flat, strides = (np.zeros(0, np.float32), (0,) * 4) if self.bias is None else span(self.bias[images])
        parts = map(memory, (self.query_scale[images], self.c[images], self.key_scale[images]))
        run(_logits, len(sums) * heads, memory(sums), (heads, left, n, m), *parts, flat, strides[:3])
        return sums.view(torch.float32)

    def chunks(self) -> Iterator[slice]:
        """The images, a few at a time."""
        (batch, heads, m, _), n = self.k.shape, self.q.shape[2]
        step = max(1, _CHUNK // max(1, heads * n * m))
        for start in range(0, batch, step):
            yield slice(start, min(start + step, batch))


def _by_channel(a: Activation, x: Tensor) -> Activation:
    """`a` with a scale of each channel of x (B, h, N, d)."""
    return a._replace(scale=a.scale.expand(x.shape[1], 1, x.shape[3]))


def _dtype(multiplications: int) -> torch.dtype:
    return torch.int8 if kernels.multiplies_int8() and multiplications >= _WORTH_INT8 else torch.float32


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left (B, h or 1, N, in) right (B, h, M, in)^T of integers: float32 as they are, int8 as int32."""
    if left.dtype == torch.float32:
        return left @ right.transpose(-2, -1)
    (batch, heads, m, _), n = right.shape, left.shape[2]
    out = torch.empty(batch, heads, n, m, dtype=torch.int32)
    lefts, rights = left.expand(-1, heads, -1, -1).flatten(0, 1), right.transpose(-2, -1).flatten(0, 1)
    for operands in zip(lefts, rights, out.flatten(0, 1), strict=True):
        torch._int_mm(*operands[:2], out=operands[2])
    return out
