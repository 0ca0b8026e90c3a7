"""What weights are for at query time: votes, scores, the threshold, the evaluation and the sampler, by slow oracles."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset, IterableDataset, concatenate_datasets
from importance_corpora import (
    ITEMS,
    KEYS,
    as_dicts,
    as_table,
    corpus,
    corpus_of,
    fitted,
    heard,
    looked_up,
    of_weights,
    rows_for,
    source_of,
    table_of,
    validation,
)
from torch.utils.data import DataLoader, WeightedRandomSampler

from hf_ext import ImportanceWeights

EIGHTHS = dict(zip("abcdefgh", [0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.375], strict=True))  # mean 0.5

# ---------------------------------------------------------------- oracles


def unseen_weight(iw: ImportanceWeights) -> float:
    neutral = {"multilinear": 0.5}.get(iw.config.method, 0.0)
    if iw.config.method == "mean":
        neutral = float(np.average(iw.weights))  # as `rows_for` makes it
    return {"keep": neutral, "drop": min(0.0, iw.weights.min())}.get(iw.config.unseen, iw.config.unseen)


def stays(iw: ImportanceWeights, key: Any, threshold: float | None) -> bool:
    """Whether an item is kept; all are without a threshold."""
    if threshold is None:
        return True
    if key in table_of(iw):
        return table_of(iw)[key] >= threshold
    return {"keep": True, "drop": False}.get(iw.config.unseen, iw.config.unseen >= threshold if _float(iw) else None)


def _float(iw: ImportanceWeights) -> bool:
    return not isinstance(iw.config.unseen, str)


def kept_places(iw: ImportanceWeights, row: dict, threshold: float | None) -> list[int]:
    """Places of the first k kept items of a row."""
    keys = row[iw.config.group_column or "retrieved"]
    return [i for i, key in enumerate(keys) if stays(iw, key, threshold)][: iw.config.k]


def plain_vote(answers: Sequence[Any]) -> Any:
    """The most frequent; ties to the first met."""
    best = None
    for answer in answers:
        if best is None or answers.count(answer) > answers.count(best):
            best = answer
    return best


def heavy_vote(answers: Sequence[Any], weights: Sequence[float], k: int) -> Any:
    places = [i for i, weight in enumerate(weights) if weight > 0][:k]
    sums: dict[Any, float] = {}
    for i in places:
        sums[answers[i]] = sums.get(answers[i], 0.0) + weights[i]
    return max(sums, key=sums.__getitem__) if sums else None  # the first of the largest, in the order of first met


def vote_score(iw: ImportanceWeights, rows: list[dict], threshold: float | None, weighted: bool = False) -> float:
    """Mean over the rows of the utility of the winner's first item."""
    total = []
    for row in rows:
        if weighted:
            keys = row[iw.config.group_column or "retrieved"]
            weights = looked_up(iw, keys, unseen_weight(iw))
            places = [i for i, weight in enumerate(weights) if weight > 0][: iw.config.k]
            winner = heavy_vote(row["answers"], weights, iw.config.k)
        else:
            places = kept_places(iw, row, threshold)
            winner = plain_vote([row["answers"][i] for i in places])
        first = [i for i in places if row["answers"][i] == winner][:1]
        total.append(row["utility"][first[0]] if first else 0.0)
    return math.fsum(total) / len(total)


def utility_score(iw: ImportanceWeights, rows: list[dict], threshold: float | None) -> float:
    """Mean over the rows of U(kept); the divisor is K also when fewer are kept."""
    sums = [math.fsum(row["utility"][i] for i in kept_places(iw, row, threshold)) for row in rows]
    return math.fsum(sums) / iw.config.k / len(rows)


SCORES = {"vote": vote_score, "utility": utility_score}


def with_strangers(rows: dict[str, list], seed: int = 3) -> dict[str, list]:
    """Every sixth item is one that the fit never met."""
    draw = np.random.default_rng(seed)

    def swapped(key: str) -> str:
        return f"stranger {draw.integers(3)}" if draw.random() < 1 / 6 else key

    return rows | {"retrieved": [[swapped(key) for key in row] for row in rows["retrieved"]]}


# ---------------------------------------------------------------- weighted vote


