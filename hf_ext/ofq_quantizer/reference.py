"""The quantisers and products of OFQ (arXiv 2302.02210) as its sections define them: the specification of this package.

Everything is written for float64 or float32 tensors, and differentiated by autograd: `through` is the straight-through
estimator. Activations are (B, N, C); an attention has h heads of d = C / h channels.
"""

import torch
from torch import Tensor


def through(value: Tensor, gradient: Tensor) -> Tensor:
    """`value` forward, the gradient of `gradient` backward."""
    return gradient + (value - gradient).detach()


def statsq(weight: Tensor, bits: int, coefficient: float = 2.0) -> Tensor:
    """Section 3.1: scales from statistics, 2^bits levels none of which is zero; dL/dW = dL/dWq everywhere."""
    n = 2 ** (bits - 1)
    s = coefficient * weight.abs().mean(1, keepdim=True)
    ratio = torch.where(s > 0, weight / s, torch.zeros_like(weight))
    codes = torch.round(ratio.clamp(-1, 1 - 1e-6) * n - 0.5)
    return through((codes + 0.5) / n * s, weight)


def lsq(x: Tensor, scale: Tensor, bits: int, positive: bool = False) -> Tensor:
    """LSQ with a scale that broadcasts against x; the scale's gradient times 1 / sqrt(Qp numel(x) / numel(scale))."""
    low, high = (0, 2**bits - 1) if positive else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    g = (high * x.numel() / scale.numel()) ** -0.5
    s = through(scale.clamp(min=1e-5), scale)
    s = through(s, g * s)
    v = (x / s).clamp(low, high)
    return through(v.round(), v) * s


def activation(x: Tensor, scale: Tensor, bits: int, positive: bool, bias_in: Tensor, bias_out: Tensor) -> Tensor:
    """ActQ: LSQ between two learnable shifts a channel."""
    return lsq(x + bias_in, scale, bits, positive) + bias_out


def logits(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """q k^T d^-0.5 + bias of quantised q, k (B, h, N, d)."""
    return q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias


def attend(logits: Tensor, v: Tensor, probs_scale: Tensor, bits: int) -> Tensor:
    """Their softmax, quantised, times the quantised v (B, h, N, d): (B, N, h d)."""
    return (lsq(logits.softmax(-1), probs_scale, bits, positive=True) @ v).transpose(1, 2).flatten(2)


def reparametrised_logits(
    x: Tensor, wq: Tensor, wk: Tensor, bq: Tensor, scale: Tensor, bias_in: Tensor, w_bits: int, a_bits: int
) -> Tensor:
    """Section 3.2 (QKR): (B, h, N, N) from x (B, N, C), quantised, and the unquantised W_q, W_k (h, d, C), b_q (h, d).

    The product A_h = W_q,h^T W_k,h is quantised, not its factors. scale (N h,) is token-major; bias_in (h C,).
    """
    (h, d, c), (b, n, _) = wq.shape, x.shape
    a = statsq((wq.transpose(1, 2) @ wk).reshape(h * c, c), w_bits)
    t = lsq((x @ a.T + bias_in).view(b, n * h, c), scale[:, None], a_bits).view(b, n, h, c)
    u = torch.einsum("hdc,hd->hc", wk, bq)
    return (torch.einsum("bnc,bmhc->bhnm", x, t) + torch.einsum("bmc,hc->bhm", x, u)[:, :, None]) * d**-0.5
