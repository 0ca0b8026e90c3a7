"""Weights on corpora of `datasets`: map, annotate, prune, sample, lookup; unseen keys; fingerprints and the cache."""

import copy
import json
import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import (
    Dataset,
    Features,
    IterableDataset,
    Value,
    concatenate_datasets,
    disable_progress_bars,
    enable_progress_bars,
    load_from_disk,
)
from datasets.fingerprint import Hasher
from datasets.table import InMemoryTable
from importance_corpora import (
    ITEMS,
    KEYS,
    METHODS,
    NEUTRAL,
    as_dicts,
    as_table,
    corpus,
    corpus_of,
    fitted,
    heard,
    looked_up,
    of_weights,
    source_of,
    table_of,
    validation,
)
from processes import answer, run_python

from hf_ext import ImportanceWeights

FORMATS = [None, "numpy", "torch", "arrow", "pandas"]
INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]
WAYS = ["map", "map one by one", "annotate", "stream"]


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture(scope="module")
def by_id() -> ImportanceWeights:
    return fitted()


@pytest.fixture(scope="module")
def by_source() -> ImportanceWeights:
    return fitted(group_column="source")


def column(data: Any, name: str = "importance") -> pa.ChunkedArray:
    """As it is stored: some formats show float64 as float32."""
    return data.with_format("arrow")[:][name]


def values(data: Any, name: str = "importance") -> list:
    return column(data, name).to_pylist()


def ids(data: Dataset) -> list:
    return values(data, "id")


def written(iw: ImportanceWeights, data: Dataset, way: str) -> list[float]:
    if way == "annotate":
        return values(iw.annotate(data))
    if way == "stream":
        return [row["importance"] for row in iw.annotate(data.to_iterable_dataset())]
    return values(data.map(iw, batched=way == "map"))


# ---------------------------------------------------------------- map


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one by one"])
@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("kind", KEYS)
def test_map(kind, format_, batched):
    data, iw = corpus(kind), fitted(kind=kind)
    mapped = data.with_format(format_).map(iw, batched=batched, batch_size=20)
    assert values(mapped) == looked_up(iw, ids(data), 0.5)
    assert mapped.format["type"] == format_
    assert mapped.features["importance"] == Value("float64")
    plain = mapped.with_format(None).remove_columns("importance")
    assert plain.to_dict() == data.to_dict()
    if format_ != "pandas":  # whose own string type and lists are others'
        assert plain.features == data.features


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one by one"])
@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_float32_is_the_type_of_the_column(format_, batched):
    data, iw = corpus(), fitted(dtype="float32")
    assert iw.weights.dtype == np.float64
    mapped = data.with_format(format_).map(iw, batched=batched)
    assert mapped.features["importance"] == Value("float32")
    assert values(mapped) == np.float32(looked_up(iw, ids(data), 0.5)).tolist()


def test_float32_when_annotated_or_streamed():
    data, iw = corpus(), fitted(dtype="float32")
    wanted = np.float32(looked_up(iw, ids(data), 0.5)).tolist()
    annotated = iw.annotate(data)
    assert annotated.features["importance"] == Value("float32")
    assert values(annotated) == wanted
    assert [row["importance"] for row in iw.annotate(data.to_iterable_dataset())] == wanted
    assert iw.lookup(ids(data)).dtype == np.float64


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_map_of_groups(by_source, format_):
    data = corpus()
    mapped = data.with_format(format_).map(by_source, batched=True)
    assert values(mapped) == looked_up(by_source, values(data, "source"), 0.5)
    assert sorted(table_of(by_source)) == sorted({source_of(i) for i in range(ITEMS)})


def test_map_in_two_processes(by_id):
    data = corpus()
    one, two = data.map(by_id, batched=True), data.map(by_id, batched=True, num_proc=2)
    assert two.to_dict() == one.to_dict()
    assert two.features == one.features


@pytest.mark.parametrize("method", METHODS)
def test_map_of_every_method(method):
    data, iw = corpus(), fitted(method=method)
    slots = [utility for row in validation()["utility"] for utility in row]
    neutral = NEUTRAL.get(method, math.fsum(slots) / len(slots))
    assert values(data.map(iw, batched=True)) == pytest.approx(looked_up(iw, ids(data), neutral), rel=1e-14, abs=0)


