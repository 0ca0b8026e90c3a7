"""The columns that may be left out: number of choices, group and permutation."""

from itertools import chain
from typing import Any

import numpy as np

from hf_ext.mcq_bias.config import FEWEST, MOST, check_num_choices
from hf_ext.mcq_bias.reading import NONSENSE, column, indices, is_row, padded

UNKNOWN = -1  # number of choices


def check_length(name: str, values: Any, n: int) -> None:
    """
    Raises:
        ValueError: other than n rows.
    """
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} rows, and predictions has {n}")


def common_num_choices(values: Any) -> int | None:
    """The one number for all rows; None if there is one a row, or nothing.

    Raises:
        ValueError: no integer from 2 to 26.
    """
    if values is None or (hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0):
        return None
    return check_num_choices(values.item() if hasattr(values, "item") else values)


def read_num_choices(values: Any, n: int) -> np.ndarray:
    """(n,) int64, `UNKNOWN` where nothing says it.

    Raises:
        ValueError: another length, or a number that is no integer from 2 to 26.
    """
    if values is None:
        return np.full(n, UNKNOWN)
    common = common_num_choices(values)
    if common is not None:
        return np.full(n, common)
    values = column("num_choices", values)
    check_length("num_choices", values, n)
    if isinstance(values, np.ndarray) and ((values >= FEWEST) & (values <= MOST)).all():
        known = indices(values)
        if (known != NONSENSE).all():
            return known
    rows = [value.item() if hasattr(value, "item") else value for value in values]
    known = [UNKNOWN if k is None else check_num_choices(k, f"num_choices[{row}]") for row, k in enumerate(rows)]
    return np.array(known, np.int64)


def read_group(values: Any, n: int) -> list[str] | None:
    """The text of each label, "" for none; None if no row has one.

    Raises:
        ValueError: another length.
    """
    if values is None:
        return None
    values = column("group", values)
    check_length("group", values, n)
    rows = values.tolist() if isinstance(values, np.ndarray) else values
    # NaN is how tables say that there is none.
    labels = ["" if label is None or label != label else str(label) for label in rows]
    return labels if any(labels) else None


def read_permutation(values: Any, k: np.ndarray) -> np.ndarray | None:
    """(n, longest) int64, -1 from the end of each row on; None if no row has one.

    Raises:
        ValueError: another length, or a row that is no permutation of as many options as it has choices.
    """
    if values is None:
        return None
    rows = column("permutation", values)
    check_length("permutation", rows, len(k))
    rows = [[] if row is None else row for row in rows]
    for number, row in enumerate(rows):
        if not is_row(row):
            raise ValueError(f"permutation[{number}]={row!r} is no list; expected the option behind each position")
    flat = indices(list(chain.from_iterable(rows)))
    places = padded(flat, np.fromiter(map(len, rows), np.int64, len(rows)), -1, np.int64)
    sizes, position = sizes_of(places), np.arange(places.shape[1])
    inside = position < sizes[:, None]
    found = np.sort(np.where(inside, places, len(position)), axis=1)
    right = (found == position).all(axis=1, where=inside) & ((sizes == k) | (k == UNKNOWN) | (sizes == 0))
    for row in np.flatnonzero(~right)[:1]:
        refuse_permutation(row, rows[row], sizes[row] if k[row] == UNKNOWN else k[row])
    return places if sizes.any() else None


def sizes_of(places: np.ndarray) -> np.ndarray:
    """(n,) entries of each permutation, up to the last that is not -1. places (n, longest)."""
    return np.where(places != -1, np.arange(1, places.shape[1] + 1), 0).max(axis=1, initial=0)


def refuse_permutation(row: int, entries: Any, k: int) -> None:
    entries = entries.tolist() if hasattr(entries, "tolist") else list(entries)
    raise ValueError(f"permutation[{row}]={entries} is no permutation of 0 to {k - 1}, the options of {k} choices")
