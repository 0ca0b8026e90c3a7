"""Nearest documents for every query, so that two data sets with embeddings are enough to begin with."""

from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset

from hf_ext.checks import check_count, check_word
from hf_ext.importance_weights.columns import ListColumn, require
from hf_ext.importance_weights.lookup import as_ids

INDEXES = ("auto", "faiss", "exact")
SCORES_AT_ONCE = 1 << 25
QUERIES_AT_ONCE = 256


def retrieve(
    corpus: Dataset,
    queries: Dataset,
    k: int,
    *,
    embedding_column: str = "embedding",
    id_column: str = "id",
    index: str = "auto",
) -> Dataset:
    """`queries` with a column "retrieved": the ids of the k documents of largest inner product, best first.

    Args:
        corpus: columns of ids and embeddings.
        queries: a column of embeddings of the same width.
        k: how many ids a query gets, all of the corpus where it holds fewer.
        embedding_column: of both, lists of numbers.
        id_column: of the corpus, integers or strings.
        index: "faiss" (through `datasets`, in float32), "exact" (blocks of a matrix product in float64, ties by
            row), or "auto": faiss where it is installed.

    Raises:
        ValueError: a column is missing, widths differ, an embedding is not finite, k < 1, no such index.
        TypeError: not a Dataset. ImportError: index="faiss" without faiss.
    """
    check_count("k", k)
    check_word("index", index, INDEXES)
    for what, dataset in (("corpus", corpus), ("queries", queries)):
        if not isinstance(dataset, Dataset):
            raise TypeError(f"{what} is a {type(dataset).__name__}; a datasets.Dataset is expected")
    require([id_column, embedding_column], corpus.column_names)
    require([embedding_column], queries.column_names)
    documents, wanted = (_matrix(dataset, embedding_column) for dataset in (corpus, queries))
    if len(documents) and len(wanted) and documents.shape[1] != wanted.shape[1]:
        raise ValueError(
            f"embeddings of the corpus have {documents.shape[1]} numbers and those of the queries {wanted.shape[1]}"
        )
    if index == "faiss" and find_spec("faiss") is None:
        raise ImportError("index='faiss' needs faiss: `pip install faiss-cpu`, or take index='exact'")
    rows = (
        _by_faiss(documents, wanted, k)
        if index == "faiss" or (index == "auto" and find_spec("faiss") is not None)
        else _exact(documents, wanted, k)
    )
    ids = as_ids(id_column, corpus.select_columns([id_column]).with_format("arrow")[:][id_column])
    found = ids.take(pa.array(rows.reshape(-1)))
    offsets = pa.array(np.arange(len(rows) + 1, dtype=np.int64) * rows.shape[1])
    column = pa.LargeListArray.from_arrays(offsets, found)
    kept = queries.remove_columns("retrieved") if "retrieved" in queries.column_names else queries
    return kept.add_column("retrieved", column)


def _matrix(dataset: Dataset, name: str) -> np.ndarray:
    """(rows, width) float64."""
    if not len(dataset):
        return np.empty((0, 0))
    column = ListColumn.of(name, dataset.select_columns([name]).with_format("arrow")[:][name], 0)
    numbers, widths = column.numbers(), np.diff(column.offsets)
    if (widths != widths[0]).any():
        row = int(np.argmax(widths != widths[0]))
        raise ValueError(f"column {name!r}: row 0 has {widths[0]} numbers and row {row} has {widths[row]}")
    return numbers.reshape(len(dataset), int(widths[0])).copy()  # Arrow's memory is read-only, which torch warns of


def _exact(documents: np.ndarray, wanted: np.ndarray, k: int) -> np.ndarray:
    """(queries, min(k, documents)) rows of largest inner product, ties by row, block of documents by block."""
    k = min(k, len(documents))
    rows = np.empty((len(wanted), k), np.int64)
    block = max(k, SCORES_AT_ONCE // QUERIES_AT_ONCE)
    for first in range(0, len(wanted), QUERIES_AT_ONCE):
        query = torch.from_numpy(wanted[first : first + QUERIES_AT_ONCE])
        scores, best = query.new_empty(len(query), 0), torch.empty(len(query), 0, dtype=torch.long)
        for at in range(0, len(documents), block):
            part = torch.from_numpy(documents[at : at + block])
            scores = torch.cat([scores, query @ part.T], 1)
            best = torch.cat([best, torch.arange(at, at + len(part)).expand(len(query), -1)], 1)
            order = _largest(scores, min(k, scores.shape[1]))
            scores, best = scores.gather(1, order), best.gather(1, order)
        rows[first : first + QUERIES_AT_ONCE] = best.numpy()
    return rows


def _largest(scores: torch.Tensor, k: int) -> torch.Tensor:
    """(queries, k) columns of the largest scores, ties by column: topk alone breaks them as it likes."""
    if k == 0:
        return torch.empty(len(scores), 0, dtype=torch.long)
    least = scores.topk(k, 1).values[:, -1:]
    order = torch.empty(len(scores), k, dtype=torch.long)
    for row, enough in enumerate(scores >= least):
        columns = enough.nonzero()[:, 0]
        order[row] = columns[scores[row, columns].sort(descending=True, stable=True).indices[:k]]
    return order


def _by_faiss(documents: np.ndarray, wanted: np.ndarray, k: int) -> np.ndarray:
    from datasets.search import FaissIndex
    from faiss import METRIC_INNER_PRODUCT

    index = FaissIndex(metric_type=METRIC_INNER_PRODUCT)
    index.add_vectors(documents.astype(np.float32))
    found = index.search_batch(wanted.astype(np.float32), min(k, len(documents)))
    return np.asarray(found.total_indices)
