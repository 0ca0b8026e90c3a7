"""The three forms of Bone as arXiv 2409.15371 defines them, block by block: the specification of this package.

A weight `W (out, in)` is cut into r x r blocks `W_ij`, i counting along out and j along in; `x_j` is the j-th slice of
an input. Called "shards" in the paper; its Bat-Col is `bat` here, its Bat-Row `bat_row`. W is frozen, b is trained.
"""

import torch
from torch import Tensor


def tile(weight: Tensor, block: Tensor) -> Tensor:
    """Bone (paper from v4 on): W'[a, k] = W[a, k] + B[k mod r, a]. block `(r, out)`; any r, the last tile is cut."""
    r = block.shape[0]
    new = torch.empty_like(weight)
    for a in range(weight.shape[0]):
        for k in range(weight.shape[1]):
            new[a, k] = weight[a, k] + block[k % r, a]
    return new


def bat(weight: Tensor, block: Tensor) -> Tensor:
    """Block-affine, one block for each row of blocks: W'_ij = W_ij + W_ij b_i + b_i. block `(out/r, r, r)`."""
    r = block.shape[-1]
    new = torch.empty_like(weight)
    for i in range(weight.shape[0] // r):
        for j in range(weight.shape[1] // r):
            w = weight[i * r : (i + 1) * r, j * r : (j + 1) * r]
            new[i * r : (i + 1) * r, j * r : (j + 1) * r] = w + w @ block[i] + block[i]
    return new


def bat_row(weight: Tensor, block: Tensor) -> Tensor:
    """Block-affine, one block for each column of blocks: W'_ij = W_ij + W_ij b_j + b_j. block `(in/r, r, r)`."""
    r = block.shape[-1]
    new = torch.empty_like(weight)
    for i in range(weight.shape[0] // r):
        for j in range(weight.shape[1] // r):
            w = weight[i * r : (i + 1) * r, j * r : (j + 1) * r]
            new[i * r : (i + 1) * r, j * r : (j + 1) * r] = w + w @ block[j] + block[j]
    return new


FORMS = {"tile": tile, "bat": bat, "bat_row": bat_row}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, steps: list[tuple[str, Tensor]]) -> Tensor:
    """y = W' x + bias with the forms in `steps` (form, block) applied to W one after the other.

    x (..., in), weight (out, in), bias (out,) or None; returns (..., out).
    """
    for form, block in steps:
        weight = FORMS[form](weight, block)
    y = x @ weight.T
    return y if bias is None else y + bias
