"""Sums over all lists of a rank, by the kernels, on every core: exact integers, so that their order does not matter."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np

from hf_ext.importance_weights.kernels import NEGLIGIBLE, scratch, sum_of_gradients
from hf_ext.importance_weights.lanes import lanes
from hf_ext.importance_weights.list_kernels import (
    group_counts,
    repeats,
    sum_of_group_gradients,
    sum_of_shapley_values,
    sum_of_utilities,
)

LISTS_AT_ONCE = 4096  # by a thread, before it asks for more
Total = tuple[np.ndarray, int, float]


@dataclass
class Sums:
    """Over lists of `players` (S,) int32 in 0..count-1 with `utilities` (S,) float64; list r is
    offsets[r]:offsets[r + 1].

    Every sum is an int64 array (count,) in units of 2^-s, given 2^s as `scale`.
    """

    offsets: np.ndarray
    players: np.ndarray
    utilities: np.ndarray
    count: int
    k: int
    dtype: np.dtype
    threads: int
    by_length: np.ndarray = field(init=False)
    longest: int = field(init=False)

    def __post_init__(self) -> None:
        lengths = np.diff(self.offsets)
        self.longest = int(lengths.max(initial=0))
        # A block takes as long as its longest list.
        uneven = bool((lengths != self.longest).any())
        self.by_length = np.argsort(lengths, kind="stable") if uneven else np.arange(len(lengths))

    @property
    def _read(self) -> int:
        """How many items of a list are read at most."""
        return max(1, min(self.k, self.longest))

    def gradients(
        self, weights: np.ndarray, scales: tuple[float, float], tail: float = 0.0, rows: np.ndarray | None = None
    ) -> Total:
        """Gradients of the multilinear extension, sum of the values, and the largest P(X <= k) at a cut.

        rows: the lists to take (all by default). tail: see kernels.block.
        """
        weights = np.ascontiguousarray(weights, np.float64)

        def kernel(order: np.ndarray, sums: np.ndarray, shared: bool, room: Any) -> tuple[int, float]:
            return sum_of_gradients(
                order,
                self.offsets,
                self.players,
                self.utilities,
                weights,
                self._read,
                tail,
                NEGLIGIBLE[self.dtype],
                np.array(scales) / self.k,
                sums,
                shared,
                *room,
            )

        def room() -> tuple[Any, ...]:
            return np.zeros(lanes(self.dtype), np.int64), scratch(self.longest, self._read, self.dtype)

        return self._run(kernel, room, rows)

    def group_gradients(self, weights: np.ndarray, scales: tuple[float, float], shapley: bool = False) -> Total:
        """Gradients of groups that are in or out as a whole; `shapley`: their mean over p at (p, .., p)."""
        weights = np.ascontiguousarray(weights, np.float64)
        nodes, starts = (
            _gauss_legendre(self._groups_in_a_list()) if shapley else (np.empty((0, 2)), np.zeros(1, np.int64))
        )

        def kernel(order: np.ndarray, sums: np.ndarray, shared: bool, room: Any) -> tuple[int, float]:
            return (
                sum_of_group_gradients(
                    order,
                    self.offsets,
                    self.players,
                    self.utilities,
                    weights,
                    self._read,
                    nodes,
                    starts,
                    np.array(scales) / self.k,
                    sums,
                    shared,
                    room,
                ),
                0.0,
            )

        def room() -> tuple[Any, ...]:
            most = max(self.longest, 1)
            integers = [np.zeros(most, np.int64) for _ in range(3)]
            numbers = [np.zeros(most) for _ in range(2)]
            local, seen, members = integers
            chances, gradient = numbers
            return local, seen, chances, gradient, members, np.zeros((most + 1, self._read)), np.zeros(self._read)

        return self._run(kernel, room, None)

    def shapley_values(self, scale: float) -> np.ndarray:
        def kernel(order: np.ndarray, sums: np.ndarray, shared: bool, room: np.ndarray) -> tuple[int, float]:
            sum_of_shapley_values(order, self.offsets, self.players, self.utilities, self.k, scale, sums, shared, room)
            return 0, 0.0

        return self._run(kernel, lambda: np.zeros(max(self.longest, 1)), None)[0]

    def plain(self, scale: float) -> np.ndarray:
        """Sums of the utilities themselves."""

        def kernel(order: np.ndarray, sums: np.ndarray, shared: bool, room: None) -> tuple[int, float]:
            sum_of_utilities(order, self.offsets, self.players, self.utilities, scale, sums, shared)
            return 0, 0.0

        return self._run(kernel, lambda: None, None)[0]

    def _run(self, kernel: Callable[..., tuple[int, float]], room: Callable[[], Any], rows: np.ndarray | None) -> Total:
        """`kernel` over all pieces of the lists; each thread has its own room, and its own sums where that is cheap."""
        order = self.by_length if rows is None else rows[np.argsort(np.diff(self.offsets)[rows], kind="stable")]
        pieces = [order[at : at + LISTS_AT_ONCE] for at in range(0, len(order), LISTS_AT_ONCE)]
        threads = max(1, min(self.threads, len(pieces)))
        shared = threads > 1 and threads * self.count > len(self.players) // 4
        copies = [np.zeros(self.count, np.int64) for _ in range(1 if shared else threads)]
        places: SimpleQueue[tuple[np.ndarray, Any]] = SimpleQueue()
        for thread in range(threads):
            places.put((copies[0 if shared else thread], room()))

        def work(piece: np.ndarray) -> tuple[int, float]:
            place = places.get()
            try:
                return kernel(piece, place[0], shared, place[1])
            finally:
                places.put(place)

        if threads == 1:
            results = [work(piece) for piece in pieces]
        else:
            with ThreadPoolExecutor(threads) as pool:
                results = list(pool.map(work, pieces))
        for copy in copies[1:]:
            copies[0] += copy
        return copies[0], sum(int(value) for value, _ in results), max((cut for _, cut in results), default=0.0)

    def repeats(self) -> tuple[int, np.ndarray]:
        """How often a player stands in one list at most, and how many lists hold each player (count,)."""
        holders = np.zeros(self.count, np.int64)
        return repeats(self.offsets, self.players, np.zeros(self.count, np.int32), holders), holders

    def _groups_in_a_list(self) -> np.ndarray:
        space = [np.zeros(max(self.longest, 1), np.int64) for _ in range(2)]
        return np.unique(group_counts(self.offsets, self.players, *space))


def _gauss_legendre(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and factors on [0, 1], exact for what has degree count - 1, one after the other; where each begins."""
    tables, starts, at = [np.empty((0, 2))], np.zeros(counts.max(initial=0) + 1, np.int64), 0
    for count in counts[counts > 0]:
        nodes, factors = np.polynomial.legendre.leggauss(-(-count // 2))
        tables.append(np.stack([(nodes + 1) / 2, factors / 2], 1))
        starts[count] = at
        at += len(nodes)
    return np.concatenate(tables), starts