@pytest.mark.parametrize(
    "answers, ids, k, winner",
    [
        ("xyy", "hbc", None, "x"),  # 1.375 against 0.375
        ("xyy", "ecc", None, "x"),  # 0.5 against 0.5: x was met first
        ("yxy", "cec", None, "y"),  # the same, and y was met first
        ("xyyz", "edbh", 3, "x"),  # 0.5 against 0.5; z is too far down
        ("xyyz", "edbh", 4, "z"),
        ("xyz", "aab", None, "z"),  # a weighs nothing, and takes no place
        ("xyyy", "aeab", 1, "y"),
        ("xyxz", "badh", 2, "x"),  # a is passed over: 0.125 + 0.375
        ("xyxz", "badh", 3, "z"),
        ("xy", "aa", None, None),
        ("xyz", "bcd", 100, "z"),
        ("xyz", "bcd", 1, "x"),
    ],
)
def test_weighted_vote(answers, ids, k, winner):
    iw = of_weights(EIGHTHS)
    assert iw.weighted_vote(list(answers), list(ids), k=k) == winner


def test_the_k_of_the_fit_is_the_default():
    for k in (1, 2, 3):
        iw = of_weights(EIGHTHS, k=k)
        for answers, ids in (("xyyz", "edbh"), ("xyxz", "badh"), ("xyz", "bcd")):
            assert iw.weighted_vote(list(answers), list(ids)) == iw.weighted_vote(list(answers), list(ids), k)


def test_lists_of_lists_give_a_list():
    iw = of_weights(EIGHTHS)
    answers, ids = [["x", "y", "y"], [], ["z"], ["z"]], [["h", "b", "c"], [], ["a"], ["e"]]
    assert iw.weighted_vote(answers, ids) == ["x", None, None, "z"]
    assert iw.weighted_vote(answers[:1], ids[:1]) == ["x"]
    assert iw.weighted_vote([[]], [[]]) == [None]


def test_votes_of_a_dataset_are_votes_of_its_rows():
    iw, rows = fitted(), as_dicts(with_strangers(validation(5)))
    data = Dataset.from_list(rows)
    wanted = [heavy_vote(row["answers"], looked_up(iw, row["retrieved"], 0.5), 3) for row in rows]
    assert iw.weighted_vote(data["answers"][:], data["retrieved"][:]) == wanted
    assert iw.weighted_vote(data["answers"], data["retrieved"]) == wanted  # columns, as datasets hands them
    assert [iw.weighted_vote(row["answers"], row["retrieved"]) for row in data] == wanted


@pytest.mark.parametrize("ids", [np.array, pa.array, tuple], ids=["numpy", "arrow", "tuple"])
def test_other_containers_of_one_row(ids):
    iw = of_weights(EIGHTHS)
    assert iw.weighted_vote(["x", "y", "y"], ids(list("hbc"))) == "x"


def test_answers_that_are_no_strings():
    iw = of_weights(EIGHTHS)
    assert iw.weighted_vote([1, 2, 2], list("hbc")) == 1
    assert iw.weighted_vote([True, False, False], list("bcd")) is False


@pytest.mark.parametrize(
    "unseen, winner",
    [("keep", "x"), ("drop", "y"), (0.0, "y"), (0.25, "x"), (0.125, "y"), (1.0, "x")],
)
def test_unseen_items_vote_with_what_the_column_holds(unseen, winner):
    """Neutral (here the mean, 0.5), 0 or the number; `y` has 0.125 + 0.0625."""
    iw = of_weights({"a": 0.125, "b": 0.875, "c": 0.0625, "d": 0.9375}, unseen=unseen)  # mean 0.5
    assert iw.weighted_vote(["x", "y", "y"], ["stranger", "a", "c"]) == winner
    assert iw.weighted_vote(["x", "y", "y"], [None, "a", "c"]) == winner


@pytest.mark.parametrize("method", ["shapley", "banzhaf", "loo"])
def test_items_of_negative_value_do_not_vote(method):
    rows = validation()
    rows["utility"] = [[utility - 0.5 for utility in row] for row in rows["utility"]]
    iw, others = fitted(rows, method=method), as_dicts(with_strangers(validation(5)))
    assert iw.weights.min() < 0 < iw.weights.max()
    for row in others:
        weights = looked_up(iw, row["retrieved"], 0.0)
        assert iw.weighted_vote(row["answers"], row["retrieved"]) == heavy_vote(row["answers"], weights, 3)


