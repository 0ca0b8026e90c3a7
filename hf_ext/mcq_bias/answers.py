"""All rows of a result together: where the mass of each answer lies, and what rows of one group share."""

import math
import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hf_ext.mcq_bias.columns import UNKNOWN, Columns, refuse_permutation, sizes_of
from hf_ext.mcq_bias.letters import FEWEST, MOST

NAN = math.nan  # what is not defined
EXACTLY, NEARLY = 0.0, 1e-9  # how far from the maximum a tie may be: of given scores, of derived ones


@dataclass(frozen=True, eq=False)
class Answers:
    """n rows of up to K choices.

    k, gold: (n,) number of choices and index of the right one.
    valid: (n,) whether there is an answer.
    ties: (n,) number of choices that share the answer, 0 where there is none.
    mass: (n, K) the answer's part on each choice, 1 / ties on each of those.
    scores: (n, K) float64, -inf beyond k; None with answers.
    group: (n,) number of the row's group, -1 for none; None if no row has one.
    option: (n, K) the option behind each position, -1 beyond k; None without groups and permutations.
    inferred: number of rows whose k is the largest that any row needs.
    """

    k: np.ndarray
    gold: np.ndarray
    valid: np.ndarray
    ties: np.ndarray
    mass: np.ndarray
    scores: np.ndarray | None
    group: np.ndarray | None
    option: np.ndarray | None
    inferred: int

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def letters(self) -> int:
        """K."""
        return self.mass.shape[1]

    @cached_property
    def correct(self) -> np.ndarray:
        """(n,) c, the mass on the gold choice."""
        return at(self.mass, self.gold)

    @cached_property
    def strata(self) -> dict[int, np.ndarray | slice]:
        """k -> its rows, ascending."""
        found = np.unique(self.k).tolist()
        return {k: slice(None) if len(found) == 1 else np.flatnonzero(self.k == k) for k in found}

    @cached_property
    def log_softmax(self) -> np.ndarray | None:
        """(n, K), -inf beyond k, without meaning where there is no answer; None with answers."""
        if self.scores is None:
            return None
        with np.errstate(all="ignore"):  # rows without an answer, and scores as far apart as floats can be
            shifted = self.scores - self.scores.max(axis=1, initial=-np.inf)[:, None]
            return shifted - np.log(np.exp(shifted).sum(axis=1))[:, None]


def at(table: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """(n,) the entry of each row in its column. table (n, K), columns (n,)."""
    return np.take_along_axis(table, columns[:, None], axis=1)[:, 0]


def maxima(scores: np.ndarray, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """(mass (n, K), number of maxima (n,)) of scores (n, K); a row whose maximum is not finite has none."""
    best = scores.max(axis=1, initial=-np.inf)
    with np.errstate(invalid="ignore"):
        top = scores >= (best - tolerance)[:, None]
    top[~np.isfinite(best)] = False
    ties = np.count_nonzero(top, axis=1)
    return top / np.maximum(ties, 1)[:, None], ties


def gather(columns: Columns, letters: int = 0) -> Answers:
    """
    Args:
        columns: the rows.
        letters: K of a result without rows.

    Raises:
        ValueError: more choices than letters, a permutation of another size than k, or rows of a group that contradict
            each other.
    """
    k, inferred = _complete_k(columns)
    letters = int(k.max(initial=0)) or letters
    if columns.scores is not None:
        mass, ties = maxima(columns.scores, EXACTLY)
    else:
        valid = (columns.answers >= 0) & (columns.answers < k)
        mass, ties = np.zeros((len(k), letters)), valid.astype(np.int64)
        mass[valid, columns.answers[valid]] = 1.0
    group = option = None
    if columns.group is not None or columns.permutation is not None:
        option = _options(columns, k, letters)
    if columns.group is not None:
        group = _numbered(columns.group)
        _check_groups(columns, group, k, at(option, columns.references))
    return Answers(
        k=k,
        gold=columns.references,
        valid=ties > 0,
        ties=ties,
        mass=mass,
        scores=columns.scores,
        group=group,
        option=option,
        inferred=inferred,
    )


def _complete_k(columns: Columns) -> tuple[np.ndarray, int]:
    k = columns.num_choices
    unknown = k == UNKNOWN
    count = int(unknown.sum())
    if not count:
        return k, 0
    answers = columns.answers
    counts = unknown | (answers < k)  # an answer beyond a known k is invalid, and says nothing
    for row in np.flatnonzero(unknown & (answers >= MOST))[:1]:
        raise ValueError(
            f"predictions[{row}]={answers[row]} would mean {answers[row] + 1} choices, and there are at most {MOST}; "
            "give num_choices if it is an invalid answer"
        )
    largest = max(answers[counts].max(initial=-1), columns.references.max())
    needed = max(FEWEST, int(largest) + 1)
    warnings.warn(
        f"num_choices is not given: rows without it are taken to have {needed} choices, as the largest index says. "
        "Pass num_choices, since rates by chance depend on it.",
        stacklevel=4,
    )
    return np.where(unknown, needed, k), count


def _options(columns: Columns, k: np.ndarray, letters: int) -> np.ndarray:
    """(n, letters): the option behind each position, -1 beyond k.

    By the row's permutation; without one, a cyclic rotation of the choices that has option 0 on the gold.

    Raises:
        ValueError: a permutation of another number of options than k.
    """
    position, sizes = np.arange(letters), k[:, None]
    rotated = np.where(position < sizes, (position - columns.references[:, None]) % sizes, -1)
    if columns.permutation is None:
        return rotated
    places = columns.permutation
    given = sizes_of(places)
    for row in np.flatnonzero((given != k) & (given > 0))[:1]:
        refuse_permutation(row, places[row, : given[row]], k[row])
    places = np.pad(places[:, :letters], ((0, 0), (0, max(0, letters - places.shape[1]))), constant_values=-1)
    return np.where(given[:, None] > 0, places, rotated)


def _numbered(labels: list[str]) -> np.ndarray:
    """(n,): groups numbered from 0 in the order in which they come, -1 where there is none."""
    numbers = {"": -1}
    return np.fromiter((numbers.setdefault(label, len(numbers) - 1) for label in labels), np.int64, len(labels))


def _check_groups(columns: Columns, group: np.ndarray, k: np.ndarray, gold_option: np.ndarray) -> None:
    """
    Raises:
        ValueError: rows of a group differ in k or in the option that is right. All arrays (n,).
    """
    rows = np.flatnonzero(group >= 0)
    _, first = np.unique(group[rows], return_index=True)
    head = rows[first][group[rows]]  # the first row of the group of each row
    for what, values in (("k", k), ("the gold option", gold_option)):
        for place in np.flatnonzero(values[rows] != values[head])[:1]:
            row, other = rows[place], head[place]
            raise ValueError(
                f"group {columns.group[row]!r}: {what} is {values[other]} in row {other} and {values[row]} in row "
                f"{row}; rows of a group are one question with its choices reordered"
            )
