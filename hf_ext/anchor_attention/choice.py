"""Which engine computes a call: the one that was named, or the first of those for its device and dtype that can.

A kernel that is not `trusted` first has to give the dense engine's results on a toy.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ext.anchor_attention.dense import dense_engine
from hf_ext.anchor_attention.flex import flex_kernels
from hf_ext.anchor_attention.kernel import HALF, Call, Kernel
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.sdpa import sdpa_engine
from hf_ext.anchor_attention.segments import SegmentTable
from hf_ext.anchor_attention.varlen import flash_kernels, varlen_kernels
from hf_ext.checks import listed

ENGINE_VARIABLE = "HF_EXT_ANCHOR_ENGINE"
# Relative error allowed to a kernel on the toy: some roundings to bfloat16.
TOLERANCE = 2e-2


class Engine(NamedTuple):
    """about: for people. kernels: those that load on this machine, best first, or the reason why there is none."""

    about: str
    kernels: Callable[[], list[Kernel] | str]


def _everything(name: str, run: Callable) -> list[Kernel]:
    has = frozenset({"sliding window", "gaps in the window", "softcap", "dropout", "sinks"})
    dtypes = (*HALF, torch.float32, torch.float64)
    return [Kernel(name, run, has, cuda_only=False, dtypes=dtypes, trusted=True)]


ENGINES: dict[str, Engine] = {
    "sdpa": Engine("any device and dtype, memory linear in length", lambda: _everything("sdpa", sdpa_engine)),
    "varlen": Engine("torch's kernel for packed rows, half precision", varlen_kernels),
    "flash": Engine("FlashAttention, half precision", flash_kernels),
    "flex": Engine("softcap and sinks on CUDA", flex_kernels),
    "dense": Engine(
        "writes out (length, length) masks, for checks; only when named", lambda: _everything("dense", dense_engine)
    ),
}


def choose(call: Call) -> Kernel:
    """The kernel for `call`.

    Raises:
        ValueError: the environment variable names no engine.
        RuntimeError: the named engine cannot compute this call; the text says why, and which engines can.
    """
    name, source = _requested()
    return _automatic(call) if name == "auto" else _forced(name, source, call)


@cache
def _automatic(call: Call) -> Kernel:
    """Cached, so that a fallback warns once."""
    passed = []
    for name in _order(call):
        kernel = _kernel(name, call)
        if isinstance(kernel, Kernel):
            if passed:
                warnings.warn(f"anchor attention uses {kernel.name}: {'; '.join(passed)}", stacklevel=2)
            return kernel
        if not isinstance(ENGINES[name].kernels(), str):  # it is here, but cannot do this
            passed.append(f"engine {name!r} was passed over, as {kernel}")
    raise TypeError(f"no engine computes {call.dtype} on {call.device}")


def _order(call: Call) -> list[str]:
    if call.device.type != "cuda" or call.dtype not in HALF:
        return ["sdpa"]
    # On Hopper FlashAttention 3 outruns torch's kernel, which is of generation 2.
    flash = flash_kernels()
    hopper = torch.cuda.get_device_capability(call.device)[0] == 9
    best = ["flash"] if hopper and not isinstance(flash, str) and "FlashAttention 3" in flash[0].name else []
    return [*best, *(name for name in ("varlen", "flash", "flex", "sdpa") if name not in best)]


def _forced(name: str, source: str, call: Call) -> Kernel:
    kernel = _kernel(name, call)
    if isinstance(kernel, Kernel):
        return kernel
    able = [other for other in ENGINES if isinstance(_kernel(other, call), Kernel)]
    raise RuntimeError(f"{source}: engine {name!r} cannot compute this: {kernel}. Engines that can: {', '.join(able)}.")


@cache
def _kernel(name: str, call: Call) -> Kernel | str:
    """The engine's first kernel that can compute `call`, or why none can."""
    kernels = ENGINES[name].kernels()
    if isinstance(kernels, str):
        return kernels
    reasons = []
    for kernel in kernels:
        reason = kernel.lacks(call) or (None if kernel.trusted else _disproof(kernel, call))
        if reason is None:
            return kernel
        reasons.append(reason)
    return "; ".join(reasons)


# --- the proof


