"""The metric as a pure function: how often, how surely and with what cost a model answers by position."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from hf_ext.mcq_bias.answers import NAN, Answers, at, gather
from hf_ext.mcq_bias.columns import common_num_choices, read_columns
from hf_ext.mcq_bias.config import BiasOptions
from hf_ext.mcq_bias.groups import calibrated_mass, complete_groups, cyclic_accuracy, permutation_consistency, pride
from hf_ext.mcq_bias.intervals import (
    bootstrap_recall_std,
    cochran_mantel_haenszel,
    recall_std,
    recall_std_null,
    recalls,
    wilson,
)
from hf_ext.mcq_bias.letters import LETTERS

Named = Iterator[tuple[str, int | float]]


def bias_metrics(
    predictions: Any,
    references: Any,
    num_choices: Any = None,
    group: Any = None,
    permutation: Any = None,
    anchor: str | int = "A",
    confidence: float = 0.95,
    n_resamples: int = 10_000,
    seed: int = 0,
) -> dict[str, int | float]:
    """Everything that `evaluate.load("anchored_mcq_bias")` computes (arXiv 2405.03205, and tests of our own).

    Args:
        predictions: n rows of scores, one real number a choice (lists, arrays or tensors, of any float type), or n
            answers: indices, -1 for none, or letters such as "B", "(b)", "B."; other text is an invalid answer. A row
            of scores that holds NaN or +inf, or -inf alone, is one as well.
        references: n indices or letters of the right choice.
        num_choices: one integer, or one a row, 2 to 26. Default: the length of a row of scores; with answers, the
            least that all indices fit in. A longer row of scores is filled up with -inf.
        group: n labels; rows of one label are the same question with its choices reordered. None or "": no group.
        permutation: n lists, the option behind each position of rows in a group; only with `group`. Default:
            (position - gold) mod k, which is right for cyclic rotations, and for nothing else.
        anchor: the letter, or its index 0 to 25, that the model is suspected of.
        confidence: level of all intervals.
        n_resamples: of the bootstrap interval of recall_std; 0: none.
        seed: of the bootstrap.

    The intervals of accuracy and anchored_bias_rate, anchored_error_z and cmh_z take rows as independent, also where
    `group` says that they are one question; the bootstrap of recall_std draws whole groups.

    Returns:
        A flat dict of int and float, the same keys in the same order for the same largest number of choices. NaN where
        something is not defined.

    Raises:
        ValueError: naming the row or the option, its value, and what is allowed.
    """
    options = BiasOptions(anchor, confidence, n_resamples, seed)
    columns = read_columns(predictions, references, num_choices, group, permutation)
    return measure(gather(columns, common_num_choices(num_choices) or 0), options)


def measure(answers: Answers, options: BiasOptions) -> dict[str, int | float]:
    """All outputs, in their order, as plain int and float."""
    named = {}
    for part in (_counts, _accuracy, _anchored_errors, _chance, _shares, _recalls, _calibrated, _groups):
        named.update(part(answers, options))
    return {name: int(x) if isinstance(x, int | np.integer) else float(x) for name, x in named.items()}


def _eligible(answers: Answers, anchor: int) -> np.ndarray:
    """(n,): rows in which the anchor is a choice, and a wrong one."""
    return (answers.k > anchor) & (answers.gold != anchor)


def _on_anchor(mass: np.ndarray, anchor: int) -> np.ndarray:
    return mass[:, anchor] if anchor < mass.shape[1] else np.zeros(len(mass))


def _counts(answers: Answers, options: BiasOptions) -> Named:
    yield "n", len(answers)
    yield "n_invalid", np.count_nonzero(~answers.valid)
    yield "n_ties", np.count_nonzero(answers.ties > 1)
    yield "n_choices_inferred", answers.inferred
    yield "n_anchor_eligible", np.count_nonzero(_eligible(answers, options.anchor))


def _accuracy(answers: Answers, options: BiasOptions) -> Named:
    yield from _share("accuracy", answers.correct.sum(), len(answers), options)


def _share(name: str, hits: float, n: int, options: BiasOptions) -> Named:
    low, high = wilson(float(hits), n, options.confidence)
    yield from ((name, hits / n if n else NAN), (f"{name}_low", low), (f"{name}_high", high))


def _anchored_errors(answers: Answers, options: BiasOptions) -> Named:
    eligible = _eligible(answers, options.anchor)
    hits = float(_on_anchor(answers.mass, options.anchor)[eligible].sum())
    yield from _share("anchored_bias_rate", hits, int(np.count_nonzero(eligible)), options)

    errors = np.where(eligible, answers.valid - answers.correct, 0.0)
    total, chance = float(errors.sum()), 1 / (answers.k - 1)
    expected, variance = float(errors @ chance), float(errors @ (chance * (1 - chance)))
    yield "anchored_error_share", hits / total if total else NAN
    yield "anchored_error_share_expected", expected / total if total else NAN
    yield "anchored_error_z", (hits - expected) / math.sqrt(variance) if variance >= 1e-12 else NAN


def _chance(answers: Answers, options: BiasOptions) -> Named:
    results = cochran_mantel_haenszel(answers, options.anchor)
    yield from zip(("cmh_z", "cmh_statistic", "cmh_p_value"), results, strict=True)


def _shares(answers: Answers, options: BiasOptions) -> Named:
    n, k = np.count_nonzero(answers.valid), answers.letters
    chosen = answers.mass.sum(axis=0)
    gold = np.bincount(answers.gold[answers.valid], minlength=k)
    recall, _ = recalls(answers)
    for letter, x, y, z in zip(LETTERS, chosen, gold, recall, strict=False):
        yield from ((f"choice_share_{letter}", x / n if n else NAN), (f"gold_share_{letter}", y / n if n else NAN))
        yield f"recall_{letter}", z
    yield "tvd", 0.5 * np.abs(chosen - gold).sum() / n if n else NAN
    # With half a row on each letter, so that a letter nobody chose leaves the divergence finite.
    p, q = chosen + 0.5, gold + 0.5
    yield "kl", (p * np.log(p / q)).sum() / (n + k / 2) if n else NAN


def _recalls(answers: Answers, options: BiasOptions) -> Named:
    low, high = bootstrap_recall_std(answers, options.confidence, options.n_resamples, options.seed)
    yield "recall_std", recall_std(recalls(answers)[0])
    yield from (("recall_std_low", low), ("recall_std_high", high), ("recall_std_null", recall_std_null(answers)))


def _calibrated(answers: Answers, options: BiasOptions) -> Named:
    mass = calibrated_mass(answers)
    accuracy = rate = NAN
    if mass is not None:
        eligible = _eligible(answers, options.anchor)
        accuracy = at(mass, answers.gold).mean()
        rate = _on_anchor(mass, options.anchor)[eligible].mean() if eligible.any() else NAN
    yield from (("calibrated_accuracy", accuracy), ("calibrated_anchored_bias_rate", rate))


def _groups(answers: Answers, options: BiasOptions) -> Named:
    count, consistency = permutation_consistency(answers)
    yield from (("n_groups", count), ("permutation_consistency", consistency), ("flip_rate", 1 - consistency))
    groups = complete_groups(answers)
    n_pride, accuracy = pride(answers, groups)
    yield "n_complete_groups", sum(len(rows) for _, rows in groups)
    yield "cyclic_accuracy", cyclic_accuracy(answers, groups)
    yield from (("n_pride", n_pride), ("pride_accuracy", accuracy))
