"""The quantised attention of OFQ (arXiv 2302.02210) as a tensor function that keeps q, k, v and recomputes the rest."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from hf_ext.ofq_quantizer.ops import (
    SMALLEST_SCALE,
    Activation,
    _activation_gradients,
    _dequantized,
    _integers,
    code_range,
    integer_sums_fit,
    no_autocast,
    product_dtype,
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
    has no shifts, ak no bias_out (it would cancel in the softmax). logit_bias broadcasts to (B, h, N, N).

    float32: `(acc * s_q[n] + c[m]) * (s_k[m] * scaling) + logit_bias`, c[m] = bias_out_q . k_int[m], and
    `((acc * s_v) + b_v * rowsum[n]) * s_p[n]`; acc are products of integers. Under autocast, in other dtypes and where
    acc could exceed 2^24, the products of the quantised values in that dtype. Scale gradients: see quantize_activation.
    """
    tensors = (q, k, v, logit_bias, aq.scale, aq.bias_in, aq.bias_out, ak.scale, ak.bias_in)
    ranges = tuple((a.bits, a.positive) for a in (aq, ak, av, ap))
    return _Attention.apply(
        *tensors, av.scale, av.bias_in, av.bias_out, ap.scale, ranges, scaling, product_dtype(q)
    )


def _largest(a: Activation) -> int:
    return max(map(abs, code_range(a.bits, a.positive)))


def _scale(a: Activation) -> Tensor:
    return a.scale.clamp(min=SMALLEST_SCALE)


def _probs(q, k, bias, aq, ak, scaling, dtype) -> Tensor:
    qi, ki = _integers(q, aq), _integers(k, ak)
    if dtype == torch.float32 and integer_sums_fit(q.shape[-1], _largest(aq), _largest(ak)):
        logits = qi @ ki.transpose(-2, -1) * _scale(aq)
        if aq.bias_out is not None:
            logits = logits + (ki * aq.bias_out.float()).sum(-1)[..., None, :]
        logits = logits * (_scale(ak) * scaling).transpose(-2, -1) if ak.scale.dim() > 1 else logits * (_scale(ak) * scaling)
    else:
        logits = _dequantized(qi, aq).to(dtype) @ _dequantized(ki, ak).to(dtype).transpose(-2, -1)
        logits = logits.float() * scaling
    return (logits if bias is None else logits + bias.float()).softmax(-1)


def _values(probs, v, av, ap, dtype) -> Tensor:
    pi, vi = _integers(probs, ap), _integers(v, av)
    if dtype == torch.float32 and integer_sums_fit(v.shape[-2], _largest(ap), _largest(av)):
        out = pi @ vi * _scale(av)
        if av.bias_out is not None:
            out = out + av.bias_out.float() * pi.sum(-1, keepdim=True)
        return out * _scale(ap)
    return _dequantized(pi, ap).to(dtype) @ _dequantized(vi, av).to(dtype)


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, bias, sq, iq, oq, sk, ik, sv, iv, ov, sp, ranges, scaling, dtype) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, sq, iq, oq, sk, ik, sv, iv, ov, sp)
        ctx.rest = ranges, scaling, dtype
        rq, rk, rv, rp = ranges
        with no_autocast(q):
            probs = _probs(q, k, bias, Activation(sq, iq, oq, *rq), Activation(sk, ik, None, *rk), scaling, dtype)
            out = _values(probs, v, Activation(sv, iv, ov, *rv), Activation(sp, None, None, *rp), dtype)
            return out.transpose(1, 2).flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, sq, iq, oq, sk, ik, sv, iv, ov, sp = ctx.saved_tensors
        ranges, scaling, dtype = ctx.rest
        rq, rk, rv, rp = ranges
        aq, ak = Activation(sq, iq, oq, *rq), Activation(sk, ik, None, *rk)
        av, ap = Activation(sv, iv, ov, *rv), Activation(sp, None, None, *rp)
        with no_autocast(g):
            probs = _probs(q, k, bias, aq, ak, scaling, dtype)
            g = g.unflatten(-1, (v.shape[1], v.shape[-1])).transpose(1, 2)
            p = _dequantized(_integers(probs, ap), ap).to(dtype)
            dv, dsv, div, dov = _activation_gradients(v, av, (p.transpose(-2, -1) @ g).float())
            dp = (g @ _dequantized(_integers(v, av), av).to(dtype).transpose(-2, -1)).float()
            dp, dsp, *_ = _activation_gradients(probs, ap, dp)
            dl = probs * (dp - (dp * probs).sum(-1, keepdim=True))
            db = None if bias is None else dl.sum_to_size(bias.shape).to(bias.dtype)
            dl = (dl * scaling).to(dtype)
            dq = (dl @ _dequantized(_integers(k, ak), ak).to(dtype)).float().sum_to_size(q.shape)
            dk = (dl.transpose(-2, -1) @ _dequantized(_integers(q, aq), aq).to(dtype)).float()
            dq, dsq, diq, doq = _activation_gradients(q, aq, dq)
            dk, dsk, dik, _ = _activation_gradients(k, ak, dk)
        return dq, dk, dv, db, dsq, diq, doq, dsk, dik, dsv, div, dov, dsp, None, None, None
