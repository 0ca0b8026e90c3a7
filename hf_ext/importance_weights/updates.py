"""One epoch of the multilinear method: the gradient, and what takes a step by it, items or groups."""

from typing import Any

import numpy as np

from hf_ext.importance_weights.bounds import Sample
from hf_ext.importance_weights.functions import tail_for
from hf_ext.importance_weights.problem import Problem


def update_of(problem: Problem) -> "ItemUpdate":
    """The rule of the configuration; without groups, items are the keys, and "exact" takes each for a group."""
    ungrouped = problem.lists.groups is None and problem.config.group_update != "exact"
    return UPDATES["item" if ungrouped else problem.config.group_update](problem)


class ItemUpdate:
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
        """Of gradients as the sums give them. Auto: eta = 1/2 * N * C / S * K / R, in Python's floats."""
        problem = self.problem
        if self.config.learning_rate != "auto":
            return float(self.config.learning_rate) * problem.factor
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
        error = config.epsilon / problem.factor / 2
        sample = Sample(problem.tuples, items, config.epochs, config.delta, error, bound, share)
        return sample if sample.size < problem.tuples else None

    def step(self, weights: np.ndarray, rate: float, epoch: int) -> tuple[np.ndarray, dict[str, Any]]:
        """(weights after epoch `epoch`, counted from 0, its line in the history)."""
        problem, options, tuples = self.problem, *self.selection(epoch)
        sums, value, cut = self.engine(self.spread_out(weights), self.scales, **options)
        sums, value = problem.add(sums, value, self.scales)
        gradient = sums / tuples
        record = {
            "epoch": epoch + 1,
            "value": value / tuples * problem.factor,
            "gradient_max": float(np.abs(gradient).max(initial=0.0)) * problem.factor,
            "tuples": tuples,
            "bound": self.reached(cut) * problem.factor if options else 0.0,
        }
        return self.moved(weights, rate * gradient), record

    def selection(self, epoch: int) -> tuple[dict[str, Any], int]:
        """Which lists are taken how far, as the engine knows it, and how many they are on all ranks."""
        config, problem, options = self.config, self.problem, {}
        if config.epsilon > 0:
            allowed = config.epsilon / problem.factor / (2 if config.delta > 0 else 1)
            options["tail"] = tail_for(allowed / self.most, problem.spread, config.k)
        if self.sample is None:
            return options, problem.tuples
        drawn = self.sample.draw(config.seed, epoch) - problem.first
        options["rows"] = drawn[(drawn >= 0) & (drawn < len(problem.lists))]
        return options, self.sample.size

    def reached(self, cut: float) -> float:
        """The error that no coordinate exceeds, given the largest P(X <= k) at which this rank cut a list."""
        cut = float(self.problem.ranks.largest(np.array([cut]))[0])
        drawn = self.sample.error if self.sample is not None else 0.0
        return self.most * self.largest_gradient() * cut + drawn

    def spread_out(self, weights: np.ndarray) -> np.ndarray:
        """Weights of the players of a list from those of the keys."""
        return weights

    def moved(self, weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return np.clip(weights + steps, 0.0, 1.0)


class MeanUpdate(ItemUpdate):
    """Items step on their own, then a group weighs as much as its retrieved items on average (the paper's code)."""

    def spread_out(self, weights: np.ndarray) -> np.ndarray:
        return weights[self.problem.lists.groups]

    def moved(self, weights: np.ndarray, steps: np.ndarray) -> np.ndarray:
        groups, count = self.problem.lists.groups, len(weights)
        items = super().moved(self.spread_out(weights), steps)
        return np.bincount(groups, items, count) / np.bincount(groups, minlength=count)


class SumUpdate(ItemUpdate):
    """A group steps by the sum of its items' gradients."""

    def players(self) -> tuple[Any, np.ndarray]:
        return self.problem.by_key, self.problem.counts


class ExactUpdate(SumUpdate):
    """A group is in or out as a whole, and steps by the gradient of that game."""

    def largest_gradient(self) -> float:
        return self.problem.largest_group_gradient

    def engine(self, weights: np.ndarray, scales: tuple[float, float], **options: Any) -> Any:
        return self.sums.group_gradients(weights, scales, **options)


UPDATES = {"item": ItemUpdate, "mean": MeanUpdate, "sum": SumUpdate, "exact": ExactUpdate}
