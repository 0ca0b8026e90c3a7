"""The quantisers of OFQ (arXiv 2302.02210) and the quantised linear layer as tensor functions.

`reference` defines them; the functions here are held to it. All arithmetic of a quantiser is float32, whatever the
dtype of the model or autocast; results are cast back. A product multiplies the integers and scales afterwards, in one
fixed order of operations, so that training, evaluation and integer arithmetic agree bit for bit. No function can be
differentiated twice.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from hf_ext.ofq_quantizer import kernels
from hf_ext.ofq_quantizer.kernels import SMALLEST_SCALE, Activation, code_range

__all__ = [
    "SMALLEST_SCALE",
    "Activation",
    "WeightQuantizer",
    "code_range",
    "integer_sums_fit",
    "low_confidence",
    "lsq",
    "lsq_codes",
    "lsq_init",
    "mask_gradient",
    "odd_codes",
    "quantize_activation",
    "quantized_linear",
    "quantized_weight",
    "statsq",
    "statsq_codes",
    "weight_integers",
]


class WeightQuantizer(NamedTuple):
    """How a weight is quantised: by StatsQ(bits, coefficient), or by signed LSQ where it has a `scale` (rows,)."""

    bits: int
    coefficient: float
    scale: Tensor | None


def integer_sums_fit(columns: int, left_max: int, right_max: int) -> bool:
    """Whether every sum of `columns` products of integers so large is exact in float32, in any order."""
    return columns * left_max * right_max <= 2**24


# --- StatsQ


def statsq(weight: Tensor, bits: int, coefficient: float = 2.0) -> Tensor:
    """StatsQ (section 3.1): (rows, columns) -> the same, one of 2^bits levels a row; the gradient is the identity."""
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
    """Where a weight lies within `boundary_range` quantisation steps of a rounding threshold (section 3.3)."""
    n = 2 ** (bits - 1)
    position, scale = _positions(weight.detach(), bits, coefficient)
    near = position - (position.floor().clamp(-n, n - 2) + 0.5)
    return (near.abs() <= boundary_range) & (scale > 0)


def mask_gradient(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight`; its gradient is 0 where `mask` is False."""
    return _MaskGradient.apply(weight, mask)


def row_sum(x: Tensor) -> Tensor:
    """(..., n) -> (..., 1). On a CPU in float64, rounded once: kernels and tensor functions then have the same sum."""
    return x.sum(-1, keepdim=True, dtype=torch.float64 if x.device.type == "cpu" else None).float()


def _positions(weight: Tensor, bits: int, coefficient: float) -> tuple[Tensor, Tensor]:
    """t of every weight, and the scales (rows, 1). All but the order of operations is exact in powers of two."""
    n, w = 2 ** (bits - 1), weight.float()
    scale = row_sum(w.abs()) / w.shape[1] * coefficient
    scale = scale + (scale - scale)  # inf becomes NaN
    return (w / (scale / n).clamp(min=1.1754944e-38)).clamp(-n, n * (1 - 1e-6)) - 0.5, scale


class _StatsQ(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, coefficient: float) -> Tensor:
        if kernels.accept(weight):
            return kernels.statsq(weight, bits, coefficient, integers=False)[0]
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
    return _ratio(x, a).clamp(*code_range(a.bits, a.positive)).round()


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
        v, g = _ratio(x, a), g.float() * gain
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
    """s'."""
    return scale.clamp(min=SMALLEST_SCALE)