@pytest.mark.parametrize("way", WAYS)
def test_own_names_of_columns(way):
    rows = validation()
    rows = {"hits": rows["retrieved"], "gain": rows["utility"]}
    names = {"id_column": "key", "retrieved_column": "hits", "utility_column": "gain", "output_column": "trust"}
    iw, data = fitted(rows, **names), corpus().rename_column("id", "key")
    assert table_of(iw) == table_of(fitted())
    renamed = data.rename_column("text", "importance")  # nothing of ours any more
    for each in (data, renamed):
        wanted = looked_up(iw, values(data, "key"), 0.5)
        if way == "stream":
            assert [row["trust"] for row in iw.annotate(each.to_iterable_dataset())] == wanted
        else:
            done = iw.annotate(each) if way == "annotate" else each.map(iw, batched=way == "map")
            assert values(done, "trust") == wanted
            assert set(done.column_names) == {*each.column_names, "trust"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("old", ["strings", "numbers"])
def test_an_existing_column_is_replaced(by_id, way, old):
    data = corpus()
    column_ = ["old"] * len(data) if old == "strings" else list(range(len(data)))
    assert written(by_id, data.add_column("importance", column_), way) == looked_up(by_id, ids(data), 0.5)


@pytest.mark.parametrize(
    "batch",
    [
        lambda keys: {"id": keys},
        lambda keys: {"id": np.array(keys)},
        lambda keys: {"id": pa.array(keys)},
        lambda keys: {"id": torch.tensor(keys)},
        lambda keys: pa.table({"id": keys}),
        lambda keys: pa.table({"id": keys}).to_pandas(),
    ],
    ids=["list", "numpy", "arrow array", "torch", "table", "pandas"],
)
def test_call(batch):
    iw, keys = fitted(kind="int"), [KEYS["int"](i) for i in (3, 99, 0)]
    given = batch(keys)
    before = copy.deepcopy(given)
    answered = iw(given)["importance"]
    assert np.asarray(answered).tolist() == looked_up(iw, keys, 0.5)
    assert len(given) == len(before)  # what was handed in has no new column
    if isinstance(given, pa.Table):
        assert isinstance(iw(given), pa.Table)


# ---------------------------------------------------------------- streaming


def stream_of(data: Dataset, shards: int = 3) -> IterableDataset:
    return data.to_iterable_dataset(num_shards=shards)


def formatted_stream_of(data: Dataset, format_: str | None) -> IterableDataset:
    try:
        stream = stream_of(data).with_format(format_)
        next(iter(stream))
    except NotImplementedError as error:
        pytest.skip(f"this datasets refuses such a stream: {error}")
    return stream


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one by one"])
@pytest.mark.parametrize("iw_", ["by_id", "by_source"])
def test_stream(request, iw_, batched):
    data, iw = corpus(), request.getfixturevalue(iw_)
    key = "id" if iw_ == "by_id" else "source"
    rows = list(stream_of(data).map(iw, batched=batched, batch_size=7))
    assert [row["importance"] for row in rows] == looked_up(iw, values(data, key), 0.5)
    assert [row["text"] for row in rows] == data["text"][:]
    assert rows == list(iw.annotate(stream_of(data)))


@pytest.mark.parametrize("format_", ["numpy", "torch", "arrow", "pandas"])
def test_stream_in_every_format(by_id, format_):
    data = corpus()
    mapped = formatted_stream_of(data, format_).map(by_id, batched=True, batch_size=7)
    found = [float(weight) for batch in mapped.iter(5) for weight in np.asarray(batch["importance"])]
    assert found == pytest.approx(looked_up(by_id, ids(data), 0.5), rel=1e-7)  # some formats show float32


@pytest.mark.parametrize("taken", [1, 20, 30])
@pytest.mark.parametrize("way", ["map", "annotate"])
def test_stream_resumes(by_id, way, taken):
    data = corpus()

    def opened() -> IterableDataset:
        stream = stream_of(data)
        return by_id.annotate(stream) if way == "annotate" else stream.map(by_id, batched=True, batch_size=7)

    whole, first = list(opened()), opened()
    rows = iter(first)
    head = [next(rows) for _ in range(taken)]
    state = json.loads(json.dumps(first.state_dict()))
    second = opened()
    second.load_state_dict(state)
    assert head + list(second) == whole


def test_features_of_an_annotated_stream(by_id):
    """`map` alone forgets them."""
    stream = stream_of(corpus())
    assert by_id.annotate(stream).features == Features(stream.features | {"importance": Value("float64")})


# ---------------------------------------------------------------- annotate


def layouts(data: Dataset) -> dict[str, Dataset]:
    """The same rows, stored in other ways."""
    n = len(data)
    order = np.random.default_rng(0).permutation(n)
    parts = [data.select(range(start, min(start + 13, n))) for start in range(0, n, 13)]
    padded = concatenate_datasets([data.select(range(5)), data, data.select(range(2))])
    return {
        "whole": data,
        "chunked": concatenate_datasets(parts),
        "sliced": padded.select(range(5, 5 + n)),
        "index-mapped": data.select(order).select(np.argsort(order)),
        "flattened": data.select(order).select(np.argsort(order)).flatten_indices(),
        "index-mapped chunks": concatenate_datasets(
            [part.select(list(range(len(part)))[::-1]) for part in parts]
        ).select([i for start in range(0, n, 13) for i in reversed(range(start, min(start + 13, n)))]),
        "sharded": concatenate_datasets([data.shard(3, i, contiguous=True) for i in range(3)]),
    }


LAYOUTS = list(layouts(corpus()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KEYS)
def test_annotate_is_map(kind, layout):
    data, iw = layouts(corpus(kind))[layout], fitted(kind=kind)
    assert ids(data) == ids(corpus(kind))
    mapped, annotated = data.map(iw, batched=True), iw.annotate(data)
    assert values(annotated) == looked_up(iw, ids(data), 0.5)
    assert annotated.to_dict() == mapped.to_dict()
    assert annotated.features == mapped.features
    assert annotated.remove_columns("importance").features == data.features
    assert annotated[4] == mapped[4]


def test_annotate_does_not_rewrite_the_corpus(by_id, tmp_path):
    """Its own column is a few hundred bytes; the texts stay where they are."""
    corpus().map(lambda row: {"text": row["text"] * 1000}).save_to_disk(tmp_path)
    before = sum(path.stat().st_size for path in tmp_path.rglob("*.arrow"))
    annotated = by_id.annotate(load_from_disk(tmp_path))
    assert values(annotated) == looked_up(by_id, ids(corpus()), 0.5)
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.arrow")) - before < 50_000 < before


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_annotate_keeps_the_format(by_id, format_):
    data = corpus().with_format(format_)
    mapped, annotated = data.map(by_id, batched=True), by_id.annotate(data)
    assert annotated.format["type"] == mapped.format["type"] == format_
    assert values(annotated) == values(mapped)
    assert data.column_names == corpus().column_names  # the corpus itself is as it was


def test_annotate_when_a_format_hides_the_key(by_id):
    """A format with columns shows those alone; a corpus for a trainer often has one, and its ids are still there."""
    data = corpus().with_format("torch", columns=["number"])
    assert values(by_id.annotate(data).with_format(None)) == looked_up(by_id, ids(corpus()), 0.5)


def test_annotate_shuffled(by_id):
    data = corpus().shuffle(seed=3)
    annotated = by_id.annotate(data)
    assert ids(annotated) == ids(data)
    assert values(annotated) == looked_up(by_id, ids(data), 0.5)
    assert annotated.to_dict() == data.map(by_id, batched=True).to_dict()


def test_annotate_of_groups(by_source):
    data = corpus()
    assert by_source.annotate(data).to_dict() == data.map(by_source, batched=True).to_dict()


# ---------------------------------------------------------------- keys


def test_keys_are_sorted_and_counted():
    rows, iw = validation(kind="int"), fitted(kind="int")
    slots = [key for row in rows["retrieved"] for key in row]
    assert iw.keys.to_pylist() == sorted(set(slots))
    assert isinstance(iw.keys, pa.Array)
    assert iw.counts.tolist() == [slots.count(key) for key in sorted(set(slots))]
    assert iw.counts.dtype == np.int64
    assert (len(iw), iw.to_dict()) == (ITEMS, table_of(iw))


def test_counts_of_groups(by_source):
    slots = [name for row in validation()["source"] for name in row]
    assert by_source.keys.to_pylist() == sorted(set(slots))
    assert by_source.counts.tolist() == [slots.count(key) for key in sorted(set(slots))]
    assert by_source.to_dict() == table_of(by_source)


@pytest.mark.parametrize("as_given", ["dict", "table"])
def test_groups_that_are_given_apart(by_source, as_given):
    """Only rows of the corpus then need the group."""
    keys = [KEYS["string"](i) for i in range(ITEMS)]
    names = [source_of(i) for i in range(ITEMS)]
    groups = dict(zip(keys, names, strict=True)) if as_given == "dict" else pa.table({"id": keys, "source": names})
    rows = {name: part for name, part in validation().items() if name != "source"}
    iw = ImportanceWeights(k=3, epochs=5, group_column="source").fit(rows, progress=False, groups=groups)
    assert iw.to_dict() == by_source.to_dict()
    assert values(corpus().map(iw, batched=True)) == values(corpus().map(by_source, batched=True))


@pytest.mark.parametrize("type_", INTEGERS)
def test_integers_of_every_width(type_):
    keys = [0, 1, 2, 3, 7, 100]
    iw = of_weights(dict(zip(keys, np.arange(6) / 2, strict=True)))
    data = corpus_of([100, 5, 0, 3, 3, 7], type_)
    for way in WAYS:
        assert written(iw, data, way) == looked_up(iw, ids(data), 1.25)


@pytest.mark.parametrize("type_", INTEGERS)
def test_a_fit_to_integers_of_every_width(type_):
    rows = {"retrieved": [[1, 2, 100], [], [2, 3]], "utility": [[1.0, 0.0, 1.0], [], [0.0, 0.25]]}
    lists = pa.array(rows["retrieved"], pa.list_(getattr(pa, type_)()))
    iw = fitted(pa.table({"retrieved": lists, "utility": rows["utility"]}))
    assert iw.to_dict() == fitted(rows).to_dict()
    for other in ("int8", "uint16", "int64", "uint64"):
        data = corpus_of([100, 5, 3], other)
        assert values(data.map(iw, batched=True)) == looked_up(iw, [100, 5, 3], 0.5)
        assert values(iw.annotate(data)) == looked_up(iw, [100, 5, 3], 0.5)


WRAPPED = {"uint64": 2**64 - 2, "int64": 2**32, "int32": 300, "int16": 256, "uint16": 65534, "uint32": 2**32 - 2}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("type_", WRAPPED)
def test_integers_do_not_wrap(type_, way):
    """-2 as uint64 is 2^64 - 2, 256 as int8 is 0: not the ids that were fitted."""
    iw = of_weights({-2: 0.25, 0: 0.75, 1: 1.0, 44: 0.0})
    try:
        found = written(iw, corpus_of([WRAPPED[type_], 1], type_), way)
    except ValueError as error:  # what is beyond int64 may be refused, by all ways alike
        assert type_ == "uint64"
        assert "int64" in str(error)
    else:
        assert found == [0.5, 1.0]


def test_integers_of_a_narrow_fit_do_not_wrap():
    small = pa.table({"retrieved": pa.array([[-2, 0], [44]], pa.list_(pa.int8())), "utility": [[1.0, 0.5], [0.0]]})
    narrow = fitted(small)
    assert values(narrow.annotate(corpus_of([254, 256, 300, 44]))) == looked_up(narrow, [254, 256, 300, 44], 0.5)


def test_integers_above_2_to_the_53():
    """Neighbours there are one float."""
    keys = [2**53 + i for i in range(4)] + [-(2**60) - 1, -(2**60), 2**62 - 1, 2**62]
    iw = of_weights(dict(zip(keys, np.arange(8) / 4, strict=True)))
    wanted = [*(np.arange(8) / 4).tolist(), 0.875]
    data = corpus_of([*keys, 2**53 + 4])
    for format_ in FORMATS:
        assert values(data.with_format(format_).map(iw, batched=True)) == wanted
        assert values(iw.annotate(data.with_format(format_))) == wanted
    assert iw.lookup(np.array(keys)).tolist() == wanted[:-1]


@pytest.mark.parametrize("type_", ["string", "large_string"])
@pytest.mark.parametrize("fitted_to", ["string", "large_string"])
def test_strings_of_every_width(fitted_to, type_):
    keys = ["a", "", "é", "e\u0301", "日本", "a b", "A"]
    rows = {"retrieved": [keys, keys[:3]], "utility": [[float(i % 2) for i in range(7)], [1.0, 0.0, 0.5]]}
    lists = pa.array(rows["retrieved"], pa.list_(getattr(pa, fitted_to)()))
    iw = fitted(pa.table({"retrieved": lists, "utility": rows["utility"]}))
    assert iw.to_dict() == fitted(rows).to_dict()
    data = corpus_of([*keys[::-1], "unknown", "a\0"], type_)
    for way in WAYS:
        assert written(iw, data, way) == looked_up(iw, ids(data), 0.5)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fit_to_rows_in_every_layout(kind, layout):
    rows = Dataset.from_dict(validation(kind=kind))
    iw, twin = fitted(layouts(rows)[layout]), fitted(kind=kind)
    assert iw.to_dict() == twin.to_dict()
    assert Hasher.hash(iw) == Hasher.hash(twin)


@pytest.mark.parametrize("format_", FORMATS, ids=str)
@pytest.mark.parametrize("rows_of", ["data set", "stream", "stream of a formatted data set"])
def test_a_fit_to_rows_in_every_format(rows_of, format_):
    """Some formats show float64 as float32; the fit reads what is stored."""
    rows = Dataset.from_dict(validation(kind="int"))
    shown = rows if rows_of == "stream" else rows.with_format(format_)
    iw = fitted(shown if rows_of == "data set" else formatted_stream_of(shown, format_))
    assert iw.to_dict() == fitted(kind="int").to_dict()


@pytest.mark.parametrize("lists", [pa.list_, pa.large_list], ids=["list", "large list"])
@pytest.mark.parametrize("utility", ["float64", "float32", "float16", "int8", "int64", "uint8", "bool_"])
def test_a_fit_to_utilities_of_every_type(utility, lists):
    rows = validation(kind="int")
    gains = [[round(value) for value in row] for row in rows["utility"]]
    table = pa.table(
        {
            "retrieved": pa.array(rows["retrieved"], lists(pa.int32())),
            "utility": pa.array(gains, lists(pa.int64())).cast(lists(getattr(pa, utility)())),
        }
    )
    wanted = fitted({"retrieved": rows["retrieved"], "utility": gains})
    for each in (table, Dataset(InMemoryTable(table)), Dataset(InMemoryTable(table)).to_iterable_dataset()):
        assert fitted(each).to_dict() == wanted.to_dict()


@pytest.mark.parametrize("kind", KEYS)
def test_lookup(kind):
    iw, keys = fitted(kind=kind), [KEYS[kind](i) for i in (5, 47, 2, 5)]
    wanted = looked_up(iw, keys, 0.5)
    data = corpus_of(keys)
    given = [keys, tuple(keys), np.array(keys), pa.array(keys), pa.chunked_array([keys[:1], keys[1:]]), data["id"]]
    given += [np.array(keys, object), pa.array([None, *keys]).slice(1), data.to_pandas()["id"]]
    given += [torch.tensor(keys)] if kind == "int" else []
    for each in given:
        found = iw.lookup(each)
        assert (type(found), found.dtype) == (np.ndarray, np.float64)
        assert found.tolist() == wanted, type(each)
    assert iw.lookup([]).tolist() == []
    assert iw.lookup(pa.array([], pa.string() if kind == "string" else pa.int64())).dtype == np.float64


def test_lookup_by_group(by_source):
    names = ["source 3", "nowhere", "source 0"]
    assert by_source.lookup(names).tolist() == looked_up(by_source, names, 0.5)


# ---------------------------------------------------------------- prune


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KEYS)
def test_prune(kind, layout):
    data, iw = layouts(corpus(kind))[layout], fitted(kind=kind)
    for threshold in (0.0, float(np.median(iw.weights)), float(iw.weights.max()), 0.7):
        kept = [i for i, key in enumerate(ids(data)) if table_of(iw).get(key, math.inf) >= threshold]
        pruned = iw.prune(data, threshold)
        assert isinstance(pruned, Dataset)
        assert pruned.to_dict() == data.select(kept).to_dict()
        assert pruned.features == data.features
    assert iw.threshold is None  # it is no tuning


def test_prune_takes_groups_whole(by_source):
    data, threshold = corpus(), float(np.median(by_source.weights))
    kept = {name for name, weight in table_of(by_source).items() if weight >= threshold}
    assert 0 < len(kept) < len(by_source)
    assert ids(by_source.prune(data, threshold)) == [row["id"] for row in data if row["source"] in kept]


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_prune_in_every_format(by_id, format_):
    data = corpus()
    pruned = by_id.prune(data.with_format(format_), 0.6)
    assert pruned.format["type"] == format_
    assert ids(pruned) == ids(by_id.prune(data, 0.6))


def test_prune_with_the_tuned_threshold():
    iw = fitted()
    threshold = iw.tune_threshold(validation(7), metric="utility")
    assert iw.threshold == threshold
    assert ids(iw.prune(corpus())) == ids(iw.prune(corpus(), threshold))


def test_a_weight_equal_to_the_threshold_is_kept():
    iw = of_weights({"a": 0.25, "b": 0.5, "c": 0.75, "d": 1.0})
    data = corpus_of(["d", "c", "b", "a"])
    assert ids(iw.prune(data, 0.75)) == ["d", "c"]
    assert ids(iw.prune(data, np.nextafter(0.75, 1))) == ["d"]
    assert ids(iw.prune(data, threshold=0)) == ["d", "c", "b", "a"]


@pytest.mark.parametrize("type_", ["int64", "string"])
def test_all_rows_pruned(type_):
    iw = fitted(kind="int" if type_ == "int64" else "string", unseen="drop")
    data = corpus("int" if type_ == "int64" else "string")
    with heard() as said:
        pruned = iw.prune(data, 1.5)
    assert len(pruned) == 0
    assert isinstance(pruned, Dataset)
    assert pruned.features == data.features
    assert len(said) == 1
    assert "1.5" in said[0] or str(len(data)) in said[0]


# ---------------------------------------------------------------- sample


def kept_keys(data: Dataset, name: str = "id") -> set:
    return set(values(data, name))


def test_sample_keeps_the_share_that_the_weights_say():
    n = 400
    weights = np.random.default_rng(0).integers(1, 64, n) / 64
    iw = of_weights(dict(enumerate(np.append(weights, [0.5] * (512 - n)).tolist())))
    data = corpus_of(range(n))
    mean, error = weights.sum(), math.sqrt((weights * (1 - weights)).sum())
    kept = [kept_keys(iw.sample(data, seed=seed)) for seed in range(25)]
    for seed, keys in enumerate(kept):
        assert abs(len(keys) - mean) < 4.5 * error, seed
    # and heavy keys are those that stay
    times = np.array([sum(key in keys for keys in kept) for key in range(n)])
    assert abs((times - 25 * weights).sum()) < 4.5 * 5 * error
    for low, high in ((0, 0.3), (0.3, 0.7), (0.7, 1)):
        chosen = (weights >= low) & (weights < high)
        share = 4.5 * math.sqrt(25 * (weights[chosen] * (1 - weights[chosen])).sum())
        assert abs((times - 25 * weights)[chosen].sum()) < share


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sample_is_one_draw_a_key(layout):
    """Whatever the order of the corpus, its other rows and its storage."""
    iw, data = fitted(), corpus()
    kept = kept_keys(iw.sample(data, seed=11))
    stored = layouts(data)[layout]
    sampled = iw.sample(stored, seed=11)
    assert sampled.to_dict() == stored.filter(lambda row: row["id"] in kept).to_dict()
    assert kept_keys(iw.sample(data.shuffle(seed=5), seed=11)) == kept
    half = data.select(range(0, len(data), 2))
    assert kept_keys(iw.sample(half, seed=11)) == kept & kept_keys(half)
    doubled = concatenate_datasets([data, data])
    assert iw.sample(doubled, seed=11)["id"][:] == 2 * sampled["id"][:]


def test_sample_by_seed(by_id):
    data = corpus()
    drawn = [ids(by_id.sample(data, seed=seed)) for seed in range(6)]
    assert drawn == [ids(fitted().sample(data, seed=seed)) for seed in range(6)]
    assert len({tuple(keys) for keys in drawn}) > 3
    assert ids(by_id.sample(data)) == ids(by_id.sample(data)) == ids(fitted().sample(data))
    assert ids(by_id.sample(data)) == ids(by_id.sample(data, seed=by_id.config.seed))
    assert ids(fitted(seed=5).sample(data)) == drawn[5]


def test_sample_leaves_the_callers_generators_alone(by_id):
    np.random.seed(0)
    torch.manual_seed(0)
    before, torchs = np.random.get_state()[1].tolist(), torch.get_rng_state()
    by_id.sample(corpus(), seed=1)
    assert np.random.get_state()[1].tolist() == before
    assert torch.equal(torch.get_rng_state(), torchs)


def test_a_heavier_key_is_kept_whenever_a_lighter_one_was():
    """The uniform is the seed's and the key's, not the weight's; keep if z < w."""
    light = dict(zip(range(8), [0.0, 0.25, 0.5, 0.25, 0.125, 0.375, 1.0, 0.5], strict=True))
    heavy = dict(zip(range(8), [0.25, 0.5, 0.5, 0.75, 0.25, 0.75, 1.0, 1.0], strict=True))
    data = corpus_of(range(8))
    low, high = of_weights(light), of_weights(heavy)
    for seed in range(30):
        few, many = (kept_keys(iw.sample(data, seed=seed)) for iw in (low, high))
        assert few <= many
        assert 0 not in few
        assert 6 in few
        assert 7 in many


def test_sample_takes_groups_whole(by_source):
    data = corpus()
    sizes = set()
    for seed in range(12):
        kept = by_source.sample(data, seed=seed)
        names = kept_keys(kept, "source")
        assert ids(kept) == [row["id"] for row in data if row["source"] in names]
        sizes.add(len(names))
    assert len(sizes) > 1


@pytest.mark.parametrize("format_", FORMATS, ids=str)
def test_sample_in_every_format(by_id, format_):
    data = corpus()
    sampled = by_id.sample(data.with_format(format_), seed=2)
    assert sampled.format["type"] == format_
    assert sampled.with_format(None).to_dict() == by_id.sample(data, seed=2).to_dict()
    assert sampled.features == data.features


# ---------------------------------------------------------------- keys that the fit never met

STRANGERS = {"int": [10_000, -10_000], "string": ["stranger", ""]}


def with_strangers(kind: str, nulls: bool) -> Dataset:
    known = [KEYS[kind](i) for i in range(0, ITEMS, 5)]
    return corpus_of([*STRANGERS[kind], *known, *([None, None] if nulls else []), STRANGERS[kind][0]])


MODES = ["keep", "drop", 0.25, 0.0, 1.0]


@pytest.mark.parametrize("nulls", [False, True], ids=["", "nulls"])
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_unseen_in_the_column(way, mode, kind, nulls):
    iw, data = fitted(kind=kind, unseen=mode), with_strangers(kind, nulls)
    unseen = {"keep": 0.5, "drop": 0.0}.get(mode, mode)
    assert written(iw, data, way) == looked_up(iw, ids(data), unseen)
    assert iw.lookup(ids(data)).tolist() == looked_up(iw, ids(data), unseen)


@pytest.mark.parametrize("way", ["map", "annotate"])
@pytest.mark.parametrize("format_", ["numpy", "torch", "arrow", "pandas"])
@pytest.mark.parametrize("kind", KEYS)
def test_null_in_every_format(kind, format_, way):
    """Some formats show integers with nulls as floats with NaN."""
    iw, data = fitted(kind=kind, unseen=0.25), with_strangers(kind, nulls=True)
    assert written(iw, data.with_format(format_), way) == looked_up(iw, ids(data), 0.25)


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("type_", [None, "null"])
def test_nothing_but_null(kind, type_):
    iw = fitted(kind=kind)
    data = corpus_of([None, None], type_ or {"int": "int32", "string": "string"}[kind])
    for way in WAYS:
        assert written(iw, data, way) == [0.5, 0.5]
    assert iw.lookup([None]).tolist() == [0.5]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["keep", "drop"])
