"""The options of the metric, checked in one place."""

from dataclasses import dataclass, fields

from hf_ext.checks import check_count, is_number
from hf_ext.mcq_bias.letters import anchor_index


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
        if not is_number(self.confidence) or not 0 < self.confidence < 1:
            raise ValueError(f"confidence={self.confidence!r} is no number between 0 and 1, both excluded")
        check_count("n_resamples", self.n_resamples, least=0)
        check_count("seed", self.seed, least=0)


OPTIONS = tuple(option.name for option in fields(BiasOptions))
