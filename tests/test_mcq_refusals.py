"""Wrong inputs of the metric: what is refused, in which words, and that nothing is lost by it."""

import math
import os

import evaluate
import numpy as np
import pytest
import torch

from hf_ext.mcq_bias import bias_metrics
from hf_ext.mcq_bias.config import BiasOptions

pytestmark = pytest.mark.filterwarnings("ignore:num_choices is not given")

NAN = math.nan
GOOD = {"predictions": [0, 1, 2], "references": [0, 1, 2], "num_choices": 4}
SCORES = {"predictions": [[1.0, 2.0], [2.0, 1.0], [3.0, 1.0]], "references": [0, 1, 1]}
GROUP = GOOD | {"group": ["q", "q", ""]}

# what replaces a part of GOOD or SCORES -> pieces of the error
REFUSED = {
    "prediction_below_minus_one": (GOOD, {"predictions": [0, -2, 1]}, ["predictions[1]", "-2", "-1 for none"]),
    "prediction_fractional": (GOOD, {"predictions": [0, 1, 0.5]}, ["predictions[2]", "0.5"]),
    "prediction_bool": (GOOD, {"predictions": [0, True, 1]}, ["predictions[1]", "True"]),
    "prediction_array_of_bool": (GOOD, {"predictions": np.array([True] * 3)}, ["predictions[0]", "True"]),
    "prediction_nan": (GOOD, {"predictions": np.array([0, NAN, 1])}, ["predictions[1]", "nan"]),
    "prediction_inf": (GOOD, {"predictions": [0, math.inf, 1]}, ["predictions[1]", "inf"]),
    "prediction_inf_in_an_array": (GOOD, {"predictions": np.array([0, math.inf, 1])}, ["predictions[1]", "inf"]),
    "prediction_dict": (GOOD, {"predictions": [{}, 0, 1]}, ["predictions[0]", "{}"]),
    "predictions_text": (GOOD, {"predictions": "ABC"}, ["predictions", "'ABC'"]),
    "predictions_of_three_dimensions": (GOOD, {"predictions": np.zeros((3, 2, 2))}, ["predictions", "(3, 2, 2)"]),
    "prediction_beyond_26_without_k": (
        GOOD,
        {"predictions": [0, 30, 1], "num_choices": None},
        ["predictions[1]=30", "31 choices", "at most 26"],
    ),
    "reference_beyond_k": (GOOD, {"references": [0, 4, 1]}, ["references[1]=4", "0 to 3", "k=4"]),
    "reference_letter_beyond_k": (GOOD, {"references": ["A", "B", "E"]}, ["references[2]='E'", "A to D", "k=4"]),
    "reference_none": (GOOD, {"references": [0, None, 1]}, ["references[1]=None", "k=4"]),
    "reference_minus_one": (GOOD, {"references": [0, 1, -1]}, ["references[2]=-1", "k=4"]),
    "reference_fractional": (GOOD, {"references": [0, 0.5, 1]}, ["references[1]=0.5", "k=4"]),
    "reference_bool": (GOOD, {"references": [False, 1, 1]}, ["references[0]=False"]),
    "reference_text": (GOOD, {"references": ["A", "", "B"]}, ["references[1]=''"]),
    "reference_beyond_scores": (SCORES, {"references": [0, 1, 2]}, ["references[2]=2", "k=2"]),
    "reference_beyond_26": (GOOD, {"references": [0, 26, 1], "num_choices": None}, ["references[1]=26", "at most 26"]),
    "references_shorter": (GOOD, {"references": [0, 1]}, ["references has 2 rows", "predictions has 3"]),
    "num_choices_shorter": (GOOD, {"num_choices": [4, 4]}, ["num_choices has 2 rows", "predictions has 3"]),
    "group_shorter": (GOOD, {"group": ["a"]}, ["group has 1 rows", "predictions has 3"]),
    "permutation_longer": (GOOD, {"permutation": [[0, 1]] * 4}, ["permutation has 4 rows", "predictions has 3"]),
    "no_references": (GOOD, {"references": None}, ["references missing"]),
    "no_predictions": (GOOD, {"predictions": None}, ["predictions missing"]),
    "k_of_1": (GOOD, {"num_choices": 1}, ["num_choices=1", "2 to 26"]),
    "k_of_27": (GOOD, {"num_choices": [4, 27, 4]}, ["num_choices[1]=27", "2 to 26"]),
    "k_minus_one": (GOOD, {"num_choices": [4, 4, -1]}, ["num_choices[2]=-1", "2 to 26"]),
    "k_fractional": (GOOD, {"num_choices": [4, 4, 2.5]}, ["num_choices[2]=2.5", "2 to 26"]),
    "k_bool": (GOOD, {"num_choices": True}, ["num_choices=True"]),
    "k_text": (GOOD, {"num_choices": "4"}, ["num_choices='4'", "an integer from 2 to 26 nor one a row"]),
    "scores_shorter_than_k": (SCORES, {"num_choices": [2, 3, 2]}, ["predictions[1] has 2 scores", "num_choices is 3"]),
    "scores_empty_with_k": (SCORES, {"predictions": [[], [1, 2], [1, 2]], "num_choices": 2}, ["predictions[0] has 0"]),
    "scores_empty_without_k": (
        SCORES,
        {"predictions": [[1, 2], [], [1, 2]]},
        ["predictions[1] has 0 scores", "2 to 26"],
    ),
    "scores_of_one_choice": (SCORES, {"predictions": [[1.0]] * 3}, ["predictions[0] has 1 scores"]),
    "scores_of_27_choices": (SCORES, {"predictions": np.zeros((3, 27))}, ["predictions[0] has 27 scores"]),
    "score_behind_the_choices": (
        SCORES,
        {"predictions": [[1, 2, -math.inf], [1, 2, 0.5], [1, 2, 3]], "num_choices": 2},
        ["predictions[1]", "0.5", "2 choices"],
    ),
    "score_text": (SCORES, {"predictions": [[1, 2], [1, "2"], [1, 2]]}, ["predictions[1]", "'2'"]),
    "score_none": (SCORES, {"predictions": [[1, 2], [1, None], [1, 2]]}, ["predictions[1]", "None"]),
    "score_bool": (SCORES, {"predictions": torch.zeros(3, 2) > 0}, ["predictions[0]", "False"]),
    "score_row_nested": (SCORES, {"predictions": [[1, 2], [[1], [2]], [1, 2]]}, ["predictions[1]"]),
    "score_tensor_nested": (
        SCORES,
        {"predictions": [torch.zeros(2), torch.zeros(1, 2), torch.zeros(2)]},
        ["predictions[1]"],
    ),
    "scores_among_answers": (GOOD, {"predictions": [0, [1.0, 2.0], 1]}, ["score rows", "answers"]),
    "letters_among_scores": (SCORES, {"predictions": [[1, 2], "A", [1, 2]]}, ["score rows", "answers"]),
    "group_of_different_k": (GROUP, {"num_choices": [4, 3, 4]}, ["group 'q'", "k is 4 in row 0", "3 in row 1"]),
    "permutation_too_short": (
        GROUP,
        {"permutation": [[0, 1, 2], None, None]},
        ["permutation[0]=[0, 1, 2]", "0 to 3", "4 choices"],
    ),
    "permutation_of_inferred_k": (
        GROUP,
        {"permutation": [None, [0, 1], None], "num_choices": None},
        ["permutation[1]=[0, 1]", "0 to 2", "3 choices"],
    ),
    "permutation_with_a_gap": (GROUP, {"permutation": [None, [0, -1, 1, 2], None]}, ["permutation[1]=[0, -1, 1, 2]"]),
    "permutation_repeats": (GROUP, {"permutation": [None, [0, 1, 1, 2], None]}, ["permutation[1]=[0, 1, 1, 2]"]),
    "permutation_too_long": (GROUP, {"permutation": [None, [0, 1, 2, 3, 4], None]}, ["permutation[1]", "0 to 3"]),
    "permutation_of_fractions": (GROUP, {"permutation": [None, [0, 1, 2, 2.5], None]}, ["permutation[1]"]),
    "permutation_without_a_group": (GOOD, {"permutation": [None, None, [1, 1, 1, 1]]}, ["permutation[2]"]),
    "permutation_without_groups": (GOOD, {"permutation": [[0, 1, 2, 3]] * 3}, ["permutation needs group"]),
    "permutation_number": (GROUP, {"permutation": [0, 1, 2]}, ["permutation[0]=0", "no list"]),
    "gold_option_differs": (
        GROUP,
        {"permutation": [[0, 1, 2, 3], [0, 1, 2, 3], None]},
        ["group 'q'", "gold option is 0 in row 0", "1 in row 1"],
    ),
    "group_of_arrays": (GOOD, {"group": [np.array([1, 2])] * 3}, ["group[0]=array([1, 2])", "a text or a number"]),
    "group_of_lists": (GOOD, {"group": ["q", ["q"], ""]}, ["group[1]=['q']", "a list"]),
    "sparse": (
        SCORES,
        {"predictions": torch.eye(3).to_sparse()},
        ["predictions: found a torch.sparse_coo", "to_dense"],
    ),
    "nested": (
        SCORES,
        {"predictions": torch.nested.nested_tensor([torch.ones(2)] * 3)},
        ["predictions: found a nested tensor"],
    ),
    "meta": (SCORES, {"predictions": torch.zeros(3, 2, device="meta")}, ["predictions: found a meta tensor"]),
    "meta_row": (SCORES, {"predictions": [torch.zeros(2, device="meta")] * 3}, ["predictions[0]: found a meta tensor"]),
    "anchor_word": (GOOD, {"anchor": "AB"}, ["anchor='AB'", "A to Z", "0 to 25"]),
    "anchor_26": (GOOD, {"anchor": 26}, ["anchor=26", "0 to 25"]),
    "anchor_bool": (GOOD, {"anchor": True}, ["anchor=True"]),
    "confidence_1": (GOOD, {"confidence": 1}, ["confidence=1", "between 0 and 1"]),
    "confidence_95": (GOOD, {"confidence": 95}, ["confidence=95", "between 0 and 1"]),
    "confidence_nan": (GOOD, {"confidence": NAN}, ["confidence=nan"]),
    "n_resamples_negative": (GOOD, {"n_resamples": -1}, ["n_resamples=-1", "at least 0"]),
    "n_resamples_fractional": (GOOD, {"n_resamples": 10.5}, ["n_resamples=10.5"]),
    "seed_none": (GOOD, {"seed": None}, ["seed=None"]),
}

