"""Positional bias of multiple-choice answers, row by row: the specification of the metric `anchored_mcq_bias`.

Row i has k choices, the gold index r, and the mass w that the answer puts on each choice: 1/t on each of t equal
maxima of its scores, 1 on an answer, nothing where there is none (invalid). c = w[r]; a is the anchor's index. NaN
stands for what is undefined. The anchor of arXiv 2405.03205 is "A"; its frequency is `anchored_bias_rate`.
"""

import math
from statistics import NormalDist, fmean, pstdev
from typing import NamedTuple

import numpy as np

NAN = math.nan


class Row(NamedTuple):
    """One question: the scores of its choices, or the index of the answer (-1: none)."""

    k: int
    r: int
    scores: list[float] | None = None
    answer: int = -1
    group: str = ""
    permutation: list[int] | None = None  # the option behind each position

    @property
    def valid(self) -> bool:
        if self.scores is None:
            return 0 <= self.answer < self.k
        return not any(math.isnan(x) for x in self.scores) and math.isfinite(max(self.scores))

    @property
    def w(self) -> list[float]:
        if not self.valid:
            return [0.0] * self.k
        return split(self.scores) if self.scores else [float(j == self.answer) for j in range(self.k)]

    @property
    def c(self) -> float:
        return self.w[self.r]

    def log_softmax(self) -> list[float]:
        top = max(self.scores)
        total = math.log(sum(math.exp(x - top) for x in self.scores))
        return [x - top - total for x in self.scores]

    def option(self, p: int) -> int:
        return self.permutation[p] if self.permutation else (p - self.r) % self.k


def split(scores: list[float], tolerance: float = 0.0) -> list[float]:
    """The mass: shared evenly by all maxima."""
    top = [x >= max(scores) - tolerance for x in scores]
    return [is_top / sum(top) for is_top in top]