def test_groups_vote_by_group():
    iw, rows = fitted(group_column="source"), as_dicts(validation(5))
    for row in rows:
        weights = looked_up(iw, row["source"], 0.5)
        assert iw.weighted_vote(row["answers"], row["source"]) == heavy_vote(row["answers"], weights, 3)


# ---------------------------------------------------------------- rescore


def test_rescore():
    iw = of_weights(EIGHTHS)
    scores, ids = [1.0, 2.0, 0.0, 8.0], ["h", "b", "e", "a"]
    assert iw.rescore(scores, ids).tolist() == [1.375, 0.25, 0.0, 0.0]
    assert iw.rescore(scores, ids, higher_is_better=False).tolist() == [1 / 1.375, 16.0, 0.0, math.inf]


@pytest.mark.parametrize("seen", [True, False], ids=["", "strangers"])
@pytest.mark.parametrize("kind", KEYS)
def test_rescore_against_a_dict(kind, seen):
    iw, draw = fitted(kind=kind), np.random.default_rng(0)
    ids = [KEYS[kind](i) for i in draw.integers(0, ITEMS if seen else ITEMS + 20, 50)]
    scores = draw.random(50) * 10
    weights = np.array(looked_up(iw, ids, 0.5))
    with np.errstate(divide="ignore"):
        far = np.where(weights > 0, scores / weights, np.inf)
    np.testing.assert_array_equal(iw.rescore(scores, ids), scores * weights)
    np.testing.assert_array_equal(iw.rescore(scores, ids, higher_is_better=False), far)


def test_rescore_of_a_batch_of_queries():
    """As `get_nearest_examples_batch` gives them: (queries, k), padded with -1."""
    iw = of_weights(dict(enumerate(EIGHTHS.values())))
    scores = np.array([[3.0, 2.0, 1.0], [4.0, 0.5, 0.0]])
    ids = np.array([[7, 4, 1], [2, -1, -1]])
    np.testing.assert_array_equal(iw.rescore(scores, ids), [[4.125, 1.0, 0.125], [1.0, -np.inf, -np.inf]])
    far = iw.rescore(scores, ids, higher_is_better=False)
    np.testing.assert_array_equal(far, [[3 / 1.375, 4.0, 8.0], [16.0, np.inf, np.inf]])


@pytest.mark.parametrize("padding", [-3.4028234663852886e38, -1.0, -math.inf, math.inf, math.nan, 0.0], ids=str)
def test_whatever_score_padding_has(padding):
    """FAISS gives it -3.4e38 as an inner product, and 3.4e38 as a distance: no negative score of an item."""
    iw = of_weights(dict(enumerate(EIGHTHS.values())))
    assert iw.rescore([2.0, padding], [4, -1]).tolist() == [1.0, -math.inf]
    assert iw.rescore([2.0, padding], [4, -1], higher_is_better=False).tolist() == [4.0, math.inf]


def test_rescore_does_not_write_into_what_it_is_given():
    iw, scores, ids = of_weights(dict(enumerate(EIGHTHS.values()))), np.array([1.0, 2.0]), np.array([7, -1])
    iw.rescore(scores, ids)
    iw.rescore(scores, ids, higher_is_better=False)
    assert (scores.tolist(), ids.tolist()) == ([1.0, 2.0], [7, -1])


@pytest.mark.parametrize("type_", [list, np.array, torch.tensor, np.float32], ids=["list", "numpy", "torch", "float32"])
def test_rescore_of_other_kinds(type_):
    iw = of_weights(dict(enumerate(EIGHTHS.values())))
    rescored = iw.rescore(type_([2.0, 1.0]), np.array([4, 7]))
    assert np.asarray(rescored).tolist() == [1.0, 1.375]


@pytest.mark.parametrize("unseen, weight", [("keep", 0.5), ("drop", 0.0), (0.25, 0.25)])
def test_unseen_items_when_rescored(unseen, weight):
    iw = of_weights(EIGHTHS, unseen=unseen)
    assert iw.rescore([2.0, 2.0], ["stranger", "e"]).tolist() == [2 * weight, 1.0]
    far = math.inf if weight == 0 else 2 / weight
    assert iw.rescore([2.0, 2.0], ["stranger", "e"], higher_is_better=False).tolist() == [far, 4.0]


