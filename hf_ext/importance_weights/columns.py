"""Whatever holds a data set as Arrow tables, and its list columns as arrays, every row checked."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node

from hf_ext import compat

KINDS = "a datasets.Dataset, a datasets.IterableDataset, a pyarrow.Table, a list of dicts or a dict of lists"
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal)
ROWS_AT_ONCE = 50_000


class MissingColumnError(ValueError):
    """A column that is needed is not there."""


def tables(dataset: Any, columns: Sequence[str], rank: int = 0, world: int = 1) -> Iterator[tuple[int, pa.Table]]:
    """(number of the first row, table of `columns`) piece by piece; with a world, the share of this rank.

    Raises:
        TypeError: not a data set.
        ValueError: a column is missing.
    """
    if isinstance(dataset, IterableDataset):
        yield from _streamed(dataset, columns, rank, world)
        return
    if isinstance(dataset, Dataset):
        require(columns, dataset.column_names)
        first, last = share(len(dataset), rank, world)
        part = dataset.select(range(first, last)).select_columns(list(columns)).with_format("arrow")
        pieces = part.iter(batch_size=ROWS_AT_ONCE)
    else:
        table = _table(dataset, columns)
        first, last = share(table.num_rows, rank, world)
        pieces = (table.slice(at, min(ROWS_AT_ONCE, last - at)) for at in range(first, last, ROWS_AT_ONCE))
    for piece in pieces:
        yield first, piece.select(list(columns))
        first += piece.num_rows


def share(count: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [first, last) of a rank."""
    return count * rank // world, count * (rank + 1) // world


def require(columns: Sequence[str], present: Sequence[str]) -> None:
    for name in columns:
        if name not in present:
            there = ", ".join(map(repr, present)) or "none"
            raise MissingColumnError(f"there is no column {name!r}; the columns are {there}")


def _streamed(dataset: Any, columns: Sequence[str], rank: int, world: int) -> Iterator[tuple[int, pa.Table]]:
    part = split_dataset_by_node(dataset, rank, world) if world > 1 else dataset
    part = part.with_format("arrow" if compat.stream_is_arrow(part) else None)
    first = 0
    for piece in part.iter(batch_size=ROWS_AT_ONCE):
        table = _table(piece, columns, first)
        yield first, table
        first += table.num_rows


def _table(dataset: Any, columns: Sequence[str], first: int = 0) -> pa.Table:
    """The columns of a table, a list of dicts or a dict of lists, which begin with row `first`."""
    if isinstance(dataset, pa.Table):
        require(columns, dataset.column_names)
        return dataset.select(list(columns))
    if isinstance(dataset, list | tuple) and all(isinstance(row, Mapping) for row in dataset):
        if dataset:
            require(columns, list(dataset[0]))
        for number, row in enumerate(dataset):
            for name in columns:
                if name not in row:
                    present = ", ".join(map(repr, row)) or "nothing"
                    raise MissingColumnError(f"row {first + number} has no {name!r}; it has {present}")
        return pa.table({name: _column(name, [row[name] for row in dataset], first) for name in columns})
    of_splits = isinstance(dataset, Mapping) and any(isinstance(x, Dataset | IterableDataset) for x in dataset.values())
    if isinstance(dataset, Mapping) and not of_splits:
        require(columns, list(dataset))
        parts = {name: _column(name, dataset[name], first) for name in columns}
        counts = {name: len(column) for name, column in parts.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"columns of different lengths: {counts}")
        return pa.table(parts)
    hint = "; choose one of its splits" if of_splits else ""
    raise TypeError(f"a {type(dataset).__name__} is no data set here{hint}: {KINDS} is expected")


def _column(name: str, values: Any, first: int) -> pa.Array:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in values]
    try:
        return pa.array(rows, from_pandas=False)
    except OverflowError as error:
        raise ValueError(f"column {name!r} holds an integer beyond int64: {error}") from None
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        for number, row in enumerate(rows):
            try:
                pa.array([*rows[:1], row])
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
                raise ValueError(
                    f"column {name!r}, row {first + number}: {row!r} is of another kind than row {first} ({error})"
                ) from None
        raise ValueError(f"column {name!r} mixes values of different kinds: {error}") from None


