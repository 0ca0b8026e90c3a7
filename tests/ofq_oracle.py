"""Every module of a quantised model of timm as its equations, in float64; and its gradients against them."""

from typing import Any

import torch
from ofq_models import lsq_of, statsq_of
from ofq_training import near_threshold
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ext.ofq_quantizer import activation_quantizers


def quantized(model: nn.Module, role: str, x: Tensor, bits: int, positive: bool = False, view: Any = None) -> Tensor:
    """`view` brings a vector into the form that broadcasts against x."""
    a = activation_quantizers(model)[role]
    shifts = [0 if b is None else b.double() for b in (a.bias_in, a.bias_out)]
    scale = a.scale[:, None] if len(a.scale) > 1 and view is None else a.scale
    return lsq_of(x.double() + shifts[0], scale, bits, positive) + shifts[1]


def split(x: Tensor, heads: int) -> Tensor:
    """(..., N, h*d) -> (..., h, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def attention(
    model: nn.Module, name: str, x: Tensor, bias: Any, w_bits: int, a_bits: int, band: float | None = None
) -> Tensor:
    """Section 2.3 and 2.4 of one block: (B, N, C) -> (B, N, C). `band`: under QKR, the gradients of annealing (2.5)."""
    module = model.get_submodule(name)
    qkv, heads, tokens = module.qkv, module.num_heads, x.shape[1]
    roles = activation_quantizers(model)
    weights = qkv.weight.double().chunk(3)
    biases = (qkv.bias.double() if qkv.bias is not None else torch.zeros(len(qkv.weight)).double()).chunk(3)
    d = len(weights[0]) // heads
    if qkr := f"{name}:qkx" in roles:
        x = quantized(model, f"{name}:input", x, a_bits)
        w_q, w_k = (part.view(heads, d, -1) for part in weights[:2])
        product = torch.einsum("hdi,hdj->hij", w_q, w_k).flatten(0, 1)
        if band is not None:
            product = torch.where(near_threshold(product, band, w_bits), product, product.detach())
            w_k = w_k.detach()
        rounded = statsq_of(product, w_bits)
        keys = roles[f"{name}:qkx"]
        t = x @ rounded.T + keys.bias_in.double()
        t = t.view(len(x), tokens * heads, -1)
        t = lsq_of(t, keys.scale[:, None], a_bits).view(len(x), tokens, heads, -1)
        u = torch.einsum("hdj,hd->hj", w_k, biases[0].view(heads, d))
        scores = torch.einsum("bni,bmhi->bhnm", x, t) + torch.einsum("bmj,hj->bhm", x, u)[:, :, None]
        assert keys.bias_out is None
    else:
        x = quantized(model, f"{name}.qkv:input", x, a_bits)
        q, k = (x @ statsq_of(w, w_bits).T + b for w, b in zip(weights[:2], biases[:2], strict=True))
        q, k = (split(quantized(model, f"{name}:{role}", y, a_bits), heads) for role, y in (("q", q), ("k", k)))
        assert roles[f"{name}:k"].bias_out is None
        scores = q @ k.mT
    v = x @ statsq_of(weights[2], w_bits).T + biases[2]
    v = split(quantized(model, f"{name}:v", v, a_bits, view="channel"), heads)
    probs = (scores * d**-0.5 + bias).softmax(-1)
    probs = quantized(model, f"{name}:probs", probs, a_bits, positive=True)
    out = (probs @ v).transpose(1, 2).flatten(2)
    assert qkr == (f"{name}.qkv:input" not in roles)
    return linear(model, f"{name}.proj", out, w_bits, a_bits)


def linear(model: nn.Module, name: str, x: Tensor, w_bits: int, a_bits: int) -> Tensor:
    layer = model.get_submodule(name)
    x = quantized(model, f"{name}:input", x, a_bits, positive=name.endswith("fc2"))
    bias = 0 if layer.bias is None else layer.bias.double()
    return x @ statsq_of(layer.weight, w_bits).T + bias


def boundary(model: nn.Module, name: str, x: Tensor) -> Tensor:
    layer = model.get_submodule(name)
    a = activation_quantizers(model)[f"{name}:input"]
    image = (-1, 1, 1) if x.ndim == 4 else (-1,)
    x = lsq_of(x + a.bias_in.double().view(image), a.scale, 8) + a.bias_out.double().view(image)
    scale = layer.weight_scale_norm.double().view(-1, *[1] * (layer.weight.ndim - 1))
    weight = lsq_of(layer.weight, scale, 8)
    bias = layer.bias.double()
    return F.conv2d(x, weight, bias, stride=layer.stride) if x.ndim == 4 else F.linear(x, weight, bias)


def position_bias(module: nn.Module, mask: Any = None) -> Any:
    """(B or 1, h, N, N) of Swin, whose windows of an image follow each other; 0 of ViT."""
    if not hasattr(module, "relative_position_bias_table"):
        return 0
    size = module.window_size[0] * module.window_size[1]
    table = module.relative_position_bias_table[module.relative_position_index.view(-1)]
    bias = table.view(size, size, -1).permute(2, 0, 1)[None].double()
    return bias if mask is None else bias + mask.repeat(2, 1, 1)[:, None].double()


def assert_gradients(module: nn.Module, x: Tensor, found: Tensor, expected: Tensor, g: Tensor) -> None:
    parts = {"x": x} | dict(module.named_parameters())
    ours = torch.autograd.grad(found, list(parts.values()), g, allow_unused=True)
    theirs = torch.autograd.grad(expected, list(parts.values()), g.double(), allow_unused=True)
    for name, one, other in zip(parts, ours, theirs, strict=True):
        assert (one is None) == (other is None), name
        if one is not None:  # a shift of all keys cancels in the softmax, but for those that are clipped
            assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=0.1), name
