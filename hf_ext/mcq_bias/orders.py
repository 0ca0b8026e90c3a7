"""Rows of one group: a question in several orders of its choices, and which option stood where."""

import numpy as np

from hf_ext.mcq_bias.columns import Columns
from hf_ext.mcq_bias.extra_columns import refuse_permutation, sizes_of


def options(columns: Columns, k: np.ndarray, letters: int) -> np.ndarray:
    """(n, letters): the option behind each position, -1 beyond k.

    By the row's permutation; without one, a cyclic rotation of the choices that has option 0 on the gold.

    Raises:
        ValueError: a permutation of another number of options than k.
    """
    position, sizes = np.arange(letters), k[:, None]
    rotated = np.where(position < sizes, (position - columns.references[:, None]) % sizes, -1)
    if columns.permutation is None:
        return rotated
    places = columns.permutation
    given = sizes_of(places)
    for row in np.flatnonzero((given != k) & (given > 0))[:1]:
        refuse_permutation(row, places[row, : given[row]], k[row])
    places = np.pad(places[:, :letters], ((0, 0), (0, max(0, letters - places.shape[1]))), constant_values=-1)
    return np.where(given[:, None] > 0, places, rotated)


def numbered(labels: list[str]) -> np.ndarray:
    """(n,): groups numbered from 0 in the order in which they come, -1 where there is none."""
    numbers = {"": -1}
    return np.fromiter((numbers.setdefault(label, len(numbers) - 1) for label in labels), np.int64, len(labels))


def check_groups(columns: Columns, group: np.ndarray, k: np.ndarray, gold_option: np.ndarray) -> None:
    """
    Raises:
        ValueError: rows of a group differ in k or in the option that is right. All arrays (n,).
    """
    rows = np.flatnonzero(group >= 0)
    _, first = np.unique(group[rows], return_index=True)
    head = rows[first][group[rows]]  # the first row of the group of each row
    for what, values in (("k", k), ("the gold option", gold_option)):
        for place in np.flatnonzero(values[rows] != values[head])[:1]:
            row, other = rows[place], head[place]
            raise ValueError(
                f"group {columns.group[row]!r}: {what} is {values[other]} in row {other} and {values[row]} in row "
                f"{row}; rows of a group are one question with its choices reordered"
            )
