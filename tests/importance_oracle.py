"""Data importance once more, slowly: over every subset and every order, in rationals and decimals, and its training."""

import hashlib
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from itertools import permutations, product
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

# ---------------------------------------------------------------- exact, for short lists


def utility_of(inside: Sequence[bool], utilities: Sequence[Any], k: int, groups: Sequence[int]) -> Fraction:
    """U(S): the first k items whose group is in, divided by k also when they are fewer."""
    taken = [Fraction(u) for u, group in zip(utilities, groups, strict=True) if inside[group]]
    return sum(taken[:k], Fraction(0)) / k


def by_subsets(
    utilities: Sequence[Any], probabilities: Sequence[Any], k: int, groups: Sequence[int] | None = None
) -> tuple[Fraction, list[Fraction]]:
    """(F, gradient) over every subset of the players: the items, or the groups that they belong to."""
    groups = range(len(utilities)) if groups is None else groups
    p = [Fraction(x) for x in probabilities]
    value, gradient = Fraction(0), [Fraction(0)] * len(p)
    for inside in product([False, True], repeat=len(p)):
        gain = utility_of(inside, utilities, k, groups)
        chances = [x if here else 1 - x for x, here in zip(p, inside, strict=True)]
        value += prod(chances) * gain
        for i, here in enumerate(inside):
            gradient[i] += prod(chances[:i] + chances[i + 1 :]) * (gain if here else -gain)
    return value, gradient


def by_orders(utilities: Sequence[Any], k: int, groups: Sequence[int] | None = None) -> list[Fraction]:
    """Shapley values: what a player adds to those before it, over every order of the players."""
    groups = range(len(utilities)) if groups is None else groups
    players = max(groups, default=-1) + 1
    games = {inside: utility_of(inside, utilities, k, groups) for inside in product([False, True], repeat=players)}
    total, orders = [Fraction(0)] * players, list(permutations(range(players)))
    for order in orders:
        inside = [False] * players
        for player in order:
            before = games[tuple(inside)]
            inside[player] = True
            total[player] += games[tuple(inside)] - before
    return [x / len(orders) for x in total]


# ---------------------------------------------------------------- 60 digits, for long lists


def by_decimals(utilities: Any, probabilities: Any, k: int) -> tuple[Decimal, list[Decimal]]:
    """(F, gradient) by a pass from the front and one from the back, which carry 60 digits."""
    with localcontext() as context:
        context.prec = 60
        u, p = ([Decimal(float(x)) for x in values] for values in (utilities, probabilities))
        fronts, row = [], [Decimal(1)] + [Decimal(0)] * (k - 1)
        for x in p:
            fronts.append(row)
            row = [here + x * (below - here) for here, below in zip(row, [Decimal(0), *row], strict=False)]
        later, gradient = [Decimal(0)] * (k + 1), []
        for i in reversed(range(len(u))):
            gains = [u[i] / k + later[j + 1] - later[j] for j in range(k)]
            gradient.append(sum((f * gain for f, gain in zip(fronts[i], gains, strict=True)), Decimal(0)))
            later = [later[j] + p[i] * gains[j] for j in range(k)] + [Decimal(0)]
        return later[0], gradient[::-1]


# ---------------------------------------------------------------- numpy, for many lists


def expected(utilities: np.ndarray, probabilities: np.ndarray, k: int) -> np.ndarray:
    """E U (...): item i counts if fewer than k of those before it are in. utilities, probabilities: (..., items)"""
    row, total = np.zeros((*np.shape(probabilities)[:-1], k)), 0.0
    row[..., 0] = 1
    for i in range(np.shape(probabilities)[-1]):
        p = probabilities[..., i]
        total = total + utilities[..., i] * p * row.sum(-1) / k
        moved = np.concatenate([np.zeros_like(row[..., :1]), row[..., :-1]], -1)
        row = row * (1 - p[..., None]) + moved * p[..., None]
    return total + np.zeros(np.shape(probabilities)[:-1])


