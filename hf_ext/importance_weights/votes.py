"""Answers of several items against each other: weighted votes, thresholds, and what they score."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from hf_ext import compat
from hf_ext.checks import check_word
from hf_ext.importance_weights.columns import ListColumn, MissingColumnError, tables
from hf_ext.importance_weights.config import ImportanceConfig
from hf_ext.importance_weights.lists import encode, read_lists
from hf_ext.importance_weights.vote_kernels import read_utility, winners

METRICS = ("vote", "utility")
Metric = str | Callable[[dict[str, list[Any]]], float]


class Judge:
    """A validation set that scores selections and weights of its slots by a metric."""

    def __init__(self, dataset: Any, config: ImportanceConfig, metric: Metric, groups: Any = None) -> None:
        """
        Raises:
            ValueError: unknown metric, or a column that it needs is missing or not as it has to be.
        """
        if not callable(metric):
            check_word("metric", metric, METRICS, "or a callable")
        self.metric, self.k = metric, config.k
        self.columns: dict[str, Any] = {}
        dataset = _kept_together(dataset)
        self.lists = read_lists(dataset, config, groups)
        if not len(self.lists):
            raise ValueError("the validation set has no rows")
        if metric == "vote":
            self.answers = _answers(dataset, config)
        elif callable(metric):
            self.columns = _all_columns(dataset)

    def score(self, weights: np.ndarray) -> float:
        """weights (S,): what each slot weighs; 0 is not there."""
        lists = self.lists
        if self.metric == "vote":
            slots = np.empty(len(lists), np.int64)
            winners(lists.offsets, self.answers, weights, self.k, slots)
            return float(lists.utilities[slots[slots >= 0]].sum() / len(lists))
        if self.metric == "utility":
            return float(read_utility(lists.offsets, lists.utilities, weights, self.k))
        score = self.metric(self._selected(weights > 0))
        if not isinstance(score, int | float | np.number) or not math.isfinite(score):
            raise ValueError(f"the metric returned {score!r}, and a finite number is expected")
        return float(score)

    def _selected(self, kept: np.ndarray) -> dict[str, list[Any]]:
        """All columns, with every list that has a value a slot cut to the first k kept."""
        offsets = self.lists.offsets
        chosen = [np.flatnonzero(kept[a:b])[: self.k] for a, b in pairwise(offsets)]
        lengths = np.diff(offsets).tolist()
        result = {}
        for name, rows in self.columns.items():
            aligned = all(isinstance(row, list) and len(row) == n for row, n in zip(rows, lengths, strict=True))
            result[name] = (
                [[row[at] for at in places] for row, places in zip(rows, chosen, strict=True)] if aligned else rows
            )
        return result


def _kept_together(dataset: Any) -> Any:
    """A stream can be read once only."""
    from datasets import IterableDataset

    if not isinstance(dataset, IterableDataset):
        return dataset
    if not compat.stream_is_arrow(dataset):
        return list(dataset.with_format(None))
    pieces = list(dataset.with_format("arrow").iter(batch_size=10_000))
    return pa.concat_tables(pieces) if pieces else pa.table({})


def _answers(dataset: Any, config: ImportanceConfig) -> np.ndarray:
    name = config.answer_column
    pieces = []
    try:
        for first, table in tables(dataset, [config.retrieved_column, name]):
            retrieved, answers = (ListColumn.of(column, table[column], first) for column in table.column_names)
            retrieved.must_match(answers)
            pieces.append(_as_words(answers.values))
    except MissingColumnError as error:
        raise ValueError(
            f"metric='vote' compares answers, and {error}; name it by answer_column={name!r}, or take metric='utility'"
        ) from None
    return encode(name, pieces)[1]


def _as_words(answers: pa.Array) -> pa.Array:
    """Answers of any kind as what can be told apart."""
    kind = answers.type
    if pa.types.is_null(kind) or pa.types.is_integer(kind):
        return answers if pa.types.is_null(kind) else answers.cast(pa.int64())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return answers.cast(pa.large_string())
    return pa.array([repr(answer) for answer in answers.to_pylist()], pa.large_string())


def _all_columns(dataset: Any) -> dict[str, list[Any]]:
    from datasets import Dataset

    if isinstance(dataset, Dataset):
        return dataset.with_format(None)[:]
    if isinstance(dataset, pa.Table):
        return dataset.to_pydict()
    if isinstance(dataset, list | tuple):
        return {name: [row.get(name) for row in dataset] for name in dataset[0]}
    return {name: [row.tolist() if hasattr(row, "tolist") else row for row in rows] for name, rows in dataset.items()}


def candidates(weights: np.ndarray, counts: np.ndarray) -> list[float]:
    """The smallest weight, which prunes nothing seen, and the weights that remove 10, 20, .. 90 % of the slots at
    least; equal weights go together.
    """
    values, place = np.unique(weights, return_inverse=True)
    below = np.concatenate([[0], np.cumsum(np.bincount(place, counts))])  # slots of smaller weight than values[i]
    total = below[-1]
    chosen = {0}
    for tenths in range(1, 10):
        at = int(np.searchsorted(below[:-1], total * tenths / 10 - 1e-9 * total))
        if at < len(values):
            chosen.add(at)
    return [float(values[at]) for at in sorted(chosen)]


def weighted_vote(answers: Sequence[Any], weights: np.ndarray, k: int) -> Any:
    """The answer with the largest sum of weights over the first k of weight > 0; None where there is none."""
    distinct: list[Any] = []
    codes = np.empty(len(answers), np.int64)
    for at, answer in enumerate(answers):
        if answer not in distinct:
            distinct.append(answer)
        codes[at] = distinct.index(answer)
    slots = np.empty(1, np.int64)
    winners(np.array([0, len(answers)]), codes, np.asarray(weights, np.float64), k, slots)
    return None if slots[0] < 0 else answers[int(slots[0])]