def test_unseen_of_every_method(method, mode):
    rows = validation()
    rows["utility"] = [[utility - 0.4 for utility in row] for row in rows["utility"]]
    iw, data = fitted(rows, method=method, unseen=mode), with_strangers("string", nulls=True)
    slots = [utility for row in rows["utility"] for utility in row]
    unseen = NEUTRAL.get(method, math.fsum(slots) / len(slots)) if mode == "keep" else min(0.0, iw.weights.min())
    assert (iw.weights.min() < 0) == (method != "multilinear")
    assert values(data.map(iw, batched=True)) == pytest.approx(looked_up(iw, ids(data), unseen), rel=1e-14, abs=0)


def test_dropped_is_at_most_zero():
    """min(0, smallest weight): 0 here, where every weight is above it."""
    iw = of_weights({"a": 0.5, "b": 0.75, "c": 1.0, "d": 0.75}, unseen="drop")
    assert iw.lookup(["a", "x", None]).tolist() == [0.5, 0.0, 0.0]


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("mode", MODES)
def test_unseen_when_pruned(mode, threshold, kind):
    iw, data = fitted(kind=kind, unseen=mode), with_strangers(kind, nulls=True)
    stay = {"keep": True, "drop": False}.get(mode, mode if isinstance(mode, str) else mode >= threshold)
    kept = [key for key in ids(data) if (table_of(iw)[key] >= threshold if key in table_of(iw) else stay)]
    assert ids(iw.prune(data, threshold)) == kept


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("mode", MODES)
def test_unseen_when_sampled(mode, kind):
    iw = fitted(kind=kind, unseen=mode)
    data, table = with_strangers(kind, nulls=True), table_of(iw)
    for seed in range(4):
        found = ids(iw.sample(data, seed=seed))
        strange = [key for key in found if key not in table]
        if mode in ("keep", 1.0):
            assert strange == [key for key in ids(data) if key not in table]
        elif mode in ("drop", 0.0):
            assert not strange
        else:
            assert strange.count(STRANGERS[kind][0]) in (0, 2)  # one draw a key
        assert ids(iw.sample(data, seed=seed)) == found


