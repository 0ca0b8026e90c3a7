"""Whatever holds answers, scores or letters, as arrays."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np

from hf_ext.mcq_bias.letters import letter_index

NO_ANSWER, NONSENSE = -1, -2
_BEYOND = 1 << 40  # stands for every larger index, so that it fits an integer and a float64


def column(name: str, values: Any) -> np.ndarray | list[Any]:
    """The rows of an array, a tensor, a Series, an Arrow array, a column of a data set or a list; objects as a list.

    Raises:
        ValueError: it has no rows, or too many dimensions.
    """
    if isinstance(values, str | bytes | Mapping | set) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name}: found {values!r}, a {type(values).__name__}; expected one value a row")
    if hasattr(values, "isna") and not (isinstance(values.dtype, np.dtype) and values.dtype.kind == "f"):
        values = values.astype(object).where(values.notna(), None)  # of pandas: it writes None as NaN or NA
    if isinstance(values, np.ma.MaskedArray):
        values = values.tolist() if values.ndim == 1 else values.astype(np.float64).filled(np.nan)
    if isinstance(values, list):
        return values
    if hasattr(values, "detach") or (hasattr(values, "__array__") and not hasattr(values, "to_pylist")):
        values = array(values, name)
        if values.ndim not in (1, 2):
            raise ValueError(f"{name}: found an array of shape {values.shape}; expected one value or one list a row")
        return values if values.dtype.kind in "biuf" else values.tolist()
    if hasattr(values, "to_pylist"):
        return values.to_pylist()
    # A column of a data set reads all of a slice at once, and otherwise row by row.
    return list(values[:] if isinstance(values, Sequence) else values)


def array(values: Any, name: str) -> np.ndarray:
    """A tensor or an array in numpy's terms. Floats that numpy does not have, such as bf16, become float64, exactly.

    Raises:
        ValueError: a tensor of the user's argument `name` that is sparse, nested or without values.
    """
    if hasattr(values, "detach"):
        if values.is_nested or values.is_meta or str(values.layout) != "torch.strided":
            kind = "nested" if values.is_nested else "meta" if values.is_meta else str(values.layout)
            raise ValueError(
                f"{name}: found a {kind} tensor; expected an ordinary one, as to_dense() or a list of rows"
            )
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    values = np.asarray(values)
    return values.astype(np.float64) if values.dtype.kind == "V" else values


def is_row(value: Any) -> bool:
    """Whether it is a list of numbers, and not one answer."""
    return isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0


def is_missing(value: Any) -> bool:
    """Whether it is None, or the NA of pandas, which equals nothing and is neither true nor false."""
    return value is None or type(value).__name__ == "NAType"


def indices(values: np.ndarray | list[Any]) -> np.ndarray:
    """(n,) int64: what the indices and letters stand for; `NO_ANSWER`, or `NONSENSE` where it is no answer at all."""
    if isinstance(values, list):
        plain = set(map(type, values)) <= {int}
        try:
            values = np.array(values if plain else list(map(_index, values)), np.int64)
        except OverflowError:
            values = np.array(list(map(_index, values)), np.int64)
    if values.dtype.kind == "b":
        return np.full(len(values), NONSENSE)
    if values.dtype.itemsize < 8:
        values = values.astype(np.float64)  # which holds all of them, and `_BEYOND`
    good = values >= NO_ANSWER
    if values.dtype.kind == "f":
        good &= (values == np.floor(values)) & np.isfinite(values)
    return np.where(good, np.minimum(values, _BEYOND), NONSENSE).astype(np.int64)


def _index(value: Any) -> int:
    if hasattr(value, "item"):  # a scalar of numpy or torch
        value = value.item()
    if is_missing(value):
        return NO_ANSWER
    if isinstance(value, str):
        return _letter(value)
    whole = isinstance(value, Real) and not isinstance(value, bool) and value == value // 1
    return int(min(value, _BEYOND)) if whole and value >= NO_ANSWER else NONSENSE


@lru_cache(1 << 12)
def _letter(text: str) -> int:
    index = letter_index(text)
    return NO_ANSWER if index is None else index


def score_rows(values: np.ndarray | list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """(scores (n, width) float64, padded with -inf; lengths (n,)).

    Raises:
        ValueError: a row does not hold real numbers.
    """
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        return values.astype(np.float64), np.full(len(values), values.shape[1])
    if all(isinstance(row, list | tuple) for row in values):
        rows, kinds = values, set(map(type, chain.from_iterable(values)))
        if not all(map(_is_number_type, kinds)):  # scalars of torch
            rows = [[value.item() if hasattr(value, "item") else value for value in row] for row in values]
            kinds = set(map(type, chain.from_iterable(rows)))
    else:
        rows = [array(row, f"predictions[{number}]") for number, row in enumerate(values)]
        kinds = {row.dtype.type for row in rows if row.size}
    if not all(map(_is_number_type, kinds)) or any(getattr(row, "ndim", 1) != 1 for row in rows):
        _refuse_row(rows)
    lengths = np.fromiter(map(len, rows), np.int64, len(rows))
    return padded(chain.from_iterable(rows), lengths, -np.inf, np.float64), lengths


def padded(flat: Any, lengths: np.ndarray, pad: float, dtype: type) -> np.ndarray:
    """(n, longest): the numbers of all rows, one after another, each row filled up with `pad`."""
    result = np.full((len(lengths), lengths.max(initial=0)), pad, dtype)
    result[np.arange(result.shape[1]) < lengths[:, None]] = np.fromiter(flat, dtype, lengths.sum())
    return result


def _is_number_type(kind: type) -> bool:
    return issubclass(kind, Real) and not issubclass(kind, bool)


def _refuse_row(rows: Sequence[Any]) -> None:
    for number, row in enumerate(rows):
        values = row.ravel().tolist() if isinstance(row, np.ndarray) else row
        if getattr(row, "ndim", 1) != 1 or not all(_is_number_type(type(value)) for value in values):
            raise ValueError(f"predictions[{number}]={row!r} is no list of scores; expected one real number a choice")
