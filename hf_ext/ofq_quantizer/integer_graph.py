"""Linear layers and attention of integers as tensor operations, for the graphs of torch.compile.

Sums are scaled as in `ops` and `attention_ops`. A compiler joins that with what the host computes between two products,
and spreads it over all threads, which `integer_kernels` do not.
"""

import torch
from torch import Tensor

from hf_ext.ofq_quantizer.attention_ops import scaled_logits, scaled_values
from hf_ext.ofq_quantizer.integer_products import product
from hf_ext.ofq_quantizer.kernels import Activation, code_range, code_shift
from hf_ext.ofq_quantizer.ops import scaled_sums
from hf_ext.ofq_quantizer.quantizer_ops import ratio


@torch.no_grad()
def linear(x: Tensor, a: Activation, weight: Tensor, bits: int, step: Tensor, bias: Tensor | None) -> Tensor:
    """x^ Wq^T + bias, (B, T, rows) of the dtype of x (B, T, columns); weight: the integers, int8 (rows, columns)."""
    zero, codes = code_shift(a, torch.int8), _codes(x, a)
    left, right = _narrow(codes, zero).flatten(0, 1), weight.t()
    sums = product(left[None, None], right[None, None], bits)[0, 0].view(*x.shape[:2], len(weight))
    if zero:
        sums = sums + weight.sum(1, dtype=torch.int32) * zero
    return scaled_sums(sums.float(), weight, step, None if bias is None else bias.float(), a).to(x.dtype)


@torch.no_grad()
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    aq: Activation,
    ak: Activation,
    av: Activation,
    ap: Activation,
    scaling: float,
    logit_bias: Tensor | None,
) -> Tensor:
    """What `quantized_attention` computes, (B, N, h*d) of the dtype of v."""
    k_codes, v_codes, zero = _codes(k, ak), _narrow(_codes(v, av)), code_shift(ap, torch.int8)
    sums = product(_narrow(_codes(q, aq)), _narrow(k_codes).transpose(2, 3), ak.bits)
    logits = scaled_logits(sums.float(), k_codes, aq, ak, scaling)
    p = _codes((logits if logit_bias is None else logits + logit_bias.float()).softmax(-1), ap)
    sums = product(_narrow(p, zero), v_codes, av.bits)
    if zero:
        sums = sums + v_codes.sum(2, keepdim=True, dtype=torch.int32) * zero
    return scaled_values(sums.float(), p, av, ap).transpose(1, 2).flatten(2).to(v.dtype)


def _codes(x: Tensor, a: Activation) -> Tensor:
    """The integers as float32; the lowest for NaN, which int8 cannot hold."""
    low, high = code_range(a.bits, a.positive)
    v = ratio(x, a)
    return v.where(v > low, low).clamp(max=high).round()


def _narrow(codes: Tensor, zero: int = 0) -> Tensor:
    return (codes - zero if zero else codes).to(torch.int8)