def _along(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    return scale if axis is None else scale.view(-1, *[1] * (x.dim() - 1 - axis % x.dim()))


def _ratio(x: Tensor, a: Activation) -> Tensor:
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


# --- products


def weight_integers(weight: Tensor, w: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Integers (rows, columns) as float32 and their step (rows,): the quantised weight is their product.

    An int8 weight holds the odd integers of StatsQ already, and `w.scale` is the step.
    """
    if weight.dtype == torch.int8:
        return weight.float(), w.scale
    if w.scale is None:
        return odd_codes(weight, w.bits, w.coefficient)
    return lsq_codes(weight, w.scale[:, None], w.bits, False), bounded(w.scale.detach())


def quantized_weight(weight: Tensor, w: WeightQuantizer) -> Tensor:
    """The weight (rows, ...) as `w` quantises it, in its dtype; StatsQ takes (rows, columns)."""
    if w.scale is None:
        return statsq(weight, w.bits, w.coefficient)
    return lsq(weight, w.scale, w.bits, axis=0)


def quantized_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Activation, w: WeightQuantizer) -> Tensor:
    """x^ Wq^T + bias, with x^ and Wq the quantised x (..., in) and weight (out, in); returns (..., out).

    float32: `((acc * s_x) * step) + (bias + Wq bias_out)`, acc the product of the integers, exact in float32. Under
    autocast, in other dtypes and where acc could exceed 2^24, the product of x^ and Wq in the dtype of nn.Linear.
    Keeps x and weight only, and quantises them again in backward.
    """
    scales = (a.scale, a.bias_in, a.bias_out, w.scale)
    return _Linear.apply(x, weight, bias, *scales, a.bits, a.positive, w.bits, w.coefficient, product_dtype(x))


# Below so many multiplications a call of the int8 product costs more than it saves.
_WORTH_INT8 = 2**22


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which nn.Linear multiplies x."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast and x.dtype != torch.float64 else x.dtype


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    # A compiled backward is traced twice, the second time under the autocast of the forward: the graph must say it.
    needed = torch.is_autocast_enabled(kind) or torch.compiler.is_compiling()
    return torch.autocast(kind, enabled=False) if needed else nullcontext()


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Activation, w: WeightQuantizer, dtype: torch.dtype
) -> Tensor:
    if dtype != torch.float32 or not integer_sums_fit(x.shape[-1], largest(a), _largest(weight, w)):
        bias = bias if bias is None else bias.to(dtype)
        return F.linear(dequantized(x, a).to(dtype), _dequantized_weight(weight, w).to(dtype), bias)
    if kernels.accept_activation(x, a) and kernels.accept(None if weight.dtype == torch.int8 else weight, bias, w.scale):
        worth_int8 = kernels.multiplies_int8() and x.numel() * len(weight) >= _WORTH_INT8
        values, step = narrow_integers(weight, w, torch.int8 if worth_int8 else torch.float32)
        return integer_linear(x, a, values, step, linear_offset(values, step, bias, a))
    odd, step = weight_integers(weight, w)
    y = F.linear(integers(x, a), odd) * bounded(a.scale) * step
    offset = linear_offset(odd, step, bias, a)
    return y if offset is None else y + offset


def narrow_integers(weight: Tensor, w: WeightQuantizer, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`weight_integers` in float32 or int8, for tensors that the kernels accept; a row with NaN has the step NaN."""
    if weight.dtype == torch.int8:
        return weight.to(dtype), w.scale
    if w.scale is None:
        return kernels.statsq(weight.detach(), w.bits, w.coefficient, dtype, integers=True)
    return kernels.quantized(weight, _rows(w), dtype)[:2]


def linear_offset(values: Tensor, step: Tensor, bias: Tensor | None, a: Activation) -> Tensor | None:
    """bias + Wq bias_out (out,), from the weight's integers and steps."""
    if a.bias_out is None:
        return bias
    if kernels.accept(step, a.bias_out):
        dots = kernels.row_dots(values, a.bias_out.detach()[None], len(values))
    else:
        dots = row_sum(values * a.bias_out.float())[:, 0]
    return dots * step if bias is None else bias + dots * step


def integer_linear(x: Tensor, a: Activation, values: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """(..., out) from x (..., in) and the weight's integers (out, in), float32 or int8, for what the kernels accept.

    ((acc * s_x) * step) + offset, the arithmetic of `quantized_linear`.
    """
    codes = kernels.quantized(x, a, values.dtype)
    shift = kernels.code_shift(a, values.dtype)
    correction = values.sum(1, dtype=torch.float32) * shift if shift else None
    sums = kernels.product(codes.values, values)
    y = kernels.scaled(sums, correction, codes.scale, step, None if offset is None else offset.detach())
    return y.view(*x.shape[:-1], len(values))


def largest(a: Activation) -> int:
    return max(map(abs, code_range(a.bits, a.positive)))


def _largest(weight: Tensor, w: WeightQuantizer) -> int:
    return 2**w.bits - 1 if w.scale is None or weight.dtype == torch.int8 else 2 ** (w.bits - 1)


def _rows(w: WeightQuantizer) -> Activation:
    return Activation(w.scale[:, None], None, None, w.bits, False)


def _dequantized_weight(weight: Tensor, w: WeightQuantizer) -> Tensor:
    if weight.dtype == torch.int8:
        return weight.float() * w.scale[:, None]
    if w.scale is None:
        return statsq(weight.detach().float(), w.bits, w.coefficient)
    return dequantized(weight, _rows(w))


class _Linear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        bias_in: Tensor | None,
        bias_out: Tensor | None,
        weight_scale: Tensor | None,
        bits: int,
        positive: bool,
        weight_bits: int,
        coefficient: float,
        dtype: torch.dtype,
    ) -> Tensor:
        a = Activation(scale, bias_in, bias_out, bits, positive)
        w = WeightQuantizer(weight_bits, coefficient, weight_scale)
        ctx.save_for_backward(x, weight, scale, bias_in, bias_out, weight_scale)
        ctx.rest = bits, positive, weight_bits, coefficient, dtype, None if bias is None else bias.dtype
        with no_autocast(x):
            return _linear(x, weight, bias, a, w, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, bias_in, bias_out, weight_scale = ctx.saved_tensors
        bits, positive, weight_bits, coefficient, dtype, bias_dtype = ctx.rest
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        a = Activation(scale, bias_in, bias_out, bits, positive)
        w = WeightQuantizer(weight_bits, coefficient, weight_scale)
        dx: tuple[Tensor | None, ...] = (None,) * 4
        dw = dws = None
        with no_autocast(g):
            if needs_x or any(ctx.needs_input_grad[3:6]):
                dx = activation_gradients(x, a, g @ _dequantized_weight(weight, w).to(dtype))
            if needs_weight or ctx.needs_input_grad[6]:
                dw = g.flatten(0, -2).T @ dequantized(x, a).to(dtype).flatten(0, -2)
                if weight_scale is not None:
                    dw, dws, *_ = activation_gradients(weight, _rows(w), dw)
                    dws = dws[:, 0]
                dw = dw.to(weight.dtype)
            db = g.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_dtype) if needs_bias else None
        return dx[0], dw, db, *dx[1:], dws, *[None] * 5
