"""From lists of retrieved items and their utilities to a weight for every item or group."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from hf_ext.importance_weights.bounds import Sample
from hf_ext.importance_weights.checkpoint import Checkpoints
from hf_ext.importance_weights.functions import tail_for
from hf_ext.importance_weights.problem import Problem


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
    return Fit(weights, _value_of_all(problem), neutral=mean)


def _values_of_the_game(problem: Problem) -> Fit:
    """Shapley, Banzhaf and leave-one-out values of items, or of groups as players, averaged over the lists."""
    method, grouped = problem.config.method, problem.lists.groups is not None
    # A group can displace as much as a whole list is worth, an item only one place.
    scales = problem.scales(problem.counts, problem.spread if grouped else problem.spread / problem.config.k)
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
    return Fit(weights / problem.tuples, _value_of_all(problem), neutral=0.0)


def _value_of_all(problem: Problem) -> float:
    """F where every item is in."""
    return _value(problem, problem.by_item.gradients, np.ones(len(problem.lists.item_keys)))


def _value(problem: Problem, engine: Callable[..., Any], weights: np.ndarray) -> float:
    scales = problem.scales(problem.counts, problem.spread)
    sums, value, _ = engine(weights, scales)
    return problem.add(np.zeros_like(sums), value, scales)[1] / problem.tuples


# --- probabilities, by gradient steps


def _learn(problem: Problem, checkpoints: Checkpoints, progress: bool) -> Fit:
    config = problem.config
    update = _UPDATES[
        "item" if problem.lists.groups is None and config.group_update != "exact" else config.group_update
    ]
    rule = update(problem)
    rate = rule.learning_rate()
    if problem.spread == 0 and problem.ranks.rank == 0:
        warnings.warn("all utilities are zero: there is nothing to learn, and every weight stays 0.5", stacklevel=4)
    weights, history = checkpoints.load(problem) or (np.full(len(problem.keys), 0.5), [])
    for epoch in _epochs(len(history), config.epochs, progress and problem.ranks.rank == 0):
        weights, record = rule.step(weights, rate, epoch)
        history.append(record)
        checkpoints.save(problem, weights, history)
    value = _value(problem, rule.engine, rule.spread_out(weights))
    return Fit(weights, value, neutral=0.5, history=history, learning_rate=rate)


def _epochs(done: int, epochs: int, progress: bool) -> Iterator[int]:
    bar = tqdm(total=epochs, initial=done, desc="importance weights", unit="epoch", disable=not progress)
    with bar:
        for epoch in range(done, epochs):
            yield epoch
            bar.update()


class _ItemUpdate:
    """One step of every item by its own gradient; where nothing is grouped, items are the keys."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.config = problem.config
        self.sums, self.counts = self.players()
        self.scales = problem.scales(self.counts, self.largest_gradient())
        self.most, holders = 1, np.zeros(1, np.int64)
        if self.config.epsilon > 0:
            most, mine = self.sums.repeats()
            self.most, holders = int(problem.ranks.largest(np.array([most]))[0]), problem.ranks.add(mine)
        self.sample = self.sampling(int(holders.max()))

    def players(self) -> tuple[Any, np.ndarray]:
        return self.problem.by_item, self.problem.item_counts

    def largest_gradient(self) -> float:
        return self.problem.spread / self.config.k

    def engine(self, weights: np.ndarray, scales: tuple[float, float], **options: Any) -> Any:
        return self.sums.gradients(weights, scales, **options)

    def learning_rate(self) -> float:
        """Auto: eta = 1/2 * N * C / S * K / R, in Python's floats."""
        if self.config.learning_rate != "auto":
            return float(self.config.learning_rate)
        problem = self.problem
        if problem.spread == 0:
            return 0.0
        return 0.5 * problem.tuples * len(self.counts) / problem.slots * self.config.k / problem.spread

    def sampling(self, holders: int) -> Sample | None:
        config, problem = self.config, self.problem
        if config.delta == 0 or problem.spread == 0:
            return None
        bound = self.most * problem.spread / config.k
        share = holders / problem.tuples
        items = len(self.counts)
        sample = Sample(problem.tuples, items, config.epochs, config.delta, config.epsilon / 2, bound, share)
        return sample if sample.size < problem.tuples else None

    def step(self, weights: np.ndarray, rate: float, epoch: int) -> tuple[np.ndarray, dict[str, Any]]:
        problem, options = self.problem, {}
        if self.config.epsilon > 0:
            allowed = self.config.epsilon / (2 if self.config.delta > 0 else 1)
            options["tail"] = tail_for(allowed / self.most, problem.spread, self.config.k)
        if self.sample is not None:
            drawn = self.sample.draw(self.config.seed, epoch) - problem.first
            options["rows"] = drawn[(drawn >= 0) & (drawn < len(problem.lists))]
        tuples = self.sample.size if self.sample is not None else problem.tuples
        sums, value, cut = self.engine(self.spread_out(weights), self.scales, **options)
        sums, value = problem.add(sums, value, self.scales)
        gradient = sums / tuples
        bound = 0.0
        if options:
            cut = float(problem.ranks.largest(np.array([cut]))[0])
            bound = self.most * self.largest_gradient() * cut
            bound += self.sample.error if self.sample is not None else 0.0
        record = {
            "epoch": epoch + 1,
            "value": value / tuples,
            "gradient_max": float(np.abs(gradient).max(initial=0.0)),
            "tuples": tuples,
            "bound": bound,
        }
        return self.moved(weights, rate * gradient), record

    def spread_out(self, weights: np.ndarray) -> np.ndarray:
        """Weights of the players of a list from those of the keys."""
        return weights

    def moved(self, weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.clip(weights + steps, 0.0, 1.0)


class _MeanUpdate(_ItemUpdate):
    """Items step on their own, then a group weighs as much as its retrieved items on average (the paper's code)."""

    def spread_out(self, weights: np.ndarray) -> np.ndarray:
        return weights[self.problem.lists.groups]

    def moved(self, weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
        groups, count = self.problem.lists.groups, len(weights)
        items = super().moved(self.spread_out(weights), steps)
        return np.bincount(groups, items, count) / np.bincount(groups, minlength=count)


class _SumUpdate(_ItemUpdate):
    """A group steps by the sum of its items' gradients."""

    def players(self) -> tuple[Any, np.ndarray]:
        return self.problem.by_key, self.problem.counts


class _ExactUpdate(_SumUpdate):
    """A group is in or out as a whole, and steps by the gradient of that game."""

    def largest_gradient(self) -> float:
        return self.problem.spread

    def engine(self, weights: np.ndarray, scales: tuple[float, float], **options: Any) -> Any:
        return self.sums.group_gradients(weights, scales, **options)


_UPDATES = {"item": _ItemUpdate, "mean": _MeanUpdate, "sum": _SumUpdate, "exact": _ExactUpdate}
