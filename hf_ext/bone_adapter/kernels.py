"""The linear algebra of the three forms on plain tensors, and its precision: what `ops` and `affine` differentiate.

What is done to a weight is local to its rows (in the block-affine forms, to runs of r rows), so a large weight can be
handled a few rows at a time. Arguments share one dtype unless the text says otherwise.
"""

from functools import reduce

import torch
from torch import Tensor

FORMS = ("tile", "bat", "bat_row")

# Entries of a float32 temporary: on a CPU it stays in the cache, elsewhere it fills the device.
_CPU_CHUNK = 2**19
_CHUNK = 2**24


def check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, not {form!r}")


def check_loaded(x: Tensor, *blocks: Tensor) -> None:
    """A product with a meta tensor does not fail on a CPU: it returns uninitialised memory."""
    if x.device.type != "meta" and any(block.device.type == "meta" for block in blocks):
        raise RuntimeError(
            f"The adapter's values were never loaded: its block is on the meta device, its input on {x.device}. "
            "Load the adapter's checkpoint, or create the adapter with low_cpu_mem_usage=False."
        )


# --- activations


def slice_sum(x: Tensor, r: int, dtype: torch.dtype) -> Tensor:
    """x (T, in) of any dtype -> (T, r): sum_j x_j, the last slice padded with zeros."""
    tokens, width = x.shape
    whole = width - width % r
    total = x[:, :whole].view(tokens, whole // r, r).sum(1, dtype=dtype)
    if whole < width:
        total[:, : width - whole] += x[:, whole:]
    return total


def tiled(t: Tensor, width: int) -> Tensor:
    """t (T, r) -> (T, width): copies of t side by side, the last one cut."""
    tokens, r = t.shape
    copies = -(-width // r)
    return t[:, None].expand(tokens, copies, r).reshape(tokens, copies * r)[:, :width]


def row_product(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """x + u (T, in) and sum_j u_j (T, r) with u_j = b_j x_j. block (in/r, r, r) in the dtype of the product."""
    slices = x.unflatten(1, (-1, block.shape[-1])).transpose(0, 1)
    u = torch.bmm(slices.to(block.dtype), block.transpose(1, 2)).to(x.dtype)
    return (slices + u).transpose(0, 1).flatten(1), u.sum(0)


def bat_product(x: Tensor, weight: Tensor, block: Tensor) -> Tensor:
    """x W'^T (T, R) of the bat form without W': y_i = sum_j W_ij (x_j + b_i x_j) + b_i s. For few tokens.

    x (T, in); R rows of W (R, in) in the dtype of the large product; block (R/r, r, r) and the result in x's.
    """
    (tokens, width), r = x.shape, block.shape[-1]
    slices = x.reshape(-1, r).expand(len(block), -1, r)
    z = torch.baddbmm(slices, slices, block.transpose(1, 2)).view(len(block), tokens, width)
    y = torch.bmm(z.to(weight.dtype), weight.unflatten(0, (-1, r)).transpose(1, 2)).to(x.dtype)
    y += slice_sum(x, r, x.dtype) @ block.transpose(1, 2)
    return y.transpose(0, 1).flatten(1)


# --- weights


def updated(form: str, weight: Tensor, block: Tensor) -> Tensor:
    """W' (R, in) of R rows of W; `block` the part of these rows (`part_of_block`)."""
    rows, width = weight.shape
    if form == "tile":
        return weight + tiled(block.T, width)
    r = block.shape[-1]
    w = _blockwise(form, weight, r)
    new = torch.baddbmm(w, w, block)
    if form == "bat":
        new.view(rows // r, r, width // r, r).add_(block[:, :, None])
        return new.view(rows, width)
    new.view(width // r, rows // r, r, r).add_(block[:, None])
    return new.transpose(0, 1).reshape(rows, width).contiguous()  # for r = 1, a reshape alone leaves it strided


def block_gradient(form: str, weight: Tensor, grad: Tensor, r: int) -> Tensor:
    """What R rows contribute to dL/d block, from W before the update and grad = dL/dW', both (R, in)."""
    if form == "tile":
        return slice_sum(grad, r, grad.dtype).T
    rows, width = weight.shape
    w, g = _blockwise(form, weight, r), _blockwise(form, grad, r)
    added = g.view(rows // r, r, width // r, r).sum(2) if form == "bat" else g.unflatten(1, (rows // r, r)).sum(1)
    return torch.baddbmm(added, w.transpose(1, 2), g)


def weight_gradient(form: str, grad: Tensor, block: Tensor) -> Tensor:
    """dL/dW (R, in), contiguous, from such a grad = dL/dW'."""
    if form == "tile":
        return grad
    g = _blockwise(form, grad, block.shape[-1])
    new = torch.baddbmm(g, g, block.transpose(1, 2))
    return (new if form == "bat" else new.transpose(0, 1)).reshape(grad.shape).contiguous()


def part_of_block(form: str, block: Tensor, rows: slice) -> Tensor:
    """A view of what rows `rows` of W use of a block."""
    if form == "tile":
        return block[:, rows]
    r = block.shape[-1]
    return block[rows.start // r : rows.stop // r] if form == "bat" else block


def _blockwise(form: str, weight: Tensor, r: int) -> Tensor:
    """(R, in) -> for each block the rows of r entries that meet it: bat (R/r, in, r), bat_row (in/r, R, r).

    For bat this is a view of contiguous rows: a row of W_ij lies in one piece, and r rows of W are `in` such pieces.
    """
    rows, width = weight.shape
    if form == "bat":
        return weight.view(rows // r, width, r)
    return weight.view(rows, width // r, r).transpose(0, 1)


# --- precision and size of temporaries


def wide(*tensors: Tensor) -> torch.dtype:
    """At least float32, and no narrower than any of `tensors`."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def differentiable(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def flat(x: Tensor) -> Tensor:
    """(..., features) -> (T, features)."""
    return x.reshape(-1, x.shape[-1])


def own(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A temporary as `shape`, to return from a Function: autograd lets nobody write into a view that one returns."""
    return torch.ops.aten._unsafe_view.default(x, shape)


def chunks(length: int, entries: int, unit: int, tensor: Tensor) -> list[slice]:
    """Slices of `length` items of `entries` each, whole multiples of `unit`, as large as a temporary may be."""
    size = _CPU_CHUNK if tensor.device.type == "cpu" and not torch.compiler.is_compiling() else _CHUNK
    step = unit * max(1, size // max(1, entries * unit))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
