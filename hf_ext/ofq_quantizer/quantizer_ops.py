"""The quantisers of OFQ (arXiv 2302.02210) as tensor functions.

`reference` defines them; the functions here are held to it. All arithmetic is float32, whatever the dtype of the model
or autocast; results are cast back. No function can be differentiated twice.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from hf_ext.ofq_quantizer import kernels
from hf_ext.ofq_quantizer.kernels import SMALLEST_SCALE, Activation, code_range

# --- StatsQ


def statsq(weight: Tensor, bits: int, coefficient: float = 2.0) -> Tensor:
    """StatsQ: (rows, columns) -> the same, one of 2^bits levels a row; the gradient is the identity."""
    return _StatsQ.apply(weight, bits, coefficient)


def statsq_codes(weight: Tensor, bits: int, coefficient: float = 2.0) -> tuple[Tensor, Tensor]:
    """int8 codes in [-n, n - 1] (rows, columns), n = 2^(bits - 1), and s (rows,): Wq = (codes + 0.5) / n * s.

    A row with NaN or inf has the scale NaN, and codes without meaning.
    """
    odd, step = odd_codes(weight, bits, coefficient)
    return ((odd - 1) / 2).nan_to_num(0.0).to(torch.int8), step * 2**bits


def odd_codes(weight: Tensor, bits: int, coefficient: float = 2.0) -> tuple[Tensor, Tensor]:
    """Odd integers 2c + 1 (rows, columns) as float32, and s / 2n (rows,): Wq is their product."""
    weight = weight.detach()
    if kernels.accept(weight):
        return kernels.statsq(weight, bits, coefficient, integers=True)
    position, scale = _positions(weight, bits, coefficient)
    return position.round() * 2 + 1, scale[:, 0] / 2**bits


def low_confidence(weight: Tensor, bits: int, boundary_range: float = 0.005, coefficient: float = 2.0) -> Tensor:
    """Where a weight lies within `boundary_range` quantisation steps of a rounding threshold.

    bool (rows, columns); False in rows of zeros, and in rows with NaN or inf.
    """
    weight = weight.detach()
    if kernels.accept(weight):
        return kernels.near_threshold(weight, bits, coefficient, boundary_range)
    n = 2 ** (bits - 1)
    position, scale = _positions(weight, bits, coefficient)
    near = position - (position.floor().clamp(-n, n - 2) + 0.5)
    return (near.abs() <= boundary_range) & (scale > 0)


def mask_gradient(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight`; its gradient is 0 where `mask` is False."""
    return _MaskGradient.apply(weight, mask)


def row_sum(x: Tensor) -> Tensor:
    """(..., n) -> (..., 1). On a CPU in float64, rounded once: kernels and tensor functions then have the same sum."""
    return x.sum(-1, keepdim=True, dtype=torch.float64 if x.device.type == "cpu" else None).float()


def _positions(weight: Tensor, bits: int, coefficient: float) -> tuple[Tensor, Tensor]:
    """t, clamped, of every weight, and s (rows, 1). n goes to the divisor, where the division takes it for nothing."""
    n, w = 2 ** (bits - 1), weight.float()
    scale = row_sum(w.abs()) / w.shape[1] * coefficient
    scale = scale + (scale - scale)  # inf becomes NaN
    return (w / (scale / n).clamp(min=torch.finfo(torch.float32).tiny)).clamp(-n, n * (1 - 1e-6)) - 0.5, scale


class _StatsQ(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, coefficient: float) -> Tensor:
        if kernels.accept(weight):
            return kernels.statsq(weight, bits, coefficient, integers=False)[0]
        if kernels.accept_compiled(weight):
            return kernels.compiled_statsq(weight, bits, coefficient)
        odd, step = odd_codes(weight, bits, coefficient)
        return (odd * step[:, None]).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return g, None, None