def wilson(hits: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of hits / n."""
    if n == 0:
        return NAN, NAN
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def anchored_errors(rows: list[Row], a: int) -> tuple[float, float, float]:
    """Share of the wrong answers that are the anchor; the same if errors spread evenly; z of their difference."""
    hits = errors = expected = variance = 0.0
    for row in rows:
        if a < row.k and row.r != a:
            e, p = row.valid - row.c, 1 / (row.k - 1)
            hits, errors, expected, variance = hits + row.w[a], errors + e, expected + e * p, variance + e * p * (1 - p)
    z = (hits - expected) / math.sqrt(variance) if variance >= 1e-12 else NAN
    return (hits / errors, expected / errors, z) if errors else (NAN, NAN, z)


def strata(rows: list[Row]) -> list[list[Row]]:
    """Rows of equal k."""
    return [[row for row in rows if row.k == k] for k in sorted({row.k for row in rows})]


def cochran_mantel_haenszel(rows: list[Row], a: int) -> tuple[float, float, float]:
    """Is the recall of the anchor another one? (z, statistic, p) over strata of equal k, with permutation variance."""
    num = var = 0.0
    for stratum in strata([row for row in rows if a < row.k]):
        n, r1, m = len(stratum), sum(row.r == a for row in stratum), fmean(row.c for row in stratum)
        if n >= 2:
            num += sum((row.r == a) * row.c for row in stratum) - r1 * m
            var += r1 * (n - r1) / (n * (n - 1)) * sum((row.c - m) ** 2 for row in stratum)
    if var < 1e-12:
        return NAN, NAN, NAN
    z = num / math.sqrt(var)
    return z, z * z, math.erfc(abs(z) / math.sqrt(2))


def recalls(rows: list[Row]) -> dict[int, float]:
    """Mean c of the rows of each gold letter that has rows."""
    return {j: fmean(row.c for row in rows if row.r == j) for j in sorted({row.r for row in rows})}


def recall_std(rows: list[Row]) -> float:
    """How unevenly the letters are recalled (RStd of PriDe): population std; NaN with fewer than two letters."""
    return pstdev(recalls(rows).values()) if len(recalls(rows)) >= 2 else NAN


def bootstrap(rows: list[Row], confidence: float, n_resamples: int, seed: int) -> tuple[float, float]:
    """Percentile interval of recall_std; whole groups are drawn, a row without one being its own."""
    units = [[row] for row in rows if not row.group]
    units += [[row for row in rows if row.group == g] for g in sorted({row.group for row in rows} - {""})]
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(n_resamples):
        picked = draw.integers(0, len(units), len(units))
        found.append(recall_std([row for unit in picked for row in units[unit]]))
    found = [x for x in found if not math.isnan(x)]
    return tuple(np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2]).tolist()) if found else (NAN, NAN)


def recall_std_null(rows: list[Row]) -> float:
    """Root mean square of recall_std when c is shuffled within each stratum."""
    letters = sorted({row.r for row in rows})
    if len(letters) < 2:
        return NAN
    size = {j: sum(row.r == j for row in rows) for j in letters}
    mean, cov = dict.fromkeys(letters, 0.0), {(i, j): 0.0 for i in letters for j in letters}
    for stratum in strata(rows):
        n, m = len(stratum), fmean(row.c for row in stratum)
        v = sum((row.c - m) ** 2 for row in stratum) / (n - 1) if n > 1 else 0.0
        of = {j: sum(row.r == j for row in stratum) for j in letters}
        for i in letters:
            mean[i] += of[i] * m / size[i]
            for j in letters:
                cov[i, j] += v * (of[i] * (i == j) - of[i] * of[j] / n) / (size[i] * size[j])
    squares = sum(cov[j, j] + mean[j] ** 2 for j in letters) / len(letters)
    return math.sqrt(max(0.0, squares - sum(cov.values()) / len(letters) ** 2 - fmean(mean.values()) ** 2))


def calibrated(rows: list[Row]) -> list[list[float]]:
    """Masses after the mean log-softmax of each letter, over the rows of equal k, is subtracted. Uses no gold."""
    masses = [row.w for row in rows]
    for k in {row.k for row in rows}:
        logs = {i: row.log_softmax() for i, row in enumerate(rows) if row.k == k and row.valid}
        if len(logs) >= 2:
            finite = [[x[j] for x in logs.values() if math.isfinite(x[j])] for j in range(k)]
            means = [fmean(column) if column else 0.0 for column in finite]
            for i, x in logs.items():
                masses[i] = split([x[j] - means[j] for j in range(k)], 1e-9)
    return masses


def by_group(rows: list[Row]) -> list[list[Row]]:
    """The same question in several orders: groups of two rows and more."""
    groups = [[row for row in rows if row.group == g] for g in sorted({row.group for row in rows} - {""})]
    return [group for group in groups if len(group) >= 2]


def consistency(group: list[Row]) -> float:
    """How often two rows of a group choose the same option: mean over its pairs."""
    chosen = [{row.option(p): row.w[p] for p in range(row.k)} for row in group]
    pairs = [(x, y) for i, x in enumerate(chosen) for y in chosen[:i]]
    return fmean(sum(x[o] * y[o] for o in x) for x, y in pairs)


def is_complete(group: list[Row]) -> bool:
    """k rows with finite scores in which every position shows k different options."""
    k = group[0].k
    finite = all(row.scores and all(map(math.isfinite, row.scores)) for row in group)
    return len(group) == k and finite and all(len({row.option(p) for row in group}) == k for p in range(k))


def cyclic_accuracy(groups: list[list[Row]]) -> float:
    """Share of complete groups in which the option with the largest mean probability is the gold one."""
    hits = []
    for group in groups:
        k, mean = group[0].k, [0.0] * group[0].k
        for row in group:
            for p, x in enumerate(row.log_softmax()):
                mean[row.option(p)] += math.exp(x) / k
        hits.append(split(mean, 1e-9)[group[0].option(group[0].r)])
    return fmean(hits) if hits else NAN


def pride(rows: list[Row], groups: list[list[Row]]) -> tuple[int, float]:
    """(rows, accuracy) once the prior over positions of complete groups is divided out (PriDe, ICLR 2024)."""
    hits = []
    for k in {group[0].k for group in groups}:
        priors = []
        for group in (group for group in groups if group[0].k == k):
            mean = np.mean([row.log_softmax() for row in group], axis=0)
            priors.append(mean - np.logaddexp.reduce(mean))
        prior = np.logaddexp.reduce(priors, axis=0) - math.log(len(priors))
        for row in (row for row in rows if row.k == k):
            hits.append(split((row.log_softmax() - prior).tolist(), 1e-9)[row.r] if row.valid else 0.0)
    return len(hits), fmean(hits) if hits else NAN