@pytest.mark.parametrize("kind", KEYS)
def test_unseen_with_a_probability(kind):
    iw, many = fitted(kind=kind, unseen=0.25), 400
    data = corpus_of([10_000 + i if kind == "int" else f"new {i}" for i in range(many)])
    with heard():  # that no id is known is a fair remark here
        kept = [len(iw.sample(data, seed=seed)) for seed in range(12)]
    error = math.sqrt(many * 0.25 * 0.75)
    assert all(abs(count - many / 4) < 4.5 * error for count in kept)
    assert len(set(kept)) > 1


@pytest.mark.parametrize("mode", ["keep", "drop", 0.25])
def test_unseen_groups(mode):
    iw = fitted(group_column="source", unseen=mode)
    data = corpus_of(["a", "b", "c"], source=["source 1", "elsewhere", None])
    unseen = {"keep": 0.5, "drop": 0.0}.get(mode, mode)
    for way in WAYS:
        assert written(iw, data, way) == looked_up(iw, ["source 1", "elsewhere", None], unseen)
    assert ids(iw.prune(data, 0.0))[1:] == ([] if mode == "drop" else ["b", "c"])


# ---------------------------------------------------------------- empty


@pytest.mark.parametrize("kind", KEYS)
def test_empty_corpus(kind):
    iw, data = fitted(kind=kind), corpus(kind).select([])
    with heard() as said:
        annotated, pruned, sampled = iw.annotate(data), iw.prune(data, 0.5), iw.sample(data, seed=0)
        data.map(iw, batched=True)
    assert not said
    assert annotated.features == Features(data.features | {"importance": Value("float64")})
    assert pruned.features == sampled.features == data.features
    assert [len(each) for each in (annotated, pruned, sampled)] == [0, 0, 0]
    assert all(isinstance(each, Dataset) for each in (annotated, pruned, sampled))
    assert np.asarray(iw({"id": []})["importance"]).shape == (0,)


