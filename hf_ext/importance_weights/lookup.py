"""Ids to their weights: places among sorted keys, without a Python object or an index of their own."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from hf_ext.importance_weights.columns import identifiers
from hf_ext.importance_weights.lists import compact
from hf_ext.importance_weights.lookup_kernels import search_strings


@dataclass(frozen=True)
class Lookup:
    """Weights by id, or by group.

    column: what ids are called. keys: sorted. weights (keys,). unseen: what an id gets that is no key: "keep" the
    neutral value, "drop" the smallest, or a number.
    """

    column: str
    keys: pa.Array
    weights: np.ndarray
    neutral: float
    unseen: float | str

    def places(self, ids: Any) -> np.ndarray:
        """(n,): places among the keys, -1 for what is unseen."""
        return find(self.column, self.keys, as_ids(self.column, ids))

    def values(self, places: np.ndarray) -> np.ndarray:
        """(n,) float64."""
        values = self.weights[places]
        values[places < 0] = self.unseen_value
        return values

    @property
    def unseen_value(self) -> float:
        if self.unseen == "keep":
            return self.neutral
        return min(0.0, float(self.weights.min())) if self.unseen == "drop" else self.unseen

    def kept(self, places: np.ndarray, threshold: float) -> np.ndarray:
        """Which of them a threshold keeps."""
        kept = self.values(places) >= threshold
        if isinstance(self.unseen, str):
            kept[places < 0] = self.unseen == "keep"
        return kept

    def check_range(self, what: str, low: float, high: float) -> None:
        """
        Raises:
            ValueError: a weight outside [low, high], with its key.
        """
        outside = (self.weights < low) | (self.weights > high)
        if outside.any():
            at = int(np.argmax(outside))
            raise ValueError(
                f"{what}, and that of {self.keys[at].as_py()!r} is {self.weights[at]}, outside [{low:g}, {high:g}]; "
                "weights of method='multilinear' are inside"
            )

    def rescore(self, scores: Any, ids: Any, higher_is_better: bool) -> np.ndarray:
        """See `ImportanceWeights.rescore`."""
        scores = _array(scores.float() if isinstance(scores, Tensor) else scores).astype(np.float64)
        ids = _array(ids)
        if scores.shape != ids.shape:
            raise ValueError(f"scores of shape {scores.shape} and ids of shape {ids.shape} must have one shape")
        padding = self.padding(ids)
        wrong = ~(scores >= 0) & ~padding
        if np.isnan(scores[wrong]).any():
            raise ValueError("a score is NaN")
        if wrong.any():
            raise ValueError(
                f"a score of {scores[wrong][0]}: a weight would raise a negative score instead of lowering it; pass "
                "scores of at least 0, for example exp(scores), or scores minus their minimum"
            )
        self.check_range("rescore needs weights of at least 0", 0.0, math.inf)
        flat = ids.reshape(-1)
        weights = self.values(self.places(flat.tolist() if flat.dtype == object else flat)).reshape(scores.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            if higher_is_better:
                return np.where(padding, -np.inf, np.where(weights == 0, 0.0, scores * weights))
            return np.where(padding | (weights == 0), np.inf, scores / weights)

    def padding(self, ids: np.ndarray) -> np.ndarray:
        """Where a retriever had nothing more and wrote -1, unless that is an id."""
        if ids.dtype.kind not in "iu" or (pa.types.is_integer(self.keys.type) and self.places([-1])[0] >= 0):
            return np.zeros(ids.shape, bool)
        return ids == -1


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def as_ids(name: str, values: Any) -> pa.Array:
    """Lists, arrays, tensors, Series, Arrow arrays as int64 or large_string; a null stays one.

    Raises:
        TypeError, ValueError: not many ids, or neither integers nor strings.
    """
    if isinstance(values, str | bytes) or np.ndim(values) == 0:
        raise TypeError(f"{name!r} is {values!r}, and a list or an array of ids is expected")
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    if isinstance(values, list | tuple):
        values = [value.item() if hasattr(value, "item") else value for value in values]
    if not isinstance(values, pa.Array | pa.ChunkedArray):
        try:
            values = pa.array(values, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise TypeError(f"column {name!r} mixes kinds of ids: {error}") from None
        except OverflowError as error:
            raise ValueError(f"column {name!r} holds an integer beyond int64: {error}") from None
    return identifiers(name, _whole(values))


def _whole(values: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """Integers that became floats beside a null, as NumPy has it, are integers again where none was rounded."""
    if not pa.types.is_floating(values.type):
        return values
    numbers = values.to_numpy(zero_copy_only=False) if isinstance(values, pa.Array) else values.to_numpy()
    present = ~np.isnan(numbers)
    exact = 2**24 if numbers.dtype == np.float32 else 2**53
    if not (np.abs(numbers[present]) < exact).all() or (numbers[present] % 1 != 0).any():
        return values
    return pa.array(np.where(present, numbers, 0).astype(np.int64), mask=~present)


def find(name: str, keys: pa.Array, ids: pa.Array) -> np.ndarray:
    """(n,) int64: the place of each id among the sorted keys, -1 where it is not among them or null.

    Raises:
        TypeError: strings are looked up among integers, or the other way round.
    """
    places = np.full(len(ids), -1, np.int64)
    if pa.types.is_null(ids.type) or not len(ids):
        return places
    if ids.type != keys.type:
        raise TypeError(
            f"column {name!r} holds {_named(ids.type)} and the weights are of {_named(keys.type)}; use one kind of id"
        )
    valid = np.ones(len(ids), bool) if not ids.null_count else ids.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_integer(keys.type):
        own, wanted = keys.to_numpy(), ids.fill_null(0).to_numpy()
        at = np.minimum(np.searchsorted(own, wanted), len(own) - 1)
        found = valid & (own[at] == wanted)
        places[found] = at[found]
        return places
    search_strings(*_text(keys), *_text(ids), places)
    places[~valid] = -1
    return places


def _named(kind: pa.DataType) -> str:
    return "integers (int64)" if pa.types.is_integer(kind) else "strings (string)"


def _text(strings: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and bytes."""
    _, offsets, data = compact(strings).buffers()
    letters = np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8)
    return np.frombuffer(offsets, np.int64, len(strings) + 1), letters
