"""The kernels for half precision on CUDA that take all segments in one call, by their cumulative lengths.

torch's own and the generations of FlashAttention differ in the names of their arguments and in their features, so a
function is asked, through its signature, what it calls a thing and whether it has it.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ext.anchor_attention.kernel import Kernel
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.segments import SegmentTable

CAUSAL = ("causal", "is_causal")
SCALE = ("softmax_scale", "scale")
FEATURES = {
    "sliding window": ("window_size",),
    "softcap": ("softcap",),
    "dropout": ("dropout_p",),
    "sinks": ("s_aux", "learnable_sink"),
}


def kernel_of(name: str, function: Callable) -> Kernel:
    """`function` of packed query, key, value and keywords, as a kernel."""
    parameters = frozenset(inspect.signature(function).parameters)
    has = frozenset(feature for feature, names in FEATURES.items() if parameters & {*names})
    return Kernel(name, partial(_run, function, parameters), has)


def _run(
    function: Callable,
    parameters: frozenset[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: SegmentTable,
    options: Options,
) -> Tensor:
    width = max(query.shape[-1], value.shape[-1])
    width += -width % 8  # the kernels' unit. Zeros change no score and no column that is kept.
    if not parameters & {*SCALE}:
        query = query * (options.scaling * width**0.5)
    # FlashAttention (softmax_scale) groups heads by itself, torch's kernel when told to.
    if query.shape[1] != key.shape[1] and not parameters & {"enable_gqa", "softmax_scale"}:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    keywords = _keywords(table, options, parameters, query.device) | {"enable_gqa": query.shape[1] != key.shape[1]}
    out = function(
        *(F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value)),
        **{name: given for name, given in keywords.items() if name in parameters},
    )
    out = out[0] if isinstance(out, tuple) else out  # some add the log-sum-exp
    return out[..., : value.shape[-1]]


def _keywords(
    table: SegmentTable, options: Options, parameters: frozenset[str], device: torch.device
) -> dict[str, Any]:
    """Every feature of the call, under all names that it goes by."""
    bounds = table.once(("bounds", device), lambda: table.bounds.to(device))
    window = options.sliding_window
    known = {
        **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "cu_seq_q", "cu_seq_k"), bounds),
        **dict.fromkeys(("max_seqlen_q", "max_seqlen_k", "max_q", "max_k"), table.longest),
        **dict.fromkeys(SCALE, options.scaling),
        **dict.fromkeys(CAUSAL, True),
    }
    if window is not None or not parameters & {*CAUSAL}:  # (-1, 0) is how the others are told to be causal
        known |= dict.fromkeys(FEATURES["sliding window"], (-1 if window is None else window - 1, 0))
    if options.softcap is not None:
        known |= dict.fromkeys(FEATURES["softcap"], options.softcap)
    if options.dropout:
        known |= dict.fromkeys(FEATURES["dropout"], options.dropout)
    if options.sinks is not None:
        known |= dict.fromkeys(FEATURES["sinks"], options.sinks)
    return known


@cache
def varlen_kernels() -> list[Kernel] | str:
    """torch's kernel, or why there is none here."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    try:
        return [kernel_of("torch.nn.attention.varlen", import_module("torch.nn.attention.varlen").varlen_attn)]
    except ImportError:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen (2.10 has)"


class Source(NamedTuple):
    """Where one generation of FlashAttention may be: an installed module, or a kernel in the hub's local cache."""

    generation: int
    module: str | None = None
    repository: str | None = None
    version: int | None = None

    def load(self) -> Kernel:
        module = import_module(self.module) if self.module else self._cached()
        name = f"FlashAttention {self.generation} ({self.module or self.repository})"
        return kernel_of(name, module.flash_attn_varlen_func)

    def _cached(self) -> Any:
        """Never downloads: what computes a training run must not depend on whether a hub answers."""
        import kernels

        path = kernels.install_kernel(self.repository, version=self.version, local_files_only=True)
        return kernels.get_local_kernel(path)


SOURCES = (
    Source(3, module="flash_attn_interface"),
    Source(3, repository="kernels-community/flash-attn3", version=1),
    Source(3, repository="kernels-community/vllm-flash-attn3", version=1),
    Source(4, module="flash_attn.cute"),
    Source(4, repository="kernels-community/flash-attn4", version=0),
    Source(2, module="flash_attn"),
    Source(2, repository="kernels-community/flash-attn2", version=4),
    Source(2, repository="kernels-community/flash-attn2", version=3),
)


@cache
def flash_kernels() -> list[Kernel] | str:
    """The builds of FlashAttention that load here, best first, or why there is none."""
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    found, reasons = [], {}
    for source in SOURCES:
        try:
            found.append(source.load())
        except Exception as error:  # compiled for another torch, another CUDA, another processor: anything may come
            reasons[source.module or source.repository] = _why(error)
    if found:
        return found
    reasons = "; ".join(f"{where}: {reason}" for where, reason in reasons.items())
    return f"no build of FlashAttention loads here (`pip install kernels` or flash-attn): {reasons}"


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
