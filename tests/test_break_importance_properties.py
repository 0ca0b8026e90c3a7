"""Data importance on any small lists: exact enumeration in rationals, and what must not matter to a fit."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_oracle import by_orders, by_subsets

from hf_ext import ImportanceWeights
from hf_ext.importance_weights import group_gradient, multilinear_gradient, shapley_values

small = settings(max_examples=60, deadline=None, derandomize=True, database=None)
fewer = settings(small, max_examples=25)
# A few binary digits, so that rationals are exact; ends, where whole branches of the recursion are zero.
UTILITY = st.integers(-6, 6).map(lambda n: n / 4)
CHANCE = st.sampled_from([0.0, 0.0625, 0.25, 0.5, 0.875, 1.0, 1.0])
K = st.integers(1, 8)


@st.composite
def lists(draw: st.DrawFn, longest: int = 6) -> tuple[list[float], list[float]]:
    length = draw(st.integers(0, longest))
    return tuple(draw(st.lists(kind, min_size=length, max_size=length)) for kind in (UTILITY, CHANCE))


def near(found: Any, exact: Any) -> None:
    np.testing.assert_allclose(np.asarray(found, float), np.asarray([float(x) for x in exact]), rtol=0, atol=1e-13)


@small
@given(lists(), K, st.booleans())
def test_value_and_gradient_over_all_subsets(problem, k, as_tensor):
    utilities, chances = problem
    value, gradient = by_subsets(utilities, chances, k)
    kind = (lambda x: torch.tensor(x, dtype=torch.float64)) if as_tensor else (lambda x: np.array(x, float))
    found = multilinear_gradient(kind(utilities), kind(chances), k, return_value=True)
    near([found[0]], [value])
    near(found[1], gradient)


@small
@given(st.lists(lists(), min_size=1, max_size=5), K)
def test_a_list_is_the_same_beside_others_that_are_padded_to_its_length(problems, k):
    """Behind the end of a list stand items that are never in."""
    longest = max(len(utilities) for utilities, _ in problems)
    utilities = np.array([u + [5.0] * (longest - len(u)) for u, _ in problems])
    chances = np.array([p + [0.0] * (longest - len(p)) for _, p in problems])
    values, gradient = multilinear_gradient(utilities, chances, k, return_value=True)
    for row, (own, p) in enumerate(problems):
        value, expected = by_subsets(own, p, k)
        near([values[row]], [value])
        near(gradient[row, : len(own)], expected)


@small
@given(lists(), K, st.data())
def test_groups_over_all_subsets_of_groups(problem, k, data):
    """Some groups have no item in the list."""
    utilities, chances = problem
    count = data.draw(st.integers(1, 4))
    groups = data.draw(st.lists(st.integers(0, count - 1), min_size=len(utilities), max_size=len(utilities)))
    p = (chances + [0.5] * count)[:count]
    value, gradient = by_subsets(utilities, p, k, groups)
    found = group_gradient(np.array(utilities), np.array(groups, int), np.array(p), k, return_value=True)
    near([found[0]], [value])
    near(found[1], gradient)


@fewer
@given(lists(5), K)
def test_shapley_over_all_orders(problem, k):
    near(shapley_values(np.array(problem[0], float), k), by_orders(problem[0], k))


@small
@given(lists(), K, st.integers(-3, 3), st.integers(0, 5))
def test_what_shifts_and_swaps_do(problem, k, shift, at):
    """The value is linear in the utilities; two neighbours of equal utility may be exchanged."""
    utilities, chances = (np.array(x, float) for x in problem)
    value, gradient = multilinear_gradient(utilities, chances, k, return_value=True)
    ones, of_ones = multilinear_gradient(np.ones_like(utilities), chances, k, return_value=True)
    shifted = multilinear_gradient(utilities + shift, chances, k, return_value=True)
    assert shifted[0] == pytest.approx(value + shift * ones, abs=1e-12)
    np.testing.assert_allclose(shifted[1], gradient + shift * of_ones, atol=1e-12)
    if at + 1 < len(utilities):
        utilities[at + 1] = utilities[at]
        order = np.arange(len(utilities))
        order[[at, at + 1]] = at + 1, at
        one = multilinear_gradient(utilities, chances, k, return_value=True)
        other = multilinear_gradient(utilities, chances[order], k, return_value=True)
        assert one[0] == pytest.approx(other[0], abs=1e-12)
        np.testing.assert_allclose(one[1][order], other[1], atol=1e-12)


# --- fits


@st.composite
def validation_sets(draw: st.DrawFn) -> dict[str, list[Any]]:
    """A few rows over six items, with repetitions and empty lists; not all lists are empty."""
    rows = draw(st.lists(st.lists(st.integers(0, 5), max_size=5), min_size=1, max_size=7))
    rows.append([draw(st.integers(0, 5))])
    return {"retrieved": rows, "utility": [[draw(UTILITY) for _ in row] for row in rows]}


METHODS = st.sampled_from(["multilinear", "shapley", "banzhaf", "loo", "mean"])
SOURCE = [0, 1, 1, 2, 2, 2]


def weights_of(rows: dict[str, list[Any]], names: dict[int, Any], **options: Any) -> dict[Any, float]:
    """By the numbers of the items, whatever they are called in the fit."""
    group_of = options.get("group_column") and {names[i]: names[SOURCE[i]] for i in range(6)}
    named = {**rows, "retrieved": [[names[i] for i in row] for row in rows["retrieved"]]}
    if group_of:
        named["source"] = [[group_of[item] for item in row] for row in named["retrieved"]]
    fitted = ImportanceWeights(k=2, epochs=4, **options).fit(named, progress=False)
    numbers = {name: number for number, name in names.items()}
    return {numbers[key]: weight for key, weight in fitted.to_dict().items()}


@pytest.mark.filterwarnings("ignore:all utilities are zero")
@fewer
@given(validation_sets(), METHODS, st.booleans(), st.permutations(range(6)), st.booleans(), st.randoms())
def test_names_and_the_order_of_rows_do_not_matter(rows, method, grouped, names, strings, random):
    """Of keys: they decide in which order weights are kept, which sums of integers do not notice."""
    options = {"method": method} | ({"group_column": "source"} if grouped else {})
    expected = weights_of(rows, {i: i for i in range(6)}, **options)
    order = random.sample(range(len(rows["utility"])), len(rows["utility"]))
    shuffled = {name: [column[i] for i in order] for name, column in rows.items()}
    renamed = {i: f"doc{name}" if strings else 1000 * name - 2500 for i, name in enumerate(names)}
    found = weights_of(shuffled, renamed, **options)
    assert found == (pytest.approx(expected, abs=1e-12) if method == "mean" else expected)


@pytest.mark.filterwarnings("ignore:all utilities are zero")
@fewer
@given(validation_sets(), METHODS)
def test_an_item_that_no_row_holds_changes_nothing_and_empty_rows_count(rows, method):
    """An empty list is a question without documents: it is averaged over, except by the mean of slots."""
    names = {i: i for i in range(6)}
    expected = weights_of(rows, names, method=method)
    more = {name: [*column, []] for name, column in rows.items()}
    found = weights_of(more, names, method=method)
    assert found.keys() == expected.keys() == {item for row in rows["retrieved"] for item in row}
    if method in ("shapley", "banzhaf", "loo"):
        n = len(rows["utility"])
        assert found == pytest.approx({key: weight * n / (n + 1) for key, weight in expected.items()}, abs=1e-12)
    else:  # the automatic rate makes up for it
        assert found == pytest.approx(expected, abs=1e-12)