def test_rescoring_ranks_a_heavy_item_above_an_equal_light_one():
    iw = of_weights(EIGHTHS)
    similarities, distances = (
        iw.rescore([1.0] * 7, list("bcdefgh"), higher_is_better=better) for better in (True, False)
    )
    assert np.argsort(-similarities).tolist() == np.argsort(distances).tolist() == [6, 5, 4, 3, 2, 1, 0]


def test_rescore_of_groups():
    iw = fitted(group_column="source")
    names = [source_of(i) for i in range(7)]
    np.testing.assert_array_equal(iw.rescore([2.0] * 7, names), 2 * np.array(looked_up(iw, names, 0.5)))


# ---------------------------------------------------------------- threshold

TENTHS = dict(zip(range(10), [w / 16 for w in (0, 1, 2, 3, 4, 5, 6, 7, 8, 14)], strict=True))  # mean 5/16


def long_rows(seed: int, rows: int = 20) -> dict[str, list]:
    """Every row is a permutation of the ten items, so every item stands in the same number of slots."""
    draw = np.random.default_rng(seed)
    lists = [draw.permutation(10).tolist() for _ in range(rows)]
    return {
        "retrieved": lists,
        "utility": draw.random((rows, 10)).round(3).tolist(),
        "answers": [[f"answer {draw.integers(3)}" for _ in row] for row in lists],
    }


@pytest.mark.parametrize("metric", SCORES)
def test_candidates_are_the_tenths(metric):
    """Ten equal shares of slots: the smallest weight, and what removes 10 %, 20 %, .. 90 % of the slots."""
    iw = of_weights(TENTHS, count=2)
    iw.tune_threshold(long_rows(0), metric=metric)
    assert [entry["threshold"] for entry in iw.tuning] == list(TENTHS.values())
    assert [entry["kept"] for entry in iw.tuning] == pytest.approx([1 - i / 10 for i in range(10)], abs=1e-12)
    assert [set(entry) for entry in iw.tuning] == [{"threshold", "score", "kept"}] * 10


@pytest.mark.parametrize("k", [1, 2, 4, 10, 30])
@pytest.mark.parametrize("metric", SCORES)
def test_scores_of_the_table(metric, k):
    iw, rows = of_weights(TENTHS, k=k), long_rows(k)
    best = iw.tune_threshold(rows, metric=metric)
    scores = [SCORES[metric](iw, as_dicts(rows), threshold) for threshold in TENTHS.values()]
    assert [entry["score"] for entry in iw.tuning] == pytest.approx(scores, rel=1e-12)
    assert best == list(TENTHS.values())[int(np.argmax(scores))]
    assert iw.threshold == best
    assert isinstance(best, float)


@pytest.mark.parametrize("unseen", ["keep", "drop", 0.5, 0.0, 0.2, 1.0])
@pytest.mark.parametrize("metric", SCORES)
def test_scores_with_strangers(metric, unseen):
    iw, rows = fitted(unseen=unseen), with_strangers(validation(6))
    best = iw.tune_threshold(rows, metric=metric)
    scores = {entry["threshold"]: entry["score"] for entry in iw.tuning}
    wanted = [SCORES[metric](iw, as_dicts(rows), threshold) for threshold in scores]
    assert list(scores.values()) == pytest.approx(wanted, rel=1e-12)
    assert best == min(threshold for threshold, score in scores.items() if score == max(scores.values()))


@pytest.mark.parametrize("method", ["multilinear", "shapley", "banzhaf", "loo", "mean"])
def test_candidates_of_ragged_slots(method):
    """The tenths fall inside items here: candidates are weights, each pruning at least as much as the one before."""
    iw = fitted(method=method)
    iw.tune_threshold(validation(6))
    found = [entry["threshold"] for entry in iw.tuning]
    assert found == sorted(set(found))
    assert found[0] == iw.weights.min()
    assert set(found) <= set(iw.weights.tolist())
    assert len(found) <= 10
    slots = np.repeat(iw.weights, iw.counts)
    shares = [(slots < threshold).mean() for threshold in found]
    assert shares[0] == 0
    # A tenth is met up to the slots that share one weight.
    together = max(np.unique(slots, return_counts=True)[1]) / len(slots)
    for tenth in range(1, 10):
        assert min(abs(share - tenth / 10) for share in shares) <= together + 1e-12


