"""The options of the metric, checked in one place."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from hf_ext.mcq_bias.letters import LETTERS, anchor_index

FEWEST, MOST = 2, len(LETTERS)  # choices


@dataclass(frozen=True)
class BiasOptions:
    """How bias is measured.

    Args:
        anchor: the letter, or its index from 0 to 25, that the model is suspected of; kept as the index.
        confidence: level of all intervals, between 0 and 1.
        n_resamples: of the bootstrap interval of recall_std; 0 leaves it out (NaN).
        seed: of the bootstrap; the same seed gives the same interval.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """

    anchor: str | int = "A"
    confidence: float = 0.95
    n_resamples: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchor", anchor_index(self.anchor))
        if not isinstance(self.confidence, Real) or not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence!r} is no number between 0 and 1, both excluded")
        for name in ("n_resamples", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name}={value!r} is no integer of at least 0")


OPTIONS = tuple(option.name for option in fields(BiasOptions))


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str], what: str) -> None:
    """
    Raises:
        ValueError: a key of `given` is not one of `known`, with the nearest of them.
    """
    known = tuple(known)
    for name in given:
        if name not in known:
            near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown option {name!r} of {what}; known are {', '.join(map(repr, known))}{hint}")


def check_num_choices(value: Any, what: str = "num_choices") -> int:
    """
    Raises:
        ValueError: no integer from 2 to 26.
    """
    whole = isinstance(value, Real) and not isinstance(value, bool) and value == value // 1
    if not whole or not FEWEST <= value <= MOST:
        raise ValueError(f"{what}={value!r} is no number of choices: an integer from {FEWEST} to {MOST}")
    return int(value)
