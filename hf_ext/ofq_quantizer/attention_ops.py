"""The quantised attention of OFQ (arXiv 2302.02210) as a tensor function that keeps q, k, v and recomputes the rest."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from hf_ext.modes import no_autocast, product_dtype
from hf_ext.ofq_quantizer import attention_kernels, kernels
from hf_ext.ofq_quantizer.kernels import Activation
from hf_ext.ofq_quantizer.ops import integer_sums_fit, largest
from hf_ext.ofq_quantizer.quantizer_ops import (
    activation_gradients,
    bounded,
    dequantized,
    integers,
    row_sum,
    scale_gradient,
)

__all__ = ["quantized_attention"]


def quantized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    aq: Activation,
    ak: Activation,
    av: Activation,
    ap: Activation,
    scaling: float,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """softmax(q^ k^T scaling + logit_bias), quantised, times v^: (B, N, h*d).

    q (B, h or 1, N, d), k (B, h, N, d), v (B, h, N, d'), quantised by aq, ak, av; ap quantises the probabilities and
    has no shifts, ak no bias_out (it would cancel in the softmax). logit_bias broadcasts to (B, h, N, N). Keeps these
    and recomputes the rest in backward.

    float32: `(acc * s_q[n] + c[m]) * (s_k[m] * scaling) + logit_bias`, c[m] = bias_out_q . k_int[m], and
    `((acc * s_v) + b_v * rowsum[n]) * s_p[n]`; acc are products of integers, rowsum sums of those of the probabilities.
    Under autocast, in other dtypes and where acc could exceed 2^24, the products of the quantised values in the dtype
    of nn.Linear. The gradients of scales depend on the batch size as in `quantize_activation`.

    Raises:
        ValueError: aq, ak or ap has a scale a channel, av one a token, or there is a shift which must not be.
    """
    _check(aq, ak, av, ap)
    tensors = (q, k, v, logit_bias, aq.scale, aq.bias_in, aq.bias_out, ak.scale, ak.bias_in)
    ranges = tuple((a.bits, a.positive) for a in (aq, ak, av, ap))
    return _Attention.apply(*tensors, av.scale, av.bias_in, av.bias_out, ap.scale, ranges, scaling, product_dtype(q))


def _check(aq: Activation, ak: Activation, av: Activation, ap: Activation) -> None:
    """Scales leave the sum over what two factors share only if they do not vary along it."""
    for name, a in (("q", aq), ("k", ak), ("the probabilities", ap)):
        if a.scale.shape[-1] != 1:
            raise ValueError(f"{name} takes one scale, or one a token, not {tuple(a.scale.shape)}")
    if av.scale.dim() > 1 and av.scale.shape[-2] != 1:
        raise ValueError(f"v takes one scale, or one a channel, not {tuple(av.scale.shape)}")
    if any(shift is not None for shift in (ak.bias_out, ap.bias_in, ap.bias_out)):
        raise ValueError("k takes no bias_out, which would cancel in the softmax, and the probabilities take no shifts")


class _Operands(NamedTuple):
    """Everything the product depends on: what `_Attention` saves, and the dtype in which it multiplies floats."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    aq: Activation
    ak: Activation
    av: Activation
    ap: Activation
    scaling: float
    dtype: torch.dtype

    def logits_fit(self) -> bool:
        exact = integer_sums_fit(self.q.shape[-1], largest(self.aq), largest(self.ak))
        return exact and self.dtype == torch.float32

    def values_fit(self) -> bool:
        exact = integer_sums_fit(self.v.shape[-2], largest(self.ap), largest(self.av))
        return exact and self.dtype == torch.float32

    def suit_kernels(self) -> bool:
        factors = zip(self[:3], self[4:7], strict=True)
        return (
            self.logits_fit()
            and self.values_fit()
            and self.v.shape[-1] > 1
            and all(x.dim() == 4 and kernels.accept_activation(x, a) for x, a in factors)
            and kernels.accept(self.bias, self.ap.scale)
        )


def _probs(o: _Operands) -> Tensor:
    if o.logits_fit():
        q, k = integers(o.q, o.aq), integers(o.k, o.ak)
        logits = scaled_logits(q @ k.transpose(-2, -1), k, o.aq, o.ak, o.scaling)
    else:
        logits = _float(o.q, o.aq, o) @ _float(o.k, o.ak, o).transpose(-2, -1)
        logits = logits.float() * o.scaling
    return (logits if o.bias is None else logits + o.bias.float()).softmax(-1)


def scaled_logits(sums: Tensor, k: Tensor, aq: Activation, ak: Activation, scaling: float) -> Tensor:
    """q^ k^T scaling (..., N, M) from the products of the integers, and those of k (..., M, d)."""
    logits = sums * bounded(aq.scale)
    if aq.bias_out is not None:
        logits = logits + row_sum(k * aq.bias_out.float()).transpose(-2, -1)
    return logits * (bounded(ak.scale) * scaling).expand(*k.shape[-3:-1], 1).transpose(-2, -1)


def _output(o: _Operands) -> Tensor:
    probs = _probs(o)
    if not o.values_fit():
        return _float(probs, o.ap, o) @ _float(o.v, o.av, o)
    p = integers(probs, o.ap)
    return scaled_values(p @ integers(o.v, o.av), p, o.av, o.ap)


def scaled_values(sums: Tensor, p: Tensor, av: Activation, ap: Activation) -> Tensor:
    """p^ v^ (..., N, d) from the products of the integers, and those of p (..., N, M)."""
    out = sums * bounded(av.scale)
    if av.bias_out is not None:
        out = out + av.bias_out.float() * row_sum(p)
    return out * bounded(ap.scale)


def _float(x: Tensor, a: Activation, o: _Operands) -> Tensor:
    return dequantized(x, a).to(o.dtype)


def _gradients(g: Tensor, o: _Operands, needs_bias: bool) -> tuple[Tensor | None, ...]:
    """dL/d (q^, k^, v^), the first two without the factor `scaling`; of the probabilities' scale, of the bias."""
    g = g.unflatten(-1, (o.v.shape[1], o.v.shape[-1])).transpose(1, 2)
    probs = _probs(o)
    dv = _float(probs, o.ap, o).transpose(-2, -1) @ g
    dp, dscale, *_ = activation_gradients(probs, o.ap, g @ _float(o.v, o.av, o).transpose(-2, -1))
    dl = probs * (dp - (dp * probs).sum(-1, keepdim=True))
    dbias = dl.sum_to_size(o.bias.shape) if needs_bias else None
    dl = dl.to(o.dtype)
    dq = (dl @ _float(o.k, o.ak, o)).sum_to_size(o.q.shape)
    return dq, dl.transpose(-2, -1) @ _float(o.q, o.aq, o), dv, dscale, dbias


class _Attention(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        q_scale: Tensor,
        q_bias_in: Tensor | None,
        q_bias_out: Tensor | None,
        k_scale: Tensor,
        k_bias_in: Tensor | None,
        v_scale: Tensor,
        v_bias_in: Tensor | None,
        v_bias_out: Tensor | None,
        p_scale: Tensor,
        ranges: tuple[tuple[int, bool], ...],
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        saved = (q, k, v, bias, q_scale, q_bias_in, q_bias_out, k_scale, k_bias_in, v_scale, v_bias_in, v_bias_out)
        ctx.save_for_backward(*saved, p_scale)
        ctx.rest = ranges, scaling, dtype
        o = _operands(*saved, p_scale, *ctx.rest)
        if o.suit_kernels():
            return attention_kernels.forward(q, k, v, o[4:8], scaling, bias)
        return _output(o).transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        o, needs_bias = _operands(*ctx.saved_tensors, *ctx.rest), ctx.needs_input_grad[3]
        with no_autocast(g):
            if o.suit_kernels() and kernels.accept(g):
                dq, dk, dv, dscale, dbias = attention_kernels.backward(g, *o[:3], o[4:8], o.scaling, o.bias, needs_bias)
                dscale = scale_gradient(dscale, o.ap, dscale.numel() * o.k.shape[2])
            else:
                dq, dk, dv, dscale, dbias = _gradients(g, o, needs_bias)
            dq, *of_aq = activation_gradients(o.q, o.aq, dq, o.scaling)
            dk, *of_ak = activation_gradients(o.k, o.ak, dk, o.scaling)
            dv, *of_av = activation_gradients(o.v, o.av, dv)
        return dq, dk, dv, dbias, *of_aq, *of_ak[:2], *of_av, dscale, None, None, None


def _operands(*arguments: Any) -> _Operands:
    """From those of `_Attention.forward`."""
    *tensors, ranges, scaling, dtype = arguments
    q_range, k_range, v_range, p_range = ranges
    return _Operands(
        *tensors[:4],
        Activation(*tensors[4:7], *q_range),
        Activation(*tensors[7:9], None, *k_range),
        Activation(*tensors[9:12], *v_range),
        Activation(tensors[12], None, None, *p_range),
        scaling,
        dtype,
    )
