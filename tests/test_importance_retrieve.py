"""hf_ext.importance_weights.retrieve against brute force in float64: order, ties, ids, storage, and what it refuses.

All vectors have one length here. Then inner product, cosine and distance rank alike, and each may be the measure.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import (
    Array2D,
    Dataset,
    Features,
    LargeList,
    Sequence,
    Value,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
)
from datasets.table import InMemoryTable
from importance_corpora import heard

from hf_ext import ImportanceWeights
from hf_ext.importance_weights import retrieve

IDS: dict[str, Callable[[int], Any]] = {
    "int": lambda row: 1000 - 3 * row,
    "string": lambda row: f"doc {row * 7 % 1000}",
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    disable_progress_bars()
    yield
    enable_progress_bars()


def sphere(seed: int, rows: int, width: int = 8) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((rows, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def signs(seed: int, rows: int, width: int = 6) -> np.ndarray:
    """Corners of a cube: exact in every type, and full of ties."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], (rows, width))


def corpus_of(vectors: np.ndarray, kind: str = "int", feature: Any = None, name: str = "embedding") -> Dataset:
    columns = {"id": [IDS[kind](row) for row in range(len(vectors))], name: vectors.tolist()}
    features = {"id": Value("int64" if kind == "int" else "string"), name: feature or Sequence(Value("float32"))}
    return Dataset.from_dict(columns, features=Features(features))


def queries_of(vectors: np.ndarray, feature: Any = None, name: str = "embedding") -> Dataset:
    columns = {"question": [f"question {row}" for row in range(len(vectors))], name: vectors.tolist()}
    features = {"question": Value("string"), name: feature or Sequence(Value("float32"))}
    return Dataset.from_dict(columns, features=Features(features))


def brute(corpus: np.ndarray, queries: np.ndarray, k: int) -> list[list[int]]:
    """Rows by decreasing inner product in float64; ties by row."""
    corpus, queries = (np.asarray(each, np.float64) for each in (corpus, queries))
    return [sorted(range(len(corpus)), key=lambda row: (-(corpus[row] @ query), row))[:k] for query in queries]


def wanted(corpus: np.ndarray, queries: np.ndarray, k: int, kind: str = "int") -> list[list]:
    return [[IDS[kind](row) for row in rows] for rows in brute(corpus, queries, k)]


def found(data: Dataset) -> list[list]:
    return data.with_format("arrow")[:]["retrieved"].to_pylist()


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("kind", IDS)
def test_against_brute_force(kind, k):
    vectors, asked = np.float32(sphere(0, 200)), np.float32(sphere(1, 30))
    queries = queries_of(asked)
    result = retrieve(corpus_of(vectors, kind), queries, k)
    assert found(result) == wanted(vectors, asked, k, kind)
    assert isinstance(result, Dataset)
    assert result["question"][:] == queries["question"][:]  # in their order
    assert result.column_names == ["question", "embedding", "retrieved"]
    assert result.remove_columns("retrieved").features == queries.features
    assert result.features["retrieved"].feature.dtype in (["int64"] if kind == "int" else ["string", "large_string"])
    assert queries.column_names == ["question", "embedding"]  # it is as it was


@pytest.mark.parametrize("rows, asked", [(3000, 17), (17, 3000), (1500, 700)], ids=["corpus", "queries", "both"])
def test_more_than_a_block(rows, asked):
    vectors, questions = np.float32(sphere(2, rows)), np.float32(sphere(3, asked))
    result = found(retrieve(corpus_of(vectors), queries_of(questions), 5))
    scores = np.float64(questions) @ np.float64(vectors).T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
    assert result == [[IDS["int"](row) for row in line] for line in best.tolist()]


@pytest.mark.parametrize("rows", [10, 300, 3000])
@pytest.mark.parametrize("k", [1, 5, 60])
def test_ties_are_broken_by_row(rows, k):
    vectors, asked = signs(4, rows), signs(5, 12)
    scores = asked @ vectors.T
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    result = found(retrieve(corpus_of(vectors), queries_of(asked), k))
    assert result == [[IDS["int"](row) for row in line] for line in best.tolist()]


def test_it_goes_without_a_word():
    """torch would warn, once a process, of an array that it must not write to."""
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with heard() as warned:
            retrieve(CORPUS, QUERIES, 3)
    finally:
        torch.set_warn_always(always)
    assert not warned


def test_one_vector_a_hundred_times():
    vectors = np.repeat(signs(6, 1), 100, axis=0)
    assert found(retrieve(corpus_of(vectors, "string"), queries_of(vectors[:2]), 7)) == 2 * [
        [IDS["string"](row) for row in range(7)]
    ]


