"""Validation rows, corpora and fits with known weights, for the tests of what surrounds the mathematics."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Value
from datasets.table import InMemoryTable

from hf_ext import ImportanceWeights

ITEMS = 40  # retrieved in the fit; a corpus has more
KEYS: dict[str, Callable[[int], Any]] = {"int": lambda i: 10 * i - 47, "string": lambda i: f"doc-{i:03}"}
NEUTRAL = {"multilinear": 0.5, "shapley": 0.0, "banzhaf": 0.0, "loo": 0.0}
METHODS = ["multilinear", "shapley", "banzhaf", "loo", "mean"]


def source_of(i: int) -> str:
    return f"source {i % 7}"


def validation(seed: int = 0, rows: int = 50, kind: str = "string", items: int = ITEMS) -> dict[str, list]:
    """Dict of lists: ragged, with duplicates within a list, one empty list, every item retrieved at least once."""
    draw = np.random.default_rng(seed)
    lists = [draw.integers(0, items, size).tolist() for size in draw.integers(1, 9, rows)]
    lists[3] = []
    lists[-1] = list(range(items))
    good = draw.random(items) < 0.5
    return {
        "question": [f"question {row} of {seed}" for row in range(rows)],
        "retrieved": [[KEYS[kind](i) for i in row] for row in lists],
        "source": [[source_of(i) for i in row] for row in lists],
        "answers": [[f"answer {(i * 3 + good[i]) % 4}" for i in row] for row in lists],
        "utility": [[float(good[i] if draw.random() < 0.8 else draw.random()) for i in row] for row in lists],
    }


def fitted(rows: Any = None, *, kind: str = "string", **options: Any) -> ImportanceWeights:
    options = {"k": 3, "epochs": 5} | options
    return ImportanceWeights(**options).fit(validation(kind=kind) if rows is None else rows, progress=False)


def rows_for(weights: Mapping[Any, float], count: int = 1) -> dict[str, list]:
    """One item a row, `count` rows an item, such that method="mean" finds these weights.

    Its weight is (sum u + 2 mu) / (count + 2), and mu is the mean of the weights. No step rounds if the weights and
    their mean are a few binary digits long, and `count` is a power of two.
    """
    mean = sum(weights.values()) / len(weights)
    utilities = {key: (weight * (count + 2) - 2 * mean) / count for key, weight in weights.items()}
    items = [(key, utility) for _ in range(count) for key, utility in utilities.items()]
    return {"retrieved": [[key] for key, _ in items], "utility": [[utility] for _, utility in items]}


def of_weights(weights: Mapping[Any, float], count: int = 1, **options: Any) -> ImportanceWeights:
    """A fit with these weights; those that are a few binary digits long are hit exactly (`rows_for`)."""
    iw = ImportanceWeights(**{"k": 3, "method": "mean"} | options).fit(rows_for(weights, count), progress=False)
    assert dict(zip(iw.keys.to_pylist(), iw.weights, strict=True)) == weights
    return iw


def table_of(iw: ImportanceWeights) -> dict[Any, float]:
    return dict(zip(iw.keys.to_pylist(), iw.weights.tolist(), strict=True))


def looked_up(iw: ImportanceWeights, keys: Sequence[Any], unseen: float) -> list[float]:
    """The weights of these keys by a dict; `unseen` for all others, null among them."""
    table = table_of(iw)
    return [table.get(key, unseen) for key in keys]


def corpus_of(ids: Sequence[Any], type_: str | None = None, **columns: Any) -> Dataset:
    """A corpus of these ids with columns of other kinds beside them."""
    if type_ is None:
        type_ = "string" if any(isinstance(key, str) for key in ids) else "int64"
    columns = {
        "text": [f"text of {key}" for key in ids],
        "number": np.arange(len(ids), dtype=np.int16),
        "embedding": np.arange(2 * len(ids), dtype=np.float32).reshape(-1, 2),
    } | columns
    table = Dataset.from_dict(columns).with_format("arrow")[:]
    keys = pa.array(ids, Value(type_)())  # datasets itself takes no integer above 2^63
    return Dataset(InMemoryTable(table.add_column(0, "id", keys)))


def corpus(kind: str = "string", extra: int = 8, seed: int = 1, type_: str | None = None) -> Dataset:
    """All items and `extra` that no one retrieved, shuffled; with the column of their sources."""
    order = np.random.default_rng(seed).permutation(ITEMS + extra).tolist()
    return corpus_of([KEYS[kind](i) for i in order], type_, source=[source_of(i) for i in order])


def as_table(rows: Mapping[str, list]) -> pa.Table:
    return pa.table(dict(rows))


def as_dicts(rows: Mapping[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]


@contextmanager
def heard() -> Iterator[list[str]]:
    """What our code says meanwhile: by `warnings`, or by a logger of the package at level WARNING or above."""
    said: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    ear, logger = Ear(logging.WARNING), logging.getLogger("hf_ext")
    logger.addHandler(ear)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield said
    finally:
        logger.removeHandler(ear)
        hosts = DeprecationWarning | FutureWarning | ResourceWarning
        said.extend(str(warning.message) for warning in caught if not issubclass(warning.category, hosts))
