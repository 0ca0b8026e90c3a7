"""Sums over all lists on a CUDA device, by the recursion on tensors; the rest by the kernels of the CPU."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ext.importance_weights import tensors
from hf_ext.importance_weights.sums import Sums, Total

BYTES_AT_ONCE = 1 << 30


@dataclass
class DeviceSums(Sums):
    """As `Sums`; gradients of the multilinear extension are computed on `device`.

    They agree with those of the CPU to rounding, not to the bit; integer sums make them the same on every run.
    """

    device: Any

    def gradients(
        self, weights: np.ndarray, scales: tuple[float, float], tail: float = 0.0, rows: np.ndarray | None = None
    ) -> Total:
        dtype = torch.float64 if self.dtype == np.float64 else torch.float32
        chances = torch.from_numpy(np.ascontiguousarray(weights)).to(self.device, dtype)
        sums = torch.zeros(self.count, dtype=torch.int64, device=self.device)
        bound = torch.tensor(tail, dtype=dtype, device=self.device) if tail > 0 else None
        value, largest = 0, 0.0
        order = self.by_length if rows is None else rows[np.argsort(np.diff(self.offsets)[rows], kind="stable")]
        for lists in self._batches(order):
            players, utilities, lengths, there = self._padded(lists, dtype)
            p = torch.where(there, chances[players], 0)
            values, gradient, cut = tensors.multilinear(utilities, p, self.k, bound, lengths)
            sums.index_add_(0, players[there], torch.round(gradient[there].double() * scales[0]).long())
            value += int(torch.round(values.double() * scales[1]).long().sum())
            largest = max(largest, float(cut))
        return sums.cpu().numpy(), value, largest

    def group_gradients(self, weights: np.ndarray, scales: tuple[float, float], shapley: bool = False) -> Total:
        self._tell("of groups as a whole")
        return super().group_gradients(weights, scales, shapley)

    def shapley_values(self, scale: float) -> np.ndarray:
        self._tell("of Shapley values")
        return super().shapley_values(scale)

    def _tell(self, what: str) -> None:
        warnings.warn(
            f"sums {what} are computed on the CPU; {self.device} computes gradients of items only", stacklevel=2
        )

    def _batches(self, order: np.ndarray) -> Any:
        """Lists of like length, as many as fit: f of every item is kept."""
        at = 0
        while at < len(order):
            longest = int(self.offsets[order[-1] + 1] - self.offsets[order[-1]])
            row = max(longest, 1) * (min(self.k, longest) + 1) * self.dtype.itemsize
            count = max(1, BYTES_AT_ONCE // row)
            yield order[at : at + count]
            at += count

    def _padded(self, lists: np.ndarray, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """players and utilities (B, M), lengths (B,), and where there is an item."""
        begin, lengths = self.offsets[lists], self.offsets[lists + 1] - self.offsets[lists]
        depth = np.arange(lengths.max(initial=0))
        there = depth < lengths[:, None]
        slots = np.where(there, begin[:, None] + depth, 0)
        players = torch.from_numpy(self.players[slots]).to(self.device).long()
        utilities = torch.from_numpy(np.where(there, self.utilities[slots], 0)).to(self.device, dtype)
        return players, utilities, torch.from_numpy(lengths).to(self.device), torch.from_numpy(there).to(self.device)
