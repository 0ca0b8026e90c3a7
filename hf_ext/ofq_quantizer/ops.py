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

__all__ = [
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


class WeightQuantizer(NamedTuple):
    """How a weight is quantised: by StatsQ(bits, coefficient), or by signed LSQ where it has a `scale` (rows,)."""

    bits: int
    coefficient: float
    scale: Tensor | None


def code_range(bits: int, positive: bool) -> tuple[int, int]:
    """(Qn, Qp) of LSQ."""
    return (0, 2**bits - 1) if positive else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


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
    codes, scale = _codes(weight.detach(), bits, coefficient)
    return codes.nan_to_num(0.0).to(torch.int8), scale[:, 0]


def odd_codes(weight: Tensor, bits: int, coefficient: float = 2.0) -> tuple[Tensor, Tensor]:
    """Odd integers 2c + 1 (rows, columns) as float32, and s / 2n (rows,): Wq is their product."""
    codes, scale = _codes(weight.detach(), bits, coefficient)
    return codes * 2 + 1, scale[:, 0] / 2**bits


def low_confidence(weight: Tensor, bits: int, boundary_range: float = 0.005, coefficient: float = 2.0) -> Tensor:
    """Where a weight lies within `boundary_range` quantisation steps of a rounding threshold (section 3.3)."""
    n = 2 ** (bits - 1)
    position, scale = _positions(weight.detach(), bits, coefficient)
    near = position - (position.floor().clamp(-n, n - 2) + 0.5)
    return (near.abs() <= boundary_range) & (scale > 0)


def mask_gradient(weight: Tensor, mask: Tensor) -> Tensor:
    """`weight`; its gradient is 0 where `mask` is False."""
    return _MaskGradient.apply(weight, mask)


def _positions(weight: Tensor, bits: int, coefficient: float) -> tuple[Tensor, Tensor]:
    n, w = 2 ** (bits - 1), weight.float()
    scale = w.abs().mean(1, keepdim=True) * coefficient
    scale = torch.where(scale.isfinite(), scale, torch.nan)
    return (w / torch.where(scale == 0, 1.0, scale)).clamp(-1, 1 - 1e-6) * n - 0.5, scale


def _codes(weight: Tensor, bits: int, coefficient: float) -> tuple[Tensor, Tensor]:
    position, scale = _positions(weight, bits, coefficient)
    return position.round(), scale


class _StatsQ(Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, bits: int, coefficient: float) -> Tensor:
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
    """The scale (S,) with which LSQ starts: a mean|x| / sqrt(Qp), a = 2 signed, 4 unsigned."""
    if not x.numel():
        raise ValueError(f"the scale comes from data, and {tuple(x.shape)} has none: pass a batch that is not empty")
    magnitude = x.detach().float().abs()
    others = [dim for dim in range(x.dim()) if axis is None or dim != axis % x.dim()]
    mean = magnitude.mean(others).reshape(-1) if others else magnitude
    return mean * ((4 if positive else 2) / code_range(bits, positive)[1] ** 0.5)


def lsq_codes(x: Tensor, scale: Tensor, bits: int, positive: bool) -> Tensor:
    """round(clamp(x / max(scale, 1e-5), Qn, Qp)) as float32; the scale broadcasts against x."""
    return _integers(x.detach(), Activation(scale.detach(), None, None, bits, positive))


def quantize_activation(x: Tensor, a: Activation) -> Tensor:
    """LSQ(x + bias_in) + bias_out in x's shape and dtype; differentiable in x, the scale and the shifts.

    The scale's gradient has the published factor 1 / sqrt(Qp numel(x) / numel(scale)): it depends on the batch size.
    """
    return _Quantize.apply(x, a.scale, a.bias_in, a.bias_out, a.bits, a.positive)


def _along(scale: Tensor, x: Tensor, axis: int | None) -> Tensor:
    return scale if axis is None else scale.view(-1, *[1] * (x.dim() - 1 - axis % x.dim()))


def _ratio(x: Tensor, a: Activation) -> Tensor:
    x = x.float()
    return (x if a.bias_in is None else x + a.bias_in.float()) / a.scale.clamp(min=SMALLEST_SCALE)


def _integers(x: Tensor, a: Activation) -> Tensor:
    return _ratio(x, a).clamp(*code_range(a.bits, a.positive)).round()


def _dequantized(integers: Tensor, a: Activation) -> Tensor:
    y = integers * a.scale.clamp(min=SMALLEST_SCALE)
    return y if a.bias_out is None else y + a.bias_out.float()


def _activation_gradients(x: Tensor, a: Activation, g: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dL/d (x, scale, bias_in, bias_out) from g = dL/d quantize_activation(x, a), float32."""
    low, high = code_range(a.bits, a.positive)
    v = _ratio(x, a)
    inside = (v >= low) & (v <= high)
    dx = torch.where(inside, g, 0)
    factor = (high * max(x.numel() // a.scale.numel(), 1)) ** -0.5
    error = v.clamp(low, high).round() - torch.where(inside, v, 0)
    ds = (g * error).sum_to_size(a.scale.shape) * factor
    return (
        dx.to(x.dtype),
        ds.to(a.scale.dtype),
        None if a.bias_in is None else dx.sum_to_size(a.bias_in.shape).to(a.bias_in.dtype),
        None if a.bias_out is None else g.sum_to_size(a.bias_out.shape).to(a.bias_out.dtype),
    )


class _Quantize(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, bias_in: Tensor | None, bias_out: Tensor | None, bits: int, positive: bool
    ) -> Tensor:
        a = Activation(scale, bias_in, bias_out, bits, positive)
        ctx.save_for_backward(x, scale, bias_in, bias_out)
        ctx.range = bits, positive
        return _dequantized(_integers(x, a), a).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        return *_activation_gradients(x, Activation(*rest, *ctx.range), g.float()), None, None


# --- products


def weight_integers(weight: Tensor, w: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """Integers (rows, columns) as float32 and their step (rows,): the quantised weight is their product."""
    if w.scale is None:
        return odd_codes(weight, w.bits, w.coefficient)
    return lsq_codes(weight, w.scale[:, None], w.bits, False), w.scale.detach().clamp(min=SMALLEST_SCALE)


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
    codes, (odd, step) = _integers(x, a), weight_integers(weight, w)
    largest = 2**w.bits - 1 if w.scale is None else 2 ** (w.bits - 1)
    if dtype != torch.float32 or not integer_sums_fit(x.shape[-1], max(map(abs, code_range(a.bits, a.positive))), largest):
        bias = bias if bias is None else bias.to(dtype)
        return F.linear(_dequantized(codes, a).to(dtype), (odd * step[:, None]).to(dtype), bias)
    y = F.linear(codes, odd) * a.scale.clamp(min=SMALLEST_SCALE) * step
    offset = bias if a.bias_out is None else torch.mv(odd, a.bias_out.float()) * step
    if a.bias_out is not None and bias is not None:
        offset = bias + offset
    return y if offset is None else y + offset


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
                odd, step = weight_integers(weight, w)
                dx = _activation_gradients(x, a, (g @ (odd * step[:, None]).to(dtype)).float())
            if needs_weight or ctx.needs_input_grad[6]:
                y = _dequantized(_integers(x, a), a).to(dtype)
                dw = (g.flatten(0, -2).T @ y.flatten(0, -2)).float()
                if weight_scale is not None:
                    rows = Activation(weight_scale[:, None], None, None, weight_bits, False)
                    dw, dws, *_ = _activation_gradients(weight, rows, dw)
                    dws = dws[:, 0]
                dw = dw.to(weight.dtype)
            db = g.flatten(0, -2).sum(0, dtype=torch.float32).to(bias_dtype) if needs_bias else None
        return dx[0], dw, db, *dx[1:], dws, *[None] * 5
