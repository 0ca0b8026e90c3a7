"""The attention of `attention_ops` for float32 on a CPU: a few images at a time, so that their probabilities stay in the
cache, and with integer products.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hf_ext.ofq_quantizer import kernels
from hf_ext.ofq_quantizer.kernels import Activation, _add, _compiled, _rounded, _stored, _sum, memory, run

# Entries of the probabilities of a few images.
_CHUNK = 2**18
# Below so many multiplications a call of the int8 product costs more than it saves.
_WORTH_INT8 = 2**19


@_compiled
def _shifted(row, s, c, key_scale) -> None:
    for m in range(row.size):
        row[m] = _stored((np.float32(row[m]) * s + c[m]) * key_scale[m], row)


@_compiled
def _biased(row, s, c, key_scale, bias) -> None:
    for m in range(row.size):
        row[m] = _stored((np.float32(row[m]) * s + c[m]) * key_scale[m] + bias[m], row)


@_compiled
def _logits(start, stop, sums, shape, query_scale, offset, key_scale, bias, has_bias, strides) -> None:
    """sums (images, heads, n, m) become (sums * s_q + c) * s_k + bias; the queries have `left` heads."""
    heads, left, n, m = shape
    for group in range(start, stop):
        image, head = group // heads, group % heads
        c, key = offset[group * m : (group + 1) * m], key_scale[group * m : (group + 1) * m]
        q, o = (image * left + head % left) * n, image * strides[0] + head * strides[1]
        for t in range(n):
            row = sums[(group * n + t) * m : (group * n + t + 1) * m]
            if has_bias:
                _biased(row, query_scale[q + t], c, key, bias[o : o + m])
            else:
                _shifted(row, query_scale[q + t], c, key)
            o += strides[2]


@_compiled
def _output(row, correction, scale, shift, total, probs_scale, out) -> None:
    for c in range(row.size):
        out[c] = ((np.float32(row[c]) + correction[c]) * scale[c] + shift[c] * total) * probs_scale


@_compiled
def _outputs(start, stop, sums, shape, correction, scale, shift, totals, probs_scale, out) -> None:
    """out (images, n, heads, width) from sums (images, heads, n, width)."""
    heads, n, width = shape
    for group in range(start, stop):
        image, head = group // heads, group % heads
        own, b = slice(group * width, (group + 1) * width), shift[head * width : (head + 1) * width]
        c, s, o = correction[own], scale[own], (image * n * heads + head) * width
        for r in range(group * n, (group + 1) * n):
            row = sums[r * width : (r + 1) * width]
            _output(row, c, s, b, totals[r], probs_scale[r], out[o : o + width])
            o += heads * width


@_compiled
def _ratios(p: np.ndarray, scale: np.float32, v: np.ndarray) -> None:
    for m in range(p.size):
        v[m] = p[m] / scale


@_compiled
def _mask(v: np.ndarray, high: np.float32, scale: np.float32, g: np.ndarray, terms: np.ndarray) -> None:
    for m in range(v.size):
        inside, q = (v[m] >= _ZERO) & (v[m] <= high), _rounded(v[m], _ZERO, high)
        terms[m] = g[m] * (q - (v[m] if inside else _ZERO))
        g[m] = g[m] if inside else _ZERO
        v[m] = q * scale


@_compiled
def _dot(a: np.ndarray, b: np.ndarray) -> np.float32:
    total = _ZERO
    for m in range(a.size):
        total = _add(total, a[m] * b[m])
    return total


@_compiled
def _finish(p: np.ndarray, dot: np.float32, v: np.ndarray, g: np.ndarray) -> None:
    for m in range(p.size):
        g[m] = p[m] * (g[m] - dot)
        p[m] = v[m]


_ZERO = np.float32(0)


@_compiled
def _softmax_gradient(start, stop, p, g, m, scale, high, by_scale) -> None:
    """The probabilities p become p^, g = dL/dp^ becomes dL/dlogits; by_scale: a row's part of dL/dscale."""
    v, terms = np.empty(m, np.float32), np.empty(m, np.float32)
    for r in range(start, stop):
        row, d, s = p[r * m : (r + 1) * m], g[r * m : (r + 1) * m], scale[r % scale.size]
        _ratios(row, s, v)
        _mask(v, high, s, d, terms)
        by_scale[r] = _sum(terms)
        _finish(row, _dot(row, d), v, d)


