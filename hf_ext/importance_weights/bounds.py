"""How much error truncation and sampling may make, and the unit in which sums are counted."""

import math
from dataclasses import dataclass

import numpy as np


def unit(count: int, bound: float) -> float:
    """2^s such that the sum of `count` numbers of size at most `bound` fits an int64, as integers of unit 2^-s."""
    size = count * bound
    return math.ldexp(1.0, min(61 - math.frexp(size)[1], 1000)) if size > 0 else 1.0


@dataclass(frozen=True)
class Sample:
    """How many of N tuples an epoch takes, so that every gradient coordinate of every epoch is within `error` of the
    whole with probability 1 - delta.

    Hoeffding-Serfling or Bernstein for sampling without replacement, whichever asks for less, and a union bound over
    `items` coordinates and `epochs`. bound: the largest contribution of a tuple to a coordinate, m R / k. share: the
    largest share of tuples that hold one item. The bound is ours, not the paper's, and is one on gradients at the
    weights of the epoch, not on weights after many epochs.
    """

    tuples: int
    items: int
    epochs: int
    delta: float
    error: float
    bound: float
    share: float

    @property
    def size(self) -> int:
        B, e, N = self.bound, self.error, self.tuples
        ratio = B / e
        if ratio < 1e-100 or ratio > 1e100:  # all or one, and beyond floats to say how clearly
            return N if ratio > 1 else 1
        L = math.log(2 * self.items * self.epochs / self.delta)
        Q = 2 * B**2 * L / e**2
        hoeffding = Q * (N + 1) / (N + Q)
        bernstein = (2 * B**2 * self.share / e**2 + 4 * B / (3 * e)) * L
        return min(N, max(1, math.ceil(min(hoeffding, bernstein))))

    def draw(self, seed: int, epoch: int) -> np.ndarray:
        """Global row numbers of an epoch (from 0), sorted; the same on every rank."""
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
        return np.sort(generator.choice(self.tuples, self.size, replace=False))
