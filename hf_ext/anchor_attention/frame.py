"""What belongs to one forward: its arguments, and what is read off its tensors once for all layers."""

from collections.abc import Callable
from threading import local
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

T = TypeVar("T")


class Forward(NamedTuple):
    """config: of the model. documents: `anchor_doc_ids` (B, L) as the model was given them, or None.

    padding: its 2-D mask (B, L) bool, True = real token, or None: one tensor for all mask calls of the forward.
    """

    config: Any
    documents: Tensor | None
    padding: Tensor | None


_running = local()  # data parallelism runs a forward in every thread


def announce_forward(config: Any, documents: Tensor | None, mask: Any) -> None:
    """A model begins; some layers do not hand on what it was given, and the host makes its mask anew for each call."""
    padding = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    _running.forward = Forward(config, documents, padding)


def forward_of(config: Any) -> Forward | None:
    """The running forward of the model with `config`, if it was announced."""
    forward = getattr(_running, "forward", None)
    return forward if forward is not None and forward.config is config else None


# For each function its last arguments and result. The tensors themselves are held, so that no other gets their memory.
_last: dict[Callable, tuple[tuple, Any]] = {}


def open_frame() -> None:
    """A forward begins: whatever was written into its tensors, by whatever means, is read anew."""
    _last.clear()


def once(function: Callable[..., T], *arguments: Any, framed: bool = False) -> T:
    """`function(*arguments)`, or its last result if that came from the same tensors, unchanged since.

    framed: whether `open_frame` was called for this forward. Without it, tensors that do not count their changes (made
    under `torch.inference_mode`) are read each time.
    """
    key = tuple((x, _version(x)) if isinstance(x, Tensor) else (x, 0) for x in arguments)
    last_key, result = _last.get(function, ((), None))
    if len(last_key) == len(key) and all(_same(a, b) for a, b in zip(last_key, key, strict=True)):
        return result
    result = function(*arguments)
    if framed or not any(isinstance(x, Tensor) and x.is_inference() for x in arguments):
        _last[function] = key, result
    return result


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same(old: tuple, new: tuple) -> bool:
    if isinstance(old[0], Tensor) or isinstance(new[0], Tensor):
        return old[0] is new[0] and old[1] == new[1]
    return old == new
