"""Answers after the mean score of each letter is taken off: what a user gains without touching the model.

This is the log-space form, over all rows at hand. The published Batch Calibration divides by the mean probability.
"""

import numpy as np

from hf_ext.mcq_bias.answers import NEARLY, Answers, maxima


def calibrated_mass(answers: Answers) -> np.ndarray | None:
    """(n, K): within each stratum of equal k the mean log-softmax score of each letter is subtracted; no gold is used.

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
