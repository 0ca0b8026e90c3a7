"""Data sets with weights: a column of them, rows above a threshold, rows by chance."""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset, Value

from hf_ext.checks import check_count
from hf_ext.importance_weights.columns import require
from hf_ext.importance_weights.config import check_seed
from hf_ext.importance_weights.lookup import Lookup, as_ids


def with_column(batch: Any, lookup: Lookup, output: str, dtype: str) -> Any:
    """What `map` makes of a batch or an example: an Arrow table or a DataFrame with the column, else the column."""
    if not isinstance(batch, pa.Table | pd.DataFrame | Mapping):
        raise TypeError(f"a {type(batch).__name__} is no batch; call it through corpus.map(weights, batched=True)")
    present = batch.column_names if isinstance(batch, pa.Table) else list(batch)
    require([lookup.column], present)
    ids = batch[lookup.column]
    if isinstance(ids, str | bytes) or np.ndim(ids) == 0:
        return {output: _column([ids], lookup, dtype)[0]}
    column = _column(ids, lookup, dtype)
    if isinstance(batch, pd.DataFrame):
        return batch.assign(**{output: column})
    if not isinstance(batch, pa.Table):
        return {output: column}
    if output in present:
        return batch.set_column(present.index(output), output, pa.array(column))
    return batch.append_column(output, pa.array(column))


def _column(ids: Any, lookup: Lookup, dtype: str) -> np.ndarray:
    return lookup.values(lookup.places(ids)).astype(dtype)


def places_in(corpus: Any, lookup: Lookup) -> np.ndarray:
    """(rows,): the place of each row among the keys.

    Raises:
        TypeError: not a Dataset. ValueError: it has no column of ids.
    """
    if not isinstance(corpus, Dataset):
        raise TypeError(f"a {type(corpus).__name__} is no corpus here; a datasets.Dataset is expected")
    require([lookup.column], corpus.column_names)
    if not len(corpus):
        return np.empty(0, np.int64)
    places = lookup.places(corpus.select_columns([lookup.column]).with_format("arrow")[:][lookup.column])
    if (places < 0).all():
        warnings.warn(
            f"none of the {len(places)} rows has one of the {len(lookup.keys)} keys that were weighed; their column "
            f"{lookup.column!r} and the validation set's ids do not belong together",
            stacklevel=4,
        )
    return places


def annotate(corpus: Any, lookup: Lookup, output: str, dtype: str) -> Any:
    """See `ImportanceWeights.annotate`."""
    column = lookup.values(places_in(corpus, lookup)).astype(dtype)
    order = corpus.column_names if output in corpus.column_names else [*corpus.column_names, output]
    rest = corpus.remove_columns(output) if output in corpus.column_names else corpus
    return rest.add_column(output, column).select_columns(order)


def annotate_stream(corpus: IterableDataset, weights: Any, output: str, dtype: str) -> IterableDataset:
    """The same for a stream, through `map`, whose features stay known."""
    features = None if corpus.features is None else corpus.features.copy()
    if features is not None:
        features[output] = Value(dtype)
    return corpus.map(weights, batched=True, features=features)


def prune(corpus: Any, lookup: Lookup, threshold: float) -> Any:
    """See `ImportanceWeights.prune`."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float | np.number) or math.isnan(threshold):
        raise ValueError(f"threshold={threshold!r} is no number")
    if isinstance(corpus, IterableDataset):
        return corpus.filter(partial(_keep, lookup=lookup, threshold=threshold), batched=True)
    kept = np.flatnonzero(lookup.kept(places_in(corpus, lookup), threshold))
    if len(corpus) and not len(kept):
        warnings.warn(f"all {len(corpus)} rows are pruned: no weight is at least {threshold}", stacklevel=3)
    return corpus.select(kept)


def _keep(batch: Any, lookup: Lookup, threshold: float) -> list[bool]:
    require([lookup.column], list(batch))
    return lookup.kept(lookup.places(batch[lookup.column]), threshold).tolist()


def sample(corpus: Any, lookup: Lookup, seed: int) -> Any:
    """See `ImportanceWeights.sample`."""
    check_seed(seed)
    lookup.check_range("sample keeps keys with their weight as probability", 0.0, 1.0)
    if not isinstance(lookup.unseen, str) and not 0 <= lookup.unseen <= 1:
        raise ValueError(f"unseen={lookup.unseen!r} is no probability; sample needs one in [0, 1]")
    places = places_in(corpus, lookup)
    generator = np.random.default_rng(seed)
    kept = (generator.random(len(lookup.keys)) < lookup.weights)[places]
    unseen = np.flatnonzero(places < 0)
    if isinstance(lookup.unseen, str):
        kept[unseen] = lookup.unseen == "keep"
    elif len(unseen):
        ids = as_ids(lookup.column, corpus.select(unseen).with_format("arrow")[:][lookup.column])
        kept[unseen] = [_uniform(seed, key) < lookup.unseen for key in ids.to_pylist()]
    return corpus.select(np.flatnonzero(kept))


def _uniform(seed: int, key: Any) -> float:
    """A number in [0, 1) of the key alone, whatever else the corpus holds."""
    return int.from_bytes(sha256(f"{seed} {key!r}".encode()).digest()[:6]) / 2**48


def sampler(
    dataset: Any, lookup: Lookup, num_samples: int | None, replacement: bool, seed: int
) -> torch.utils.data.WeightedRandomSampler:
    """See `ImportanceWeights.sampler`."""
    check_seed(seed)
    lookup.check_range("a sampler draws rows in proportion to their weights", 0.0, math.inf)
    if isinstance(dataset, Dataset) and len(dataset) > 1 << 24:
        raise ValueError(
            f"{len(dataset)} rows: torch draws from 2^24 at most; thin the data set out with sample() first"
        )
    weights = lookup.values(places_in(dataset, lookup))
    count = len(weights) if num_samples is None else num_samples
    if not len(weights):
        raise ValueError("the data set has no rows to draw from")
    check_count("num_samples", count)
    usable = int((weights > 0).sum())
    if usable == 0 or (weights < 0).any():
        raise ValueError("no row has a weight above 0" if usable == 0 else "a row has a negative weight")
    if not replacement and usable < count:
        raise ValueError(f"num_samples={count} without replacement, and {usable} rows have a weight above 0")
    generator = torch.Generator().manual_seed(seed)
    return torch.utils.data.WeightedRandomSampler(weights.tolist(), int(count), replacement, generator)