@pytest.mark.parametrize(
    "weights, wanted",
    [([0.5] * 4, [0.5]), ([0.25, 0.25, 0.75, 0.75], [0.25, 0.75]), ([0.0, 1, 1, 1, 1, 1, 1, 0], [0.0, 1.0])],
    ids=["one weight", "two weights", "zeros and ones"],
)
def test_equal_weights_go_together(weights, wanted):
    iw = of_weights(dict(zip("abcdefgh", weights, strict=False)))
    other = {"retrieved": [["a", "b"]], "utility": [[0.25, 0.5]]}
    iw.tune_threshold(other, metric="utility")
    found = [entry["threshold"] for entry in iw.tuning]
    assert found == wanted


def test_ties_go_to_the_smallest_threshold():
    iw = of_weights(TENTHS)
    rows = {"retrieved": [[9, 3]], "utility": [[1.0, 0.0]], "answers": [["x", "y"]]}
    assert iw.tune_threshold(rows) == 0.0  # the first item wins everywhere
    assert {entry["score"] for entry in iw.tuning} == {1.0}
    rows = {"retrieved": [[0, 5, 9]], "utility": [[0.0, 1.0, 0.0]], "answers": [["x", "y", "z"]]}
    assert iw.tune_threshold(rows) == 1 / 16
    assert [entry["score"] for entry in iw.tuning] == [0.0] + 5 * [1.0] + 4 * [0.0]


def test_a_second_tuning_replaces_the_first():
    iw = of_weights(TENTHS)
    first = iw.tune_threshold(long_rows(0))
    table = iw.tuning
    second = iw.tune_threshold(long_rows(1), metric="utility")
    assert (iw.threshold, iw.tuning != table) == (second, True)
    again = of_weights(TENTHS)
    assert (again.tune_threshold(long_rows(0)), again.tuning) == (first, table)


def test_a_fit_forgets_the_threshold_of_other_weights():
    iw = fitted()
    iw.tune_threshold(validation(6))
    iw.fit(validation(9), progress=False)
    assert iw.threshold is None


def test_rows_with_nothing_kept_score_nothing():
    """They count in the mean."""
    iw = of_weights(TENTHS)
    rows = {"retrieved": [[0], [9], []], "utility": [[1.0], [0.5], []], "answers": [["x"], ["y"], []]}
    iw.tune_threshold(rows, metric="vote")
    assert [entry["score"] for entry in iw.tuning] == pytest.approx([0.5] + 9 * [0.5 / 3], rel=1e-12)
    iw.tune_threshold(rows, metric="utility")
    assert [entry["score"] for entry in iw.tuning] == pytest.approx([0.5 / 3] + 9 * [0.5 / 9], rel=1e-12)


@pytest.mark.parametrize(
    "given",
    [
        Dataset.from_dict,
        as_table,
        as_dicts,
        dict,
        lambda rows: Dataset.from_dict(rows).to_iterable_dataset(),
        lambda rows: Dataset.from_dict(rows).with_format("numpy"),
        lambda rows: concatenate_datasets([Dataset.from_dict(rows).select(part) for part in (range(7, 20), range(7))]),
    ],
    ids=["dataset", "table", "dicts", "dict", "stream", "numpy format", "other order"],
)
def test_every_kind_of_input(given):
    tables = []
    for rows in (long_rows(0), given(long_rows(0))):
        iw = of_weights(TENTHS)
        iw.tune_threshold(rows)
        tables.append([(entry["threshold"], round(entry["score"], 12)) for entry in iw.tuning])
        assert iw.evaluate(rows)["rows"] == 20
    assert tables[0] == tables[1]


def test_tuning_does_not_refit():
    iw = fitted()
    before = (iw.to_dict(), iw.value, iw.history, iw.counts.tolist())
    iw.tune_threshold(validation(6))
    iw.evaluate(validation(7))
    iw.prune(corpus())
    assert (iw.to_dict(), iw.value, iw.history, iw.counts.tolist()) == before