def forward(q: Tensor, k: Tensor, v: Tensor, a: tuple[Activation, ...], scaling: float, bias: Tensor | None) -> Tensor:
    """(B, N, h*d); a: how q, k, v and the probabilities are quantised."""
    aq, ak, av, ap = a
    (_, heads, _, width), n = v.shape, q.shape[2]
    out = torch.empty(len(q), n, heads * width)
    logits = _Logits(q, k, aq, ak, scaling, bias)
    dtype = _dtype(n * v.shape[2] * width)
    values = kernels.quantized(v, av._replace(scale=av.scale.expand(heads, 1, width)), dtype)
    codes = values.values.view(v.shape)
    shift = (
        torch.zeros(heads * width) if av.bias_out is None else av.bias_out.detach().expand(heads, 1, width).reshape(-1)
    )
    for images in _chunks(logits):
        probs = kernels.quantized(logits(images).softmax(-1), ap, dtype)
        sums = _product(probs.values.view(-1, heads, n, v.shape[2]), codes[images].transpose(-2, -1))
        code_shift = kernels.code_shift(ap, dtype)
        correction = (
            codes[images].sum(-2, dtype=torch.float32) * code_shift if code_shift else torch.zeros(sums.numel() // n)
        )
        scale = values.scale.view(-1, heads, width)[images]
        rest = map(memory, (correction, scale, shift, probs.sums, probs.scale, out[images]))
        run(
            _outputs,
            len(sums) * heads,
            memory(sums),
            (heads, n, width),
            *rest,
        )
    return out


def backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, a: tuple[Activation, ...], scaling: float, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """dL/d (q^, k^, v^), the first two without the factor `scaling`; of the probabilities' scale, a row; of the bias."""
    aq, ak, av, ap = a
    heads, n = v.shape[1], q.shape[2]
    logits = _Logits(q, k, aq, ak, scaling, bias)
    left, right, values = kernels.dequantized(q, aq), kernels.dequantized(k, ak), kernels.dequantized(v, av)
    dq, dk, dv = torch.empty_like(left), torch.empty_like(right), torch.empty_like(values)
    dbias = None if bias is None else torch.zeros(bias.shape)
    shape = heads, n, k.shape[2]
    scale, high = kernels.scales(ap, shape), np.float32(2**ap.bits - 1)
    by_scale = torch.empty(len(q), heads, n, 1)
    for images in _chunks(logits):
        d = g[images].unflatten(2, (heads, -1)).transpose(1, 2).contiguous()
        p, dl = logits(images).softmax(-1), d @ values[images].transpose(-2, -1)
        run(
            _softmax_gradient,
            p.numel() // shape[2],
            memory(p),
            memory(dl),
            shape[2],
            scale,
            high,
            memory(by_scale[images]),
        )
        torch.matmul(p.transpose(-2, -1), d, out=dv[images])
        torch.matmul(dl.transpose(-2, -1), left[images], out=dk[images])
        if q.shape[1] == heads:
            torch.matmul(dl, right[images], out=dq[images])
        else:
            torch.sum(dl @ right[images], 1, keepdim=True, out=dq[images])
        if dbias is not None:
            part = dbias[images] if bias.dim() == 4 and len(bias) > 1 else dbias
            part += dl.sum_to_size(part.shape)
    return dq, dk, dv, by_scale, dbias


class _Logits:
    """`logits(images)`: those of some images, computed when they are asked for."""

    def __init__(
        self, q: Tensor, k: Tensor, aq: Activation, ak: Activation, scaling: float, bias: Tensor | None
    ) -> None:
        (images, heads, m, width), (_, left, n, _) = k.shape, q.shape
        dtype = _dtype(n * m * width)
        self.query, self.key = kernels.quantized(q, aq, dtype), kernels.quantized(k, ak, dtype)
        self.shape, self.images = (heads, left, n, m), images
        self.q, self.k = self.query.values.view(q.shape), self.key.values.view(k.shape)
        self.query_scale = self.query.scale.view(images, left * n)
        self.key_scale = (self.key.scale * scaling).view(images, heads * m)
        if aq.bias_out is None:
            self.c = torch.zeros(images, heads * m)
        else:
            self.c = kernels.row_dots(self.key.values, aq.bias_out.detach().reshape(-1, width), m).view(
                images, heads * m
            )
        self.bias = None
        if bias is not None:
            bias = bias.detach()
            if bias.stride(-1) != 1 or bias.shape[-1] != m:
                bias = bias.expand(*bias.shape[:-1], m).contiguous()
            self.bias = bias.expand(images, heads, n, m)

    def __call__(self, images: slice) -> Tensor:
        heads = self.shape[0]
        sums = _product(self.q[images], self.k[images])
        flat, strides = self.query_scale.numpy().reshape(-1)[:0], (0, 0, 0)
        if self.bias is not None:
            bias = self.bias[images]
            *strides, _ = bias.stride()
            span = 1 + sum((size - 1) * stride for size, stride in zip(bias.shape, bias.stride(), strict=True))
            flat = bias.as_strided((span,), (1,)).numpy()
        parts = map(memory, (self.query_scale[images], self.c[images], self.key_scale[images]))
        run(
            _logits,
            len(sums) * heads,
            memory(sums),
            self.shape,
            *parts,
            flat,
            self.bias is not None,
            tuple(strides),
        )
        return sums.view(torch.float32)


def _dtype(multiplications: int) -> torch.dtype:
    return torch.int8 if kernels.multiplies_int8() and multiplications >= _WORTH_INT8 else torch.float32


def _chunks(logits: _Logits) -> Iterator[slice]:
    heads, _, n, m = logits.shape
    step = max(1, _CHUNK // max(1, heads * n * m))
    for start in range(0, logits.images, step):
        yield slice(start, min(start + step, logits.images))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left (B, h or 1, N, in) right (B, h, M, in)^T of integers: float32 as they are, int8 as int32."""
    if left.dtype == torch.float32:
        return left @ right.transpose(-2, -1)
    (images, heads, m, _), n = right.shape, left.shape[2]
    out = torch.empty(images, heads, n, m, dtype=torch.int32)
    lefts, rights = left.expand(-1, heads, -1, -1).flatten(0, 1), right.transpose(-2, -1).flatten(0, 1)
    for operands in zip(lefts, rights, out.flatten(0, 1), strict=True):
        torch._int_mm(*operands[:2], out=operands[2])
    return out
