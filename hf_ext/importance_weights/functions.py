"""Values and gradients of single lists: numpy arrays on the CPU's kernels, torch tensors where they are."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ext.checks import check_count, check_word, is_number
from hf_ext.importance_weights import tensors
from hf_ext.importance_weights.config import DTYPES
from hf_ext.importance_weights.kernels import NEGLIGIBLE, gradients, scratch
from hf_ext.importance_weights.lanes import lanes
from hf_ext.importance_weights.list_kernels import group_list, shapley_list

Array = np.ndarray | Tensor


def multilinear_gradient(
    utilities: Array,
    probabilities: Array,
    k: int,
    *,
    epsilon: float = 0.0,
    dtype: str = "float64",
    return_value: bool = False,
) -> Any:
    """Gradient of the expected utility by the probabilities (arXiv 2307.03027), in O(M k) time a list.

    Args:
        utilities: (M,) or (B, M), best rank first; any finite numbers.
        probabilities: the same shape, in [0, 1]: the chance that an item is in the corpus, independently.
        k: how many items that are in are read.
        epsilon: largest error of a coordinate; late ranks are left out as far as it allows. 0: none.
        dtype: arithmetic and result for arrays, "float64" or "float32"; tensors keep their own.
        return_value: return (value, gradient); the value is a number, (B,) for a batch.

    Returns:
        The gradient, of the shape of `utilities`; a tensor on the same device for tensors.

    Raises:
        ValueError: shapes differ, a number is not finite, a probability is outside [0, 1], k is no count.
    """
    check_count("k", k)
    check_word("dtype", dtype, DTYPES)
    if not is_number(epsilon) or epsilon < 0:
        raise ValueError(f"epsilon={epsilon!r} is no number of at least 0")
    _check_pair("probabilities", utilities, probabilities)
    if _ndim(utilities) not in (1, 2):
        raise ValueError(f"utilities of shape {tuple(np.shape(utilities))}: (M,) or (B, M) are expected")
    on_device = isinstance(utilities, Tensor) or isinstance(probabilities, Tensor)
    if on_device:
        utilities, probabilities = _tensors(utilities, probabilities)
        values, gradient = _of_tensors(utilities, probabilities, k, epsilon)
    else:
        utilities, probabilities = (np.asarray(x, np.float64) for x in (utilities, probabilities))
        _check_numbers(utilities)
        _check_probabilities(probabilities)
        values, gradient = _of_arrays(utilities, probabilities, k, epsilon, np.dtype(dtype))
    if not return_value:
        return gradient
    return (values if gradient.ndim == 2 else values[0] if on_device else values[0].item()), gradient


def _of_arrays(u: np.ndarray, p: np.ndarray, k: int, epsilon: float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    lists = u if u.ndim == 2 else u[None]
    count, length = lists.shape
    gradient, values = np.zeros(u.size, dtype), np.zeros(count, dtype)
    arrays = np.arange(count + 1) * length, np.arange(u.size, dtype=np.int32), u.ravel(), p.ravel()
    read = max(1, min(k, length))
    room = np.zeros(lanes(dtype), np.int64), scratch(length, read, dtype)
    # A list is cut by the range of its own utilities.
    together = [np.arange(count)] if epsilon == 0 else np.arange(count)[:, None]
    for rows in together:
        tail = tail_for(epsilon, utility_range(lists[rows[0]]), k) if epsilon else 0.0
        gradients(rows, *arrays, read, tail, NEGLIGIBLE[dtype], gradient, values, *room)
    return values / dtype.type(k), gradient.reshape(u.shape) / dtype.type(k)


def _of_tensors(u: Tensor, p: Tensor, k: int, epsilon: float) -> tuple[Tensor, Tensor]:
    _check_numbers(u)
    _check_probabilities(p)
    lists, chances = ((x if x.ndim == 2 else x[None]).to(torch.promote_types(x.dtype, torch.float32)) for x in (u, p))
    tails = [tail_for(epsilon, utility_range(row), k) for row in lists.detach().cpu().numpy()] if epsilon else []
    tail = torch.tensor(tails, dtype=lists.dtype, device=lists.device) if epsilon else None
    values, gradient, _ = tensors.multilinear(lists, chances, k, tail)
    return values.to(u.dtype), gradient.reshape(u.shape).to(u.dtype)


def shapley_values(utilities: Array, k: int) -> Array:
    """Shapley values of the items of a list, exact, in O(M); they sum to the utility of the whole list.

    utilities: (M,) or (B, M), best rank first; array or tensor. Returns the same shape.

    Raises:
        ValueError: k is no count, a utility is not finite, or there are more than two axes.
    """
    check_count("k", k)
    if _ndim(utilities) not in (1, 2):
        raise ValueError(f"utilities of shape {tuple(np.shape(utilities))}: (M,) or (B, M) are expected")
    if isinstance(utilities, Tensor):
        (utilities,) = _tensors(utilities)
        _check_numbers(utilities)
        return tensors.shapley(utilities, k) if utilities.numel() else utilities.clone()
    u = np.asarray(utilities, np.float64)
    _check_numbers(u)
    values = np.zeros(u.shape)
    for row, result in zip(u, values, strict=True) if u.ndim == 2 else [(u, values)]:
        shapley_list(np.ascontiguousarray(row), k, result)
    return values / k


def group_gradient(utilities: Array, groups: Array, probabilities: Array, k: int, *, return_value: bool = False) -> Any:
    """Gradient by the probabilities of groups that are in or out as a whole, in O(M G k) time.

    Args:
        utilities: (M,), best rank first.
        groups: (M,), for each item the index of its group in `probabilities`.
        probabilities: (G,), in [0, 1].
        k: how many items that are in are read.
        return_value: return (value, gradient).

    Returns:
        The gradient (G,); a tensor for tensors, computed on the CPU.

    Raises:
        ValueError: shapes differ, a number is not finite or out of range, a group that there is not.
    """
    check_count("k", k)
    _check_pair("groups", utilities, groups)
    if _ndim(utilities) != 1 or _ndim(probabilities) != 1:
        raise ValueError(
            f"utilities of shape {tuple(np.shape(utilities))} and probabilities of shape "
            f"{tuple(np.shape(probabilities))}: (M,) and (G,) are expected"
        )
    tensor = any(isinstance(x, Tensor) for x in (utilities, probabilities))
    if tensor:
        utilities, probabilities = _tensors(utilities, probabilities)
    u, h, p = map(_array, (utilities, groups, probabilities))
    value, gradient = _of_groups(u.astype(np.float64), h, p.astype(np.float64), k)
    if tensor:
        value, gradient = (torch.as_tensor(np.asarray(x)).to(utilities) for x in (value, gradient))
    return (value, gradient) if return_value else gradient


def _of_groups(u: np.ndarray, groups: np.ndarray, p: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    _check_numbers(u)
    _check_probabilities(p)
    if len(groups) and (groups.dtype.kind not in "iu" or groups.min() < 0 or groups.max() >= len(p)):
        raise ValueError(f"groups must be integers from 0 to {len(p) - 1}, indices into probabilities, not {groups}")
    gradient = np.zeros(len(p))
    read = max(1, min(k, len(u)))
    space = np.zeros(len(p), np.int64), np.zeros((len(p) + 1, read)), np.zeros(read)
    value = group_list(groups.astype(np.int64), u, p, read, 1.0, gradient, *space)
    return value / k, gradient / k


def utility_range(utilities: np.ndarray) -> float:
    """R = max(0, max u) - min(0, min u): no gradient of a slot is larger than R / k."""
    return float(utilities.max(initial=0.0)) - float(utilities.min(initial=0.0))


def tail_for(epsilon: float, spread: float, k: int) -> float:
    """The P(X <= k) at which a list may be cut: an error of (R / k) P(X <= k) is at most epsilon. 0: never."""
    return epsilon * k / spread if spread > 0 else 0.0


def _array(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)


def _ndim(x: Any) -> int:
    return x.ndim if isinstance(x, Tensor) else np.ndim(x)


def _tensors(*arrays: Any) -> list[Tensor]:
    like = next(x for x in arrays if isinstance(x, Tensor))
    dtype = next(
        (x.dtype for x in arrays if isinstance(x, Tensor) and x.is_floating_point()), torch.get_default_dtype()
    )
    return [torch.as_tensor(x, dtype=dtype, device=like.device) for x in arrays]


def _check_pair(name: str, utilities: Any, other: Any) -> None:
    shapes = tuple(np.shape(utilities)), tuple(np.shape(other))
    if shapes[0] != shapes[1]:
        raise ValueError(f"utilities of shape {shapes[0]} and {name} of shape {shapes[1]} must have the same shape")


def _check_numbers(utilities: Any) -> None:
    finite = torch.isfinite if isinstance(utilities, Tensor) else np.isfinite
    if not bool(finite(utilities).all()):
        raise ValueError("utilities must be finite numbers; there is a NaN or an infinity")


def _check_probabilities(probabilities: Any) -> None:
    if not bool(((probabilities >= 0) & (probabilities <= 1)).all()):
        raise ValueError("probabilities must be numbers in [0, 1]")
