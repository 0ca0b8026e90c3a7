"""What an engine is made of: functions that compute attention in segments, and the calls they can take."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.segments import SegmentTable

HALF = (torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """What a kernel has to be able to do."""

    device: torch.device
    dtype: torch.dtype
    widths: tuple[int, int]  # D of query and key, Dv of value
    features: frozenset[str] = frozenset()  # "sliding window", "gaps in the window", "softcap", "dropout", "sinks"


def call_of(query: Tensor, value: Tensor, table: SegmentTable, options: Options) -> Call:
    """query (..., D), value (..., Dv)."""
    asked = {
        "sliding window": options.sliding_window is not None,
        "gaps in the window": options.sliding_window is not None and table.gaps,
        "softcap": options.softcap is not None,
        "dropout": options.dropout > 0,
        "sinks": options.sinks is not None,
    }
    features = frozenset(feature for feature, wanted in asked.items() if wanted)
    return Call(query.device, query.dtype, (query.shape[-1], value.shape[-1]), features)


def without_idle_window(options: Options, table: SegmentTable) -> Options:
    """A window that no segment is longer than hides nothing, and keeps fast kernels from being used."""
    window = options.sliding_window
    if window is None or table.gaps or (table.lengths and window < table.longest):
        return options
    return replace(options, sliding_window=None)


@dataclass(frozen=True)
class Kernel:
    """One way to compute `(query, key, value, table, options) -> (slots, Hq, Dv)`.

    query (slots, Hq, D), key (slots, Hkv, D), value (slots, Hkv, Dv).

    Args:
        name: for people.
        run: the function.
        has: the features it has, out of those of `Call`.
        cuda_only, dtypes: what it takes.
        trusted: whether its results need no check against the dense engine before they are used.
    """

    name: str
    run: Callable[[Tensor, Tensor, Tensor, SegmentTable, Options], Tensor]
    has: frozenset[str] = frozenset()
    cuda_only: bool = True
    dtypes: tuple[torch.dtype, ...] = HALF
    trusted: bool = False

    def lacks(self, call: Call) -> str | None:
        """Why it cannot compute that call."""
        if self.cuda_only and call.device.type != "cuda":
            return f"{self.name} takes CUDA tensors, not {call.device.type}"
        if call.dtype not in self.dtypes:
            allowed = ", ".join(_short(dtype) for dtype in self.dtypes)
            return f"{self.name} takes {allowed}, not {_short(call.dtype)}"
        missing = sorted(call.features - self.has)
        return f"{self.name} has no {', '.join(missing)}" if missing else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