class _MaskGradient(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return torch.where(ctx.saved_tensors[0], g, 0), None


# --- LSQ


def lsq(x: Tensor, scale: Tensor, bits: int, positive: bool = False, axis: int | None = -2) -> Tensor:
    """LSQ with one learnable scale for each index of `axis` (None: one in all); x of any shape, scale (S,).

    The scale's gradient has the published factor 1 / sqrt(Qp numel(x) / S), which depends on the batch size.
    """
    return quantize_activation(x, Activation(_along(scale, x, axis), None, None, bits, positive))


def lsq_init(x: Tensor, bits: int, positive: bool = False, axis: int | None = -2) -> Tensor:
    """The scale (S,) with which LSQ starts: a mean|x| / sqrt(Qp), a = 2 signed, 4 unsigned; NaN if x is empty."""
    magnitude = x.detach().float().abs()
    others = [dim for dim in range(x.dim()) if axis is None or dim != axis % x.dim()]
    mean = magnitude.mean(others).reshape(-1) if others else magnitude
    return mean * ((4 if positive else 2) / code_range(bits, positive)[1] ** 0.5)


def lsq_codes(x: Tensor, scale: Tensor, bits: int, positive: bool) -> Tensor:
    """round(clamp(x / max(scale, 1e-5), Qn, Qp)) as float32; the scale broadcasts against x."""
    return integers(x.detach(), Activation(scale.detach(), None, None, bits, positive))


def quantize_activation(x: Tensor, a: Activation) -> Tensor:
    """LSQ(x + bias_in) + bias_out in x's shape and dtype; differentiable in x, the scale and the shifts.

    The scale's gradient has the published factor 1 / sqrt(Qp numel(x) / numel(scale)): it depends on the batch size.
    """
    return _Quantize.apply(x, a.scale, a.bias_in, a.bias_out, a.bits, a.positive)


def integers(x: Tensor, a: Activation) -> Tensor:
    """round(clamp((x + bias_in) / scale, Qn, Qp)) as float32."""
    if kernels.accept_activation(x, a):
        return kernels.quantized(x, a).values.view(x.shape)
    return ratio(x, a).clamp(*code_range(a.bits, a.positive)).round()


def dequantized(x: Tensor, a: Activation) -> Tensor:
    """What `a` makes of x, float32."""
    if kernels.accept_activation(x, a):
        return kernels.dequantized(x, a)
    y = integers(x, a) * bounded(a.scale)
    return y if a.bias_out is None else y + a.bias_out.float()


def activation_gradients(x: Tensor, a: Activation, g: Tensor, gain: float = 1.0) -> tuple[Tensor | None, ...]:
    """dL/d (x, scale, bias_in, bias_out), where g gain = dL/dx^ with g of x's shape; g may be overwritten."""
    low, high = code_range(a.bits, a.positive)
    if kernels.accept_activation(x, a) and kernels.accept(g):
        dx, ds, sum_in, sum_out = kernels.gradients(x, a, g.contiguous(), gain)
    else:
        v, g = ratio(x, a), g.float() * gain
        inside = (v >= low) & (v <= high)
        ds = g * (v.clamp(low, high).round() - torch.where(inside, v, 0))
        dx, sum_out = torch.where(inside, g, 0), g
        sum_in = dx
    return (
        dx.to(x.dtype),
        scale_gradient(ds, a, x.numel()),
        None if a.bias_in is None else sum_in.sum_to_size(a.bias_in.shape).to(a.bias_in.dtype),
        None if a.bias_out is None else sum_out.sum_to_size(a.bias_out.shape).to(a.bias_out.dtype),
    )


def scale_gradient(terms: Tensor, a: Activation, numel: int) -> Tensor:
    """dL/dscale from sums over parts of the tensor: times g, which depends on the batch size, as published."""
    factor = (code_range(a.bits, a.positive)[1] * max(numel // a.scale.numel(), 1)) ** -0.5
    return (terms.sum_to_size(a.scale.shape) * factor).to(a.scale.dtype)


def bounded(scale: Tensor) -> Tensor:
    """s' = max(s, 1e-5)."""
    return scale.clamp(min=SMALLEST_SCALE)


def _along(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    return scale if axis is None else scale.view(-1, *[1] * (x.dim() - 1 - axis % x.dim()))


def ratio(x: Tensor, a: Activation) -> Tensor:
    """(x + bias_in) / s', which `integers` rounds."""
    x = x.float()
    return (x if a.bias_in is None else x + a.bias_in.float()) / bounded(a.scale)


class _Quantize(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bias_in: Tensor | None, bias_out: Tensor | None, bits: int, positive: bool
    ) -> Tensor:
        ctx.save_for_backward(x, scale, bias_in, bias_out)
        ctx.range = bits, positive
        return dequantized(x, Activation(scale, bias_in, bias_out, bits, positive)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        return *activation_gradients(x, Activation(*rest, *ctx.range), g.clone()), None, None
