"""What may differ from plain softmax(q k^T) v."""

from dataclasses import dataclass

from torch import Tensor

from hf_ext.checks import check_count


@dataclass(frozen=True, eq=False)
class Options:
    """Features of one attention call.

    Args:
        scaling: factor on q k^T, positive.
        sliding_window: a query sees that many columns of its row, its own included.
        softcap: c in c * tanh(s / c), applied to the scores before masking.
        dropout: probability on the weights, applied as given (the caller passes 0 in evaluation).
        sinks: (Hq,), one more column of the softmax, without a value.

    Raises:
        ValueError: a value outside its range.
    """

    scaling: float
    sliding_window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.scaling > 0:
            raise ValueError(f"scaling must be positive, not {self.scaling}")
        if self.sliding_window is not None:
            check_count("sliding_window", self.sliding_window)
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be positive, not {self.softcap}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
