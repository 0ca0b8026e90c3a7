"""How strong an edit has to be: searched for on prompts without labels."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from hf_ext.mcq_bias.answers import EXACTLY, maxima
from hf_ext.mcq_bias.letters import LETTERS
from hf_ext.mcq_bias.scoring import NotFiniteError, prepare, score_choices

DOUBLINGS, BISECTIONS = 10, 12
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Exam:
    """Prompts that a model is asked again and again; the options are those of `score_choices`."""

    model: Any
    tokenizer: Any
    prompts: Sequence[str]
    num_choices: Sequence[int]
    options: dict[str, Any]
    name: str  # of the argument that the prompts come from

    def check(self) -> None:
        """Raise what the model cannot be asked, before it is."""
        prepare(
            *(self.model, self.tokenizer, self.prompts, self.num_choices),
            *(self.options[name] for name in ("letter_prefix", "prepend_bos")),
            name=self.name,
        )

    def answers(self) -> np.ndarray:
        """(n, K): the share of each letter in the model's answer, 1/t for each of t equally good ones.

        Raises:
            NotFiniteError: logits are not finite.
        """
        asked = self.model, self.tokenizer, self.prompts, self.num_choices
        return maxima(score_choices(*asked, progress=False, **self.options).scores, EXACTLY)[0]

    def share(self, anchor: int) -> float:
        """How often it answers the letter; inf if a prompt has no answer, as no edit is worth that."""
        try:
            return float(self.answers()[:, anchor].mean())
        except NotFiniteError:
            return math.inf

    def accuracy(self, labels: Sequence[int]) -> float:
        return float(self.answers()[np.arange(len(labels)), labels].mean())

    def target_share(self) -> float:
        """How often a letter would be the answer if all choices were alike: the mean of 1/k."""
        return float(np.mean(1 / np.asarray(self.num_choices)))


def over_answers(share: float, target: float, rows: int) -> bool:
    """Whether `share` is above `target` by more than chance would have it in 95 % of samples of `rows` prompts."""
    return share - target > NORMAL_95 * math.sqrt(target * (1 - target) / rows)


def matching_strength(
    share_at: Callable[[float], float], target: float, anchor: int, progress: bool
) -> tuple[float, float]:
    """(strength, share there) with the share closest to `target`: doubled from 1 on, then bisected.

    share_at: the anchor's share at a strength, above `target` at 0. Warns if the target is never reached.
    """
    seen: dict[float, float] = {}
    with tqdm(total=DOUBLINGS + 1 + BISECTIONS, desc="strength", disable=not progress) as bar:
        for strength in _search(seen, target):
            seen[strength] = share_at(strength)
            bar.update()
        bar.total = bar.n
        bar.refresh()
    best = min(seen, key=lambda strength: (abs(seen[strength] - target), strength))
    if min(seen.values()) > target:
        warnings.warn(
            f"the share of answers {LETTERS[anchor]} does not fall to {target:.3f}: the best is {seen[best]:.3f}, at "
            f"strength {best:g}. Edit more neurons (n), or components='both'",
            stacklevel=4,
        )
    return best, seen[best]


def _search(seen: dict[float, float], target: float) -> Iterator[float]:
    """Strengths to try; the caller writes the share of each into `seen` before it asks for the next."""
    low, high = 0.0, 1.0
    yield high
    for _ in range(DOUBLINGS):
        if seen[high] <= target:
            break
        low, high = high, 2 * high
        yield high
    if seen[high] > target:
        return
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        yield middle
        if seen[middle] > target:
            low = middle
        else:
            high = middle
