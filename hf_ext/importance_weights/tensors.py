"""The recursion of reference.py on torch tensors, any device: all lists of a batch at once, item by item."""

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # after so many items it is checked whether a list can be cut


def multilinear(
    utilities: Tensor, probabilities: Tensor, k: int, tail: Tensor | None = None, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (B,) and gradients (B, M) of B lists, and the largest P(X <= k) at a cut, a tensor ().

    utilities, probabilities: (B, M); a list shorter than M has probability and utility 0 behind its end. tail: () or
    (B,); a list is cut after the first chunk at whose end P(X <= k) <= tail, if its length `lengths (B,)` goes further.
    """
    count, length = utilities.shape
    read = max(1, min(k, length))
    columns = read if tail is None else read + 1
    u, p = utilities, probabilities
    largest = u.new_zeros(())
    f = u.new_zeros(length + 1, count, columns)
    f[0, :, 0] = 1
    for i in range(length):
        before = F.pad(f[i, :, :-1], (1, 0))
        f[i + 1] = f[i] + p[:, i, None] * (before - f[i])
        if tail is not None and (i + 1) % CHUNK == 0 and i + 1 < length:
            few = f[i + 1].sum(-1)
            cut = (few <= tail) if lengths is None else (few <= tail) & (lengths > i + 1)
            largest = torch.maximum(largest, torch.where(cut, few, 0).max())
            later = torch.arange(length, device=u.device) > i
            u, p = (torch.where(cut[:, None] & later, 0, x) for x in (u, p))
            if lengths is not None:
                lengths = torch.where(cut, 0, lengths)

    V = u.new_zeros(count, read + 1)
    gradient = torch.empty_like(u)
    for i in range(length - 1, -1, -1):
        D = u[:, i, None] + V[:, 1:] - V[:, :-1]
        gradient[:, i] = (f[i, :, :read] * D).sum(-1)
        V[:, :-1] += p[:, i, None] * D
    return V[:, 0] / k, gradient / k, largest


def shapley(utilities: Tensor, k: int) -> Tensor:
    """Exact Shapley values of the items of each list; utilities (..., M), best rank first."""
    length = utilities.shape[-1]
    ranks = torch.arange(1, length + 1, device=utilities.device, dtype=utilities.dtype)
    share = ranks.clamp(max=k) / ranks / k
    steps = torch.cat([utilities[..., :-1] - utilities[..., 1:], utilities[..., -1:]], -1) * share
    return steps.flip(-1).cumsum(-1).flip(-1)
