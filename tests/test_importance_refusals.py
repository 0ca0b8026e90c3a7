"""Bad input: every row of section 5, what the message says, and that nothing is lost before it is said."""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, IterableDataset, Sequence, Value, disable_progress_bars, enable_progress_bars
from datasets.table import InMemoryTable
from importance_corpora import as_dicts, corpus, corpus_of, fitted, heard, of_weights, table_of, validation

from hf_ext import ImportanceWeights
from hf_ext.importance_weights import group_gradient, multilinear_gradient, shapley_values

ALLOWED = {
    "method": ["multilinear", "shapley", "banzhaf", "loo", "mean"],
    "group_update": ["mean", "sum", "exact"],
    "dtype": ["float64", "float32"],
    "unseen": ["keep", "drop"],
    "metric": ["vote", "utility"],
}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    disable_progress_bars()
    yield
    enable_progress_bars()


def said(error: type[Exception], call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What the refusal says; it is exactly of this type, or a kind of it that Python has."""
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    return str(caught.value)


def refused(rows: Any, error: type[Exception] = ValueError, *, groups: Any = None, **options: Any) -> str:
    """What a fit to these rows says."""
    iw = ImportanceWeights(**{"k": 3, "epochs": 2} | options)
    return said(error, iw.fit, rows, progress=False, groups=groups)


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    "name, value",
    [
        *[("k", value) for value in (0, -1, 2.0, 2.5, True, False, "10", None, math.nan, math.inf)],
        *[("epochs", value) for value in (0, -5)],
        *[("learning_rate", value) for value in (0, 0.0, -1, -0.5, math.nan)],
        *[("epsilon", value) for value in (-1e-9, -1, math.nan)],
        *[("delta", value) for value in (-0.1, 1.0, 1, 1.5, math.nan)],
    ],
)
@pytest.mark.parametrize("where", ["weights", "config"])
def test_numbers(where, name, value):
    options = {name: value} | ({"epsilon": 0.1} if name == "delta" else {})
    make = ImportanceWeights if where == "weights" else type(ImportanceWeights().config)
    message = said(ValueError, make, **options)
    assert re.search(rf"\b{name}\b", message)
    assert repr(value) in message
    bound = {"k": "1", "epochs": "1", "learning_rate": "'auto'", "epsilon": "0", "delta": "0"}[name]
    assert bound in message.replace(repr(value), "", 1)


@pytest.mark.parametrize(
    "name, value, nearest",
    [
        ("method", "multilnear", "multilinear"),
        ("method", "Shapley", "shapley"),
        ("method", "banzaf", "banzhaf"),
        ("method", "mean ", "mean"),
        ("group_update", "means", "mean"),
        ("group_update", "exakt", "exact"),
        ("group_update", "SUM", "sum"),
        ("dtype", "float46", "float64"),
        ("dtype", "float3", "float32"),
        ("unseen", "kep", "keep"),
        ("unseen", "dropped", "drop"),
        ("unseen", "Keep", "keep"),
    ],
)
def test_words(name, value, nearest):
    message = said(ValueError, ImportanceWeights, **{name: value})
    assert re.search(rf"\b{name}\b", message)
    assert repr(value) in message
    assert all(repr(allowed) in message for allowed in ALLOWED[name])
    assert message.count(f"'{nearest}'") == 2  # once among the allowed, once as the suggestion


@pytest.mark.parametrize(
    "name, value",
    [
        *[("method", value) for value in (None, 1, "zzz", "", ["mean"])],
        *[("group_update", value) for value in (None, True, "zzz")],
        *[("dtype", value) for value in (None, "zzz", "int64")],
        *[("unseen", value) for value in (None, "zzz", [0.5], math.nan)],
    ],
)
def test_words_with_nothing_near(name, value):
    message = said(ValueError, ImportanceWeights, **{name: value})
    assert re.search(rf"\b{name}\b", message)
    assert repr(value) in message
    assert all(repr(allowed) in message for allowed in ALLOWED[name])


@pytest.mark.parametrize("value, nearest", [("atuo", "'auto'"), ("Auto", "'auto'"), ("fast", "'auto'")])
def test_learning_rate_that_is_another_word(value, nearest):
    message = said(ValueError, ImportanceWeights, learning_rate=value)
    assert "learning_rate" in message
    assert repr(value) in message
    assert nearest in message


@pytest.mark.parametrize("call", ["tune_threshold", "evaluate"])
@pytest.mark.parametrize(
    "value, nearest", [("votes", "vote"), ("utilty", "utility"), ("Vote", "vote"), ("accuracy", "")]
)
def test_metric(call, value, nearest):
    iw = fitted()
    message = said(ValueError, getattr(iw, call), validation(6), metric=value)
    assert "metric" in message
    assert repr(value) in message
    assert all(repr(allowed) in message for allowed in ALLOWED["metric"])
    assert not nearest or message.count(f"'{nearest}'") == 2
    assert iw.threshold is None


def test_metric_is_refused_before_the_rows_are_read():
    def rows() -> Iterator[dict]:
        raise AssertionError("read")
        yield {}

    said(ValueError, fitted().tune_threshold, IterableDataset.from_generator(rows), metric="votes")


@pytest.mark.parametrize(
    "options, names",
    [
        ({"delta": 0.1}, ["delta", "epsilon"]),
        ({"delta": 0.1, "epsilon": 0.0}, ["delta", "epsilon"]),
        ({"epsilon": 0.1, "method": "shapley"}, ["epsilon", "method", "shapley", "multilinear"]),
        ({"epsilon": 0.1, "method": "banzhaf"}, ["epsilon", "method", "banzhaf", "multilinear"]),
        ({"epsilon": 0.1, "method": "loo"}, ["epsilon", "method", "loo", "multilinear"]),
        ({"epsilon": 0.1, "method": "mean"}, ["epsilon", "method", "mean", "multilinear"]),
        ({"epsilon": 0.1, "group_update": "exact"}, ["epsilon", "group_update", "exact"]),
        ({"epsilon": 0.1, "group_update": "exact", "group_column": "source"}, ["epsilon", "group_update", "exact"]),
        ({"epsilon": 0.1, "delta": 0.1, "group_update": "exact"}, ["epsilon", "group_update", "exact"]),
    ],
    ids=lambda value: "-".join(f"{name}={x}" for name, x in value.items()) if isinstance(value, dict) else None,
)
def test_options_that_exclude_each_other(options, names):
    message = said(ValueError, ImportanceWeights, **options)
    assert all(name in message for name in names)


def test_options_that_go_together():
    ImportanceWeights(epsilon=0.1, delta=0.1)
    ImportanceWeights(epsilon=0.1, group_update="sum", group_column="source")
    ImportanceWeights(method="mean", group_column="source", group_update="exact")
    ImportanceWeights(unseen=0, learning_rate=1, epsilon=1, k=10**6)
    ImportanceWeights(unseen=np.float32(0.5), k=np.int64(3))


@pytest.mark.parametrize("call", [ImportanceWeights, type(ImportanceWeights().config)], ids=["weights", "config"])
def test_an_unknown_keyword_is_pythons_own_error(call):
    with pytest.raises(TypeError, match="learning_rat'"):
        call(learning_rat=1)


def test_unknown_keywords_of_methods():
    iw, data = fitted(), corpus()
    for call in (iw.fit, iw.annotate, iw.prune, iw.sample, iw.sampler, iw.tune_threshold, iw.evaluate):
        with pytest.raises(TypeError, match="zzz"):
            call(data, zzz=1)


# ---------------------------------------------------------------- values in the rows

GOOD = {"retrieved": [["a", "b"], ["c"], ["a", "c"]], "utility": [[1.0, 0.0], [1.0], [0.5, 1.0]]}


def bad(name: str, row: int, value: Any, width: int | None = None) -> dict[str, list]:
    """The rows above five times over, with this value in this row."""
    rows = {key: [list(part) for part in parts * 5] for key, parts in GOOD.items()}
    if width is None:
        rows[name][row][-1] = value
    else:
        rows[name][row] = value
    return rows


def chunks(table: pa.Table) -> pa.Table:
    return pa.concat_tables([table.slice(0, 4), table.slice(4, 7), table.slice(11)])


def dataset(rows: dict[str, list], group: bool = False) -> Dataset:
    group = group or "source" in rows
    features = {"retrieved": Sequence(Value("string")), "utility": Sequence(Value("float64"))}
    return Dataset.from_dict(
        rows, features=Features(features | ({"source": Sequence(Value("string"))} if group else {}))
    )


def no_stream() -> IterableDataset:
    """An empty Dataset makes no stream; a generator does."""

    def rows() -> Iterator[dict]:
        yield from ()

    return IterableDataset.from_generator(rows, features=dataset(GOOD).features)


KINDS: dict[str, Callable[[dict[str, list]], Any]] = {
    "dataset": dataset,
    "index-mapped": lambda rows: dataset({name: part[::-1] for name, part in rows.items()}).select(
        range(len(rows["utility"]))[::-1]
    ),
    "sliced": lambda rows: dataset({name: part[:2] + part for name, part in rows.items()}).select(
        range(2, 2 + len(rows["utility"]))
    ),
    "stream": lambda rows: dataset(rows).to_iterable_dataset(num_shards=3) if rows["utility"] else no_stream(),
    "dicts": as_dicts,
    "dict": dict,
    "table": lambda rows: dataset(rows).with_format("arrow")[:],
    "chunked table": lambda rows: chunks(dataset(rows).with_format("arrow")[:]),
}


@pytest.fixture(params=KINDS)
def kind(request) -> Callable[[dict[str, list]], Any]:
    return KINDS[request.param]


@pytest.mark.parametrize("row", [0, 6, 14])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None], ids=str)
def test_utility_that_is_no_number(kind, value, row):
    message = refused(kind(bad("utility", row, value)))
    assert re.search(rf"\brow {row}\b", message)
    assert "utility" in message
    assert {"None": "null"}.get(str(value), str(value)) in message.lower()


@pytest.mark.parametrize("row", [0, 6, 14])
def test_null_id(kind, row):
    message = refused(kind(bad("retrieved", row, None)))
    assert re.search(rf"\brow {row}\b", message)
    assert "retrieved" in message
    assert "null" in message.lower()


@pytest.mark.parametrize("name", ["retrieved", "utility"])
@pytest.mark.parametrize("row", [0, 6, 14])
def test_null_list(kind, name, row):
    message = refused(kind(bad(name, row, None, width=0)))
    assert re.search(rf"\brow {row}\b", message)
    assert name in message
    assert "null" in message.lower()


@pytest.mark.parametrize("name", ["retrieved", "utility"])
@pytest.mark.parametrize("row", [0, 6, 14])
def test_lengths_differ(kind, name, row):
    width = len(bad("utility", row, 1.0)["utility"][row])
    message = refused(kind(bad(name, row, (["a"] if name == "retrieved" else [1.0]) * 7, width=7)))
    assert re.search(rf"\brow {row}\b", message)
    assert "retrieved" in message
    assert "utility" in message
    rest = re.sub(rf"\brow {row}\b", "", message)
    assert re.search(r"\b7\b", rest)
    assert re.search(rf"\b{width}\b", rest)


def test_lengths_that_differ_and_cancel():
    """The columns have the same number of slots; rows do not."""
    rows = {"retrieved": [["a"], ["b", "c"]], "utility": [[1.0, 0.0], [1.0]]}
    for each in (rows, as_dicts(rows), dataset(rows)):
        assert re.search(r"\brow 0\b", refused(each))


def test_the_first_bad_row_is_named():
    rows = bad("utility", 9, math.nan)
    rows["utility"][5] = [math.inf, 0.0]
    assert re.search(r"\brow 5\b", refused(dataset(rows)))


def test_a_row_far_down_a_stream():
    """Streams are read in batches; the number is the row's in the stream."""
    n = 3000
    rows = {"retrieved": [["a"]] * n, "utility": [[1.0]] * (n - 3) + [[math.nan]] + [[1.0]] * 2}
    for each in (dataset(rows), dataset(rows).to_iterable_dataset()):
        assert re.search(rf"\brow {n - 3}\b", refused(each))


def test_ids_that_are_integers():
    rows = {"retrieved": [[1, 2], [3]], "utility": [[1.0, 0.0], [math.nan]]}
    assert re.search(r"\brow 1\b", refused(rows))
    assert re.search(r"\brow 0\b", refused(rows | {"retrieved": [[None, 2], [3]], "utility": [[1.0, 0.0], [1.0]]}))


@pytest.mark.parametrize("method", ["multilinear", "shapley", "banzhaf", "loo", "mean"])
def test_every_method_refuses(method):
    assert re.search(r"\brow 6\b", refused(bad("utility", 6, math.nan), method=method))
    assert re.search(r"\brow 6\b", refused(bad("retrieved", 6, None), method=method))


@pytest.mark.parametrize("call", ["tune_threshold", "evaluate"])
@pytest.mark.parametrize(
    "rows",
    [bad("utility", 6, math.nan), bad("utility", 6, None, 0), bad("retrieved", 6, ["a"] * 7, 7)],
    ids=["nan", "null list", "lengths"],
)
def test_rows_of_other_splits_are_as_good(call, rows):
    iw = fitted()
    assert re.search(r"\brow 6\b", said(ValueError, getattr(iw, call), dataset(rows), metric="utility"))
    assert iw.threshold is None


# ---------------------------------------------------------------- nothing there


def test_no_rows(kind):
    assert re.search(r"no rows|empty|0 rows", refused(kind({"retrieved": [], "utility": []})))


def test_no_rows_at_all():
    for rows in ([], {"retrieved": [], "utility": []}, dataset(GOOD).select([])):
        assert re.search(r"no rows|empty|0 rows", refused(rows))


def test_no_retrieved_item(kind):
    message = refused(kind({"retrieved": [[]] * 15, "utility": [[]] * 15}))
    assert "retrieved" in message


@pytest.mark.parametrize("method", ["multilinear", "shapley", "mean"])
def test_utility_range(method):
    rows = {"retrieved": [["a", "b"], ["c"]], "utility": [[1.7e308, 0.0], [-1.7e308]]}
    message = refused(rows, method=method)
    assert "utilit" in message
    assert "1.7e+308" in message
    assert "-1.7e+308" in message


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("name", ["retrieved", "utility"])
def test_column_missing(kind, name):
    if name == "utility":
        rows, there = {"retrieved": GOOD["retrieved"] * 5, "utilities": GOOD["utility"] * 5}, "utilities"
    else:
        rows, there = {"hits": GOOD["retrieved"] * 5, "utility": GOOD["utility"] * 5}, "hits"
    if kind in (KINDS["dict"], KINDS["dicts"]):
        message = refused(kind(rows))
    else:
        data = Dataset.from_dict(rows)
        message = refused(data.to_iterable_dataset() if kind is KINDS["stream"] else data)
    assert f"'{name}'" in message
    assert f"'{there}'" in message or f"{there}," in message or f" {there}" in message


def test_group_column_missing():
    message = refused(validation(), group_column="origin")
    assert "origin" in message
    assert "source" in message


@pytest.mark.parametrize("name", ["retrieved", "utility"])
def test_column_that_holds_no_lists(name):
    flat = {"retrieved": ["a", "b", "c"], "utility": [1.0, 0.0, 1.0]}
    rows = GOOD | {name: flat[name]}
    stream = Dataset.from_dict(rows).to_iterable_dataset()
    for each in (rows, Dataset.from_dict(rows), as_dicts(rows), pa.table(rows), stream):
        message = refused(each)
        assert name in message
        assert "list" in message
        assert re.search({"retrieved": "str", "utility": "float|double"}[name], message)  # what is there


@pytest.mark.parametrize(
    "utilities, there",
    [([["1", "0"], ["1"], ["0.5", "1"]], "str"), ([[[1.0], [0.0]], [[1.0]], [[0.5], [1.0]]], "list")],
    ids=["strings", "lists"],
)
def test_utilities_that_are_no_numbers(utilities, there):
    rows = GOOD | {"utility": utilities}
    for each in (rows, Dataset.from_dict(rows), as_dicts(rows), pa.table(rows)):
        message = refused(each)
        assert "utility" in message
        assert "number" in message
        assert there in message


# ---------------------------------------------------------------- groups

GROUPED = GOOD | {"source": [["x", "y"], ["z"], ["x", "z"]]}


@pytest.mark.parametrize("update", ["mean", "sum", "exact"])
def test_one_item_in_two_groups(kind, update):
    rows = {name: part * 5 for name, part in GROUPED.items()}
    rows["source"] = [*rows["source"][:11], ["y", "z"], *rows["source"][12:]]
    message = refused(kind(rows), group_column="source", group_update=update)
    assert "'a'" in message
    assert "'x'" in message
    assert "'y'" in message


def test_one_item_in_two_groups_by_number():
    rows = {"retrieved": [[5, 6], [5]], "utility": [[1.0, 0.0], [1.0]], "source": [[70, 80], [90]]}
    message = refused(rows, group_column="source")
    assert all(re.search(rf"\b{word}\b", message) for word in (5, 70, 90))


@pytest.mark.parametrize("row", [0, 6, 14])
def test_groups_that_are_not_aligned(kind, row):
    rows = {name: part * 5 for name, part in GROUPED.items()}
    rows["source"] = [[*part, "x"] if i == row else part for i, part in enumerate(rows["source"])]
    message = refused(kind(rows), group_column="source")
    assert re.search(rf"\brow {row}\b", message)
    assert "source" in message


@pytest.mark.parametrize("where", ["null group", "null list"])
def test_null_groups(where):
    rows = {name: [list(each) for each in part * 5] for name, part in GROUPED.items()}
    rows["source"][6] = [None, "y"] if where == "null group" else None
    for each in (rows, as_dicts(rows), dataset(rows)):
        message = refused(each, group_column="source")
        assert re.search(r"\brow 6\b", message)
        assert "source" in message


def test_groups_given_apart_that_contradict():
    table = pa.table({"id": ["a", "b", "c", "a"], "source": ["x", "y", "z", "y"]})
    message = refused(GOOD, group_column="source", groups=table)
    assert all(f"'{word}'" in message for word in "axy")


def test_groups_given_apart_that_lack_an_item():
    for groups in ({"a": "x", "b": "y"}, pa.table({"id": ["a", "b"], "source": ["x", "y"]})):
        assert "'c'" in refused(GOOD, group_column="source", groups=groups)


# ---------------------------------------------------------------- no dataset


@pytest.mark.parametrize("rows", [42, "rows", None, 1.5, object(), {1, 2}, np.zeros(3)], ids=lambda x: type(x).__name__)
def test_not_a_dataset(rows):
    message = refused(rows, TypeError)
    assert type(rows).__name__ in message
    assert all(word in message for word in ("Dataset", "IterableDataset", "list", "dict", "Table"))


@pytest.mark.parametrize("call", ["tune_threshold", "evaluate"])
def test_no_dataset_to_tune_on(call):
    message = said(TypeError, getattr(fitted(), call), 42)
    assert "int" in message
    assert "Dataset" in message


@pytest.mark.parametrize("call", ["annotate", "prune", "sample", "sampler"])
def test_no_corpus(call):
    iw = fitted()
    arguments = [0.5] if call == "prune" else []
    for corpus_ in (42, None, "corpus"):
        message = said(TypeError, getattr(iw, call), corpus_, *arguments)
        assert type(corpus_).__name__ in message
        assert "Dataset" in message


# ---------------------------------------------------------------- what is allowed


@pytest.mark.parametrize(
    "rows",
    [
        {"retrieved": [["a"]], "utility": [[1.0]]},
        {"retrieved": [["a"], []], "utility": [[1.0], []]},
        {"retrieved": [["a", "a", "b"]], "utility": [[1.0, 0.0, 1.0]]},
        {"retrieved": [["a", "b"]], "utility": [[1, 0]]},
        {"retrieved": [["a", "b"]], "utility": [[True, False]]},
        {"retrieved": [["a", "b"]], "utility": [[-1.0, -3.5]]},
        {"retrieved": [["a", "b"]], "utility": [[1e30, -1e30]]},
        {"retrieved": [["a", "b"]], "utility": [[1e-300, 0.0]]},
        {"retrieved": [["a", "b"]], "utility": [[-0.0, 1.0]]},
    ],
    ids=["k above M", "empty list", "duplicates", "integers", "bools", "negative", "large", "small", "minus zero"],
)
@pytest.mark.parametrize("method", ["multilinear", "shapley", "banzhaf", "loo", "mean"])
def test_what_is_defined(method, rows):
    for each in (rows, Dataset.from_dict(rows)):
        with heard() as warned:
            iw = ImportanceWeights(k=5, epochs=3, method=method).fit(each, progress=False)
        assert np.isfinite(iw.weights).all()
        assert math.isfinite(iw.value)
        assert not warned
        if method == "multilinear":
            assert ((iw.weights >= 0) & (iw.weights <= 1)).all()


def test_what_is_defined_for_pure_functions():
    assert multilinear_gradient(np.array([]), np.array([]), 3).shape == (0,)
    assert shapley_values(np.array([]), 3).shape == (0,)
    assert multilinear_gradient(np.array([1, 0]), np.array([0, 1]), 1).tolist() == [1.0, 0.0]
    assert multilinear_gradient(np.array([True, False]), np.array([0.5, 0.5]), 4).tolist() == [0.25, 0.0]
    assert shapley_values(np.array([-1.0, 2.0]), 2).tolist() == [-0.5, 1.0]
    assert group_gradient(np.array([1.0, 3.0]), np.array([0, 0]), np.array([0.5, 0.5]), 2).tolist() == [2.0, 0.0]


@pytest.mark.parametrize("function", [multilinear_gradient, shapley_values, group_gradient])
@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_pure_functions_refuse_k_too(function, k):
    utilities = np.ones(3)
    arguments = {
        "multilinear_gradient": [np.full(3, 0.5)],
        "shapley_values": [],
        "group_gradient": [np.zeros(3, int), np.array([0.5])],
    }[function.__name__]
    message = said(ValueError, function, utilities, *arguments, k)
    assert re.search(r"\bk\b", message)
    assert repr(k) in message


@pytest.mark.parametrize("update", ["mean", "sum", "exact"])
@pytest.mark.parametrize("group", [None, "source"])
def test_all_utilities_zero(update, group):
    rows = validation()
    rows["utility"] = [[0.0] * len(row) for row in rows["utility"]]
    with heard() as warned:
        iw = fitted(rows, group_update=update, group_column=group)
    assert len(warned) == 1
    assert re.search(r"zero|\b0\b", warned[0])
    assert set(iw.weights.tolist()) == {0.5}
    assert iw.value == 0.0


# ---------------------------------------------------------------- before the fit

BEFORE: dict[str, Callable[[ImportanceWeights], Any]] = {
    "call": lambda iw: iw({"id": ["a"]}),
    "map": lambda iw: corpus().map(iw, batched=True),
    "annotate": lambda iw: iw.annotate(corpus()),
    "annotate a stream": lambda iw: list(iw.annotate(corpus().to_iterable_dataset())),
    "lookup": lambda iw: iw.lookup(["a"]),
    "prune": lambda iw: iw.prune(corpus(), 0.5),
    "prune untuned": lambda iw: iw.prune(corpus()),
    "tune_threshold": lambda iw: iw.tune_threshold(validation()),
    "evaluate": lambda iw: iw.evaluate(validation()),
    "sample": lambda iw: iw.sample(corpus()),
    "weighted_vote": lambda iw: iw.weighted_vote(["x"], ["a"]),
    "rescore": lambda iw: iw.rescore([1.0], ["a"]),
    "sampler": lambda iw: iw.sampler(corpus()),
    "keys": lambda iw: iw.keys,
    "weights": lambda iw: iw.weights,
    "counts": lambda iw: iw.counts,
    "to_dict": lambda iw: iw.to_dict(),
    "len": len,
    "value": lambda iw: iw.value,
}


@pytest.mark.parametrize("reader", BEFORE)
def test_use_before_fit(reader):
    message = said(RuntimeError, BEFORE[reader], ImportanceWeights())
    assert re.search(r"\bfit\b", message)
    assert "from_pretrained" in message


def test_save_before_fit(tmp_path):
    message = said(RuntimeError, ImportanceWeights().save_pretrained, tmp_path / "new")
    assert re.search(r"\bfit\b", message)
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- corpora

READERS: dict[str, Callable[[ImportanceWeights, Dataset], Any]] = {
    "map": lambda iw, data: data.map(iw, batched=True),
    "map one by one": lambda iw, data: data.map(iw),
    "map numpy": lambda iw, data: data.with_format("numpy").map(iw, batched=True),
    "map torch": lambda iw, data: data.with_format("torch").map(iw, batched=True),
    "map arrow": lambda iw, data: data.with_format("arrow").map(iw, batched=True),
    "map pandas": lambda iw, data: data.with_format("pandas").map(iw, batched=True),
    "annotate": lambda iw, data: iw.annotate(data),
    "stream": lambda iw, data: list(iw.annotate(data.to_iterable_dataset())),
    "prune": lambda iw, data: iw.prune(data, 0.5),
    "sample": lambda iw, data: iw.sample(data, seed=0),
    "sampler": lambda iw, data: iw.sampler(data),
}


@pytest.mark.parametrize("group", [None, "source"], ids=["ids", "groups"])
@pytest.mark.parametrize("reader", READERS)
def test_corpus_lacks_the_column(reader, group):
    iw, name = fitted(group_column=group), group or "id"
    data = corpus().rename_column(name, "other")
    message = said(ValueError, READERS[reader], iw, data)
    assert f"'{name}'" in message
    assert all(there in message for there in data.column_names)


@pytest.mark.parametrize("group", [None, "source"], ids=["ids", "groups"])
@pytest.mark.parametrize("kind_", ["integers for strings", "strings for integers"])
@pytest.mark.parametrize("reader", READERS)
def test_corpus_of_another_kind(reader, kind_, group):
    """Never "all unseen"."""
    numbers = kind_ == "strings for integers"
    rows = validation(kind="int" if numbers else "string")
    if numbers:
        rows["source"] = [[int(name[-1]) for name in row] for row in rows["source"]]
    iw = fitted(rows, group_column=group)
    keys = ["1", "2", "3"] if numbers else [1, 2, 3]
    data = corpus_of(keys, source=keys) if group else corpus_of(keys)
    message = said(TypeError, READERS[reader], iw, data)
    assert "int" in message
    assert "str" in message


@pytest.mark.parametrize(
    "read",
    [
        lambda iw, keys: iw.lookup(keys),
        lambda iw, keys: iw.lookup(np.array(keys)),
        lambda iw, keys: iw.lookup(pa.array(keys)),
        lambda iw, keys: iw.weighted_vote(["x", "y"], keys),
        lambda iw, keys: iw.rescore([1.0, 2.0], keys),
    ],
    ids=["lookup", "lookup numpy", "lookup arrow", "weighted_vote", "rescore"],
)
@pytest.mark.parametrize("kind_", ["int", "string"])
def test_ids_of_another_kind(kind_, read):
    message = said(TypeError, read, fitted(kind=kind_), [5, 7] if kind_ == "string" else ["5", "7"])
    assert "int" in message
    assert "str" in message


def test_one_id_is_no_list_of_its_letters():
    """Either its weight, or an error; never seven strangers."""
    iw = fitted()
    try:
        found = iw.lookup("doc-001")
    except (TypeError, ValueError):
        return
    assert np.ravel(found).tolist() == [table_of(iw)["doc-001"]]


@pytest.mark.parametrize("reader", ["annotate", "prune"])
@pytest.mark.parametrize("unseen", ["keep", "drop", 0.6])
def test_no_corpus_id_known(reader, unseen):
    iw, data = fitted(unseen=unseen), corpus_of([f"other {i}" for i in range(17)])
    with heard() as warned:
        result = READERS[reader](iw, data)
    about = [text for text in warned if re.search(r"\b17\b", text) and re.search(r"\b40\b", text)]
    assert len(about) == 1  # both counts: rows of the corpus, and keys of the fit
    assert len(result) == (0 if reader == "prune" and unseen == "drop" else 17)


@pytest.mark.parametrize("reader", ["annotate", "prune"])
def test_a_single_known_id_is_no_reason_to_warn(reader):
    with heard() as warned:
        READERS[reader](fitted(), corpus_of(["other 1", "doc-003", "other 2"]))
    assert not warned


def test_empty_corpus_and_all_pruned():
    iw, data = fitted(), corpus()
    with heard() as warned:
        empty = iw.prune(data.select([]), 0.5)
    assert (len(empty), empty.features, warned) == (0, data.features, [])
    with heard() as warned:
        nothing = fitted(unseen="drop").prune(data, 2.0)
    assert (len(nothing), nothing.features, len(warned)) == (0, data.features, 1)


def test_prune_without_a_threshold():
    message = said(ValueError, fitted().prune, corpus())
    assert "threshold" in message
    assert "tune_threshold" in message


@pytest.mark.parametrize("call", ["tune_threshold", "evaluate"])
@pytest.mark.parametrize("column", ["answers", "said"])
def test_vote_without_answers(call, column):
    iw = fitted(answer_column=column)
    rows = {name: part for name, part in validation(6).items() if name != column}
    for each in (rows, Dataset.from_dict(rows), as_dicts(rows)):
        message = said(ValueError, getattr(iw, call), each)
        assert f"'{column}'" in message
        assert re.search(r"metric=['\"]utility['\"]", message)
    assert iw.threshold is None


def test_answers_that_are_not_aligned():
    """A row with fewer answers than items has no vote."""
    rows = validation(6)
    rows["answers"][5] = rows["answers"][5][:-1]
    assert re.search(r"\brow 5\b", said(ValueError, fitted().tune_threshold, rows))


# ---------------------------------------------------------------- weights that are no probabilities


@pytest.mark.parametrize("weights", [[-0.25, 0.5, 0.5, 0.25], [0.25, 1.5, 0.5, 0.75]], ids=["negative", "above 1"])
def test_sample_outside_the_unit_interval(weights):
    iw = of_weights(dict(zip("abcd", weights, strict=True)))
    message = said(ValueError, iw.sample, corpus_of(list("abcd")))
    assert re.search(r"\[0, ?1\]|0 and 1|0 to 1", message)
    assert f"{min(weights) if min(weights) < 0 else max(weights)}" in message


@pytest.mark.parametrize("replacement", [True, False])
def test_sampler_with_negative_weights(replacement):
    iw = of_weights({"a": -0.25, "b": 0.5, "c": 0.5, "d": 0.25})
    message = said(ValueError, iw.sampler, corpus_of(list("abcd")), num_samples=2, replacement=replacement)
    assert "'a'" in message
    assert "-0.25" in message


def test_sampler_with_weights_of_zero():
    iw = of_weights({"a": 0.0, "b": 0.0, "c": 1.0, "d": 1.0})
    message = said(ValueError, iw.sampler, corpus_of(list("aab")))
    assert "zero" in message or re.search(r"\b0\b", message)
    assert len(list(iw.sampler(corpus_of(list("aac"))))) == 3


def test_sampler_takes_weights_above_one():
    """They are relative."""
    iw = of_weights({"a": 3.0, "b": 0.0, "c": 1.0, "d": 1.0})
    assert 1 not in list(iw.sampler(corpus_of(list("abcd")), num_samples=50))


def test_sampler_of_more_rows_than_multinomial_takes():
    iw = fitted(kind="int")
    data = Dataset(InMemoryTable(pa.table({"id": np.zeros(2**24 + 1, np.int8)})))
    message = said(ValueError, iw.sampler, data)
    assert "sample(" in message
    assert re.search(r"2\^24|2\*\*24|16[ ,_]?777[ ,_]?216", message)


# ---------------------------------------------------------------- rescore


@pytest.mark.parametrize("higher", [True, False])
def test_rescore_with_a_negative_score(higher):
    iw = of_weights({"a": 0.25, "b": 0.5, "c": 0.5, "d": 0.75})
    scores = np.array([1.0, -0.5])
    message = said(ValueError, iw.rescore, scores, ["a", "b"], higher_is_better=higher)
    assert "negative" in message
    assert "-0.5" in message
    assert re.search("exp|shift", message)
    assert scores.tolist() == [1.0, -0.5]
    assert iw.rescore([0.0, -0.0], ["a", "b"]).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "scores, ids",
    [([1.0], ["a", "b"]), ([[1.0, 2.0]], ["a", "b"]), ([[1.0], [2.0]], [["a", "b"]]), ([1.0], [["a"]])],
    ids=["lengths", "dimensions", "transposed", "one"],
)
def test_rescore_with_other_shapes(scores, ids):
    iw = of_weights({"a": 0.25, "b": 0.5, "c": 0.5, "d": 0.75})
    message = said(ValueError, iw.rescore, scores, ids)
    assert str(np.shape(scores)) in message
    assert str(np.shape(ids)) in message