def test_own_names_of_columns():
    names = {"retrieved": "hits", "utility": "gain", "answers": "said"}

    def renamed(rows: dict[str, list]) -> dict[str, list]:
        return {names.get(name, name): part for name, part in rows.items()}

    iw = fitted(renamed(validation()), retrieved_column="hits", utility_column="gain", answer_column="said")
    other = fitted()
    assert iw.tune_threshold(renamed(validation(6))) == other.tune_threshold(validation(6))
    assert iw.evaluate(renamed(validation(7))) == other.evaluate(validation(7))


@pytest.mark.parametrize("metric", SCORES)
def test_groups_are_tuned_as_groups(metric):
    iw, rows = fitted(group_column="source"), validation(6)
    best = iw.tune_threshold(rows, metric=metric)
    thresholds = [entry["threshold"] for entry in iw.tuning]
    scores = [SCORES[metric](iw, as_dicts(rows), threshold) for threshold in thresholds]
    assert [entry["score"] for entry in iw.tuning] == pytest.approx(scores, rel=1e-12)
    assert best == thresholds[int(np.argmax([entry["score"] for entry in iw.tuning]))]


@pytest.mark.parametrize(
    "given", [Dataset.from_dict, as_table, as_dicts, dict], ids=["dataset", "table", "dicts", "dict"]
)
def test_tuning_on_the_rows_of_the_fit_is_warned_of(given):
    iw = fitted(Dataset.from_dict(validation()))
    with heard() as said:
        iw.tune_threshold(given(validation()))
    assert len(said) == 1
    assert "fit" in said[0]
    assert "three" in said[0]
    assert "split" in said[0]


def test_tuning_on_other_rows_is_not_warned_of():
    iw = fitted()
    with heard() as said:
        iw.tune_threshold(validation(6))
        iw.tune_threshold(validation(6), metric="utility")
        iw.evaluate(validation(7))
    assert not said


# ---------------------------------------------------------------- callables


class Recorder:
    """A metric of the user's; keeps what it was given."""

    def __init__(self, score: Callable[[dict], float]):
        self.score, self.calls = score, []

    def __call__(self, columns: dict[str, list]) -> float:
        self.calls.append(columns)
        return self.score(columns)


def exact_match(columns: dict[str, list]) -> float:
    return sum(bool(row) and row[0] == "answer 1" for row in columns["answers"]) / len(columns["answers"])


@pytest.mark.parametrize("unseen", ["keep", "drop", 0.5])
def test_a_callable_gets_what_is_kept(unseen):
    iw = fitted(unseen=unseen)
    rows = with_strangers(validation(6))
    rows["rank"] = [list(range(len(row))) for row in rows["retrieved"]]
    metric = Recorder(exact_match)
    best = iw.tune_threshold(Dataset.from_dict(rows), metric=metric)
    scores = [entry["score"] for entry in iw.tuning]
    for entry in iw.tuning:
        places = [kept_places(iw, row, entry["threshold"]) for row in as_dicts(rows)]
        cut = {
            name: [[row[i] for i in where] for row, where in zip(rows[name], places, strict=True)]
            for name in ("retrieved", "utility", "answers", "source", "rank")
        }
        (given,) = [call for call in metric.calls if call["rank"] == cut["rank"]][:1]
        assert {name: given[name] for name in cut} == cut
        assert given["question"] == rows["question"]  # not a list: as it is
        assert entry["score"] == exact_match(cut)
    assert best == iw.tuning[int(np.argmax(scores))]["threshold"] == iw.threshold


def test_a_callable_needs_no_answers():
    rows = {name: part for name, part in validation(6).items() if name in ("retrieved", "utility")}
    iw = fitted()
    best = iw.tune_threshold(rows, metric=lambda columns: sum(map(len, columns["retrieved"])))
    assert best == iw.weights.min()  # nothing pruned has the most


def test_evaluate_with_a_callable():
    iw, rows = fitted(), validation(7)
    untuned = iw.evaluate(rows, metric=exact_match)
    first = {"answers": [row["answers"][:3] for row in as_dicts(rows)]}
    assert untuned["vanilla"] == exact_match(first)
    assert untuned["prune"] is None
    assert untuned.get("weighted_vote") is None
    threshold = iw.tune_threshold(validation(6), metric=exact_match)
    places = [[row["answers"][i] for i in kept_places(iw, row, threshold)] for row in as_dicts(rows)]
    assert iw.evaluate(rows, metric=exact_match)["prune"] == exact_match({"answers": places})