INVALID = {
    "nan": [NAN, 1.0, 0.0],
    "nan_not_the_first": [1.0, NAN, 0.0],
    "inf": [0.0, math.inf, 0.0],
    "all_minus_inf": [-math.inf] * 3,
    "index_k": 3,
    "huge_index": 10**30,
    "letter_beyond_k": "D",
    "minus_one": -1,
    "none": None,
    "empty": "",
    "text": "I do not know",
}


@pytest.fixture
def metric():
    return evaluate.load("anchored_mcq_bias", n_resamples=0)


def files_left():
    root = evaluate.config.HF_METRICS_CACHE
    found = [os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names]
    return [name for name in found if "anchored" in name and not name.endswith(".lock")]


@pytest.mark.smoke
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    base, change, pieces = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        bias_metrics(**base | change)
    assert [piece for piece in pieces if piece not in str(caught.value)] == []


@pytest.mark.parametrize("case", REFUSED)
def test_the_metric_refuses_the_same_before_it_writes_anything(case, metric):
    base, change, pieces = REFUSED[case]
    with pytest.raises(ValueError) as caught:
        metric.compute(**base | change)
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    assert metric.writer is None
    assert metric.compute(**GOOD)["n"] == 3
    assert files_left() == []


OPTIONS = ("anchor", "confidence", "n_resamples", "seed")
BY_ALL_ROWS = (
    "group_of_different_k",
    "gold_option_differs",
    "permutation_of_inferred_k",
    "prediction_beyond_26_without_k",
)