# ---------------------------------------------------------------- folders and checkpoints


def test_folder_without_config(tmp_path):
    message = said(OSError, ImportanceWeights.from_pretrained, tmp_path)
    assert "config.json" in message
    assert str(tmp_path) in message


def test_newer_format(tmp_path):
    fitted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"format_version": 7}))
    message = said(ValueError, ImportanceWeights.from_pretrained, tmp_path)
    assert "format" in message
    assert re.search(r"\b7\b", message)


def checkpointed(folder: Any, **options: Any) -> ImportanceWeights:
    iw = ImportanceWeights(**{"k": 3, "epochs": 4} | options)
    return iw.fit(validation(), progress=False, checkpoint_dir=folder, checkpoint_every=2)


def resumed(folder: Any, rows: Any = None, **options: Any) -> ImportanceWeights:
    iw = ImportanceWeights(**{"k": 3, "epochs": 4} | options)
    return iw.fit(rows or validation(), progress=False, resume_from_checkpoint=folder)


def test_resume(tmp_path):
    """What the following refusals are not: the same data and options."""
    wanted = checkpointed(tmp_path)
    assert resumed(tmp_path).to_dict() == wanted.to_dict()
    assert resumed(str(tmp_path), epochs=6).to_dict() == fitted(epochs=6).to_dict()


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows["utility"][4].__setitem__(0, 0.123),
        lambda rows: rows["retrieved"][4].__setitem__(0, "doc-007"),
        lambda rows: [part.pop() for part in rows.values()],
        lambda rows: [part.append(part[3]) for part in rows.values()],
    ],
    ids=["utility", "id", "a row less", "an empty row more"],
)
def test_resume_with_other_data(tmp_path, change):
    checkpointed(tmp_path)
    rows = validation()
    assert rows["retrieved"][4][0] != "doc-007"
    change(rows)
    assert "data" in said(ValueError, resumed, tmp_path, rows)