@dataclass
class ListColumn:
    """A column of lists: row r is `values[offsets[r]:offsets[r + 1]]`; `first` is the number of row 0."""

    name: str
    first: int
    offsets: np.ndarray
    values: pa.Array

    @classmethod
    def of(cls, name: str, column: pa.ChunkedArray, first: int) -> "ListColumn":
        """
        Raises:
            ValueError: not lists, or a null list or a null in one, with its row.
        """
        array = joined(column)
        kind = array.type
        if pa.types.is_null(kind) and not len(array):
            array = pa.array([], pa.list_(pa.null()))
        elif not (is_list(kind) or pa.types.is_null(kind)):
            raise ValueError(f"column {name!r} holds {kind}, and a list a row is expected")
        if array.null_count:
            row = first + int(np.argmin(array.is_valid().to_numpy(zero_copy_only=False)))
            raise ValueError(f"row {row}: column {name!r} is null, and a list is expected (an empty one is fine)")
        lengths = pc.list_value_length(array).to_numpy()
        offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        result = cls(name, first, offsets, array.flatten())
        if result.values.null_count:
            valid = result.values.is_valid().to_numpy(zero_copy_only=False)
            raise ValueError(f"row {result.row_of(int(np.argmin(valid)))}: column {name!r} holds a null")
        return result

    def row_of(self, slot: int) -> int:
        """The number of the row to which a value belongs."""
        return self.first + int(np.searchsorted(self.offsets, slot, side="right")) - 1

    def must_match(self, other: "ListColumn") -> None:
        """
        Raises:
            ValueError: a row's lists are of different lengths, with both.
        """
        mine, theirs = np.diff(self.offsets), np.diff(other.offsets)
        if (mine != theirs).any():
            row = int(np.argmax(mine != theirs))
            raise ValueError(
                f"row {self.first + row}: {self.name!r} has {mine[row]} values and {other.name!r} has {theirs[row]}; "
                "they must have one for each other"
            )

    def numbers(self) -> np.ndarray:
        """The values in float64.

        Raises:
            ValueError: not numbers, or not finite, with the row.
        """
        kind = self.values.type
        if pa.types.is_null(kind):
            return np.empty(0)
        if not any(is_one(kind) for is_one in NUMBERS):
            raise ValueError(f"column {self.name!r} holds lists of {kind}, and numbers are expected")
        values = self.values.cast(pa.int8()) if pa.types.is_boolean(kind) else self.values
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        if not np.isfinite(numbers).all():
            slot = int(np.argmin(np.isfinite(numbers)))
            raise ValueError(
                f"row {self.row_of(slot)}: column {self.name!r} holds {numbers[slot]}, not a finite number"
            )
        return numbers

    def identifiers(self) -> pa.Array:
        """The values, integers in the width in which they are, or large_string.

        Raises:
            ValueError: neither integers nor strings, or an integer beyond int64.
        """
        wide = identifiers(self.name, self.values)
        return self.values if pa.types.is_integer(self.values.type) else wide


def joined(column: pa.ChunkedArray) -> pa.Array:
    """One array; a single chunk is not copied, which combine_chunks does."""
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def is_list(kind: pa.DataType) -> bool:
    plain = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return plain or "list_view" in str(kind)


def identifiers(name: str, values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Ids of any width as int64 or large_string (or null, where there is no value at all).

    Raises:
        ValueError: neither integers nor strings, or an integer beyond int64.
    """
    if isinstance(values, pa.ChunkedArray):
        values = joined(values)
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    kind = values.type
    if pa.types.is_null(kind):
        return values
    if pa.types.is_integer(kind):
        try:
            return values.cast(pa.int64())
        except pa.ArrowInvalid as error:
            raise ValueError(f"column {name!r} holds an integer beyond int64: {error}") from None
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or "string_view" in str(kind):
        return values.cast(pa.large_string())
    raise ValueError(f"column {name!r} holds {kind}; ids and groups are integers or strings")
