"""The validation set as numbers: which items stand in which list, with which utilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hf_ext.importance_weights.columns import ListColumn, identifiers, tables
from hf_ext.importance_weights.config import ImportanceConfig


@dataclass
class Lists:
    """Rows of lists, best rank first: row r is slots offsets[r]:offsets[r + 1].

    offsets (N + 1,) int64; items (S,) int32, indices into `item_keys`, which is sorted; utilities (S,) float64. With
    groups, `groups (items,)` int32 says to which of the sorted `group_keys` an item belongs. `first`: number of row 0.
    """

    offsets: np.ndarray
    items: np.ndarray
    utilities: np.ndarray
    item_keys: pa.Array
    groups: np.ndarray | None = None
    group_keys: pa.Array | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def keys(self) -> pa.Array:
        """What is weighed: groups, or items."""
        return self.item_keys if self.group_keys is None else self.group_keys

    def players(self) -> np.ndarray:
        """(S,) int32: for each slot the index of its key."""
        return self.items if self.groups is None else self.groups[self.items]


def read_lists(dataset: Any, config: ImportanceConfig, groups: Any = None, rank: int = 0, world: int = 1) -> Lists:
    """Rows of a validation set; `groups`: table or mapping from id to group, in place of a column.

    Raises:
        TypeError, ValueError: a row that is not as it has to be, with its number.
    """
    columns = [config.retrieved_column, config.utility_column]
    in_rows = config.group_column is not None and groups is None
    if in_rows:
        columns.append(config.group_column)
    lengths, ids, utilities, labels = [], [], [], []
    begin = None
    for first, table in tables(dataset, columns, rank, world):
        begin = first if begin is None else begin
        lists = [ListColumn.of(name, table[name], first) for name in columns]
        for other in lists[1:]:
            lists[0].must_match(other)
        lengths.append(np.diff(lists[0].offsets))
        ids.append(lists[0].identifiers())
        utilities.append(lists[1].numbers())
        if in_rows:
            labels.append(lists[2].identifiers())
    offsets = np.zeros(sum(map(len, lengths)) + 1, np.int64)
    np.cumsum(np.concatenate([*lengths, np.empty(0, np.int64)]), out=offsets[1:])
    keys, items = encode(config.retrieved_column, ids)
    result = Lists(offsets, items, _joined(utilities), keys, first=begin or 0)
    if in_rows:
        result.group_keys, by_slot = encode(config.group_column, labels)
        result.groups = _one_group_each(result, by_slot)
    elif groups is not None:
        result.group_keys, result.groups = _look_up(groups, keys, config)
    return result


def encode(name: str, pieces: Sequence[pa.Array]) -> tuple[pa.Array, np.ndarray]:
    """(sorted distinct values, index of each value in them as int32)."""
    pieces = [piece for piece in pieces if not pa.types.is_null(piece.type)]
    kinds = {"int64" if pa.types.is_integer(piece.type) else str(piece.type) for piece in pieces}
    if len(kinds) > 1:
        raise ValueError(f"column {name!r} holds {' here and '.join(sorted(kinds))} there; one kind is expected")
    if not pieces:
        return pa.array([], pa.int64()), np.empty(0, np.int32)
    if kinds == {"int64"}:
        dense = _encode_dense([piece.to_numpy() for piece in pieces])
        if dense is not None:
            return dense
        pieces = [piece.cast(pa.int64()) for piece in pieces]
    encoded = pa.chunked_array(pieces).dictionary_encode()
    if not encoded.num_chunks:
        return pieces[0].slice(0, 0), np.empty(0, np.int32)
    values = encoded.chunk(encoded.num_chunks - 1).dictionary
    order = pc.sort_indices(values).to_numpy()
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    codes = np.empty(len(encoded), np.int32)
    at = 0
    for chunk in encoded.chunks:
        np.take(place, chunk.indices.to_numpy(), out=codes[at : at + len(chunk)])
        at += len(chunk)
    return values.take(pa.array(order)), codes


def _encode_dense(pieces: Sequence[np.ndarray]) -> tuple[pa.Array, np.ndarray] | None:
    """`encode` by a table over the range of integers, where that is not much longer than they are many."""
    count = sum(map(len, pieces))
    if not count:
        return None
    low = min(int(piece.min()) for piece in pieces if len(piece))
    high = max(int(piece.max()) for piece in pieces if len(piece))
    if high - low >= max(4 * count, 1 << 16) or high - low >= 1 << 31:
        return None
    present = np.zeros(high - low + 1, bool)
    for piece in pieces:
        present[piece.astype(np.int64) - low] = True
    place = np.cumsum(present, dtype=np.int32) - np.int32(1)
    codes = np.empty(count, np.int32)
    at = 0
    for piece in pieces:
        np.take(place, piece.astype(np.int64) - low, out=codes[at : at + len(piece)])
        at += len(piece)
    return pa.array(np.flatnonzero(present) + low), codes


def compact(keys: pa.Array) -> pa.Array:
    """The same keys in buffers that hold nothing else, so that equal keys are equal bytes."""
    return pa.concat_arrays([keys.slice(0, 0), keys]) if len(keys) else pa.array([], keys.type)


def merge_keys(all_keys: Sequence[pa.Array], mine: pa.Array) -> tuple[pa.Array, np.ndarray]:
    """(sorted union of several sorted keys, index in it of each of `mine`).

    Raises:
        ValueError: keys of different kinds.
    """
    filled = [keys for keys in all_keys if len(keys)]
    kinds = {str(keys.type) for keys in filled}
    if len(kinds) > 1:
        raise ValueError(f"ids are {' on one rank and '.join(sorted(kinds))} on another; one kind is expected")
    if not filled:
        return mine, np.empty(0, np.int32)
    union = pc.unique(pa.concat_arrays(filled))
    union = union.take(pc.sort_indices(union))
    return union, pc.index_in(mine.cast(union.type), union).to_numpy(zero_copy_only=False).astype(np.int32)


def _one_group_each(lists: Lists, by_slot: np.ndarray) -> np.ndarray:
    groups = np.full(len(lists.item_keys), -1, np.int32)
    groups[lists.items] = by_slot
    wrong = groups[lists.items] != by_slot
    if wrong.any():
        slot = int(np.argmax(wrong))
        item, pair = lists.items[slot], sorted((int(groups[lists.items[slot]]), int(by_slot[slot])))
        raise two_groups(lists.item_keys[int(item)].as_py(), *(lists.group_keys[group].as_py() for group in pair))
    return groups


def two_groups(item: Any, one: Any, other: Any) -> ValueError:
    return ValueError(f"item {item!r} is in group {one!r} and in group {other!r}; an item belongs to one")


def _look_up(groups: Any, keys: pa.Array, config: ImportanceConfig) -> tuple[pa.Array, np.ndarray]:
    """(sorted groups of these items, index of each item's group), from a mapping or a table of ids and groups."""
    if isinstance(groups, Mapping) and not {config.id_column, config.group_column} <= set(groups):
        ids, labels = pa.array(list(groups)), pa.array(list(groups.values()))
    else:
        name_of_ids, name_of_groups = config.id_column, config.group_column
        pieces = [table for _, table in tables(groups, [name_of_ids, name_of_groups])]
        table = pa.concat_tables(pieces) if pieces else pa.table({name_of_ids: [], name_of_groups: []})
        ids, labels = table[name_of_ids], table[name_of_groups]
    ids, labels = identifiers("groups", ids), identifiers("groups", labels)
    if len(keys) and ids.type != keys.type:
        raise ValueError(f"groups has ids of type {ids.type}, and the lists hold {keys.type}")
    at = pc.index_in(keys, ids)
    if at.null_count:
        missing = keys.filter(pc.is_null(at))
        raise ValueError(f"groups names no group of {len(missing)} retrieved items, among them {missing[0].as_py()!r}")
    found = labels.take(at)
    if found.null_count:
        raise ValueError(f"groups has a null for item {keys.filter(pc.is_null(found))[0].as_py()!r}")
    group_keys, of_item = encode("groups", [found])
    _refuse_contradictions(keys, found, ids, labels)
    return group_keys, of_item


def _refuse_contradictions(keys: pa.Array, found: pa.Array, ids: pa.Array, labels: pa.Array) -> None:
    """Of a table, one row names the group of an item; every other has to name the same."""
    place = pc.index_in(ids, keys)
    ids, labels, place = (column.filter(pc.is_valid(place)) for column in (ids, labels, place))
    wrong = pc.fill_null(pc.not_equal(labels, found.take(place)), True).to_numpy(zero_copy_only=False)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise two_groups(ids[row].as_py(), found[place[row].as_py()].as_py(), labels[row].as_py())


def _joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """One array; where there is one piece only, it: the memory of the Arrow table."""
    return pieces[0] if len(pieces) == 1 else np.concatenate([*pieces, np.empty(0)])
