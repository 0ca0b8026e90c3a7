"""The options of importance weights, checked in one place."""

from dataclasses import asdict, dataclass, fields
from itertools import combinations
from typing import Any

from hf_ext.checks import check_count, check_word, is_integer, is_number, refuse_unknown

METHODS = ("multilinear", "shapley", "banzhaf", "loo", "mean")
GROUP_UPDATES = ("mean", "sum", "exact")
DTYPES = ("float64", "float32")
UNSEEN = ("keep", "drop")


@dataclass(frozen=True)
class ImportanceConfig:
    """Options of `ImportanceWeights` (arXiv 2307.03027).

    Args:
        k: how many of the retrieved items the model reads (the paper's K).
        method: "multilinear" learns probabilities in [0, 1] by gradient steps on the expected utility; "shapley",
            "banzhaf" and "loo" (leave one out) are values of the game; "mean" is the smoothed mean utility.
        id_column: the column of ids of the corpus.
        group_column: weigh groups (sources) instead of items: a column of the corpus, and of the validation set, where
            it holds a list beside `retrieved_column`.
        retrieved_column: the validation set's lists of retrieved ids, best rank first.
        utility_column: the validation set's lists of utilities, one an id.
        learning_rate: step size; "auto" moves an item of average frequency by at most 1/2 an epoch.
        epochs: full passes over the validation set.
        group_update: "mean": items take steps, a group is the mean of its items (the paper's code); "sum": a group
            takes the sum of its items' steps; "exact": a group is in or out as a whole.
        unseen: what an id that was never retrieved gets: "keep" the neutral value, "drop" the smallest, or a number.
        epsilon: largest error of a gradient coordinate that leaving out late ranks may make; 0 leaves nothing out.
        delta: probability with which sampling tuples may exceed `epsilon`; 0 samples nothing.
        dtype: arithmetic of the kernels and type of the column, "float64" or "float32".
        seed: of the sampled tuples.
        answer_column: the validation set's lists of answers, one an id, for votes.
        output_column: the column that `map` and `annotate` write.
        prior_strength: method "mean": how many slots of the mean utility are added to every key.

    Raises:
        ValueError: naming the option, its value, what is allowed and the nearest match.
    """

    k: int = 10
    method: str = "multilinear"
    id_column: str = "id"
    group_column: str | None = None
    retrieved_column: str = "retrieved"
    utility_column: str = "utility"
    learning_rate: float | str = "auto"
    epochs: int = 50
    group_update: str = "mean"
    unseen: float | str = "keep"
    epsilon: float = 0.0
    delta: float = 0.0
    dtype: str = "float64"
    seed: int = 0
    answer_column: str = "answers"
    output_column: str = "importance"
    prior_strength: float = 2.0

    def __post_init__(self) -> None:
        for name in ("k", "epochs"):
            check_count(name, getattr(self, name))
        check_seed(self.seed)
        for name, allowed in (("method", METHODS), ("group_update", GROUP_UPDATES), ("dtype", DTYPES)):
            check_word(name, getattr(self, name), allowed)
        self._check_columns()
        self._check_numbers()
        if self.delta > 0 and self.epsilon == 0:
            raise ValueError(
                f"delta={self.delta!r} samples tuples to reach an error of epsilon, and epsilon=0.0 allows none: "
                "set epsilon > 0, or delta=0.0"
            )
        if self.epsilon > 0 and (self.method != "multilinear" or self.group_update == "exact"):
            other = f"method={self.method!r}" if self.method != "multilinear" else "group_update='exact'"
            raise ValueError(
                f"epsilon={self.epsilon!r} bounds the gradients of method='multilinear' with group_update 'mean' or "
                f"'sum'; {other} has no such bound: set epsilon=0.0"
            )
        # One spelling of each number, so that equal options are equal files and fingerprints.
        for name in ("k", "epochs", "seed"):
            object.__setattr__(self, name, int(getattr(self, name)))
        for name in ("learning_rate", "unseen", "epsilon", "delta", "prior_strength"):
            if not isinstance(getattr(self, name), str):
                object.__setattr__(self, name, float(getattr(self, name)))

    def _check_columns(self) -> None:
        names = ("id_column", "retrieved_column", "utility_column", "answer_column", "output_column")
        for name in names:
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is no name of a column")
        if self.group_column is not None and (not isinstance(self.group_column, str) or not self.group_column):
            raise ValueError(f"group_column={self.group_column!r} is neither a name of a column nor None")
        corpus = ("id_column", "group_column", "output_column")
        lists = ("retrieved_column", "utility_column", "answer_column", "group_column")
        for one, other in (*combinations(corpus, 2), *combinations(lists, 2)):
            if getattr(self, one) == getattr(self, other):
                raise ValueError(f"{one} and {other} are both {getattr(self, one)!r}; they are different columns")

    def _check_numbers(self) -> None:
        if isinstance(self.learning_rate, str):
            check_word("learning_rate", self.learning_rate, ("auto",), "or a positive number")
        elif not is_number(self.learning_rate) or self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate!r} is neither 'auto' nor a positive number")
        if isinstance(self.unseen, str):
            check_word("unseen", self.unseen, UNSEEN, "or a number")
        elif not is_number(self.unseen):
            raise ValueError(f"unseen={self.unseen!r} is neither 'keep' nor 'drop' nor a number")
        if not is_number(self.epsilon) or self.epsilon < 0:
            raise ValueError(f"epsilon={self.epsilon!r} is no number of at least 0")
        if not is_number(self.delta) or not 0 <= self.delta < 1:
            raise ValueError(f"delta={self.delta!r} is no number in [0, 1)")
        if not is_number(self.prior_strength) or self.prior_strength < 0:
            raise ValueError(f"prior_strength={self.prior_strength!r} is no number of at least 0")

    @property
    def key_column(self) -> str:
        """The column of a corpus by which weights are looked up."""
        return self.group_column or self.id_column

    def to_dict(self) -> dict[str, Any]:
        """The options, as JSON knows them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImportanceConfig":
        """Options from their dict.

        Raises:
            ValueError: a key that is no option, with the nearest one.
        """
        refuse_unknown(values, [option.name for option in fields(cls)], "ImportanceWeights")
        return cls(**values)


def check_seed(seed: Any) -> None:
    if not is_integer(seed) or not 0 <= seed < 1 << 63:
        raise ValueError(f"seed={seed!r} is no integer from 0 to 2^63 - 1")
