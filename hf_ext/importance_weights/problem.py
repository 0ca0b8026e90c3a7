"""A validation set that is ready to be fitted: this rank's lists, and the figures of all ranks."""

import math
import warnings
from collections.abc import Sized
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from hf_ext.importance_weights.bounds import unit
from hf_ext.importance_weights.config import ImportanceConfig
from hf_ext.importance_weights.functions import utility_range
from hf_ext.importance_weights.list_kernels import mix_slots
from hf_ext.importance_weights.lists import Lists, compact, merge_keys, read_lists, two_groups
from hf_ext.importance_weights.ranks import Ranks
from hf_ext.importance_weights.sums import Sums


@dataclass
class Problem:
    """What a fit needs to know.

    keys, counts: what is weighed, sorted, and how many slots each has. tuples, slots: of all ranks. spread: R, the
    range of the utilities with 0; all sums are of utilities divided by `factor`, and so is it. longest: of all lists.
    first: global number of this rank's row 0. Item sums are over items of a list, key sums over keys; they are one
    where nothing is grouped.
    """

    config: ImportanceConfig
    ranks: Ranks
    lists: Lists
    tuples: int
    slots: int
    first: int
    spread: float
    factor: float
    longest: int
    counts: np.ndarray
    item_counts: np.ndarray
    by_item: Any
    by_key: Any

    @property
    def largest_group_gradient(self) -> float:
        """A group can displace as much as a whole list is worth, an item only one place."""
        return self.spread * min(1.0, self.longest / self.config.k)

    @property
    def keys(self) -> pa.Array:
        return self.lists.keys

    def scales(self, counts: np.ndarray, bound: float) -> tuple[float, float]:
        """Units of sums of gradients, each at most `bound`, and of the sum of the values."""
        return unit(int(counts.max(initial=1)), bound), unit(self.tuples, self.spread)

    def add(self, sums: np.ndarray, value: int, scales: tuple[float, float]) -> tuple[np.ndarray, float]:
        """Sums and value of all ranks, as numbers."""
        total = self.ranks.add(np.append(sums, value))
        return total[:-1] / scales[0], int(total[-1]) / scales[1]

    @cached_property
    def digest(self) -> str:
        """Of the rows, the keys and the groups; of the order of rows only where tuples are drawn by their number."""
        rows = self.rows_digest if self.config.delta == 0 else self._mixed(self.first)
        keys = b"".join(str(keys.type).encode() + _hash(keys) for keys in (self.lists.item_keys, self.keys))
        groups = b"" if self.lists.groups is None else self.lists.groups.tobytes()
        return sha256(rows.encode() + keys + groups).hexdigest()

    @cached_property
    def rows_digest(self) -> str:
        """Of the rows of all ranks, whatever their order."""
        return self._mixed(-1)

    def _mixed(self, first: int) -> str:
        lists = self.lists
        mixed = np.uint64(mix_slots(lists.offsets, lists.items, lists.utilities, first)).astype(np.int64)
        return f"{self.tuples}-{self.slots}-{int(self.ranks.add(np.array([mixed]))[0]) % 2**64:016x}"


