"""Data importance against numbers of others: exact rationals, many digits, and the authors' package on the same lists.

Skipped where the reference data does not lie beside the checkout.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from hf_ext import ImportanceWeights
from hf_ext.importance_weights import group_gradient, multilinear_gradient, reference, shapley_values

SHARED = Path(__file__).parents[2] / "shared"
GOLDEN = SHARED / "golden" / "importance_weights"
REAL = SHARED / "data" / "importance" / "dev"  # private: read in place, nothing of it is copied
golden_data = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference data")
real_data = pytest.mark.skipif(not REAL.is_dir(), reason="no development data")
EXACT = 1e-14


def cases(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def gap(found, expected):
    assert np.shape(found) == np.shape(expected)
    return np.abs(np.asarray(found, dtype=float) - np.asarray(expected)).max(initial=0)


def fast(u, p, k):
    return multilinear_gradient(u, p, k, return_value=True)


@golden_data
@pytest.mark.parametrize("function", [fast, reference.multilinear], ids=["fast", "reference"])
def test_every_subset(function):
    for case in cases("brute_force"):
        u, p = np.array(case["utilities"], dtype=float), np.array(case["probabilities"], dtype=float)
        value, gradient = function(u, p, case["k"])
        assert gap(value, case["value"]) <= EXACT
        assert gap(gradient, case["gradient"]) <= EXACT


@golden_data
def test_every_subset_in_one_batch():
    """All lists of one k, of unequal lengths."""
    by_k = {}
    for case in cases("brute_force"):
        by_k.setdefault(case["k"], []).append(case)
    for k, group in by_k.items():
        u, p = np.zeros((2, len(group), 8))
        for row, case in enumerate(group):
            length = len(case["utilities"])
            u[row, :length], p[row, :length] = case["utilities"], case["probabilities"]
        values, gradients = multilinear_gradient(u, p, k, return_value=True)
        assert gap(values, [case["value"] for case in group]) <= EXACT
        for row, case in enumerate(group):
            assert gap(gradients[row, : len(case["gradient"])], case["gradient"]) <= EXACT


@golden_data
def test_every_subset_of_groups():
    for case in cases("group_exact"):
        u, p = np.array(case["utilities"], dtype=float), np.array(case["probabilities"], dtype=float)
        value, gradient = group_gradient(u, np.array(case["groups"], dtype=int), p, case["k"], return_value=True)
        assert gap(value, case["value"]) <= EXACT
        assert gap(gradient, case["gradient"]) <= EXACT


@golden_data
def test_every_order():
    for case in cases("shapley"):
        assert gap(shapley_values(np.array(case["utilities"], dtype=float), case["k"]), case["shapley"]) <= EXACT


@golden_data
@pytest.mark.parametrize("dtype, tolerance", [("float64", 2e-15), ("float32", 2e-7)], ids=["float64", "float32"])
@pytest.mark.parametrize("number", range(6))
def test_many_digits(number, dtype, tolerance):
    with np.load(GOLDEN / "high_precision.npz") as file:
        case = {name: file[f"{number}/{name}"] for name in ("k", "probabilities", "utilities", "value", "gradient")}
    u, p = case["utilities"].astype(dtype), case["probabilities"].astype(dtype)
    value, gradient = multilinear_gradient(u, p, int(case["k"]), dtype=dtype, return_value=True)
    if dtype == "float32" and number == 3:  # a thousand chances below 1e-3: what is left of 1 is rounded each time
        tolerance = 4e-7
    assert gap(gradient, case["gradient"]) <= tolerance
    assert gap(value, case["value"]) <= tolerance


@golden_data
@pytest.mark.parametrize("name", ["item_binary", "item_levels", "grouped_binary", "grouped_levels"])
def test_weights_of_the_authors_package(name):
    with np.load(GOLDEN / f"ragbooster_{name}.npz") as file:
        case = {key: file[key] for key in file.files}
    ends = list(zip(case["offsets"], case["offsets"][1:], strict=False))
    rows = {key: [case[key][a:b].tolist() for a, b in ends] for key in ("retrieved", "utility")}
    of_item = case.get("item_group", np.arange(len(case["weights"])))
    rows["source"] = [[int(of_item[i]) for i in row] for row in rows["retrieved"]]
    weights = ImportanceWeights(
        k=int(case["k"]),
        learning_rate=float(case["learning_rate"]),
        epochs=int(case["epochs"]),
        group_column="source" if "item_group" in case else None,
    ).fit(rows, progress=False)
    assert gap(weights.lookup(of_item.tolist()), case["weights"]) <= 1e-12


# ---------------------------------------------------------------- real questions


SETS = ["place_of_birth", "measured_physical_quantity", "imputation_buy_manufacturer_gptjt6b"]


def lines(name):
    with gzip.open(REAL / f"{name}.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file]


@real_data
@pytest.mark.parametrize("name", SETS)
def test_weights_of_the_authors_package_on_real_questions(name):
    questions = lines(name)
    with gzip.open(REAL / f"{name}.golden.json.gz", "rt") as file:
        seeds = json.load(file)["seeds"]
    assert len(seeds) == 3
    for expected in seeds.values():
        chosen = [questions[i] for i in expected["val"]]
        rows = {
            "retrieved": [q["retrieved_websites"] for q in chosen],
            "source": [q["retrieved_groups"] for q in chosen],
            "utility": [[float(a in q["correct_answers"]) for a in q["retrieved_answers"]] for q in chosen],
        }
        options = {key: expected[key] for key in ("k", "learning_rate", "epochs")}
        for golden, column in [(expected["group_weights"], "source"), (expected["first_ungrouped"], None)]:
            weights = ImportanceWeights(group_column=column, **options).fit(rows, progress=False)
            assert len(weights) == (expected["n_items"] if column is None else len(golden))
            assert gap(weights.lookup(list(golden)), list(golden.values())) <= 1e-9