@pytest.mark.parametrize("case", [case for case in REFUSED if not case.startswith((*OPTIONS, *BY_ALL_ROWS))])
def test_a_refused_batch_leaves_the_rows_before_it(case, metric):
    base, change, pieces = REFUSED[case]
    metric.add_batch(**base)
    with pytest.raises(ValueError) as caught:
        metric.add_batch(**base | change)
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    metric.add_batch(**base)
    assert metric.compute()["n"] == 6
    assert files_left() == []


@pytest.mark.parametrize("case", BY_ALL_ROWS)
def test_what_only_all_rows_show_is_refused_by_compute_which_leaves_no_file(case, metric):
    base, change, pieces = REFUSED[case]
    metric.add_batch(**base | change)
    with pytest.raises(ValueError) as caught:
        metric.compute()
    assert [piece for piece in pieces if piece not in str(caught.value)] == []
    assert files_left() == []
    metric.add_batch(**GOOD)
    assert metric.compute()["n"] == 3


def test_batches_of_scores_and_of_answers_are_not_mixed(metric):
    metric.add_batch(**GOOD)
    with pytest.raises(ValueError, match="score rows and others are answers"):
        metric.add_batch(**SCORES)
    with pytest.raises(ValueError, match="score rows and others are answers"):
        metric.compute(**SCORES)
    assert metric.compute()["n"] == 3
    assert metric.compute(**SCORES)["n"] == 3  # a new result


