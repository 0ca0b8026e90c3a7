"""datasets: what it has no interface for."""

from typing import Any

# --- datasets: a stream made of examples, read in Arrow format, has its types guessed example by example, its features
# --- notwithstanding, and dies where two guesses differ (an empty list has the type null). Streams that are Arrow from
# --- the start do not. Which kind a stream is stands in a private attribute only; goes when features are used.


def stream_is_arrow(dataset: Any) -> bool:
    """Whether an IterableDataset reads Arrow tables from its source to its end. False where that is not known."""
    return getattr(getattr(dataset, "_ex_iterable", None), "iter_arrow", None) is not None