def slots(utilities: np.ndarray, probabilities: np.ndarray, k: int) -> np.ndarray:
    """g (..., items): F with the item in for certain, less F with it out for certain."""
    width = np.shape(probabilities)[-1]
    here = np.eye(width, dtype=bool)
    u, p = utilities[..., None, :], probabilities[..., None, :]
    return expected(u, np.where(here, 1.0, p), k) - expected(u, np.where(here, 0.0, p), k)


def subset_game(utilities: Sequence[float], groups: Sequence[int], k: int) -> Callable[[np.ndarray], Any]:
    """Groups 0..G-1 as players: a function from their probabilities (G,) to (F, gradient (G,)), over all subsets."""
    masks = np.array(list(product([0, 1], repeat=max(groups, default=-1) + 1)), dtype=bool)
    inside = masks[:, list(groups)]
    gains = (inside & (inside.cumsum(1) <= k)) @ np.asarray(utilities, float) / k

    def mean(p: np.ndarray) -> float:
        return float(np.where(masks, p, 1 - p).prod(1) @ gains)

    def game(p: np.ndarray) -> tuple[float, np.ndarray]:
        ends = [[mean(np.where(np.arange(len(p)) == i, x, p)) for x in (1.0, 0.0)] for i in range(len(p))]
        return mean(p), np.array([one - none for one, none in ends])

    return game


# ---------------------------------------------------------------- training


def layout(retrieved: list[list[Any]], utility: list[list[float]], group_of: dict[Any, Any] | None) -> SimpleNamespace:
    """Ids as numbers, lists side by side; what is beyond the end of a list counts for nothing."""
    items = sorted({i for row in retrieved for i in row})
    keys = sorted({group_of[i] for i in items}) if group_of else items
    owner = np.array([keys.index(group_of[i]) for i in items]) if group_of else np.arange(len(items))
    number = {item: i for i, item in enumerate(items)}
    slot = np.full((len(retrieved), max(map(len, retrieved))), len(items))
    u = np.zeros(slot.shape)
    for t, (ids, values) in enumerate(zip(retrieved, utility, strict=True)):
        slot[t, : len(ids)], u[t, : len(ids)] = [number[i] for i in ids], values
    size = int((slot < len(items)).sum())
    spread = max(0.0, float(u.max())) - min(0.0, float(u.min()))
    return SimpleNamespace(items=items, keys=keys, owner=owner, slot=slot, u=u, slots=size, range=spread)


def train(
    retrieved: list[list[Any]],
    utility: list[list[float]],
    k: int,
    epochs: int,
    learning_rate: Any = "auto",
    group_of: dict[Any, Any] | None = None,
    group_update: str = "mean",
    draw: Callable[[int], Any] | None = None,
) -> SimpleNamespace:
    """Full-batch ascent from 0.5, clipped to [0, 1]; `draw(epoch)`: the rows of that epoch, all without it."""
    data = layout(retrieved, utility, group_of)
    n, owner = len(retrieved), data.owner
    stepped = len(data.items) if group_update == "mean" else len(data.keys)
    if learning_rate == "auto":
        learning_rate = 0.5 * n * stepped / data.slots * k / data.range
    whose = np.append(owner, len(data.keys))[data.slot]  # (rows, longest), by key
    lists = [row[row < len(data.keys)] for row in whose]
    players = [np.unique(row, return_inverse=True) for row in lists]
    games = zip(data.u, players, strict=True) if group_update == "exact" else ()
    exact = [subset_game(u[: len(who)], who, k) for u, (_, who) in games]

    def gradient(w: np.ndarray, rows: np.ndarray) -> tuple[float, np.ndarray]:
        if group_update == "exact":
            value, total = 0.0, np.zeros(len(w))
            for t in rows:
                part, gradients = exact[t](w[players[t][0]])
                value += part
                total[players[t][0]] += gradients
            return value / len(rows), total / len(rows)
        p = np.append(w, 0.0)[whose[rows]]
        into = data.slot if group_update == "mean" else whose
        g = slots(data.u[rows], p, k)
        total = np.bincount(into[rows].ravel(), g.ravel(), stepped + 1)[:stepped]
        return expected(data.u[rows], p, k).sum() / len(rows), total / len(rows)

    w, history, everything = np.full(len(data.keys), 0.5), [], np.arange(n)
    for epoch in range(epochs):
        rows = everything if draw is None else draw(epoch)
        value, g = gradient(w, rows)
        history.append({"value": value, "gradient_max": np.abs(g).max()})
        if group_update == "mean":
            w = np.bincount(owner, np.clip(w[owner] + learning_rate * g, 0, 1)) / np.bincount(owner)
        else:
            w = np.clip(w + learning_rate * g, 0, 1)
    return SimpleNamespace(
        keys=data.keys,
        weights=w,
        learning_rate=learning_rate,
        history=history,
        value=gradient(w, everything)[0],
        gradient=lambda at: gradient(at, everything)[1],
    )