@cache
def _disproof(kernel: Kernel, call: Call) -> str | None:
    """How `kernel` differs from the dense engine on two documents with grouped heads, in output and gradients."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(call.device.type, enabled=False):
        table, options, inputs, weights = _toy(call)
        expected = _results(dense_engine, inputs, table, options, weights)
        try:
            results = _results(kernel.run, inputs, table, options, weights)
        except Exception as error:  # whatever a kernel says of a head width, a processor or a compiler it does not like
            text = str(error).strip().splitlines()
            return f"{kernel.name} failed its self-test, {type(error).__name__}: {text[0] if text else ''}"
    error = max(((x - y).norm() / y.norm()).item() for x, y in zip(results, expected, strict=True))
    # The comparison is written so that nan fails it.
    return None if error < TOLERANCE else f"{kernel.name} failed its self-test: it differed by {error:.0e}"


def _toy(call: Call) -> tuple[SegmentTable, Options, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = call.dtype) -> Tensor:
        return torch.randn(size, generator=generator).to(call.device, dtype)

    lengths, heads, key_heads, (width, value_width) = [45, 84], 4, 2, call.widths
    slots = sum(lengths)
    tokens = torch.arange(slots).to(call.device)
    if "gaps in the window" in call.features:
        tokens = tokens + 3 * (tokens // 30)
    table = SegmentTable((1, slots), lengths, [slots], tokens, tokens, gaps="gaps in the window" in call.features)
    inputs = {
        "query": normal(slots, heads, width),
        "key": normal(slots, key_heads, width),
        "value": normal(slots, key_heads, value_width),
    }
    if "sinks" in call.features:
        inputs["sinks"] = normal(heads, dtype=torch.float32)
    options = Options(
        scaling=width**-0.5,
        sliding_window=16 if "sliding window" in call.features else None,
        softcap=2.0 if "softcap" in call.features else None,
    )
    return table, options, inputs, normal(slots, heads, value_width)


def _results(
    run: Callable, inputs: dict[str, Tensor], table: SegmentTable, options: Options, weights: Tensor
) -> list[Tensor]:
    """The output and the gradients of its weighted sum, in float32."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    options = replace(options, sinks=leaves.get("sinks"))
    out = run(leaves["query"], leaves["key"], leaves["value"], table, options)
    gradients = torch.autograd.grad((out * weights).sum(), list(leaves.values()))
    return [x.float() for x in (out.detach(), *gradients)]


# --- what the user says


class EngineStatus(NamedTuple):
    """usable: whether it can run here. chosen: for an ordinary call. reason: why, or why not."""

    usable: bool
    reason: str
    chosen: bool = False


def available_engines() -> dict[str, EngineStatus]:
    """Every engine: whether it can run on this machine, and why it is chosen for an ordinary call, or why not.

    An ordinary call is bfloat16 on CUDA where there is a device, else float32, heads of width 64 and no features.
    """
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    call = Call(torch.device(device), dtype, (64, 64))
    name, source = _requested()
    if name == "auto":
        chosen, by = _automatic(call).name, ""
    else:
        kernel = _kernel(name, call)
        chosen, by = kernel.name if isinstance(kernel, Kernel) else None, f" by {source}"
    report = {}
    for engine, (about, _) in ENGINES.items():
        kernel = _kernel(engine, call)
        if isinstance(kernel, str):
            report[engine] = EngineStatus(False, kernel)
        else:
            about = about if kernel.trusted else f"{kernel.name}: {about}"
            mine = kernel.name == chosen
            report[engine] = EngineStatus(True, f"chosen{by}: {about}" if mine else about, mine)
    return report


class use_engine:
    """Set the engine of this process; as a context manager, until the block ends.

    Args:
        name: "auto", or an engine of `available_engines`. "auto" also overrides the environment variable.

    Raises:
        ValueError: an unknown name, with the allowed ones and the nearest match.
        RuntimeError: an engine that cannot run on this machine, with the reason.
    """

    def __init__(self, name: str) -> None:
        kernels = [] if _checked(name, "use_engine") == "auto" else ENGINES[name].kernels()
        if isinstance(kernels, str):
            raise RuntimeError(f"use_engine: engine {name!r} cannot run here: {kernels}")
        self.name = name
        _named.append(self)

    def __enter__(self) -> None:
        if self not in _named:  # it is used again
            _named.append(self)

    def __exit__(self, *_: object) -> None:
        if self in _named:
            _named.remove(self)


_named: list[use_engine] = []  # the last one counts; those of two threads end in any order


def _requested() -> tuple[str, str]:
    """The name set by `use_engine`, else by the environment, else "auto"; and who set it."""
    if last := _named[-1:]:
        return last[0].name, "use_engine"
    source = f"environment variable {ENGINE_VARIABLE}"
    return _checked(os.environ.get(ENGINE_VARIABLE) or "auto", source), source


def _checked(name: str, source: str) -> str:
    allowed = ["auto", *ENGINES]
    if name not in allowed:
        raise ValueError(f"{source}: there is no engine {name!r}; allowed are {listed(name, allowed)}")
    return name
