"""Linear layers and attention of integers as tensor operations, for the graphs of torch.compile.

The order of operations is that of `integer_kernels`. A compiler joins them with what the host computes between two
products, and spreads them over all threads, which the kernels do not.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_ext.ofq_quantizer.integer_products import product
from hf_ext.ofq_quantizer.ops import linear_offset
from hf_ext.ofq_quantizer.quantizer_ops import bounded, ratio, row_sum

if TYPE_CHECKING:
    from hf_ext.ofq_quantizer.integer import Int8Quantizer, Int8Weight


def codes(x: Tensor, quantizer: "Int8Quantizer") -> Tensor:
    """float32, of the shape of x; NaN has the lowest."""
    low, high = quantizer.limits[:2]
    v = ratio(x, quantizer.activation(x))
    return v.where(v > low, low).clamp(max=high).round()


def narrow(whole: Tensor, zero: int = 0) -> Tensor:
    """int8, less `zero`."""
    return (whole - zero if zero else whole).to(torch.int8)


@torch.no_grad()
def linear(x: Tensor, layer: "Int8Weight", quantizer: "Int8Quantizer", bias: Tensor | None) -> Tensor:
    """x (B, T, columns) -> (B, T, rows) of its dtype."""
    a, zero, weight = quantizer.activation(x), quantizer.limits[2], layer.integers
    left, right = narrow(codes(x, quantizer), zero).flatten(0, 1), weight.t()
    sums = product(left[None, None], right[None, None], layer.weight_bits)[0, 0]
    if zero:
        sums = sums + weight.sum(1, dtype=torch.int32) * zero
    y = sums.view(*x.shape[:2], len(weight)).float() * bounded(a.scale) * layer.step
    offset = linear_offset(weight, layer.step, None if bias is None else bias.float(), a)
    return (y if offset is None else y + offset).to(x.dtype)


@torch.no_grad()
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: "Int8Quantizer",
    right: "Int8Quantizer",
    values: "Int8Quantizer",
    probs: "Int8Quantizer",
    scaling: float,
    logit_bias: Tensor | None,
) -> Tensor:
    """softmax(q k^T scaling + logit_bias) v with all four rounded, (B, N, h*d) of the dtype of v."""
    p = _probabilities(q, k, left, right, scaling, logit_bias)
    a, zero, p_codes, v_codes = values.activation(v), probs.limits[2], codes(p, probs), narrow(codes(v, values))
    sums = product(narrow(p_codes, zero), v_codes, values.bits)
    if zero:
        sums = sums + v_codes.sum(2, keepdim=True, dtype=torch.int32) * zero
    out = sums.float() * bounded(a.scale)
    if a.bias_out is not None:
        out = out + a.bias_out.float() * p_codes.sum(3, keepdim=True)
    return (out * bounded(probs.activation(p).scale)).transpose(1, 2).flatten(2).to(v.dtype)


def _probabilities(
    q: Tensor,
    k: Tensor,
    left: "Int8Quantizer",
    right: "Int8Quantizer",
    scaling: float,
    logit_bias: Tensor | None,
) -> Tensor:
    query, key, k_codes = left.activation(q), right.activation(k), codes(k, right)
    sums = product(narrow(codes(q, left)), narrow(k_codes).transpose(2, 3), right.bits)
    logits = sums.float() * bounded(query.scale)
    if query.bias_out is not None:
        logits = logits + row_sum(k_codes * query.bias_out.float()).transpose(2, 3)
    logits = logits * (bounded(key.scale) * scaling).expand(*k.shape[1:3], 1).transpose(1, 2)
    return (logits if logit_bias is None else logits + logit_bias.float()).softmax(-1)