def prepare(
    dataset: Any,
    config: ImportanceConfig,
    ranks: Ranks,
    accelerator: Any = None,
    groups: Any = None,
    presharded: bool = False,
    threads: int | None = None,
) -> Problem:
    """Read this rank's rows and share what the others have to know.

    Raises:
        TypeError, ValueError: the same on every rank, when a row of any rank is not as it has to be.
    """
    if not presharded and isinstance(dataset, Sized):
        ranks.same("numbers of rows (presharded=True takes rows of each process's own)", len(dataset))
    rank, world = (0, 1) if presharded else (ranks.rank, ranks.world)
    lists = ranks.agree(lambda: read_lists(dataset, config, groups, rank, world))
    ranks.agree(lambda: _merge(lists, ranks))
    rows = ranks.gather((len(lists), len(lists.items)))
    tuples, slots = (sum(numbers) for numbers in zip(*rows, strict=True))
    if not tuples:
        raise ValueError("the validation set has no rows")
    if not slots:
        raise ValueError(f"nothing is retrieved: every list of {config.retrieved_column!r} is empty")
    extremes = ranks.largest(np.array([lists.utilities.max(initial=0.0), -lists.utilities.min(initial=0.0)]))
    spread, utilities, factor = _in_reach(utility_range(np.array([extremes[0], -extremes[1]])), lists.utilities)
    if not math.isfinite(spread) or not math.isfinite(spread * slots):
        raise ValueError(f"utilities from {-extremes[1]} to {extremes[0]}: their sums are beyond float64; scale them")
    longest = int(ranks.largest(np.array([np.diff(lists.offsets).max(initial=0)]))[0])
    item_counts = ranks.add(np.bincount(lists.items, minlength=len(lists.item_keys)))
    threads = threads or torch.get_num_threads()
    dtype = np.dtype(config.dtype)

    def sums(players: np.ndarray, count: int) -> Sums:
        if accelerator is not None and accelerator.device.type == "cuda":
            from hf_ext.importance_weights.device_sums import DeviceSums

            return DeviceSums(lists.offsets, players, utilities, count, config.k, dtype, threads, accelerator.device)
        return Sums(lists.offsets, players, utilities, count, config.k, dtype, threads)

    by_item = sums(lists.items, len(lists.item_keys))
    by_key = by_item if lists.groups is None else sums(lists.players(), len(lists.keys))
    counts = item_counts
    if lists.groups is not None:
        counts = np.bincount(lists.groups, item_counts, minlength=len(lists.keys)).astype(np.int64)
    first = sum(count for count, _ in rows[: ranks.rank])
    if _is_padded(lists.item_keys) and ranks.rank == 0:
        warnings.warn(
            "-1 is one of the retrieved ids and is weighed as an item; some retrievers pad with it: leave it out then",
            stacklevel=3,
        )
    return Problem(
        config, ranks, lists, tuples, slots, first, spread, factor, longest, counts, item_counts, by_item, by_key
    )


def _in_reach(spread: float, utilities: np.ndarray) -> tuple[float, np.ndarray, float]:
    """Range and utilities divided by a factor, a power of two, and it: 1 unless float32 would not reach so far."""
    exponent = math.frexp(spread)[1]
    if abs(exponent) <= 60 or not math.isfinite(spread):
        return spread, utilities, 1.0
    # In two steps, neither of which leaves the range of float64.
    half = exponent // 2
    scaled = np.ldexp(np.ldexp(utilities, -half), half - exponent)
    return math.ldexp(math.ldexp(spread, -half), half - exponent), scaled, math.ldexp(1.0, exponent)


def _is_padded(keys: pa.Array) -> bool:
    return pa.types.is_integer(keys.type) and bool(np.isin(-1, keys.to_numpy()))


def _merge(lists: Lists, ranks: Ranks) -> None:
    """Number items and groups of this rank's lists as all ranks do."""
    if not ranks.together:
        return
    items, place = merge_keys(ranks.gather(lists.item_keys), lists.item_keys)
    lists.items = place[lists.items] if len(place) else lists.items
    lists.item_keys = items
    if lists.groups is None:
        return
    keys, place_of_group = merge_keys(ranks.gather(lists.group_keys), lists.group_keys)
    mine = np.full(len(items), -1, np.int64)
    mine[place] = place_of_group[lists.groups]
    everywhere = ranks.largest(mine)
    lists.groups, lists.group_keys = everywhere.astype(np.int32), keys
    wrong = (mine >= 0) & (mine != everywhere)
    if wrong.any():
        item = int(np.argmax(wrong))
        raise two_groups(items[item].as_py(), keys[int(mine[item])].as_py(), keys[int(everywhere[item])].as_py())


def _hash(keys: pa.Array) -> bytes:
    return b"".join(sha256(buffer).digest() for buffer in compact(keys).buffers() if buffer is not None)