@pytest.mark.parametrize("k", [20, 21, 1000])
@pytest.mark.parametrize("kind", IDS)
def test_k_above_the_corpus(kind, k):
    """All there are; never a padding."""
    vectors, asked = signs(7, 20), signs(8, 5)
    assert found(retrieve(corpus_of(vectors, kind), queries_of(asked), k)) == wanted(vectors, asked, 20, kind)


def test_digits_that_float32_has_not():
    """Exact: float64 is compared as float64."""
    angles = np.array([3e-9, 1e-9, 2e-9, 5e-9, 4e-9]) + np.pi / 4
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    wide = Sequence(Value("float64"))
    result = found(retrieve(corpus_of(vectors, feature=wide), queries_of(np.array([[0.0, 1.0]]), wide), 5))
    assert result == [[IDS["int"](row) for row in (3, 4, 0, 2, 1)]]


FEATURES: dict[str, Any] = {
    "list": Sequence(Value("float32")),
    "float64": Sequence(Value("float64")),
    "float16": Sequence(Value("float16")),
    "fixed": Sequence(Value("float32"), length=6),
    "large": LargeList(Value("float32")),
    "integers": Sequence(Value("int8")),
}


@pytest.mark.parametrize("asked_feature", FEATURES)
@pytest.mark.parametrize("feature", FEATURES)
def test_kinds_of_embeddings(feature, asked_feature):
    vectors, asked = signs(9, 40), signs(10, 6)
    corpus = corpus_of(vectors, feature=FEATURES[feature])
    assert found(retrieve(corpus, queries_of(asked, FEATURES[asked_feature]), 4)) == wanted(vectors, asked, 4)


def test_embeddings_that_are_numpy_arrays():
    """As a model's output becomes a column."""
    vectors, asked = np.float32(sphere(11, 40)), np.float32(sphere(12, 6))
    corpus = Dataset.from_dict({"id": np.arange(40), "embedding": vectors})
    queries = Dataset.from_dict({"embedding": list(asked)})
    assert found(retrieve(corpus, queries, 4)) == brute(vectors, asked, 4)
    bare = Dataset.from_dict({"id": np.arange(40)})
    mapped = bare.map(lambda _, rows: {"embedding": vectors[rows]}, batched=True, with_indices=True)
    assert found(retrieve(mapped, queries, 4)) == brute(vectors, asked, 4)


@pytest.mark.parametrize("format_", ["numpy", "torch", "arrow", "pandas"])
def test_formats(format_):
    vectors, asked = np.float32(sphere(13, 40)), np.float32(sphere(14, 6))
    corpus, queries = corpus_of(vectors, "string"), queries_of(asked)
    result = retrieve(corpus.with_format(format_), queries.with_format(format_), 4)
    assert found(result) == wanted(vectors, asked, 4, "string")


@pytest.mark.parametrize("side", ["corpus", "queries"])
def test_shuffled_sliced_and_chunked(side):
    vectors, asked = signs(15, 60), signs(16, 12)
    order = np.random.default_rng(0).permutation(60 if side == "corpus" else 12)
    corpus, queries = corpus_of(vectors, "string"), queries_of(asked)
    if side == "corpus":
        for stored, rows in (
            (corpus.select(order), order),
            (corpus.select(range(11, 40)), np.arange(11, 40)),
            (concatenate_datasets([corpus.select(range(30, 60)), corpus.select(range(30))]), np.r_[30:60, 0:30]),
        ):
            names = [[IDS["string"](rows[row]) for row in best] for best in brute(vectors[rows], asked, 5)]
            assert found(retrieve(stored, queries, 5)) == names  # ties by the row that it now is
    else:
        for stored, rows in (
            (queries.select(order), order),
            (queries.select(range(3, 9)), np.arange(3, 9)),
            (concatenate_datasets([queries.select(range(5, 12)), queries.select(range(5))]), np.r_[5:12, 0:5]),
        ):
            result = retrieve(corpus, stored, 5)
            assert found(result) == wanted(vectors, asked[rows], 5, "string")
            assert result["question"][:] == stored["question"][:]


def test_own_names_of_columns():
    vectors, asked = signs(17, 30), signs(18, 4)
    corpus = corpus_of(vectors, name="vector").rename_column("id", "key")
    result = retrieve(corpus, queries_of(asked, name="vector"), 3, embedding_column="vector", id_column="key")
    assert found(result) == wanted(vectors, asked, 3)


