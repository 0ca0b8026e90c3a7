"""The options of a mitigation, checked in one place."""

import math
from dataclasses import dataclass
from numbers import Real

from hf_ext.mcq_bias.letters import anchor_index
from hf_ext.mcq_bias.words import check_count, check_word

METHODS = ("project", "shift", "paper")
COMPONENTS = ("mlp", "attention", "both")


@dataclass(frozen=True)
class Plan:
    """How to mitigate; the arguments are those of `mitigate`, the anchor is kept as its index.

    Raises:
        ValueError: naming the option, its value, what is allowed and the nearest match.
    """

    method: str
    components: str
    strength: float | str
    n: int
    anchor: str | int

    def __post_init__(self) -> None:
        check_word("method", self.method, METHODS)
        check_word("components", self.components, COMPONENTS)
        if self.method != "project" and self.components != "mlp":
            raise ValueError(
                f"components={self.components!r}: method={self.method!r} edits MLP neurons only. Use components='mlp', "
                "or method='project'"
            )
        if isinstance(self.strength, str):
            check_word("strength", self.strength, ("match",))
        elif (
            not isinstance(self.strength, Real) or isinstance(self.strength, bool) or not 0 <= self.strength < math.inf
        ):
            raise ValueError(f"strength={self.strength!r} is neither 'match' nor a number of at least 0")
        else:
            object.__setattr__(self, "strength", float(self.strength))
        check_count("n", self.n)
        object.__setattr__(self, "n", int(self.n))
        object.__setattr__(self, "anchor", anchor_index(self.anchor))

    @property
    def needs_labels(self) -> bool:
        return self.method == "paper"
