"""Intervals and tests of the metric: Wilson, Cochran-Mantel-Haenszel, and what recall_std is by chance."""

import math
from statistics import NormalDist

import numpy as np

from hf_ext.mcq_bias.answers import NAN, Answers

_AT_ONCE = 1 << 22  # counts of the bootstrap that are held at a time


def wilson(hits: float, n: int, confidence: float) -> tuple[float, float]:
    """Wilson's score interval of the share hits / n, clipped to [0, 1]; hits may be fractional."""
    if n == 0:
        return NAN, NAN
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), hits / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(max(0.0, p * (1 - p)) / n + z * z / (4 * n * n))
    # At the ends exactly, which rounding misses.
    low = (middle - half) / (1 + z * z / n) if hits > 0 else 0.0
    high = (middle + half) / (1 + z * z / n) if hits < n else 1.0
    return max(0.0, low), min(1.0, high)


def cochran_mantel_haenszel(answers: Answers, anchor: int) -> tuple[float, float, float]:
    """(z, z^2, two-sided p): is the recall of the anchor that of the other letters, within strata of equal k?

    Positive z: it is higher. Permutation variance, no continuity correction. It holds its level for any gold
    distribution, unlike chi-square against the gold prior or McNemar.
    """
    numerator = variance = 0.0
    for k, rows in answers.strata.items():
        correct = answers.correct[rows]
        n = len(correct)
        if anchor >= k or n < 2:
            continue
        is_anchor = answers.gold[rows] == anchor
        r1, off = int(np.count_nonzero(is_anchor)), correct - correct.mean()
        numerator += off[is_anchor].sum()
        variance += r1 * (n - r1) / (n * (n - 1)) * (off @ off)
    if variance < 1e-12:
        return NAN, NAN, NAN
    z = float(numerator / math.sqrt(variance))
    return z, z * z, math.erfc(abs(z) / math.sqrt(2))


def recalls(answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """(recall (K,), gold rows (K,)); NaN without rows."""
    count = np.bincount(answers.gold, minlength=answers.letters)
    hits = np.bincount(answers.gold, weights=answers.correct, minlength=answers.letters)
    return np.divide(hits, count, out=np.full(len(count), NAN), where=count > 0), count


def recall_std(recall: np.ndarray) -> np.ndarray:
    """(...): population standard deviation over the letters that have gold rows, NaN for fewer than two. (..., K)."""
    known = np.isfinite(recall)
    letters = np.maximum(known.sum(axis=-1), 1)
    mean = np.where(known, recall, 0.0).sum(axis=-1) / letters
    squares = np.where(known, (recall - mean[..., None]) ** 2, 0.0).sum(axis=-1) / letters
    return np.where(known.sum(axis=-1) >= 2, np.sqrt(squares), NAN)


def bootstrap_recall_std(answers: Answers, confidence: float, n_resamples: int, seed: int) -> tuple[float, float]:
    """Percentile interval of recall_std, rows drawn with replacement; with groups, whole groups.

    Only how often each kind of row (gold and c) was drawn matters, which is multinomial: no row is ever looked up. It
    depends on the rows and the seed, not on the order of rows. Resamples in which one letter alone has gold rows say
    nothing and are left out.
    """
    if n_resamples == 0 or len(answers) == 0:
        return NAN, NAN
    kinds, times = _kinds(answers)
    units, half = int(times.sum()), len(kinds[0]) // 2
    draw = np.random.default_rng(seed)
    found = []
    for first in range(0, n_resamples, step := max(1, _AT_ONCE // len(kinds))):
        size = min(step, n_resamples - first)
        drawn = draw.multinomial(units, times / units, size) @ kinds
        count, hits = drawn[:, :half], drawn[:, half:]
        found.append(recall_std(np.divide(hits, count, out=np.full(count.shape, NAN), where=count > 0)))
    spread = np.concatenate(found)
    spread = spread[np.isfinite(spread)]
    if not len(spread):
        return NAN, NAN
    low, high = np.quantile(spread, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _kinds(answers: Answers) -> tuple[np.ndarray, np.ndarray]:
    """(kinds (P, 2K): gold rows and sum of c by letter; how many units are of each kind)."""
    gold, correct, letters = answers.gold, answers.correct, answers.letters
    alone = np.ones(len(answers), bool) if answers.group is None else answers.group < 0
    levels, level = np.unique(correct[alone], return_inverse=True)
    cells = np.bincount(gold[alone] * len(levels) + level, minlength=letters * len(levels)).reshape(letters, -1)
    letter, at_level = np.nonzero(cells)
    kinds, place = np.zeros((len(letter), 2 * letters)), np.arange(len(letter))
    kinds[place, letter], kinds[place, letters + letter] = 1.0, levels[at_level]
    times = cells[letter, at_level]
    if answers.group is None:
        return kinds, times
    group, gold, correct = answers.group[~alone], gold[~alone], correct[~alone]
    place, size = group * letters + gold, (group.max(initial=-1) + 1) * letters
    parts = [np.bincount(place, weights, size).reshape(-1, letters) for weights in (None, correct)]
    # Rounded, since the same thirds and halves add up to different last bits in another order.
    of_groups, group_times = np.unique(np.round(np.hstack(parts), 12), axis=0, return_counts=True)
    return np.concatenate([kinds, of_groups]), np.concatenate([times, group_times])


def recall_std_null(answers: Answers) -> float:
    """Root mean square of recall_std if c is shuffled within each stratum of equal k: what no bias looks like."""
    total = np.bincount(answers.gold, minlength=answers.letters)
    support = np.flatnonzero(total)
    letters = len(support)
    if letters < 2:
        return NAN
    total = total[support]
    mean, covariance = np.zeros(letters), np.zeros((letters, letters))
    for rows in answers.strata.values():
        correct = answers.correct[rows]
        n = len(correct)
        count = np.bincount(answers.gold[rows], minlength=answers.letters)[support]
        mean += count * correct.mean() / total
        if n > 1:
            covariance += correct.var(ddof=1) * (np.diag(count) - np.outer(count, count) / n) / np.outer(total, total)
    square = (np.diag(covariance) + mean**2).mean() - covariance.mean() - mean.mean() ** 2
    return math.sqrt(max(0.0, float(square)))