@pytest.mark.parametrize("type_", ["int8", "uint64", "int32", "string", "large_string"])
def test_the_type_of_the_ids(type_):
    text = "string" in type_
    vectors = signs(19, 50)
    ids = [f"d{row}" if text else row for row in range(50)]
    features = Features({"id": Value(type_), "embedding": Sequence(Value("float32"))})
    corpus = Dataset.from_dict({"id": ids, "embedding": vectors.tolist()}, features=features)
    asked = signs(20, 3)
    best = brute(vectors, asked, 3)
    assert found(retrieve(corpus, queries_of(asked), 3)) == [[ids[row] for row in rows] for rows in best]


@pytest.mark.parametrize("feature", [None, FEATURES["fixed"]], ids=["list", "fixed"])
def test_no_queries(feature):
    corpus = corpus_of(signs(21, 10), "string")
    queries = queries_of(signs(22, 2), feature).select([])
    result = retrieve(corpus, queries, 3)
    assert len(result) == 0
    assert result.column_names == ["question", "embedding", "retrieved"]
    assert "string" in result.features["retrieved"].feature.dtype


def test_the_same_call_has_the_same_answer():
    vectors, asked = np.float32(sphere(23, 500)), np.float32(sphere(24, 20))
    corpus, queries = corpus_of(vectors), queries_of(asked)
    assert found(retrieve(corpus, queries, 10)) == found(retrieve(corpus, queries, 10))
    singly = [found(retrieve(corpus, queries.select([row]), 10))[0] for row in range(20)]
    assert singly == found(retrieve(corpus, queries, 10))


@pytest.mark.parametrize("kind", IDS)
def test_what_it_finds_can_be_fitted(kind):
    vectors, asked = np.float32(sphere(25, 40)), np.float32(sphere(26, 50))
    corpus = corpus_of(vectors, kind)
    rows = retrieve(corpus, queries_of(asked), 6)
    rows = rows.add_column("utility", [[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]] * 50)
    iw = ImportanceWeights(k=3, epochs=3).fit(rows, progress=False)
    assert set(iw.to_dict()) <= set(corpus["id"])
    assert sum(iw.counts) == 300
    assert "importance" in corpus.map(iw, batched=True).column_names


# ---------------------------------------------------------------- refusals