@pytest.mark.parametrize("format_", ["arrow", "numpy"])
def test_empty_slice_of_a_formatted_corpus(by_id, format_):
    data = corpus().with_format(format_).select(range(0))
    assert len(by_id.annotate(data)) == len(by_id.prune(data, 0.5)) == 0


# ---------------------------------------------------------------- fingerprints


def use(iw: ImportanceWeights, folder: Path) -> None:
    """Every reader, once."""
    data, other = corpus(), validation(7)
    data.map(iw, batched=True)
    iw({"id": ids(data)})
    iw.annotate(data)
    list(iw.annotate(data.to_iterable_dataset()))
    iw.lookup(ids(data))
    iw.tune_threshold(other, metric="vote")
    iw.tune_threshold(other, metric="utility")
    iw.evaluate(validation(8))
    iw.prune(data)
    iw.sample(data, seed=3)
    iw.weighted_vote(other["answers"], other["retrieved"])
    iw.rescore([1.0, 2.0], other["retrieved"][0][:1] * 2)
    iw.sampler(data)
    iw.save_pretrained(folder)
    assert len(iw.to_dict()) == len(iw) == len(iw.keys) == len(iw.weights) == len(iw.counts)
    assert repr(iw)
    assert iw.threshold in [entry["threshold"] for entry in iw.tuning]
    assert math.isfinite(iw.value)
    assert iw.history == [] if iw.config.method != "multilinear" else iw.history[-1]["epoch"] == 5
    assert iw.learning_rate_ is None or iw.learning_rate_ > 0


