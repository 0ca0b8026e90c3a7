"""Products of int8 matrices in int32, by torch."""

from functools import cache
from itertools import chain, repeat

import torch
from torch import Tensor


def multiply_heads(left: Tensor, right: Tensor, bits: int, out: Tensor) -> None:
    """`multiply` for every head: (B, h or 1, n, k) times (B, h, k, m) into (B, h, n, m)."""
    heads = out.shape[1] // left.shape[1]
    lefts = chain.from_iterable(repeat(one, heads) for one in left.flatten(0, 1).unbind())
    for one, other, result in zip(lefts, right.flatten(0, 1).unbind(), out.flatten(0, 1).unbind(), strict=True):
        multiply(one, other, bits, result)


def multiply(left: Tensor, right: Tensor, bits: int, out: Tensor) -> None:
    """int8 (n, k) times int8 (k, m), whose values have so many bits, into int32 (n, m)."""
    if bits < 8 or not _products_saturate():
        torch._int_mm(left, right, out=out)
    else:
        low = right & 15
        torch._int_mm(left, (right - low) >> 4, out=out)
        out.mul_(16).add_(torch._int_mm(left, low))


@torch.library.custom_op("hf_ext::ofq_int8_product", mutates_args=())
def product(left: Tensor, right: Tensor, bits: int) -> Tensor:
    """`multiply_heads` into a tensor of its own, for graphs."""
    out = _products(left, right, bits)
    multiply_heads(left, right, bits, out)
    return out


@product.register_fake
def _products(left: Tensor, right: Tensor, bits: int) -> Tensor:
    return right.new_empty(*right.shape[:2], left.shape[2], right.shape[3], dtype=torch.int32)


@cache
def _products_saturate() -> bool:
    """Whether this machine adds pairs of products in 16 bits: x86 without VNNI does, and returns wrong sums."""
    largest = torch.full((32, 32), 127, dtype=torch.int8)
    return int(torch._int_mm(largest, largest)[0, 0]) != 32 * 127**2
