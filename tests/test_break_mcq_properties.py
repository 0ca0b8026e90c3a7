"""The metric on any rows: letters have no meaning of their own, masses add up, and scores are read as scores."""

import math
from string import ascii_letters
from string import ascii_uppercase as LETTERS
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mcq_oracle import differences

from hf_ext.mcq_bias import bias_metrics

small = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SCORE = st.sampled_from([0.0, 1.0, 1.0, -0.5, -2.25, 3.5, -math.inf, math.nan])
FINITE = st.sampled_from([0.0, 1.0, -0.5, -2.25, 3.5])
Rows = dict[str, list[Any]]


def measured(rows: Rows, anchor: int = 0) -> dict[str, float]:
    return bias_metrics(**rows, anchor=anchor, n_resamples=0)


@st.composite
def one_k(draw: st.DrawFn, scores: bool | None = None) -> tuple[int, Rows]:
    """Rows of k choices in groups, each with the order of its options; half of the groups are complete rotations."""
    k = draw(st.integers(2, 5))
    rows: Rows = {"predictions": [], "references": [], "group": [], "permutation": []}
    scores = draw(st.booleans()) if scores is None else scores
    for group in range(draw(st.integers(1, 4))):
        gold_option, start = draw(st.integers(0, k - 1)), draw(st.permutations(range(k)))
        turns = range(k) if draw(st.booleans()) else sorted(draw(st.sets(st.integers(0, k - 1), min_size=1)))
        for turn in turns:
            order = [*start[turn:], *start[:turn]]
            row = draw(st.lists(SCORE, min_size=k, max_size=k)) if scores else draw(st.integers(-1, k - 1))
            rows["predictions"].append(row)
            rows["references"].append(order.index(gold_option))
            rows["group"].append(f"question {group}")
            rows["permutation"].append(order)
    return k, rows | {"num_choices": [k] * len(rows["references"])}


def renamed(rows: Rows, new_place: list[int]) -> Rows:
    """The same answers where what stood at place i stands at new_place[i]."""
    old_place = np.argsort(new_place).tolist()

    def moved(values: list[Any]) -> list[Any]:
        return [values[place] for place in old_place]

    def prediction(value: Any) -> Any:
        return moved(value) if isinstance(value, list) else value if value < 0 else new_place[value]

    return rows | {
        "predictions": [prediction(value) for value in rows["predictions"]],
        "references": [new_place[gold] for gold in rows["references"]],
        "permutation": [moved(order) for order in rows["permutation"]],
    }


@small
@given(one_k(), st.data())
def test_letters_may_be_called_otherwise(problem, data):
    k, rows = problem
    new_place, anchor = data.draw(st.permutations(range(k))), data.draw(st.integers(0, k - 1))
    before, after = measured(rows, anchor), measured(renamed(rows, new_place), new_place[anchor])
    expected = dict(before)
    for kind in ("choice_share", "gold_share", "recall"):
        expected |= {f"{kind}_{LETTERS[new_place[i]]}": before[f"{kind}_{LETTERS[i]}"] for i in range(k)}
    assert after.keys() == before.keys()
    assert differences(after, expected) == {}


@small
@given(one_k(), st.randoms(), st.data())
def test_rows_and_labels_of_groups_may_stand_in_any_order(problem, random, data):
    _, rows = problem
    n = len(rows["references"])
    order = random.sample(range(n), n)
    shuffled = {name: [column[i] for i in order] for name, column in rows.items()}
    called = data.draw(st.lists(st.text(min_size=1, max_size=3), min_size=4, max_size=4, unique=True))
    called = [f"{number}{text}" for number, text in enumerate(called)]
    shuffled["group"] = [called[int(label.split()[1])] for label in shuffled["group"]]
    assert differences(measured(shuffled), measured(rows)) == {}


@st.composite
def mixed(draw: st.DrawFn) -> Rows:
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=12))
    return {
        "predictions": [draw(st.lists(SCORE, min_size=k, max_size=k)) for k in sizes],
        "references": [draw(st.integers(0, k - 1)) for k in sizes],
        "num_choices": sizes,
    }


