"""From lists of retrieved items and their utilities to a weight for every item or group."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_ext.importance_weights.checkpoint import Checkpoints
from hf_ext.importance_weights.problem import Problem
from hf_ext.importance_weights.updates import update_of


@dataclass
class Fit:
    """What a fit leaves: weights (keys,) float64, the value they reach, and how they got there.

    neutral: what a key weighs of which nothing is known.
    """

    weights: np.ndarray
    value: float
    neutral: float
    history: list[dict[str, Any]] = field(default_factory=list)
    learning_rate: float | None = None


def solve(problem: Problem, checkpoints: Checkpoints, progress: bool = True) -> Fit:
    """Weights by the method of the configuration."""
    if problem.config.method == "multilinear":
        return _learn(problem, checkpoints, progress)
    if problem.config.method == "mean":
        return _smoothed_means(problem)
    return _values_of_the_game(problem)


# --- values, without epochs


def _smoothed_means(problem: Problem) -> Fit:
    """(sum u + a mu) / (n + a) over the n slots of a key."""
    scales = problem.scales(problem.counts, problem.spread)
    sums, _ = problem.add(problem.by_key.plain(scales[0]), 0, scales)
    # From the sums of all keys in their order, as they are the same everywhere.
    mean, prior = float(sums.sum() / problem.slots), problem.config.prior_strength
    weights = (sums + prior * mean) / (problem.counts + prior)
    return Fit(weights * problem.factor, _value_of_all(problem), neutral=mean * problem.factor)


def _values_of_the_game(problem: Problem) -> Fit:
    """Shapley, Banzhaf and leave-one-out values of items, or of groups as players, averaged over the lists."""
    method, grouped = problem.config.method, problem.lists.groups is not None
    bound = problem.largest_group_gradient if grouped else problem.spread / problem.config.k
    scales = problem.scales(problem.counts, bound)
    if method == "shapley":
        if grouped:
            sums, value, _ = problem.by_key.group_gradients(problem.counts, scales, shapley=True)
        else:
            sums, value = problem.by_item.shapley_values(scales[0]), 0
    else:
        weights = np.full(len(problem.keys), 0.5 if method == "banzhaf" else 1.0)
        engine = problem.by_key.group_gradients if grouped else problem.by_item.gradients
        sums, value, _ = engine(weights, scales)
    weights, _ = problem.add(sums, value, scales)
    return Fit(weights / problem.tuples * problem.factor, _value_of_all(problem), neutral=0.0)


def _value_of_all(problem: Problem) -> float:
    """F where every item is in."""
    return _value(problem, problem.by_item.gradients, np.ones(len(problem.lists.item_keys)))


def _value(problem: Problem, engine: Callable[..., Any], weights: np.ndarray) -> float:
    scales = problem.scales(problem.counts, problem.spread)
    sums, value, _ = engine(weights, scales)
    return problem.add(np.zeros_like(sums), value, scales)[1] / problem.tuples * problem.factor


# --- probabilities, by gradient steps


def _learn(problem: Problem, checkpoints: Checkpoints, progress: bool) -> Fit:
    config = problem.config
    rule = update_of(problem)
    rate = rule.learning_rate()
    if problem.spread == 0 and problem.ranks.rank == 0:
        warnings.warn("all utilities are zero: there is nothing to learn, and every weight stays 0.5", stacklevel=4)
    weights, history = checkpoints.load(problem) or (np.full(len(problem.keys), 0.5), [])
    for epoch in _epochs(len(history), config.epochs, progress and problem.ranks.rank == 0):
        weights, record = rule.step(weights, rate, epoch)
        history.append(record)
        checkpoints.save(problem, weights, history)
    value = _value(problem, rule.engine, rule.spread_out(weights))
    return Fit(weights, value, neutral=0.5, history=history, learning_rate=rate / problem.factor)


def _epochs(done: int, epochs: int, progress: bool) -> Iterator[int]:
    bar = tqdm(total=epochs, initial=done, desc="importance weights", unit="epoch", disable=not progress)
    with bar:
        for epoch in range(done, epochs):
            yield epoch
            bar.update()