def said(error: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        retrieve(*arguments, **options)
    return str(caught.value)


CORPUS, QUERIES = corpus_of(signs(27, 10)), queries_of(signs(28, 4))


@pytest.mark.parametrize("k", [0, -1, True, 2.5, "3", None], ids=repr)
def test_k_below_one(k):
    message = said(ValueError, CORPUS, QUERIES, k)
    assert re.search(r"\bk\b", message)
    assert repr(k) in message


@pytest.mark.parametrize(
    "corpus, queries, options, missing, there",
    [
        (CORPUS.remove_columns("embedding"), QUERIES, {}, "embedding", ["id"]),
        (CORPUS, QUERIES.remove_columns("embedding"), {}, "embedding", ["question"]),
        (CORPUS.rename_column("id", "key"), QUERIES, {}, "id", ["key", "embedding"]),
        (CORPUS, QUERIES, {"embedding_column": "vector"}, "vector", ["embedding"]),
        (CORPUS, QUERIES, {"id_column": "key"}, "key", ["id", "embedding"]),
    ],
    ids=["corpus embedding", "queries embedding", "id", "own embedding", "own id"],
)
def test_missing_column(corpus, queries, options, missing, there):
    message = said(ValueError, corpus, queries, 3, **options)
    assert f"'{missing}'" in message
    assert all(name in message for name in there)


def test_widths_of_corpus_and_queries():
    message = said(ValueError, CORPUS, queries_of(signs(29, 4, width=5)), 3)
    assert re.search(r"\b6\b", message)
    assert re.search(r"\b5\b", message)


@pytest.mark.parametrize("side", ["corpus", "queries"])
def test_widths_within_a_column(side):
    vectors = signs(30, 10).tolist()
    vectors[7] = vectors[7][:-1]
    ragged = Dataset.from_dict({"id": list(range(10)), "embedding": vectors})
    message = said(ValueError, *((ragged, QUERIES) if side == "corpus" else (CORPUS, ragged)), 3)
    assert "embedding" in message
    assert re.search(r"\b5\b", message)
    assert re.search(r"\b6\b", message)


def test_widths_that_differ_and_cancel():
    """As many numbers as ten vectors of width six have."""
    vectors = signs(31, 10).tolist()
    vectors[2], vectors[3] = vectors[2] + vectors[3][:1], vectors[3][1:]
    said(ValueError, Dataset.from_dict({"id": list(range(10)), "embedding": vectors}), QUERIES, 3)


@pytest.mark.parametrize("side", ["corpus", "queries"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None], ids=str)
def test_nan(side, value):
    """Infinity gives NaN as soon as it meets 0 or its like; null is read as NaN."""
    vectors = signs(32, 10).tolist()
    vectors[7][2] = value
    sick = Dataset.from_dict({"id": list(range(10)), "embedding": vectors})
    message = said(ValueError, *((sick, QUERIES) if side == "corpus" else (CORPUS, sick)), 3)
    assert "embedding" in message
    assert re.search(r"\b7\b", message)  # the row


@pytest.mark.parametrize("side", ["corpus", "queries"])
def test_a_row_without_embedding(side):
    vectors = signs(33, 10).tolist()
    vectors[7] = None
    sick = Dataset.from_dict({"id": list(range(10)), "embedding": vectors})
    message = said(ValueError, *((sick, QUERIES) if side == "corpus" else (CORPUS, sick)), 3)
    assert "embedding" in message


@pytest.mark.parametrize("side", ["corpus", "queries"])
@pytest.mark.parametrize(
    "content",
    [list(range(10)), ["a"] * 10, [["a"]] * 10, [[[1.0]]] * 10],
    ids=["numbers", "text", "texts", "matrices"],
)
def test_a_column_that_holds_no_vectors(side, content):
    sick = Dataset.from_dict({"id": list(range(10)), "embedding": content})
    message = said(ValueError, *((sick, QUERIES) if side == "corpus" else (CORPUS, sick)), 3)
    assert "embedding" in message


def test_matrices():
    feature = Features({"id": Value("int64"), "embedding": Array2D((2, 3), "float32")})
    sick = Dataset.from_dict({"id": [0], "embedding": [np.zeros((2, 3))]}, features=feature)
    assert "embedding" in said(ValueError, sick, QUERIES, 3)


def test_empty_corpus():
    """Nothing to find: lists without an item, or a clear word; never an item."""
    try:
        result = retrieve(CORPUS.select([]), QUERIES, 3)
    except ValueError as error:
        assert re.search("empty|no rows", str(error))
    else:
        assert found(result) == [[]] * 4


@pytest.mark.parametrize("index_", ["atuo", "zzz", None, 3])
def test_an_index_that_is_not_known(index_):
    message = said(ValueError, CORPUS, QUERIES, 3, index=index_)
    assert "index" in message
    assert repr(index_) in message
    assert "'auto'" in message


@pytest.mark.parametrize("what", [42, None, {"id": [1], "embedding": [[1.0]]}], ids=["int", "None", "dict"])
@pytest.mark.parametrize("side", ["corpus", "queries"])
def test_no_dataset(side, what):
    message = said(TypeError, *((what, QUERIES) if side == "corpus" else (CORPUS, what)), 3)
    assert type(what).__name__ in message
    assert "Dataset" in message


# ---------------------------------------------------------------- FAISS


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss")


@pytest.mark.parametrize("kind", IDS)
def test_faiss_finds_the_same(faiss, kind):
    vectors, asked = np.float32(sphere(34, 300)), np.float32(sphere(35, 30))
    corpus, queries = corpus_of(vectors, kind), queries_of(asked)
    assert found(retrieve(corpus, queries, 5)) == wanted(vectors, asked, 5, kind)
    assert corpus.list_indexes() == []  # none was left on the caller's corpus


def test_faiss_pads_nothing(faiss):
    vectors, asked = np.float32(sphere(36, 4)), np.float32(sphere(37, 3))
    assert found(retrieve(corpus_of(vectors), queries_of(asked), 9)) == wanted(vectors, asked, 4)


def test_faiss_breaks_ties_by_row(faiss):
    vectors, asked = signs(38, 300), signs(39, 12)
    assert found(retrieve(corpus_of(vectors), queries_of(asked), 5)) == wanted(vectors, asked, 5)


def test_arrow_offsets_are_honoured():
    """A table that is a slice of a longer one, in both columns."""
    vectors = signs(40, 50)
    table = pa.table({"id": list(range(50)), "embedding": vectors.tolist()}).slice(13, 20)
    corpus, asked = Dataset(InMemoryTable(table)), signs(41, 5)
    best = brute(vectors[13:33], asked, 4)
    assert found(retrieve(corpus, queries_of(asked), 4)) == [[row + 13 for row in rows] for rows in best]
