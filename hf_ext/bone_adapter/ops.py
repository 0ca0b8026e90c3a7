"""The three forms of Bone (arXiv 2409.15371) as tensor functions: they keep little for backward and recompute.

`reference` defines the forms; the functions here are held to it. Sums are formed in at least float32 and rounded once,
also under autocast. Blocks may have another dtype than weights and activations, and get their gradients in their own.
No function can be differentiated twice.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable

from hf_ext.bone_adapter.affine import affine_linear
from hf_ext.bone_adapter.kernels import (
    FORMS,
    check_form,
    check_loaded,
    chunks,
    differentiable,
    flat,
    own,
    row_product,
    slice_sum,
    tiled,
    updated,
    wide,
)
from hf_ext.modes import no_autocast, product_dtype

__all__ = [
    "FORMS",
    "add_tiled",
    "affine_linear",
    "block_shape",
    "composed",
    "restored_weight",
    "row_forward",
    "tile_forward",
    "updated_weight",
]


def block_shape(form: str, r: int, in_features: int, out_features: int) -> tuple[int, ...]:
    """Shape of `bone_block`: tile (r, out), bat (out/r, r, r), bat_row (in/r, r, r).

    Raises:
        ValueError: r does not divide both features, which the block-affine forms need; an unknown form.
    """
    check_form(form)
    if form == "tile":
        return r, out_features
    if in_features % r or out_features % r:
        common = gcd(in_features, out_features)
        divisors = [d for d in range(1, common + 1) if common % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - r))[:3])
        raise ValueError(
            f"{form} needs an r that divides in_features and out_features: r={r} does not divide "
            f"in_features={in_features} and out_features={out_features}; near by, {', '.join(map(str, near))} would, "
            "and the tile form (init_weights=True) takes any r"
        )
    return (out_features if form == "bat" else in_features) // r, r, r


def updated_weight(form: str, weight: Tensor, block: Tensor) -> Tensor:
    """W' of one form. weight (out, in), block as `block_shape`; returns (out, in) in at least float32."""
    check_form(form)
    dtype = wide(weight, block)
    with no_autocast(weight):
        return updated(form, weight.contiguous().to(dtype), block.to(dtype))


def restored_weight(form: str, weight: Tensor, block: Tensor) -> Tensor:
    """The inverse: W from W' (out, in), up to rounding, in at least float32.

    (W'_ij + I) = (W_ij + I)(I + b), so the way back is the same form with c = (I + b)^-1 - I = -(I + b)^-1 b.

    Raises:
        ValueError: I + b is singular to working precision, so W' does not determine W.
    """
    check_form(form)
    if form == "tile":
        return updated_weight(form, weight, -block)
    with no_autocast(weight):
        b = block.double()
        affine = b + torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
        inverse, _ = torch.linalg.inv_ex(affine)
        condition = torch.linalg.matrix_norm(affine, 1) * torch.linalg.matrix_norm(inverse, 1)
        singular = ~(condition < 1 / torch.finfo(wide(weight, block)).eps)
        if singular.any():
            index = singular.nonzero()[0].item()
            raise ValueError(
                f"I + b is singular in block {index} of a {form} adapter, so its update cannot be undone; "
                "keep the original weight instead"
            )
        return updated_weight(form, weight, -(inverse @ b).to(wide(weight, block)))


def composed(blocks: Sequence[Tensor]) -> Tensor:
    """One block for several of equal r and form (bat or bat_row) in the order of application: I+b = (I+b1)(I+b2)..."""
    with no_autocast(blocks[0]):
        return reduce(lambda first, then: torch.baddbmm(first + then, first, then), blocks)


def tile_forward(y: Tensor, x: Tensor, block: Tensor) -> Tensor:
    """y + s(x) B with s = sum_j x_j: the tile form without its weight.

    y (..., out) the output of the base layer, x (..., in), block (r, out); returns (..., out) in y's dtype. The update
    is added before rounding. Keeps s (T, r) for backward, not x.

    Raises:
        RuntimeError: a block on the meta device for an x that is not.
    """
    check_loaded(x, block)
    product = product_dtype(y, wide(y, x, block))
    with no_autocast(x):
        if differentiable(y, x, block):
            return _Tile.apply(y, x, block, product)
        return _tile(y, x, block, product)[0]


