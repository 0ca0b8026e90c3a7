"""The measures of multiple-choice bias: against the reference's loops, against numbers of others, and by simulation."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mcq_oracle import LETTERS, by_loops, differences, draw_answers, draw_groups, draw_scores, rows_of

from hf_ext.mcq_bias import bias_metrics, reference

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "golden" / "mcq_bias"
REAL = SHARED / "data" / "mcq" / "dev" / "bbh_code_davinci_002_direct.jsonl"  # read in place, nothing of it is copied
golden_data = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference data")
real_data = pytest.mark.skipif(not REAL.is_file(), reason="no development data")

CASES = {
    "answers": draw_answers(300, bias=0.2, invalid=0.1),
    "two_choices_skewed": draw_answers(200, ks=(2,), skew=0.7, bias=0.3),
    "up_to_26_choices": draw_answers(200, ks=(2, 26), seed=1),
    "scores_ties_nan_inf": draw_scores(300),
    "scores_of_one_k": draw_scores(150, ks=(4,), seed=2),
    "scores_strata_of_one_row": draw_scores(5, ks=(2, 3, 4, 5, 6, 7), seed=3, damaged=0),
    "groups_of_rotations": draw_groups(60),
    "groups_explicit": draw_groups(60, explicit=True, seed=1),
    "groups_and_others": {
        name: column + draw_scores(40, seed=4)[name] if name != "group" else column + [None] * 20 + [""] * 20
        for name, column in draw_groups(30, seed=2).items()
    },
}


def fast(n_resamples=0, **inputs):
    return bias_metrics(**inputs, n_resamples=n_resamples)


# --- against loops


@pytest.mark.smoke
@pytest.mark.parametrize(("anchor", "confidence"), [("A", 0.95), ("C", 0.5), ("Z", 0.95)])
@pytest.mark.parametrize("case", CASES)
def test_every_output_is_that_of_the_loops(case, anchor, confidence):
    expected = by_loops(rows_of(**CASES[case]), LETTERS.index(anchor), confidence)
    found = fast(**CASES[case], anchor=anchor, confidence=confidence)
    assert differences(found, expected) == {}
    bootstrap = {"n_choices_inferred", "recall_std_low", "recall_std_high"}
    assert found.keys() - expected.keys() == bootstrap


@st.composite
def any_rows(draw):
    score = st.sampled_from([0.0, 1.0, 1.5, -2.0, -700.5, 90.0, -math.inf, math.inf, math.nan])
    sizes = draw(st.lists(st.integers(2, 6), max_size=12))
    gold = [draw(st.integers(0, k - 1)) for k in sizes]
    if draw(st.booleans()):
        predictions = [draw(st.lists(score, min_size=k, max_size=k)) for k in sizes]
    else:
        predictions = [draw(st.integers(-1, 7)) for _ in sizes]
    # Rotations by default: any rows of equal k may be one question.
    label = st.sampled_from(["", "x", "y"])
    return {
        "predictions": predictions,
        "references": gold,
        "num_choices": sizes,
        "group": [label_ + str(k) if (label_ := draw(label)) else "" for k in sizes],
    }


@settings(max_examples=150, deadline=None)
@given(any_rows(), st.integers(0, 6))
def test_any_rows_are_as_in_the_loops(rows, anchor):
    found = fast(**rows, anchor=anchor)
    assert differences(found, by_loops(rows_of(**rows), anchor)) == {}
    assert all(type(x) is (int if name.startswith("n_") or name == "n" else float) for name, x in found.items())
    shares = [x for name, x in found.items() if "share" in name or "rate" in name or "accuracy" in name]
    assert all(math.isnan(x) or -1e-12 <= x <= 1 + 1e-12 for x in shares)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_order_of_rows_does_not_matter(seed):
    rows = draw_groups(12, seed=seed)
    order = np.random.default_rng(seed).permutation(len(rows["references"]))
    shuffled = {name: [column[i] for i in order] for name, column in rows.items()}
    assert differences(fast(200, **shuffled), fast(200, **rows)) == {}


def test_names_and_their_order_depend_on_the_largest_k_alone():
    names = list(fast(predictions=[0, 1], references=[0, 1], num_choices=4))
    assert names == list(fast(100, **draw_scores(50, ks=(2, 4))))
    assert names == list(fast(predictions=[], references=[], num_choices=4))
    assert names[:6] == ["n", "n_invalid", "n_ties", "n_choices_inferred", "n_anchor_eligible", "accuracy"]
    assert [name for name in names if name.startswith("choice_share")] == [f"choice_share_{x}" for x in "ABCD"]


@pytest.mark.filterwarnings("error")
def test_scores_as_far_apart_as_floats_can_be():
    extremes = [
        [1e308, -1e308, 0.0],
        [-1e308, -1e308, -1.7e308],
        [5e-324, 0.0, -5e-324],
        [math.nan, math.inf, -math.inf],
    ]
    group = ["q", "q", "q", ""]
    found = fast(
        predictions=extremes, references=[0, 1, 2, 0], group=group, permutation=[[0, 1, 2], [1, 0, 2], [1, 2, 0], None]
    )
    assert (found["n_invalid"], found["n_ties"], found["accuracy"]) == (1, 1, 1.5 / 4)


# --- what is equal by construction


def test_ties_are_split_not_given_to_the_first():
    found = fast(predictions=[[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]], references=[1, 2])
    assert found["n_ties"] == 2
    assert found["accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["anchored_bias_rate"] == pytest.approx((1 / 2 + 1 / 3) / 2)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("form", ["tensor", "list_of_tensors", "lists_of_scalars"])
def test_any_float_type_is_taken_exactly(dtype, form):
    """Near -100 bf16 has steps of 1/2: many ties, none of which may be lost or invented."""
    scores = (torch.randn(400, 4, generator=torch.Generator().manual_seed(0)) - 100).to(dtype)
    gold = torch.arange(400) % 4
    given = {"tensor": scores, "list_of_tensors": list(scores), "lists_of_scalars": [list(row) for row in scores]}[form]
    expected = by_loops(rows_of(scores.double().tolist(), gold.tolist()))
    assert differences(fast(predictions=given, references=gold), expected) == {}
    assert (expected["n_ties"] > 50) == (dtype == torch.bfloat16)


FORMS = {
    "array": np.array,
    "int8": lambda x: np.array(x, np.int8),
    "floats": lambda x: np.array(x, float),
    "tensor": torch.tensor,
    "tuple": tuple,
    "scalars": lambda x: [np.int64(i) for i in x],
    "tensors": lambda x: list(torch.tensor(x)),
    "letters": lambda x: [LETTERS[i] for i in x],
    "array_of_letters": lambda x: np.array([LETTERS[i] for i in x]),
    "brackets": lambda x: [f" ({LETTERS[i].lower()}) " for i in x],
    "mixed": lambda x: [f"{LETTERS[i]}." if i % 2 else i for i in x],
    "generator": iter,
}


@pytest.mark.parametrize("form", FORMS)
def test_any_form_of_answers(form):
    rows = draw_answers(100)
    given = {name: FORMS[form](rows[name]) for name in ("predictions", "references")}
    assert differences(fast(**given, num_choices=rows["num_choices"]), fast(**rows)) == {}


def test_columns_of_pandas_arrow_and_datasets():
    import pandas as pd
    import pyarrow as pa
    from datasets import Dataset

    rows = draw_groups(20, explicit=True)
    expected = fast(**rows)
    frame, table, dataset = pd.DataFrame(rows), pa.table(rows), Dataset.from_dict(rows)
    for holder in (frame, table, dataset, dataset.with_format("torch"), dataset.with_format("numpy")):
        assert differences(fast(**{name: holder[name] for name in rows}), expected) == {}


def test_missing_labels_of_pandas_are_no_group():
    rows = draw_groups(2)
    rows["group"] = [math.nan if i % 2 else None for i in range(len(rows["references"]))]
    assert fast(**rows)["n_groups"] == 0


def of_answers(predictions, references, **columns):
    return fast(predictions=predictions, references=references, **columns)


def test_what_is_missing_in_a_column_of_pandas_is_no_answer_and_no_group():
    """It writes None as NaN in columns of text, and as NA in others."""
    import pandas as pd

    expected = of_answers(["A", None, "B"], ["A", "B", "B"], num_choices=2, group=["q", "", "r"])
    assert expected["n_invalid"] == 1
    letters, numbers = pd.Series(["A", None, "B"]), pd.Series([0, None, 1], dtype="Int64")
    group = pd.Series(["q", None, "r"])
    for predictions in (letters, letters.astype(object), letters.astype("string"), numbers, list(numbers)):
        for labels in (group, group.astype(object), group.convert_dtypes(), list(group.convert_dtypes())):
            found = of_answers(predictions, ["A", "B", "B"], num_choices=2, group=labels)
            assert differences(found, expected) == {}
    assert of_answers(pd.Series([0.0, 1.0, 1.0]), [0, 1, 1], num_choices=2)["accuracy"] == 1


def test_what_is_masked_is_no_answer():
    masked = np.ma.masked_array([0, 1, 1], mask=[1, 0, 0])
    assert (
        differences(of_answers(masked, [0, 1, 1], num_choices=3), of_answers([-1, 1, 1], [0, 1, 1], num_choices=3))
        == {}
    )
    scores = np.ma.masked_array(np.arange(6).reshape(3, 2), mask=[[0, 1], [0, 0], [0, 0]])
    assert of_answers(scores, [0, 1, 1])["n_invalid"] == 1
    with pytest.raises(ValueError, match=r"references\[0\]=None"):
        of_answers([0, 1, 1], masked, num_choices=3)


@pytest.mark.parametrize(("hits", "end"), [(0, "accuracy_low"), (1, "accuracy_high")])
def test_intervals_end_exactly_at_none_and_all(hits, end):
    for n in range(1, 40):
        assert of_answers([hits] * n, [1] * n, num_choices=2)[end] == hits


def test_permutations_may_be_padded_to_one_array():
    rows = draw_groups(20, explicit=True)
    padded = np.full((len(rows["references"]), 6), -1)
    for i, order in enumerate(rows["permutation"]):
        padded[i, : len(order)] = order
    for places in (padded, torch.tensor(padded), padded.astype(float)):
        assert differences(fast(**rows | {"permutation": places}), fast(**rows)) == {}


def test_rows_without_a_permutation_are_rotations():
    rows = draw_groups(20)
    orders = [
        [(p - r) % len(row) for p in range(len(row))]
        for row, r in zip(rows["predictions"], rows["references"], strict=True)
    ]
    some = [order if i % 3 else [] for i, order in enumerate(orders)]
    for permutation in (orders, some):
        assert differences(fast(**rows, permutation=permutation), fast(**rows)) == {}


def test_groups_are_told_apart_by_their_text():
    rows = draw_groups(10)
    numbers = [int(label[1:]) + 1 for label in rows["group"]]
    assert fast(**rows | {"group": numbers}) == pytest.approx(fast(**rows), nan_ok=True)
    assert fast(**rows | {"group": torch.tensor(numbers)}) == pytest.approx(fast(**rows), nan_ok=True)


@pytest.mark.parametrize(
    ("text", "index"),
    [("A", 0), ("b", 1), ("(c)", 2), (" D. ", 3), ("a)", 0), ("B:", 1), ("C\n", 2)]
    + [(text, -1) for text in ("", " ", "AB", "A B", "Answer: A", "((A))", "A..", "1", "é", "-")],
)
def test_what_is_a_letter(text, index):
    found = fast(predictions=[text], references=["A"], num_choices=4)
    assert found["n_invalid"] == (index == -1)
    assert [found[f"choice_share_{x}"] for x in "ABCD"] == pytest.approx(
        [math.nan] * 4 if index == -1 else [float(j == index) for j in range(4)], nan_ok=True
    )


def test_scores_padded_beyond_num_choices_are_ragged_scores():
    rows = draw_scores(80)
    k = [len(row) for row in rows["predictions"]]
    wide = np.full((80, 30), -np.inf)
    for i, row in enumerate(rows["predictions"]):
        wide[i, : k[i]] = row
    for padded in (wide, wide.tolist(), torch.tensor(wide), [row[: 5 + i % 20] for i, row in enumerate(wide)]):
        found = fast(predictions=padded, references=rows["references"], num_choices=k)
        assert differences(found, fast(**rows)) == {}


def test_nan_behind_the_choices_is_an_invalid_answer_too():
    found = fast(predictions=[[2.0, 1.0, math.nan], [1.0, 2.0, -math.inf]], references=[0, 1], num_choices=2)
    assert (found["n_invalid"], found["accuracy"]) == (1, 0.5)


def test_number_of_choices_is_inferred_from_all_indices():
    with pytest.warns(UserWarning, match="num_choices is not given: .* 5 choices"):
        found = fast(predictions=[0, 1, -1], references=[4, 0, 0])
    assert found["n_choices_inferred"] == 3
    assert (
        differences(
            found, fast(predictions=[0, 1, -1], references=[4, 0, 0], num_choices=5) | {"n_choices_inferred": 3}
        )
        == {}
    )
    with pytest.warns(UserWarning, match="2 choices"):
        assert fast(predictions=[0], references=[0])["gold_share_B"] == 0
    with pytest.warns(UserWarning, match="4 choices"):  # 9 is no choice of a row that has four
        found = fast(predictions=[9, 0], references=[3, 0], num_choices=[4, None])
    assert (found["n_choices_inferred"], found["n_invalid"]) == (1, 1)


def test_constant_scores_of_letters_are_calibrated_away():
    """The bias is the same in every row, and what the model knows is not: calibration finds it without labels."""
    draw = np.random.default_rng(0)
    gold = np.arange(400) % 4
    scores = draw.normal(size=(400, 4)) + 3.0 * np.eye(4)[gold] + np.array([6.0, 0, 0, 0])
    found = fast(predictions=scores, references=gold)
    assert found["anchored_bias_rate"] > 0.8
    assert found["cmh_z"] > 5
    assert found["calibrated_anchored_bias_rate"] < 0.05
    assert found["calibrated_accuracy"] > 0.9


# --- against numbers of others


def number(x):
    return float(x) if x in ("nan", "inf", "-inf") else x


def numbers(x):
    return [numbers(y) for y in x] if isinstance(x, list) else number(x)


def read(name):
    return json.loads((GOLDEN / name).read_text())


@golden_data
@pytest.mark.parametrize("position", range(10))
def test_golden_cases(position):
    case = read("metric.json")["cases"][position]
    inputs = {name: column if name == "group" else numbers(column) for name, column in case["inputs"].items()}
    expected = {name: number(x) for name, x in case["expected"].items()}
    assert differences(bias_metrics(**inputs, **case["options"]), expected) == {}
    anchor, confidence = LETTERS.index(case["options"]["anchor"]), case["options"]["confidence"]
    assert differences(by_loops(rows_of(**inputs), anchor, confidence), expected) == {}


@golden_data
@real_data
def test_predictions_of_a_language_model():
    rows = [json.loads(line) for line in REAL.read_text().splitlines()[1:]]
    columns = ([row[name] for row in rows] for name in ("pred", "ref", "k"))
    expected = {name: number(x) for name, x in read("metric_bbh.json")["expected"].items()}
    assert differences(bias_metrics(*columns), expected) == {}


# --- by simulation


def p_values(ks, skew, bias, repeats, n=240):
    """Of a model whose accuracy falls with k."""
    found = []
    for seed in range(repeats):
        rows = draw_answers(n, ks, seed=seed, skew=skew, bias=bias)
        found.append(fast(**rows)["cmh_p_value"])
    return np.array(found)


@pytest.mark.parametrize("skew", [0.0, 0.5], ids=["even_gold", "gold_mostly_A"])
@pytest.mark.parametrize("ks", [(2,), (4,), (3, 4, 5)], ids=str)
def test_cmh_raises_false_alarms_at_its_level(ks, skew):
    assert abs((p_values(ks, skew, 0.0, 600) < 0.05).mean() - 0.05) < 0.03


@pytest.mark.parametrize("ks", [(2,), (4,), (3, 4, 5)], ids=str)
def test_cmh_finds_anchoring_in_a_quarter_of_the_answers(ks):
    assert (p_values(ks, 0.0, 0.25, 60) < 0.05).mean() > 0.8


@pytest.mark.parametrize("case", ["answers", "scores_ties_nan_inf", "two_choices_skewed"])
def test_null_of_recall_std_is_what_shuffling_gives(case):
    """Recalls of shuffled c, by loops over strata; the closed form has no error of its own."""
    rows = rows_of(**CASES[case])
    draw = np.random.default_rng(0)
    c, gold, k = (np.array(x) for x in zip(*((row.c, row.r, row.k) for row in rows), strict=True))
    squares = []
    for _ in range(3000):
        shuffled = c.copy()
        for size in set(k.tolist()):
            shuffled[k == size] = draw.permutation(c[k == size])
        squares.append(np.var([shuffled[gold == j].mean() for j in set(gold.tolist())]))
    assert fast(**CASES[case])["recall_std_null"] == pytest.approx(np.sqrt(np.mean(squares)), rel=0.03)


@pytest.mark.parametrize("case", ["answers", "groups_of_rotations", "groups_and_others"])
@pytest.mark.parametrize("confidence", [0.95, 0.6])
def test_bootstrap_is_that_of_drawn_rows(case, confidence):
    rows = {name: column[:120] for name, column in CASES[case].items()}
    low, high = reference.bootstrap(rows_of(**rows), confidence, 400, seed=1)
    found = bias_metrics(**rows, confidence=confidence, n_resamples=20_000)
    assert [found["recall_std_low"], found["recall_std_high"]] == pytest.approx([low, high], abs=0.02)


def test_bootstrap_draws_whole_groups():
    """Two rows of a group that always agree are one unit of information: the interval is wider than of single rows."""
    rows = draw_answers(60, ks=(4,))
    twice = {name: column * 2 for name, column in rows.items()}
    alone, together = (fast(20_000, **twice, group=group) for group in (None, list(range(1, 61)) * 2))
    once, names = fast(20_000, **rows), ("recall_std_low", "recall_std_high")
    assert differences(together, {name: once[name] for name in names}, 0.01) == {}
    width_alone, width_together = (x["recall_std_high"] - x["recall_std_low"] for x in (alone, together))
    assert width_together > 1.2 * width_alone


def test_same_seed_same_interval():
    rows = CASES["answers"]
    one, same, other = (bias_metrics(**rows, n_resamples=500, seed=seed) for seed in (3, 3, 4))
    assert one["recall_std_low"] == same["recall_std_low"] != other["recall_std_low"]
    assert math.isnan(bias_metrics(**rows, n_resamples=0)["recall_std_low"])
    assert differences(one, {name: x for name, x in other.items() if "std_" not in name}) == {}


def test_padding_without_num_choices_is_warned_of():
    scores, gold = [[0.0, 1.0, -np.inf], [2.0, 0.0, 1.0]], [1, 0]
    with pytest.warns(UserWarning, match="rows of scores end in -inf"):
        bias_metrics(scores, gold, n_resamples=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bias_metrics(scores, gold, num_choices=[2, 3], n_resamples=0)["accuracy"] == 1.0
