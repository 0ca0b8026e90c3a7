"""The tensor functions of OFQ (arXiv 2302.02210): its quantisers, from `quantizer_ops`, and the quantised linear layer.

A product multiplies the integers and scales afterwards, in one fixed order of operations, so that training, evaluation
and integer arithmetic agree bit for bit.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from hf_ext.modes import no_autocast, product_dtype
from hf_ext.ofq_quantizer import kernels
from hf_ext.ofq_quantizer.kernels import SMALLEST_SCALE, Activation, code_range
from hf_ext.ofq_quantizer.quantizer_ops import (
    activation_gradients,
    bounded,
    dequantized,
    integers,
    low_confidence,
    lsq,
    lsq_codes,
    lsq_init,
    mask_gradient,
    odd_codes,
    quantize_activation,
    row_sum,
    statsq,
    statsq_codes,
)

__all__ = [
    "SMALLEST_SCALE",
    "Activation",
    "WeightQuantizer",
    "code_range",
    "integer_linear",
    "integer_sums_fit",
    "largest_of_weight",
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
    a.scale is one number or one a token. The gradients of scales depend on the batch size as in `quantize_activation`.
    Keeps x and weight only, and quantises them again in backward.
    """
    if a.scale.shape[-1] != 1:
        raise ValueError(f"a scale {tuple(a.scale.shape)} is one a channel; a product takes one a token, or one number")
    scales = (a.scale, a.bias_in, a.bias_out, w.scale)
    return _Linear.apply(x, weight, bias, *scales, a.bits, a.positive, w.bits, w.coefficient, product_dtype(x))


def integer_linear(x: Tensor, a: Activation, values: Tensor, step: Tensor, offset: Tensor | None) -> Tensor:
    """The same from the weight's integers (out, in), float32 or int8, and bias + Wq bias_out; not differentiable.

    x and the parts of `a` are what the kernels accept.
    """
    codes = kernels.quantized(x, a, values.dtype)
    shift = kernels.code_shift(a, values.dtype)
    correction = values.sum(1, dtype=torch.float32) * shift if shift else None
    sums = kernels.product(codes.values, values)
    y = kernels.scaled(sums, correction, codes.scale, step, None if offset is None else offset.detach())
    return y.view(*x.shape[:-1], len(values))


# --- what they share with the attention


def largest(a: Activation) -> int:
    """The largest magnitude of an integer."""
    return max(map(abs, code_range(a.bits, a.positive)))


def largest_of_weight(weight: Tensor, w: WeightQuantizer) -> int:
    """The same of `weight_integers`."""
    return 2**w.bits - 1 if w.scale is None or weight.dtype == torch.int8 else 2 ** (w.bits - 1)


# --- the linear layer


def _linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Activation, w: WeightQuantizer, dtype: torch.dtype
) -> Tensor:
    if dtype != torch.float32 or not integer_sums_fit(x.shape[-1], largest(a), largest_of_weight(weight, w)):
        bias = bias if bias is None else bias.to(dtype)
        return F.linear(dequantized(x, a).to(dtype), _dequantized_weight(weight, w).to(dtype), bias)
    if kernels.accept_activation(x, a) and kernels.accept(
        None if weight.dtype == torch.int8 else weight, bias, w.scale
    ):
        values, step = _narrow_integers(weight, w)
        return integer_linear(x, a, values, step, _offset(values, step, bias, a))
    odd, step = weight_integers(weight, w)
    return scaled_sums(F.linear(integers(x, a), odd), odd, step, bias, a)


def scaled_sums(sums: Tensor, values: Tensor, step: Tensor, bias: Tensor | None, a: Activation) -> Tensor:
    """x^ Wq^T + bias (..., out) from the products of the integers, those of the weight (out, in), and its steps."""
    y = sums * bounded(a.scale) * step
    offset = _offset(values, step, bias, a)
    return y if offset is None else y + offset


def _narrow_integers(weight: Tensor, w: WeightQuantizer) -> tuple[Tensor, Tensor]:
    """`weight_integers` in the dtype of the product; the step of a row with NaN, which int8 cannot hold, is NaN."""
    dtype = torch.int8 if kernels.multiplies_int8() else torch.float32
    if weight.dtype == torch.int8:
        return weight.to(dtype), w.scale
    if w.scale is None:
        return kernels.statsq(weight, w.bits, w.coefficient, dtype, integers=True)
    return kernels.quantized(weight, _rows(w), dtype)[:2]


def _offset(values: Tensor, step: Tensor, bias: Tensor | None, a: Activation) -> Tensor | None:
    """bias + Wq bias_out (out,), from the weight's integers and steps."""
    if a.bias_out is None:
        return bias
    if kernels.accept(step, a.bias_out):
        dots = kernels.row_dots(values, a.bias_out, len(values))
    else:
        dots = row_sum(values * a.bias_out.float())[:, 0]
    return dots * step if bias is None else bias + dots * step


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