@small
@given(mixed(), st.integers(0, 6))
def test_masses_add_up(rows, anchor):
    found = measured(rows, anchor)
    letters = LETTERS[: max(rows["num_choices"])]
    n, answered = found["n"], found["n"] - found["n_invalid"]
    chosen, gold, recall = (
        [found[f"{kind}_{x}"] for x in letters] for kind in ("choice_share", "gold_share", "recall")
    )
    # Recall counts rows without an answer as misses; shares leave them out.
    of_letter = [rows["references"].count(i) for i in range(len(letters))]
    hits = [count * r for count, r in zip(of_letter, recall, strict=True) if count]
    if answered:
        assert sum(chosen) == pytest.approx(1)
        assert sum(gold) == pytest.approx(1)
        assert found["accuracy"] * n == pytest.approx(sum(hits))
        assert found["tvd"] == pytest.approx(sum(abs(c - g) for c, g in zip(chosen, gold, strict=True)) / 2)
        assert found["tvd"] <= 1 + 1e-12
        assert found["kl"] >= -1e-12
    assert found["n_ties"] <= answered
    assert found["accuracy_low"] - 1e-12 <= found["accuracy"] <= found["accuracy_high"] + 1e-12
    if found["n_anchor_eligible"]:
        low, high = found["anchored_bias_rate_low"], found["anchored_bias_rate_high"]
        assert low - 1e-12 <= found["anchored_bias_rate"] <= high + 1e-12
    # What is chosen of a letter is its right answers and, where it was wrong, the anchored errors.
    if answered and anchor < len(letters):
        right = of_letter[anchor] * recall[anchor] if of_letter[anchor] else 0.0
        wrong = found["anchored_bias_rate"] * found["n_anchor_eligible"] if found["n_anchor_eligible"] else 0.0
        assert chosen[anchor] * answered == pytest.approx(right + wrong)


@small
@given(mixed(), mixed(), st.integers(0, 4))
def test_counts_of_two_sets_add_up(one, other, anchor):
    parts = [measured(rows, anchor) for rows in (one, other)]
    both = measured({name: one[name] + other[name] for name in one}, anchor)
    for name in ("n", "n_invalid", "n_ties", "n_anchor_eligible"):
        assert both[name] == sum(part[name] for part in parts)
    for name, size in (("accuracy", "n"), ("anchored_bias_rate", "n_anchor_eligible")):
        hits = sum(part[name] * part[size] for part in parts if part[size])
        assert (both[name] * both[size] if both[size] else 0.0) == pytest.approx(hits)


@small
@given(mixed(), st.sampled_from([-8.0, 0.25, 4.0]), st.sampled_from([0.5, 1.0, 2.0]), st.integers(0, 3))
def test_scores_are_read_up_to_a_constant(rows, shift, factor, anchor):
    """All steps are exact: what is added to every score of a row changes nothing, a factor only what is calibrated."""
    moved = {**rows, "predictions": [[factor * (x + shift) for x in row] for row in rows["predictions"]]}
    found, expected = measured(moved, anchor), measured(rows, anchor)
    if factor != 1:
        found, expected = ({k: v for k, v in x.items() if "calibrated" not in k} for x in (found, expected))
    assert differences(found, expected) == {}


@small
@given(st.lists(st.tuples(st.integers(2, 6), st.integers(-1, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_answers_are_scores_that_say_nothing_else(triples):
    """An answer beyond k is none; none is a row of scores without a maximum."""
    sizes = [k for k, _, _ in triples]
    answers = [answer for _, answer, _ in triples]
    gold = [reference % k for k, _, reference in triples]
    scores = [[0.0 if j == answer else -1.0 for j in range(k)] for k, answer in zip(sizes, answers, strict=True)]
    for row, k, answer in zip(scores, sizes, answers, strict=True):
        if not 0 <= answer < k:
            row[:] = [math.nan] * k
    found = measured({"predictions": answers, "references": gold, "num_choices": sizes})
    as_scores = measured({"predictions": scores, "references": gold, "num_choices": sizes})
    own = {"calibrated_accuracy", "calibrated_anchored_bias_rate"}
    assert differences(found, {name: x for name, x in as_scores.items() if name not in own}) == {}
    words = ["" if answer < 0 else f"({LETTERS[answer].lower()})" for answer in answers]
    spelt = measured({"predictions": words, "references": [LETTERS[x] for x in gold], "num_choices": sizes})
    assert differences(spelt, found) == {}


@small
@given(st.text(max_size=4) | st.from_regex(r"\s*\(?[A-Za-z][).:]?\s*", fullmatch=True))
def test_an_answer_in_words_is_one_letter_in_brackets_or_marks_or_none(text):
    found = measured({"predictions": [text], "references": [0], "num_choices": [26]})
    bare = "".join(text.split()).strip("().:").upper()
    if found["n_invalid"]:
        assert len(text) != 1 or text not in ascii_letters
    else:
        assert found[f"choice_share_{bare}"] == 1
