"""What is unusual, wrong by a little, or far out of range: it works, or says so."""

import copy
import pickle
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset

from hf_ext import ImportanceWeights
from hf_ext.importance_weights import group_gradient, multilinear_gradient, shapley_values

METHODS = ["multilinear", "mean", "shapley", "banzhaf", "loo"]


def rows(scale=1.0, lists=40, seed=0):
    draw = np.random.default_rng(seed)
    return [
        {"retrieved": draw.integers(0, 9, 5).tolist(), "utility": (scale * draw.normal(size=5)).tolist()}
        for _ in range(lists)
    ]


def fitted(data=None, **options):
    return ImportanceWeights(**{"k": 3, "epochs": 6} | options).fit(rows() if data is None else data, progress=False)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e39, 1e300, 1e-45, 1e-300], ids=str)
def test_utilities_of_any_size_give_the_weights_of_ordinary_ones(scale, method, dtype):
    found, expected = fitted(rows(scale), method=method, dtype=dtype), fitted(method=method, dtype=dtype)
    unit = 1.0 if method == "multilinear" else scale
    assert found.weights / unit == pytest.approx(expected.weights, abs=1e-5 if dtype == "float32" else 1e-11)
    assert found.value / scale == pytest.approx(expected.value, rel=1e-5)
    if method == "multilinear":
        assert found.learning_rate_ * scale == pytest.approx(expected.learning_rate_)
        for mine, theirs in zip(found.history, expected.history, strict=True):
            assert mine["gradient_max"] / scale == pytest.approx(theirs["gradient_max"], rel=1e-4)


def test_a_rate_and_an_error_are_in_units_of_the_utilities():
    found = fitted(rows(2.0**200), learning_rate=3 / 2.0**200, epsilon=0.05 * 2.0**200)
    assert (found.weights == fitted(learning_rate=3, epsilon=0.05).weights).all()
    assert found.history[-1]["bound"] <= 0.05 * 2.0**200


@pytest.mark.parametrize("options", [{}, {"epsilon": 1e-9}, {"group_update": "exact"}, {"method": "shapley"}], ids=str)
def test_lists_shorter_than_k_cost_what_they_are_long(options):
    """The divisor is k, the room is not; multiplying all utilities by it gives the weights back."""
    many, few = (fitted(rows(k / 5), k=k, **options) for k in (10**9, 5))
    assert many.weights == pytest.approx(few.weights, abs=1e-12)


def test_single_lists_shorter_than_k():
    u, p, k = np.array([1.0, 2.0, -1.0]), np.array([0.3, 0.5, 0.9]), 10**9
    for found in (
        multilinear_gradient(u, p, k),
        multilinear_gradient(torch.tensor(u), torch.tensor(p), k).numpy(),
        group_gradient(u, [0, 1, 2], p, k),
        shapley_values(u, k),
    ):
        assert found * k == pytest.approx(u)


@pytest.mark.parametrize(
    "names",
    [
        {"output_column": "id"},
        {"group_column": "retrieved"},
        {"retrieved_column": "utility"},
        {"group_column": "id"},
        {"answer_column": "utility"},
    ],
    ids=str,
)
def test_one_column_is_not_two_things(names):
    with pytest.raises(ValueError, match=f"are both {next(iter(names.values()))!r}"):
        ImportanceWeights(**names)


def test_views_of_lists_are_read_in_their_order():
    lists = [[1, 2], [3, 4], [5, 6]]
    flat, at, sizes = pa.array([5, 6, 1, 2, 3, 4]), pa.array([2, 4, 0], pa.int32()), pa.array([2, 2, 2], pa.int32())
    utility = [[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]]
    views = pa.table({"retrieved": pa.ListViewArray.from_arrays(at, sizes, flat), "utility": utility})
    assert fitted(views).to_dict() == fitted({"retrieved": lists, "utility": utility}).to_dict()


def test_padding_has_no_vote_and_is_warned_of_as_an_id():
    clean = fitted([{"retrieved": [3, 7], "utility": [1.0, 0.0]}])
    assert clean.weighted_vote(["x", "y", "y"], [3, -1, -1]) == "x"
    assert clean.weighted_vote(["x", "y"], [-1, -1]) is None
    with pytest.warns(UserWarning, match="-1 is one of the retrieved ids"):
        fitted([{"retrieved": [3, -1], "utility": [1.0, 0.0]}])