OPTIONS = [
    {},
    {"group_column": "source"},
    {"group_column": "source", "group_update": "exact"},
    {"method": "mean"},
    {"dtype": "float32"},
    {"epsilon": 0.01},
]
NAMES = ["items", "groups", "exact groups", "mean", "float32", "truncated"]


@pytest.mark.parametrize("options", OPTIONS, ids=NAMES)
def test_twin_and_loaded_have_one_fingerprint(options, tmp_path):
    iw, data = fitted(**options), corpus()
    iw.save_pretrained(tmp_path)
    others = {
        "twin": fitted(**options),
        "twin of another input": fitted(as_table(validation()), **options),
        "twin of dicts": fitted(as_dicts(validation()), **options),
        "twin of other rows": fitted(Dataset.from_dict(validation()), **options),
        "loaded": ImportanceWeights.from_pretrained(tmp_path),
        "pickled": pickle.loads(pickle.dumps(iw)),
        "copied": copy.deepcopy(iw),
    }
    mapped = data.map(iw, batched=True)
    for name, other in others.items():
        assert Hasher.hash(other) == Hasher.hash(iw), name
        assert data.map(other, batched=True)._fingerprint == mapped._fingerprint, name


def test_threads_and_progress_are_not_in_the_fingerprint():
    one, two = (
        ImportanceWeights(k=3, epochs=5).fit(validation(), progress=progress, num_threads=threads)
        for progress, threads in ((False, 1), (True, 2))
    )
    assert Hasher.hash(one) == Hasher.hash(two)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=NAMES[:4])