def values(
    retrieved: list[list[Any]], utility: list[list[float]], k: int, method: str, group_of: dict[Any, Any] | None = None
) -> tuple[list[Any], np.ndarray]:
    """(keys, values) of the methods without epochs, from the games of every tuple; duplicates add unless grouped."""
    data = layout(retrieved, utility, group_of)
    total = np.zeros(len(data.keys))
    for row, u in zip(data.slot, data.u, strict=True):
        row = row[row < len(data.items)]
        keys, who = np.unique(data.owner[row], return_inverse=True)
        if not group_of:  # every slot is a player, also two that hold the same item
            keys, who = row, np.arange(len(row))
        if method == "shapley":
            part = [float(x) for x in by_orders(u[: len(row)].tolist(), k, who.tolist())]
        else:
            part = subset_game(u[: len(row)], who, k)(np.full(len(keys), {"banzhaf": 0.5, "loo": 1.0}[method]))[1]
        np.add.at(total, keys, part)
    return data.keys, total / len(retrieved)


# ---------------------------------------------------------------- validation sets


def some_rows(
    rows: int = 40,
    items: int = 15,
    longest: int = 9,
    seed: int = 0,
    binary: bool = False,
    distinct: bool = False,
    strings: bool = False,
) -> dict[str, list[Any]]:
    """{"retrieved", "utility"}: lists of every length from none, some of which hold an item twice."""
    generator = np.random.default_rng(seed)
    retrieved, utility = [], []
    for t in range(rows):
        length = 0 if t == 3 else int(generator.integers(1, min(longest, items if distinct else longest) + 1))
        ids = generator.permutation(items)[:length] if distinct else generator.integers(0, items, length)
        values = generator.integers(0, 2, length) if binary else generator.normal(0.3, 1, length)
        # 10 sorts before 2 as a string; far ids and negative ones are as good as dense ones.
        retrieved.append([f"doc{i}" if strings else 1000 * int(i) - 3000 for i in ids])
        utility.append([float(x) for x in values])
    return {"retrieved": retrieved, "utility": utility}


def sources(rows: dict[str, list[Any]], count: int = 4, strings: bool = True) -> dict[Any, Any]:
    """A source of its own size for every item of `rows`."""
    items = sorted({i for row in rows["retrieved"] for i in row})
    chosen = np.random.default_rng(5).integers(0, count, len(items)) ** 2
    return {item: f"source{g}" if strings else int(g) for item, g in zip(items, chosen, strict=True)}


def grouped(rows: dict[str, list[Any]], group_of: dict[Any, Any]) -> dict[str, list[Any]]:
    return rows | {"source": [[group_of[i] for i in row] for row in rows["retrieved"]]}


def fingerprint(fitted: Any) -> dict[str, Any]:
    """What two equal fits agree on to the last bit."""
    weights = np.asarray(fitted.weights)
    assert weights.dtype == np.float64
    return {
        "weights": hashlib.sha256(weights.tobytes()).hexdigest(),
        "keys": fitted.keys.to_pylist(),
        "counts": np.asarray(fitted.counts).tolist(),
        "value": float(fitted.value).hex(),
        "history": [{name: float(x).hex() for name, x in entry.items()} for entry in fitted.history],
    }