@pytest.mark.parametrize("answers", [[["l"], ["m"], ["m"]], [("l",), ("m",), ("m",)], [{"a": 1}, {"a": 2}, {"a": 2}]])
def test_answers_may_be_anything_that_can_be_compared(answers):
    weights = fitted(k=3)
    assert weights.weighted_vote(answers, [1, 2, 3]) in answers
    assert weights.weighted_vote([answers, answers], [[1, 2, 3], [4, 5, 6]])[0] in answers
    assert weights.weighted_vote([answers], torch.tensor([[1, 2, 3]]))[0] in answers


def test_scores_that_are_no_numbers_of_numpy():
    weights = fitted([{"retrieved": [3, 7], "utility": [1.0, -1.0]}], epochs=50)
    half = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    assert weights.rescore(half, [3, 7]).tolist() == (np.array([1, 2]) * weights.lookup([3, 7])).tolist()
    assert weights.lookup([7])[0] == 0
    assert weights.rescore([np.inf], [7]).tolist() == [0.0]
    with pytest.raises(ValueError, match="NaN"):
        weights.rescore([np.nan], [3])


def test_an_unseen_key_is_drawn_by_itself():
    """Whatever else the corpus holds: a new source is kept or dropped in all of its shards."""
    weights = fitted(unseen=0.5)
    corpus = Dataset.from_dict({"id": list(range(100, 160))})
    whole = weights.sample(corpus, seed=3)["id"][:]
    parts = [weights.sample(corpus.select(part), seed=3)["id"][:] for part in (range(20), range(20, 60))]
    assert whole == parts[0] + parts[1]
    assert 10 < len(whole) < 50


def test_judges_take_lists_of_which_all_are_empty():
    weights = fitted()
    data = {"retrieved": pa.array([[], []], pa.list_(pa.int64())), "utility": [[], []], "answers": [[], []]}
    assert weights.evaluate(data)["vanilla"] == 0.0


def test_groups_given_apart_are_given_to_judges_too():
    data = rows()
    of = {i: f"source {i % 3}" for i in range(9)}
    weights = ImportanceWeights(k=3, epochs=5, group_column="source").fit(data, progress=False, groups=of)
    judged = weights.tune_threshold(rows(seed=1), metric="utility", groups=of)
    inside = [{**row, "source": [of[i] for i in row["retrieved"]]} for row in rows(seed=1)]
    assert judged == weights.tune_threshold(inside, metric="utility")
    assert weights.evaluate(rows(seed=2), metric="utility", groups=of)["rows"] == 40


def test_files_of_two_fits_are_not_mixed(tmp_path):
    for name, seed in (("one", 0), ("other", 1)):
        fitted(rows(seed=seed, lists=200)).save_pretrained(tmp_path / name)
    assert len(fitted(rows(lists=200))) == 9
    (tmp_path / "other/importance.safetensors").rename(tmp_path / "one/importance.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        ImportanceWeights.from_pretrained(tmp_path / "one")


def test_a_byte_that_changed_is_noticed(tmp_path):
    weights = fitted(k=3)
    weights.save_pretrained(tmp_path / "saved")
    ImportanceWeights(k=3, epochs=6).fit(rows(), progress=False, checkpoint_dir=tmp_path / "run")
    for path in (tmp_path / "saved/importance.safetensors", tmp_path / "run/checkpoint.safetensors"):
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        ImportanceWeights.from_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="damaged"):
        ImportanceWeights(k=3, epochs=6).fit(rows(), progress=False, resume_from_checkpoint=tmp_path / "run")


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_copies_keep_the_threshold_and_pickles_do_not(copied):
    weights = fitted()
    weights.tune_threshold(rows(seed=1), metric="utility")
    assert copied(weights).threshold == weights.threshold
    assert pickle.loads(pickle.dumps(weights)).threshold is None


def test_seeds_and_errors_out_of_range_are_refused():
    with pytest.raises(ValueError, match="seed"):
        ImportanceWeights(seed=2**70)
    with pytest.raises(ValueError, match="seed"):
        fitted().sample(Dataset.from_dict({"id": [1]}), seed=-1)
    for epsilon in (1e-170, 1e300):
        fitted(epsilon=epsilon, delta=0.1)


def test_without_a_compiler_it_says_so():
    code = "import hf_ext.importance_weights"
    done = subprocess.run(
        [sys.executable, "-c", code], env={"NUMBA_DISABLE_JIT": "1", "PATH": ""}, capture_output=True, text=True
    )
    assert "unset NUMBA_DISABLE_JIT" in done.stderr
