"""What takes the bias off without touching the model: calibrated scores, and one question in several orders."""

import math
from typing import NamedTuple

import numpy as np

from hf_ext.mcq_bias.answers import NAN, NEARLY, Answers, at, maxima


def calibrated_mass(answers: Answers) -> np.ndarray | None:
    """(n, K): within each stratum of equal k the mean log-softmax score of each letter is subtracted; no gold is used.

    The log-space form, over all rows at hand: the published Batch Calibration divides by the mean probability.

    The mean is over finite entries of valid rows; -inf stays. A stratum with fewer than two valid rows keeps its raw
    answers. None with answers, which have no scores.
    """
    if answers.log_softmax is None or not len(answers):
        return None
    mass = answers.mass.copy()
    for k, rows in answers.strata.items():
        valid = answers.valid[rows]
        if np.count_nonzero(valid) < 2:
            continue
        log_softmax = answers.log_softmax[rows, :k]
        finite = np.isfinite(log_softmax) & valid[:, None]
        sums = np.where(finite, log_softmax, 0.0).sum(axis=0)
        shifted = np.where(valid[:, None], log_softmax - sums / np.maximum(finite.sum(axis=0), 1), -np.inf)
        mass[rows, :k] = maxima(shifted, NEARLY)[0]
    return mass


def permutation_consistency(answers: Answers) -> tuple[int, float]:
    """(groups of two rows and more, mean over them of how often two of their rows choose the same option)."""
    if answers.group is None:
        return 0, NAN
    rows = _rows_in_company(answers)
    if not len(rows):
        return 0, NAN
    numbers, group, sizes = np.unique(answers.group[rows], return_inverse=True, return_counts=True)
    mass, option = answers.mass[rows], np.maximum(answers.option[rows], 0)  # beyond k there is no mass
    place = (group[:, None] * answers.letters + option).ravel()
    total, own = (
        np.bincount(place, values.ravel(), len(numbers) * answers.letters).reshape(len(numbers), -1)
        for values in (mass, mass**2)
    )
    # The products of all ordered pairs of rows, each row with itself included, less those with itself.
    agreement = (total**2 - own).sum(axis=1) / (sizes * (sizes - 1))
    return len(numbers), float(agreement.mean())


class CompleteGroups(NamedTuple):
    """G groups of equal k in which every position shows all options: rows (G, k)."""

    k: int
    rows: np.ndarray


def complete_groups(answers: Answers) -> list[CompleteGroups]:
    """Groups of exactly k rows, valid and with finite scores, in which every position shows k different options."""
    if answers.group is None or answers.scores is None:
        return []
    found = []
    for k in answers.strata:
        rows = np.flatnonzero((answers.group >= 0) & (answers.k == k))
        rows = rows[np.argsort(answers.group[rows], kind="stable")]
        _, first, sizes = np.unique(answers.group[rows], return_index=True, return_counts=True)
        members = rows[first[sizes == k][:, None] + np.arange(k)]
        finite = np.isfinite(answers.scores[members, :k]).all(axis=(1, 2))
        shown = np.sort(answers.option[members, :k], axis=1) == np.arange(k)[:, None]
        members = members[finite & shown.all(axis=(1, 2))]
        if len(members):
            found.append(CompleteGroups(k, members))
    return found


def cyclic_accuracy(answers: Answers, groups: list[CompleteGroups]) -> float:
    """Share of complete groups whose gold option has the largest probability in the mean over their rows."""
    hits = []
    for k, rows in groups:
        option, by_option = answers.option[rows, :k], np.empty((*rows.shape, k))
        np.put_along_axis(by_option, option, np.exp(answers.log_softmax[rows, :k]), axis=2)
        gold_option = at(option[:, 0], answers.gold[rows[:, 0]])
        hits.append(at(maxima(by_option.mean(axis=1), NEARLY)[0], gold_option))
    return float(np.concatenate(hits).mean()) if hits else NAN


def pride(answers: Answers, groups: list[CompleteGroups]) -> tuple[int, float]:
    """(rows, accuracy) once the prior over positions is divided out, over all rows whose k has a complete group.

    PriDe (Zheng et al., ICLR 2024) estimates the prior on a few per cent of the questions; here it is the mean of the
    priors of all complete groups. No labels are used.
    """
    count, hits = 0, 0.0
    for k, members in groups:
        means = answers.log_softmax[members, :k].mean(axis=1)
        priors = means - np.logaddexp.reduce(means, axis=1, keepdims=True)
        log_prior = np.logaddexp.reduce(priors, axis=0) - math.log(len(priors))
        rows = answers.strata[k]
        debiased = np.where(answers.valid[rows][:, None], answers.log_softmax[rows, :k] - log_prior, -np.inf)
        count += len(debiased)
        hits += float(at(maxima(debiased, NEARLY)[0], answers.gold[rows]).sum())
    return count, hits / count if count else NAN


def _rows_in_company(answers: Answers) -> np.ndarray:
    sizes = np.bincount(answers.group[answers.group >= 0])
    return np.flatnonzero((answers.group >= 0) & (sizes[answers.group] >= 2)) if len(sizes) else np.empty(0, np.int64)