def test_use_changes_nothing_that_map_hashes(options, tmp_path):
    iw, data = fitted(**options), corpus()
    fresh, mapped = Hasher.hash(iw), data.map(iw, batched=True)._fingerprint
    keys, weights, counts = iw.keys.to_pylist(), iw.weights.copy(), iw.counts.copy()
    if options.get("group_column"):  # the vote of items needs ids; what remains are the readers of groups
        iw.lookup(["source 1"])
        iw.annotate(data)
        iw.tune_threshold(validation(7))
        iw.prune(data)
        iw.sample(data)
        iw.sampler(data)
        iw.save_pretrained(tmp_path)
    else:
        use(iw, tmp_path)
    assert Hasher.hash(iw) == fresh
    assert data.map(iw, batched=True)._fingerprint == mapped
    assert Hasher.hash(ImportanceWeights.from_pretrained(tmp_path)) == fresh
    assert (iw.keys.to_pylist(), iw.weights.tolist(), iw.counts.tolist()) == (keys, weights.tolist(), counts.tolist())


@pytest.mark.parametrize(
    "options",
    [{"output_column": "other"}, {"unseen": "drop"}, {"unseen": 0.25}, {"dtype": "float32"}, {"id_column": "text"}],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()),
)
def test_other_columns_have_other_fingerprints(options):
    assert Hasher.hash(fitted(**options)) != Hasher.hash(fitted())


