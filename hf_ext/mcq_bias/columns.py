"""The five inputs of the metric in one form, every row checked by itself, before anything is kept of them."""

import warnings
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from hf_ext.mcq_bias.letters import FEWEST, MOST, check_num_choices, no_choice
from hf_ext.mcq_bias.reading import NONSENSE, column, indices, is_missing, is_row, padded, score_rows

UNKNOWN = -1  # number of choices
MIXED = (
    "some predictions are score rows and others are answers; one result takes either, since a score row also says "
    "how sure the model was"
)


@dataclass(frozen=True, eq=False)
class Columns:
    """n rows.

    answers: (n,) int64, index of the answer, of any size, -1 for none; None where there are scores.
    scores: (n, widest) float64, -inf from num_choices on; None where there are answers.
    references, num_choices: (n,) int64; num_choices is `UNKNOWN` where nothing says it.
    group: n texts, "" for none; None if no row has one.
    permutation: (n, longest) int64, -1 from the end of a row on; None if no row has one.
    """

    answers: np.ndarray | None
    scores: np.ndarray | None
    references: np.ndarray
    num_choices: np.ndarray
    group: list[str] | None = None
    permutation: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.references)

    def to_lists(self) -> dict[str, list[Any]]:
        """One list a column, for Arrow: an answer is a row of one number, as a row of scores has at least two."""
        if self.scores is None:
            predictions = [[float(answer)] for answer in self.answers.tolist()]
        else:
            rows = zip(self.scores.tolist(), self.num_choices.tolist(), strict=True)
            predictions = [row[:k] for row, k in rows]
        orders = [[]] * len(self) if self.permutation is None else self.permutation.tolist()
        return {
            "predictions": predictions,
            "references": self.references.tolist(),
            "num_choices": self.num_choices.tolist(),
            "group": [""] * len(self) if self.group is None else self.group,
            "permutation": [[place for place in row if place >= 0] for row in orders],
        }

    @classmethod
    def from_lists(cls, lists: dict[str, list[Any]]) -> "Columns":
        """The undo of `to_lists`, of any number of batches.

        Raises:
            ValueError: batches of scores among batches of answers.
        """
        predictions, order = lists["predictions"], lists["permutation"]
        lengths = np.fromiter(map(len, predictions), np.int64, len(predictions))
        is_answer = lengths == 1
        if is_answer.any() and not is_answer.all():
            raise ValueError(MIXED)
        numbers = padded(chain.from_iterable(predictions), lengths, -np.inf, np.float64)
        answers = numbers.reshape(-1).astype(np.int64) if is_answer.all() else None
        sizes = np.fromiter(map(len, order), np.int64, len(order))
        return cls(
            answers=answers,
            scores=numbers if answers is None else None,
            references=np.array(lists["references"], np.int64),
            num_choices=np.array(lists["num_choices"], np.int64),
            group=lists["group"] if any(lists["group"]) else None,
            permutation=padded(chain.from_iterable(order), sizes, -1, np.int64) if sizes.any() else None,
        )


def read_columns(
    predictions: Any, references: Any, num_choices: Any = None, group: Any = None, permutation: Any = None
) -> Columns:
    """
    Args:
        predictions: n score rows (lists, arrays, tensors, one array) or n answers (indices, -1 for none, or letters).
        references: n indices or letters of the right choice.
        num_choices: one integer for all rows or one a row; None: the length of a score row, unknown with answers.
        group: n labels of questions; None or "" for none.
        permutation: n lists, the option behind each position; None or empty for none. Only with `group`.

    Raises:
        ValueError: naming the row, what is there and what is allowed.
    """
    missing = [name for name, x in (("predictions", predictions), ("references", references)) if x is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} missing: the metric needs predictions and references")
    predictions, references = column("predictions", predictions), column("references", references)
    n = len(predictions)
    if n == 0:
        predictions = []  # of an array without rows nobody can tell whether they are scores
    _check_length("references", references, n)
    k = _read_num_choices(num_choices, n)
    answers = scores = None
    if _are_scores(predictions):
        scores, k = _fit_scores(*score_rows(predictions), k)
    else:
        answers = indices(predictions)
        for row in np.flatnonzero(answers == NONSENSE)[:1]:
            raise ValueError(
                f"predictions[{row}]={predictions[row]!r} is no answer; expected an index, -1 for none, or a letter"
            )
    order = _read_permutation(permutation, k)
    if order is not None and group is None:
        raise ValueError(
            "permutation needs group: it says how the rows of one question differ, and without group no rows belong "
            "together"
        )
    return Columns(
        answers=answers,
        scores=scores,
        references=_read_references(references, k),
        num_choices=k,
        group=_read_group(group, n),
        permutation=order,
    )


def _are_scores(predictions: np.ndarray | list[Any]) -> bool:
    if isinstance(predictions, np.ndarray):
        return predictions.ndim == 2
    if set(map(type, predictions)) <= {int, float, str, type(None)}:  # the usual case, at once
        return False
    kinds = set(map(is_row, predictions))
    if len(kinds) > 1:
        raise ValueError(MIXED)
    return kinds == {True}


