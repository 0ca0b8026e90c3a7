"""The linear layer whose weight carries adapters: y = x W'^T + bias, W' formed anew wherever it is needed."""

from collections.abc import Callable, Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function, once_differentiable
from torch.nn import functional as F

from hf_ext.bone_adapter.kernels import (
    bat_product,
    block_gradient,
    check_form,
    check_loaded,
    chunks,
    differentiable,
    flat,
    own,
    part_of_block,
    updated,
    weight_gradient,
    wide,
)
from hf_ext.modes import no_autocast, product_dtype

Weight = Tensor | Callable[[], Tensor]


def affine_linear(x: Tensor, weight: Weight, bias: Tensor | None, steps: Sequence[tuple[str, Tensor]]) -> Tensor:
    """y = x W'^T + bias, W' being the forms of `steps` applied to W in order.

    W' is formed in at least float32, a few rows at a time, and rounded once to the dtype of the product (autocast's,
    else x's). Keeps x, W and the blocks; W' is formed again in backward.

    Args:
        x: (..., in).
        weight: (out, in), or a function that returns it (called again in backward), for quantised layers. A function
            gets no gradient, and may return another dtype than x's.
        bias: (out,) or None.
        steps: (form, block) of each adapter, blocks as `block_shape`.

    Raises:
        RuntimeError: dtypes that nn.Linear refuses; a block on the meta device for an x that is not.
    """
    forms, blocks = tuple(form for form, _ in steps), [block for _, block in steps]
    for form in forms:
        check_form(form)
    check_loaded(x, *blocks)
    _check_dtypes(x, weight)
    dtype = product_dtype(x, x.dtype)
    with no_autocast(x):
        trained = weight if isinstance(weight, Tensor) else None
        if not differentiable(x, trained, bias, *blocks) and forms == ("bat",) and _is_few(x, blocks[0]):
            return _few_tokens(x, _read(weight), bias, blocks[0], dtype)
        return _Affine.apply(x, weight, bias, dtype, forms, *blocks)


class _Affine(Function):
    # Not (ctx, x, ..., *blocks): a compiler that counts parameters would drop ctx where there are two blocks.
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        x, weight, bias, dtype, forms, *blocks = inputs
        ctx.dtype, ctx.forms = dtype, forms
        ctx.x_shape, ctx.x_dtype, ctx.bias_dtype = x.shape, x.dtype, None if bias is None else bias.dtype
        ctx.read = None if isinstance(weight, Tensor) else weight
        kept = x if ctx.needs_input_grad[1] or any(ctx.needs_input_grad[5:]) else None
        ctx.save_for_backward(kept, weight if ctx.read is None else None, *blocks)
        weight = _read(weight)
        new = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        for rows in _weight_chunks(weight, forms, blocks):
            new[rows] = _running_weights(weight, rows, forms, blocks)[-1]
        y = F.linear(x.to(dtype), new, None if bias is None else bias.to(dtype))
        return own(y, y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *blocks = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _, _, *needs_block = ctx.needs_input_grad
        weight = _read(ctx.read or weight)
        rows_g, rows_x = flat(g), None if x is None else flat(x).to(ctx.dtype)
        new = torch.empty(weight.shape, dtype=ctx.dtype, device=weight.device) if needs_x else None
        dweight = torch.empty_like(weight) if needs_weight else None
        exact = wide(weight, *blocks)
        grads = [
            torch.zeros_like(b, dtype=exact) if need else None for b, need in zip(blocks, needs_block, strict=True)
        ]
        with no_autocast(g):
            for rows in _weight_chunks(weight, ctx.forms, blocks):
                running = _running_weights(weight, rows, ctx.forms, blocks)
                if needs_x:
                    new[rows] = running[-1]
                if rows_x is not None:
                    grad = (rows_g[:, rows].T @ rows_x).to(exact)
                    grad = _add_block_gradients(grad, rows, running, ctx.forms, blocks, grads, needs_weight)
                    if needs_weight:
                        dweight[rows] = grad
            dx = (rows_g @ new).to(ctx.x_dtype).view(ctx.x_shape) if needs_x else None
        dbias = rows_g.sum(0).to(ctx.bias_dtype) if needs_bias else None
        grads = [None if grad is None else grad.to(b.dtype) for grad, b in zip(grads, blocks, strict=True)]
        return dx, dweight, dbias, None, None, *grads


def _running_weights(weight: Tensor, rows: slice, forms: Sequence[str], blocks: Sequence[Tensor]) -> list[Tensor]:
    """Rows of W and of what each step makes of it, unrounded."""
    exact = wide(weight, *blocks)
    running = [weight[rows].contiguous().to(exact)]
    for form, block in zip(forms, blocks, strict=True):
        running.append(updated(form, running[-1], part_of_block(form, block, rows).to(exact)))
    return running


def _add_block_gradients(
    grad: Tensor,
    rows: slice,
    running: Sequence[Tensor],
    forms: Sequence[str],
    blocks: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    to_weight: bool,
) -> Tensor:
    """Add to the gradient of every block what `rows` of dL/dW' (R, in) contribute, from the last step to the first.

    Returns dL/dW of these rows if `to_weight`, else the gradient of what the first step makes of them.
    """
    for index in reversed(range(len(forms))):
        form, block = forms[index], blocks[index]
        if grads[index] is not None:
            r = len(block) if form == "tile" else block.shape[-1]
            part_of_block(form, grads[index], rows).add_(block_gradient(form, running[index], grad, r))
        if index or to_weight:
            grad = weight_gradient(form, grad, part_of_block(form, block, rows).to(grad.dtype))
    return grad


def _check_dtypes(x: Tensor, weight: Weight) -> None:
    """W' is rounded to the dtype of the product, so a product of two dtypes would go unnoticed, one of integers too."""
    wrong = isinstance(weight, Tensor) and product_dtype(x, x.dtype) != product_dtype(x, weight.dtype)
    if wrong or not x.is_floating_point():
        raise RuntimeError(
            f"x is {x.dtype} and the weight {_read(weight).dtype}: as in nn.Linear, they have to be of one "
            "floating-point dtype. Convert x, or use autocast."
        )


def _is_few(x: Tensor, block: Tensor) -> bool:
    """Forming W' would cost more than transforming the tokens for each row of blocks."""
    return 2 * x.numel() <= x.shape[-1] * block.shape[-1]


def _few_tokens(x: Tensor, weight: Tensor, bias: Tensor | None, block: Tensor, dtype: torch.dtype) -> Tensor:
    exact, r = wide(x, weight, block), block.shape[-1]
    rows_x, b = flat(x).to(exact), block.to(exact)
    parts = chunks(len(weight), rows_x.numel() // r, r, weight)
    products = [bat_product(rows_x, weight[rows].to(dtype), part_of_block("bat", b, rows)) for rows in parts]
    y = torch.cat(products, 1)
    y = y if bias is None else y + bias
    return own(y.to(dtype), (*x.shape[:-1], len(weight)))


def _weight_chunks(weight: Tensor, forms: Sequence[str], blocks: Sequence[Tensor]) -> list[slice]:
    """Runs of rows that cut no block."""
    unit = lcm(*(block.shape[-1] for form, block in zip(forms, blocks, strict=True) if form != "tile"))
    return chunks(*weight.shape, unit, weight)


def _read(weight: Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight()