# ---------------------------------------------------------------- evaluate


@pytest.mark.parametrize("unseen", ["keep", "drop", 0.75])
@pytest.mark.parametrize("strange", [False, True], ids=["", "strangers"])
def test_evaluate(strange, unseen):
    iw = fitted(unseen=unseen)
    rows = with_strangers(validation(7)) if strange else validation(7)
    untuned = iw.evaluate(rows)
    assert (untuned["rows"], untuned["prune"]) == (50, None)
    threshold = iw.tune_threshold(validation(6))
    found = iw.evaluate(rows)
    assert set(found) == {"rows", "vanilla", "prune", "weighted_vote"}
    wanted = {
        "rows": 50,
        "vanilla": vote_score(iw, as_dicts(rows), None),
        "prune": vote_score(iw, as_dicts(rows), threshold),
        "weighted_vote": vote_score(iw, as_dicts(rows), None, weighted=True),
    }
    assert found == pytest.approx(wanted, rel=1e-12)
    assert (untuned["vanilla"], untuned["weighted_vote"]) == (found["vanilla"], found["weighted_vote"])


def test_evaluate_utility():
    iw, rows = fitted(), validation(7)
    threshold = iw.tune_threshold(validation(6), metric="utility")
    found = iw.evaluate(rows, metric="utility")
    assert found["vanilla"] == pytest.approx(utility_score(iw, as_dicts(rows), None), rel=1e-12)
    assert found["prune"] == pytest.approx(utility_score(iw, as_dicts(rows), threshold), rel=1e-12)
    assert found.get("weighted_vote") is None


def test_evaluate_of_groups():
    iw, rows = fitted(group_column="source"), validation(7)
    threshold = iw.tune_threshold(validation(6))
    found = iw.evaluate(rows)
    assert found["prune"] == pytest.approx(vote_score(iw, as_dicts(rows), threshold), rel=1e-12)
    assert found["weighted_vote"] == pytest.approx(vote_score(iw, as_dicts(rows), None, weighted=True), rel=1e-12)


def test_pruning_what_misleads_is_seen_in_the_evaluation():
    """A third of the sources lies in chorus; a fit, a threshold and a third split find that out."""

    def split(seed: int) -> dict[str, list]:
        draw = np.random.default_rng(seed)

        def answer(item: int) -> str:
            return "wrong" if item < 4 else "right" if draw.random() < 0.5 else f"odd {draw.integers(40)}"

        lists = [draw.permutation(12)[:8].tolist() for _ in range(60)]
        said = [[answer(item) for item in row] for row in lists]
        good = [[float(answer == "right") for answer in row] for row in said]
        return {"retrieved": lists, "answers": said, "utility": good}

    iw = ImportanceWeights(k=4, epochs=20).fit(split(0), progress=False)
    iw.tune_threshold(split(1))
    found = iw.evaluate(split(2))
    assert found["prune"] > found["vanilla"] + 0.1
    assert found["weighted_vote"] > found["vanilla"] + 0.1
    assert not set(range(4)) & {row["id"] for row in iw.prune(corpus_of(range(12)))}


# ---------------------------------------------------------------- sampler


def test_sampler():
    iw, data = fitted(), corpus()
    sampler = iw.sampler(data)
    assert isinstance(sampler, WeightedRandomSampler)
    assert sampler.weights.tolist() == looked_up(iw, data["id"][:], 0.5)
    assert (sampler.num_samples, sampler.replacement, len(list(sampler))) == (len(data), True, len(data))
    some = iw.sampler(data, num_samples=5, replacement=False)
    drawn = list(some)
    assert (len(some), len(set(drawn))) == (5, 5)
    assert set(drawn) <= set(range(len(data)))
    assert not some.replacement