def row_forward(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """The row form on activations: (x + u, sum_j u_j) with u_j = b_j x_j; then y = base(x + u) + tile(sum_j u_j).

    x (..., in), block (in/r, r, r); returns (..., in) in x's dtype and (..., r) in at least float32. Keeps x only.

    Raises:
        RuntimeError: a block on the meta device for an x that is not.
    """
    check_loaded(x, block)
    product = product_dtype(x, wide(x, block))
    with no_autocast(x):
        return _Row.apply(x, block, product) if differentiable(x, block) else _row(x, block, product)


def add_tiled(y: Tensor, t: Tensor) -> Tensor:
    """y (..., out) + copies of t (..., r) side by side, in y's dtype; keeps nothing."""
    return _AddTiled.apply(y, t) if differentiable(y, t) else _add_tiled(y, t)


# What has nothing to differentiate is spared the cost of a Function, which shows in a single token.


def _tile(y: Tensor, x: Tensor, block: Tensor, product: torch.dtype) -> tuple[Tensor, Tensor]:
    """The output and s (T, r)."""
    exact, b = wide(y, x, block), block.to(product)

    def add(y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        s = slice_sum(x, len(b), exact)
        return torch.addmm(y.to(product), s.to(product), b).to(y.dtype), s

    out, s = _by_tokens(add, flat(y), flat(x))
    return own(out, y.shape), s


def _row(x: Tensor, block: Tensor, product: torch.dtype) -> tuple[Tensor, Tensor]:
    exact, b = wide(x, block), block.to(product)

    def change(x: Tensor) -> tuple[Tensor, Tensor]:
        new, total = row_product(x.to(exact), b)
        return new.to(x.dtype), total

    new, total = _by_tokens(change, flat(x))
    return own(new, x.shape), own(total, (*x.shape[:-1], total.shape[-1]))


def _add_tiled(y: Tensor, t: Tensor) -> Tensor:
    def add(y: Tensor, t: Tensor) -> list[Tensor]:
        return [(y.unflatten(1, (-1, t.shape[1])) + t[:, None]).to(y.dtype).flatten(1)]

    return own(_by_tokens(add, flat(y), flat(t))[0], y.shape)


class _Tile(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, block: Tensor, product: torch.dtype) -> Tensor:
        out, s = _tile(y, x, block, product)
        ctx.save_for_backward(block, *([s] if ctx.needs_input_grad[2] else []))
        ctx.x_shape, ctx.x_dtype, ctx.product = x.shape, x.dtype, product
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        block, *s = ctx.saved_tensors
        needs_y, needs_x, needs_block, _ = ctx.needs_input_grad
        b, width = block.to(ctx.product), ctx.x_shape[-1]
        db = torch.zeros_like(block, dtype=wide(block)) if needs_block else None

        def gradients(g: Tensor, *s: Tensor) -> list[Tensor]:
            g = g.to(ctx.product)
            if needs_block:
                db.add_(s[0].to(ctx.product).T @ g)
            return [tiled((g @ b.T).to(ctx.x_dtype), width)] if needs_x else []

        with no_autocast(g):
            dx = _by_tokens(gradients, flat(g), *s)
        return (
            g if needs_y else None,
            dx[0].view(ctx.x_shape) if needs_x else None,
            db.to(block.dtype) if needs_block else None,
            None,
        )


class _Row(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Tensor, product: torch.dtype) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, block)
        ctx.product = product
        return _row(x, block, product)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor, g_total: Tensor) -> tuple[Tensor | None, ...]:
        x, block = ctx.saved_tensors
        needs_x, needs_block, _ = ctx.needs_input_grad
        exact, b, cut = wide(x, block), block.to(ctx.product), (-1, block.shape[-1])
        db = torch.zeros_like(block, dtype=exact) if needs_block else None

        def gradients(x: Tensor, g: Tensor, g_total: Tensor) -> list[Tensor]:
            g = g.to(exact).unflatten(1, cut).transpose(0, 1)
            p = (g + g_total).to(ctx.product)
            if needs_block:
                db.add_(torch.bmm(p.transpose(1, 2), x.to(ctx.product).unflatten(1, cut).transpose(0, 1)))
            return [(g + torch.bmm(p, b)).to(x.dtype).transpose(0, 1).flatten(1)] if needs_x else []

        with no_autocast(g):
            dx = _by_tokens(gradients, flat(x), flat(g), flat(g_total))
        return dx[0].view(x.shape) if needs_x else None, db.to(block.dtype) if needs_block else None, None


class _AddTiled(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, t: Tensor) -> Tensor:
        ctx.t_shape, ctx.t_dtype = t.shape, t.dtype
        return _add_tiled(y, t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        needs_y, needs_t = ctx.needs_input_grad

        def total(g: Tensor) -> list[Tensor]:
            return [slice_sum(g, ctx.t_shape[-1], ctx.t_dtype)]

        return g if needs_y else None, _by_tokens(total, flat(g))[0].view(ctx.t_shape) if needs_t else None


def _by_tokens(function: Callable[..., Sequence[Tensor]], *tensors: Tensor) -> Sequence[Tensor]:
    """function(*tensors) on a few tokens at a time; tensors and results are (T, ...)."""
    tokens, width = tensors[0].shape
    parts = [] if torch.compiler.is_compiling() else chunks(tokens, width, 1, tensors[0])
    if len(parts) < 2:
        return function(*tensors)
    results: list[Tensor] = []
    for part in parts:
        pieces = function(*(tensor[part] for tensor in tensors))
        results = results or [piece.new_empty(tokens, *piece.shape[1:]) for piece in pieces]
        for result, piece in zip(results, pieces, strict=True):
            result[part] = piece
    return results