def _fit_scores(scores: np.ndarray, lengths: np.ndarray, k: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The scores of the choices alone, and how many there are."""
    known = k != UNKNOWN
    for row in np.flatnonzero(known & (lengths < k))[:1]:
        raise ValueError(f"predictions[{row}] has {lengths[row]} scores, and num_choices is {k[row]}")
    for row in np.flatnonzero(~known & ((lengths < FEWEST) | (lengths > MOST)))[:1]:
        raise ValueError(
            f"predictions[{row}] has {lengths[row]} scores; a row without num_choices has {FEWEST} to {MOST}"
        )
    last = scores[np.arange(len(k)), np.maximum(lengths, 1) - 1]
    if ((last == -np.inf) & ~known & np.isfinite(scores.max(axis=1, initial=-np.inf))).any():
        warnings.warn(
            "rows of scores end in -inf, and num_choices is not given: each -inf counts as a choice that is never "
            "taken. Where it fills a row up, as in what score_choices returns, pass num_choices",
            stacklevel=5,
        )
    k = np.where(known, k, lengths)
    if (k == scores.shape[1]).all():
        return scores, k
    padding = np.where(np.arange(scores.shape[1]) < k[:, None], -np.inf, scores)
    for row in np.flatnonzero(np.isfinite(padding).any(axis=1))[:1]:
        raise ValueError(
            f"predictions[{row}] has the score {padding[row][np.isfinite(padding[row])][0]!r} beyond its "
            f"{k[row]} choices; only -inf may follow them"
        )
    scores[(padding != -np.inf).any(axis=1), 0] = np.nan  # the row holds NaN or inf: no valid answer, as elsewhere
    return scores[:, : k.max(initial=0)], k


def _read_references(values: np.ndarray | list[Any], k: np.ndarray) -> np.ndarray:
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"references: found an array of shape {values.shape}; expected one index or letter a row")
    gold = indices(values)
    limit = np.where(k == UNKNOWN, MOST, k)
    for row in np.flatnonzero((gold < 0) | (gold >= limit))[:1]:
        what = f"k is not known, and at most {MOST}" if k[row] == UNKNOWN else f"k={k[row]}"
        raise ValueError(f"{no_choice(f'references[{row}]', values[row], limit[row])} ({what})")
    return gold


def _check_length(name: str, values: Any, n: int) -> None:
    """
    Raises:
        ValueError: other than n rows.
    """
    if len(values) != n:
        raise ValueError(f"{name} has {len(values)} rows, and predictions has {n}")


def common_num_choices(values: Any) -> int | None:
    """The one number for all rows; None if there is one a row, or nothing.

    Raises:
        ValueError: no integer from 2 to 26.
    """
    if isinstance(values, str):
        raise ValueError(f"num_choices={values!r} is neither an integer from {FEWEST} to {MOST} nor one a row")
    if values is None or (hasattr(values, "__len__") and getattr(values, "ndim", 1) > 0):
        return None
    return check_num_choices(values.item() if hasattr(values, "item") else values)


def _read_num_choices(values: Any, n: int) -> np.ndarray:
    """(n,) int64, `UNKNOWN` where nothing says it.

    Raises:
        ValueError: another length, or a number that is no integer from 2 to 26.
    """
    if values is None:
        return np.full(n, UNKNOWN)
    common = common_num_choices(values)
    if common is not None:
        return np.full(n, common)
    values = column("num_choices", values)
    _check_length("num_choices", values, n)
    if isinstance(values, np.ndarray) and ((values >= FEWEST) & (values <= MOST)).all():
        known = indices(values)
        if (known != NONSENSE).all():
            return known
    rows = [value.item() if hasattr(value, "item") else value for value in values]
    rows = [int(k) if isinstance(k, float) and k.is_integer() else k for k in rows]  # of a table with gaps
    known = [UNKNOWN if k is None else check_num_choices(k, f"num_choices[{row}]") for row, k in enumerate(rows)]
    return np.array(known, np.int64)


def _read_group(values: Any, n: int) -> list[str] | None:
    """The text of each label, "" for none; None if no row has one.

    Raises:
        ValueError: another length, or a label that is an array or a list.
    """
    if values is None:
        return None
    values = column("group", values)
    _check_length("group", values, n)
    rows = values.tolist() if isinstance(values, np.ndarray) else values
    for row, label in enumerate(rows):
        if is_row(label):
            raise ValueError(
                f"group[{row}]={label!r} is a {type(label).__name__}; expected a label: a text or a number"
            )
    # NaN is how tables say that there is none.
    labels = ["" if is_missing(label) or label != label else str(label) for label in rows]
    return labels if any(labels) else None


def _read_permutation(values: Any, k: np.ndarray) -> np.ndarray | None:
    """(n, longest) int64, -1 from the end of each row on; None if no row has one.

    Raises:
        ValueError: another length, or a row that is no permutation of as many options as it has choices.
    """
    if values is None:
        return None
    rows = column("permutation", values)
    _check_length("permutation", rows, len(k))
    rows = [[] if row is None else row for row in rows]
    for number, row in enumerate(rows):
        if not is_row(row):
            raise ValueError(f"permutation[{number}]={row!r} is no list; expected the option behind each position")
    flat = indices(list(chain.from_iterable(rows)))
    places = padded(flat, np.fromiter(map(len, rows), np.int64, len(rows)), -1, np.int64)
    sizes, position = sizes_of(places), np.arange(places.shape[1])
    inside = position < sizes[:, None]
    found = np.sort(np.where(inside, places, len(position)), axis=1)
    right = (found == position).all(axis=1, where=inside) & ((sizes == k) | (k == UNKNOWN) | (sizes == 0))
    for row in np.flatnonzero(~right)[:1]:
        refuse_permutation(row, rows[row], sizes[row] if k[row] == UNKNOWN else k[row])
    return places if sizes.any() else None


def sizes_of(places: np.ndarray) -> np.ndarray:
    """(n,) entries of each permutation, up to the last that is not -1. places (n, longest)."""
    return np.where(places != -1, np.arange(1, places.shape[1] + 1), 0).max(axis=1, initial=0)


def refuse_permutation(row: int, entries: Any, k: int) -> None:
    entries = entries.tolist() if hasattr(entries, "tolist") else list(entries)
    raise ValueError(f"permutation[{row}]={entries} is no permutation of 0 to {k - 1}, the options of {k} choices")