def test_other_weights_have_other_fingerprints():
    assert Hasher.hash(fitted(validation(1))) != Hasher.hash(fitted())
    assert Hasher.hash(fitted(k=4)) != Hasher.hash(fitted())


def test_what_is_pickled_is_small():
    """Keys as compact buffers: a slice pickles its whole parent."""
    keys = [f"{i:010}" for i in range(2000)]
    rows = {"retrieved": [keys[i : i + 20] for i in range(0, 2000, 20)], "utility": [[0.5] * 20] * 100}
    table = pa.table(rows)
    iw = fitted(table.slice(90))
    iw.lookup(keys)  # builds the index
    assert len(iw) == 200
    assert len(pickle.dumps(iw)) < 200 * (10 + 4 + 8 + 8) + 6000


def files(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.arrow")}


def maps(folder: Path, iw: ImportanceWeights) -> Dataset:
    return load_from_disk(folder).map(iw, batched=True)


def never(*_: Any) -> Any:
    raise AssertionError("called, where the cache has the answer")


def test_the_cache_answers_a_twin_and_a_loaded_object(tmp_path, monkeypatch):
    corpus().save_to_disk(tmp_path / "corpus")
    iw = fitted()
    iw.save_pretrained(tmp_path / "weights")
    first = maps(tmp_path / "corpus", iw)
    before = files(tmp_path)
    assert len(before) == 3  # the corpus, the cache and the keys
    monkeypatch.setattr(ImportanceWeights, "__call__", never)
    for other in (iw, fitted(), ImportanceWeights.from_pretrained(tmp_path / "weights")):
        assert maps(tmp_path / "corpus", other).to_dict() == first.to_dict()
    assert files(tmp_path) == before


def test_the_cache_answers_in_another_process(tmp_path):
    corpus().save_to_disk(tmp_path / "corpus")
    iw = fitted()
    iw.save_pretrained(tmp_path / "weights")
    (tmp_path / "rows.json").write_text(json.dumps(validation()))
    first = maps(tmp_path / "corpus", iw)
    before = files(tmp_path)
    code = f"""
    import json
    from pathlib import Path
    from datasets import load_from_disk
    from hf_ext import ImportanceWeights

    folder, calls, answers = Path({str(tmp_path)!r}), [], []
    twin = ImportanceWeights(k=3, epochs=5).fit(json.loads((folder / "rows.json").read_text()), progress=False)
    ImportanceWeights.__call__ = lambda self, batch: calls.append(1)
    for iw in (twin, ImportanceWeights.from_pretrained(folder / "weights")):
        mapped = load_from_disk(folder / "corpus").map(iw, batched=True)
        answers.append([len(calls), mapped._fingerprint, mapped["importance"][:]])
    print(json.dumps(answers))
    """
    assert answer(run_python(code)) == [[0, first._fingerprint, values(first)]] * 2
    assert files(tmp_path) == before


@pytest.mark.smoke
def test_the_readme_line():
    """The whole of it: fit, map, and the corpus has the column."""
    rows: Iterable[dict] = as_dicts(validation())
    data = corpus().map(ImportanceWeights(k=10).fit(Dataset.from_list(rows)), batched=True)
    weights = column(data).to_numpy()
    assert ((weights >= 0) & (weights <= 1)).all()
    assert len(set(weights.tolist())) > 5
