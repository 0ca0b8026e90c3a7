"""Are rotary phases computed precisely enough? (arXiv 2411.13476, section 3, on what bfloat16 does to them.)"""

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_ext import compat

TOLERANCE = 1e-5  # float32 stays below 1e-6; bfloat16 gives 4e-3, float16 5e-4 (or 0, below 6e-8)


@dataclass
class RopeFinding:
    """One thing `check_rope_precision` has to say.

    Args:
        name: the buffer by its full name, `position_ids`, or the module with the matmul.
        message: all of it in words.
        relative_error: largest over the frequencies, or None where none was computed.
        phase_error: radians at the config's `max_position_embeddings`, or None.
    """

    name: str
    message: str
    relative_error: float | None = None
    phase_error: float | None = None

    def __str__(self) -> str:
        return self.message


@dataclass
class RopePrecision:
    """`ok`: every `inv_freq` buffer was recomputed and agrees to 1e-5, and nothing else spoils the phases.

    Findings are empty then, except for a model without any such buffer: there one says that nothing was compared.
    """

    ok: bool
    findings: list[RopeFinding]


def check_rope_precision(model: nn.Module, position_ids: Tensor | None = None) -> RopePrecision:
    """Compare every `inv_freq` buffer (and `original_inv_freq`) with what the config defines, in float64.

    The host's own rotary module is built again from its config, through the host's rope functions, in float64. A cast
    of the whole model (`model.to(torch.bfloat16)`, Trainer's `bf16_full_eval`) rounds the buffers, and a later
    `.float()` does not heal them; `from_pretrained(dtype=torch.bfloat16)` leaves them alone.

    Args:
        model: the model, or whatever wraps one.
        position_ids: as they will be handed to the model; of an integer dtype, or it is a finding.

    Raises:
        ValueError: `model` is no module.

    A model without such a buffer is ok, as GPT-2 with its learned positions is, and a finding says that nothing was
    compared. A buffer that no config explains is not ok: it could not be verified.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, not a {type(model).__name__}")
    rotary = [(name, module) for name, module in model.named_modules() if _frequencies(module)]
    bad = [finding for name, module in rotary for finding in _module_findings(name, module)]
    if position_ids is not None and position_ids.is_floating_point():
        message = (
            f"position_ids are {position_ids.dtype}, which cannot count far: bfloat16 to 256, float16 to 2048, "
            "float32 to 16,777,216. Use torch.long"
        )
        bad.append(RopeFinding("position_ids", message))
    nothing = RopeFinding(
        "inv_freq",
        "there is no inv_freq buffer, so nothing was compared: positions are learned or absent, or the phases are "
        "kept in another form, of which nothing is said here",
    )
    return RopePrecision(not bad, bad if rotary else [*bad, nothing])


def _frequencies(module: nn.Module) -> dict[str, Tensor]:
    return {name: x for name, x in module.named_buffers(recurse=False) if name.endswith("inv_freq")}


def _module_findings(name: str, module: nn.Module) -> Iterator[RopeFinding]:
    try:
        expected, farthest = _expected(module), module.config.max_position_embeddings
        why = "its module has no such buffer when built from its config"
    except Exception as error:  # modules come in any shape; what cannot be built again is reported, not guessed
        expected, farthest, why = {}, 0, str(error)
    for key, buffer in _frequencies(module).items():
        full = f"{name}.{key}" if name else key
        candidates = [x for x in expected.get(key, []) if x.shape == buffer.shape]
        if buffer.is_meta:
            yield RopeFinding(full, f"{full} is on the meta device: load the model first")
        elif not candidates:
            yield RopeFinding(full, f"{full} cannot be verified: no config explains it ({why})")
        else:
            yield from _difference(full, buffer, candidates, farthest)
        if compat.tf32_on(buffer.device) and _multiplies_matrices(module):
            message = (
                f"{name} computes its phases by a matrix product, and TF32 is on, which rounds positions to 11 bits: "
                'call torch.set_float32_matmul_precision("highest")'
            )
            yield RopeFinding(name, message)


def _difference(name: str, buffer: Tensor, candidates: list[Tensor], farthest: int) -> Iterator[RopeFinding]:
    """A finding if `buffer` is none of the candidates."""
    values = buffer.detach().cpu().double()
    errors = [(values - x).abs() for x in candidates]
    # A frequency of exactly 0 (heads rotated in part) has to be met exactly.
    relative = [(e / x.abs()).nan_to_num(0.0).max().item() for e, x in zip(errors, candidates, strict=True)]
    best = min(range(len(relative)), key=relative.__getitem__)
    if relative[best] > TOLERANCE:
        phase = errors[best].max().item() * farthest
        message = (
            f"{name} ({buffer.dtype}) is off by {relative[best]:.1e} relative, {phase:.3g} rad at position "
            f"{farthest:,}. Was the model cast with .to(dtype), or by bf16_full_eval? Casting back does not heal it: "
            "load it again with from_pretrained(..., dtype=...)"
        )
        yield RopeFinding(name, message, relative[best], phase)


class _Float64(TorchFunctionMode):
    """Code that asks for float32 gets float64."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is Tensor.float:
            function = Tensor.double
        args, kwargs = torch.utils._pytree.tree_map(_widened, (args, kwargs or {}))
        return function(*args, **kwargs)


def _widened(x: Any) -> Any:
    return torch.float64 if x is torch.float32 else x


def _expected(module: nn.Module) -> dict[str, list[Tensor]]:
    """Buffer name -> values it may rightly have, float64: as built, and as grown in use (dynamic, longrope).

    Raises:
        ValueError: the module has no config, or parameters (then it is more than a rotary embedding).
    """
    if not hasattr(module, "config") or next(module.parameters(), None) is not None:
        raise ValueError(f"{type(module).__name__} has no config of its own")
    with torch.device("cpu"), _Float64():
        expected = {name: [x.double()] for name, x in _frequencies(type(module)(module.config)).items()}
        kinds = module.rope_type if isinstance(module.rope_type, dict) else {None: module.rope_type}
        for layer_type, kind in kinds.items():
            if kind == "longrope" or "dynamic" in kind:
                name = "inv_freq" if layer_type is None else f"{layer_type}_inv_freq"
                expected[name].append(_grown(module, layer_type, kind).double())
    return expected


def _grown(module: nn.Module, layer_type: str | None, kind: str) -> Tensor:
    """After rows beyond the first range: longrope has one table for all of them, dynamic one for each length."""
    # Some versions of the host write the length of a model without layer types under the name of None.
    seen = getattr(module, f"{layer_type}_max_seq_len_cached", module.max_seq_len_cached)
    length = 2**62 if kind == "longrope" else int(seen)
    by_layer = {} if layer_type is None else {"layer_type": layer_type}
    return ROPE_INIT_FUNCTIONS[kind](module.config, torch.device("cpu"), seq_len=length, **by_layer)[0]


def _multiplies_matrices(module: nn.Module) -> bool:
    """Read off the code, since running a rotary module may change its buffers."""
    code = inspect.unwrap(type(module).forward).__code__
    return any(step.argrepr == "@" or step.argval in ("matmul", "einsum") for step in dis.get_instructions(code))