@pytest.mark.parametrize(
    "options",
    [{"k": 4}, {"learning_rate": 3.0}, {"dtype": "float32"}, {"epsilon": 0.1}, {"group_update": "exact"}],
    ids=lambda options: "-".join(options),
)
def test_resume_with_other_options(tmp_path, options):
    checkpointed(tmp_path)
    message = said(ValueError, resumed, tmp_path, **options)
    (name,) = options
    assert name in message
    assert str(options[name]) in message


def test_resume_of_a_sample_with_more_epochs(tmp_path):
    """`epochs` sizes the sample."""
    options = {"epsilon": 0.5, "delta": 0.1}
    checkpointed(tmp_path, **options)
    message = said(ValueError, resumed, tmp_path, epochs=6, **options)
    assert "epochs" in message
    assert "delta" in message


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_resume_without_a_checkpoint(tmp_path, name):
    (tmp_path / "empty").mkdir()
    message = said(FileNotFoundError, resumed, tmp_path / name)
    assert name in message


# ---------------------------------------------------------------- nothing is lost


def test_a_refused_fit_leaves_the_one_before():
    iw = fitted()
    iw.tune_threshold(validation(6))
    before = (iw.to_dict(), iw.value, iw.history, iw.threshold, iw.counts.tolist())
    refusable = [{"retrieved": [], "utility": []}, GOOD | {"utility": [1, 2, 3]}]
    for rows in (bad("utility", 6, math.nan), bad("retrieved", 6, None), *refusable):
        said(ValueError, iw.fit, rows, progress=False)
        assert (iw.to_dict(), iw.value, iw.history, iw.threshold, iw.counts.tolist()) == before
    said(TypeError, iw.fit, 42)
    assert (iw.to_dict(), iw.value, iw.history, iw.threshold, iw.counts.tolist()) == before


def test_a_refused_tuning_leaves_the_one_before():
    iw = fitted()
    iw.tune_threshold(validation(6))
    before = (iw.threshold, iw.tuning)
    said(ValueError, iw.tune_threshold, bad("utility", 6, math.nan), metric="utility")
    said(ValueError, iw.tune_threshold, validation(7), metric="votes")
    said(ValueError, iw.tune_threshold, GOOD)
    with pytest.raises(ZeroDivisionError):
        iw.tune_threshold(validation(7), metric=lambda columns: 1 / 0)
    assert (iw.threshold, iw.tuning) == before


def test_a_refused_read_leaves_the_corpus():
    iw, data = fitted(), corpus("int")
    before = data.to_dict()
    for reader in READERS.values():
        said(TypeError, reader, iw, data)
    assert data.to_dict() == before
    assert table_of(iw) == table_of(fitted())