@pytest.mark.parametrize("case", INVALID)
def test_invalid_answer_is_a_miss_in_every_denominator(case):
    answer = INVALID[case]
    other = [0.0, 2.0, 1.0] if isinstance(answer, list) else 1
    found = bias_metrics(predictions=[answer, other, answer], references=[1, 1, 0], num_choices=3, n_resamples=0)
    assert (found["n"], found["n_invalid"], found["n_ties"]) == (3, 2, 0)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["recall_B"] == 0.5
    assert (found["choice_share_B"], found["gold_share_B"], found["tvd"]) == (1.0, 1.0, 0.0)


@pytest.mark.parametrize("where", ["load", "compute", "add_batch", "add"])
def test_unknown_option_is_refused_with_the_nearest(where, metric):
    call = {
        "load": lambda **option: evaluate.load("anchored_mcq_bias", **option),
        "compute": lambda **option: metric.compute(**GOOD, **option),
        "add_batch": lambda **option: metric.add_batch(**GOOD, **option),
        "add": lambda **option: metric.add(prediction=0, reference=1, **option),
    }[where]
    typo, meant = ("ancor", "anchor") if where in ("load", "compute") else ("grup", "group")
    with pytest.raises(ValueError, match=f"'{typo}'.*did you mean '{meant}'"):
        call(**{typo: "B"})


@pytest.mark.parametrize(
    ("option", "value"),
    [("anchor", "?"), ("confidence", 2), ("n_resamples", -1), ("num_choices", 1), ("num_choices", [4])],
)
def test_defaults_are_checked_at_load(option, value):
    with pytest.raises(ValueError, match=option):
        evaluate.load("anchored_mcq_bias", **{option: value})