def test_sampler_has_a_seeded_generator_of_its_own():
    iw, data = fitted(), corpus()
    before = torch.get_rng_state()
    first, second, other = (list(iw.sampler(data, seed=seed)) for seed in (4, 4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second != other
    assert list(iw.sampler(data)) == list(iw.sampler(data)) == list(iw.sampler(data, seed=iw.config.seed))
    sampler = iw.sampler(data, seed=4)
    assert list(sampler) == first
    assert list(sampler) != first  # the next epoch is another draw
    assert sampler.generator is not None


def test_sampler_draws_by_weight():
    iw = of_weights(EIGHTHS)
    data = corpus_of(list("habcdefgh"))
    draws = 20_000
    counts = np.bincount(list(iw.sampler(data, num_samples=draws, seed=1)), minlength=9)
    share = np.array(looked_up(iw, list("habcdefgh"), 0.5))
    share /= share.sum()
    assert counts[1] == 0
    assert (np.abs(counts - draws * share) <= 4.5 * np.sqrt(draws * share * (1 - share))).all()


@pytest.mark.parametrize("unseen, weight", [("keep", 0.5), ("drop", 0.0), (0.25, 0.25)])
def test_sampler_with_strangers(unseen, weight):
    iw = of_weights(EIGHTHS, unseen=unseen)
    assert iw.sampler(corpus_of(["h", "stranger", None])).weights.tolist() == [1.375, weight, weight]


def test_sampler_of_groups_and_of_shuffled_rows():
    iw, data = fitted(group_column="source"), corpus().shuffle(seed=2)
    assert iw.sampler(data).weights.tolist() == looked_up(iw, data["source"][:], 0.5)
    assert iw.sampler(data.with_format("torch")).weights.tolist() == looked_up(iw, data["source"][:], 0.5)


def test_sampler_in_a_loader():
    iw, data = of_weights(EIGHTHS), corpus_of(list("abcdefgh")).select_columns(["id", "number"])
    drawn = [key for batch in DataLoader(data, batch_size=3, sampler=iw.sampler(data, seed=0)) for key in batch["id"]]
    assert drawn == [data[i]["id"] for i in iw.sampler(data, seed=0)]


def test_sampler_under_accelerate():
    iw, data = of_weights(EIGHTHS), corpus_of(list("abcdefgh")).select_columns(["id", "number"])
    loader = Accelerator(cpu=True).prepare(DataLoader(data, batch_size=3, sampler=iw.sampler(data, seed=0)))
    drawn = [int(i) for batch in loader for i in batch["number"]]
    assert drawn == list(iw.sampler(data, seed=0))


def test_accelerate_shards_the_sampler():
    """Two processes draw the same sequence, and take turns with its batches."""
    iw, data = of_weights(EIGHTHS), corpus_of(list("abcdefgh")).select_columns(["id", "number"])

    def share(rank: int) -> list[list[int]]:
        loader = DataLoader(data, batch_size=2, sampler=iw.sampler(data, num_samples=16, seed=0))
        loader = prepare_data_loader(loader, num_processes=2, process_index=rank, put_on_device=False)
        return [batch["number"].tolist() for batch in loader]

    drawn = list(iw.sampler(data, num_samples=16, seed=0))
    batches = [drawn[i : i + 2] for i in range(0, 16, 2)]
    assert [share(0), share(1)] == [batches[0::2], batches[1::2]]


def test_the_rows_of_known_weights():
    """The tests above rest on it: the weights asked for are the weights found."""
    assert table_of(ImportanceWeights(method="mean").fit(rows_for(EIGHTHS), progress=False)) == EIGHTHS


@pytest.mark.parametrize("metric", ["utility", "vote"])
def test_a_stream_of_examples_with_an_empty_list_is_judged_as_its_rows_are(metric):
    """In Arrow format such a stream has its types guessed row by row, and an empty list has none."""
    rows = [
        {"retrieved": ["a", "b"], "utility": [1.0, 0.0], "answers": ["x", "y"]},
        {"retrieved": [], "utility": [], "answers": []},
        {"retrieved": ["b"], "utility": [1.0], "answers": ["z"]},
    ]

    def stream() -> Any:
        return IterableDataset.from_generator(lambda: iter(rows))

    weights = ImportanceWeights(k=1, epochs=3).fit(stream())
    assert weights.tune_threshold(stream(), metric=metric) == weights.tune_threshold(rows, metric=metric)
    assert weights.evaluate(stream(), metric=metric) == weights.evaluate(rows, metric=metric)