def test_nothing_to_compute(metric):
    with pytest.raises(ValueError, match="predictions and references missing"):
        metric.compute()
    metric.add_batch(predictions=[0], references=[1])
    with pytest.raises(ValueError, match="num_choices without predictions and references"):
        metric.compute(num_choices=4)
    with pytest.raises(ValueError, match="reference missing"):
        metric.add(prediction=0)


UNDEFINED = {
    "no_rows": ({"predictions": [], "references": []}, {"n": 0, "accuracy": NAN, "recall_std": NAN, "n_pride": 0}),
    "no_scores": ({"predictions": np.empty((0, 4)), "references": []}, {"n": 0, "calibrated_accuracy": NAN}),
    "one_row": (
        {"predictions": [1], "references": [1], "num_choices": 2},
        {"n": 1, "accuracy": 1.0, "recall_std": NAN, "cmh_z": NAN},
    ),
    "anchor_beyond_every_k": (
        GOOD | {"anchor": "Z"},
        {"n": 3, "n_anchor_eligible": 0, "anchored_bias_rate": NAN, "cmh_z": NAN},
    ),
    "all_invalid": (
        GOOD | {"predictions": [-1] * 3},
        {"n": 3, "n_invalid": 3, "accuracy": 0.0, "tvd": NAN, "kl": NAN, "choice_share_A": NAN},
    ),
    "all_scores_invalid": (
        SCORES | {"predictions": [[NAN, 1.0]] * 3},
        {"n_invalid": 3, "accuracy": 0.0, "calibrated_accuracy": 0.0},
    ),
    "all_right": (
        GOOD | {"predictions": [0, 1, 2]},
        {"anchored_error_share": NAN, "anchored_error_z": NAN, "cmh_p_value": NAN},
    ),
    "groups_of_one_row": (
        GOOD | {"group": ["a", "b", "c"]},
        {"n_groups": 0, "permutation_consistency": NAN, "flip_rate": NAN},
    ),
}


@pytest.mark.parametrize("case", UNDEFINED)
def test_what_is_undefined_is_nan_and_counts_are_right(case):
    inputs, expected = UNDEFINED[case]
    found = bias_metrics(**inputs)
    assert {name: found[name] for name in expected} == pytest.approx(expected, nan_ok=True)


def test_options_keep_the_index_of_the_anchor():
    assert BiasOptions(anchor="b") == BiasOptions(anchor=1) == BiasOptions(anchor=np.int64(1))


def test_a_column_of_whole_floats_is_a_number_of_choices_and_one_float_is_none():
    """As a table with gaps has it."""
    whole = bias_metrics(**GOOD | {"num_choices": [4, 3, 4]}, n_resamples=0)
    for column in ([4.0, 3.0, 4.0], np.array([4.0, 3.0, 4.0]), [4, None, np.float64(4)]):
        found = bias_metrics(**GOOD | {"num_choices": column}, n_resamples=0)
        assert found["accuracy"] == whole["accuracy"]
    with pytest.raises(ValueError, match=r"num_choices=4\.0 is no number of choices"):
        evaluate.load("anchored_mcq_bias", num_choices=4.0)


def test_a_second_argument_of_load_is_not_swallowed():
    with pytest.raises(ValueError, match=r"config_name='B'.*anchor='B'"):
        evaluate.load("anchored_mcq_bias", "B")


def test_a_batch_that_was_not_written_does_not_decide_what_the_result_holds(metric, monkeypatch):
    def full(self, **columns):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.Metric, "add_batch", full)
        with pytest.raises(OSError, match="no space"):
            metric.add_batch(**GOOD)
    metric.add_batch(**SCORES)
    assert metric.compute()["n"] == 3


def test_permutations_of_rows_that_say_they_have_no_group():
    order = [[0, 1, 2, 3]] * 3
    assert bias_metrics(**GOOD | {"group": ["", None, ""], "permutation": order}, n_resamples=0)["n_groups"] == 0
    assert bias_metrics(**GOOD | {"permutation": [None] * 3}, n_resamples=0)["n_groups"] == 0
