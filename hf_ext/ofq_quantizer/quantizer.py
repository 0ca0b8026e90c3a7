"""The quantiser of an activation: learnable scales and shifts (LSQ), and how they get their first values."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.utils import logging

from hf_ext import compat
from hf_ext.modes import product_dtype
from hf_ext.ofq_quantizer import ops
from hf_ext.ofq_quantizer.config import OFQConfig

logger = logging.get_logger(__name__)


@dataclass(eq=False)
class Switches:
    """What all quantised modules of one model share; a deep copy of the model gets its own.

    Attributes:
        config: how the model was quantised.
        name: what the user typed, "ofq" or a recipe such as "ofq_w2a2".
        rounding: False inside `full_precision`.
        calibrating: True inside `calibrate`.
        boundary_range: width of the band of weights that train, while `ConfidenceAnnealing` is attached.
        integer: True in the result of `to_int8`.
        told: warnings that this model has given.
    """

    config: OFQConfig
    name: str = "ofq"
    rounding: bool = True
    calibrating: bool = False
    boundary_range: float | None = None
    integer: bool = False
    told: set[str] = field(default_factory=set)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy nobody masks gradients or restores weights: `ConfidenceAnnealing` is attached to the original."""
        return vars(self) | {"boundary_range": None}

    def announce(self) -> None:
        """Tell people who debug a string that it is executed."""
        if not torch.compiler.is_compiling():
            compat.announce(self.name, w_bits=self.config.w_bits, a_bits=self.config.a_bits)

    def warn_once(self, message: str) -> None:
        """Warn, once a model."""
        if not torch.compiler.is_compiling() and message not in self.told:
            self.told.add(message)
            logger.warning(message)

    def tell_if_plain(self, x: Tensor, *products: tuple[int, int, int]) -> None:
        """Warn, once a model, where x is multiplied as a float.

        products: the terms of a sum, and the largest integers of its two factors.
        """
        if product_dtype(x) != torch.float32 or not all(ops.integer_sums_fit(*product) for product in products):
            self.warn_once(
                "this OFQ model multiplies rounded floats, not integers: it runs under autocast or in another dtype "
                "than float32, or a sum of products of integers could exceed 2^24. Its logits may depend on the size "
                "of the batch, and what to_int8 makes of it is close only"
            )


class ActivationQuantizer(nn.Module):
    """ActQ(x) = LSQ(x + bias_in) + bias_out, with parameters of their final shape from the start.

    Args:
        bits: 2 to 8.
        positive: unsigned codes 0 .. 2^bits - 1.
        axis: -2, a scale a token; -1, a scale a channel; None, one scale.
        size: number of scales.
        bias_in, bias_out: length of the shifts, 0 for none. A shorter one than x is wide holds for runs of channels: at
            the patch embedding, one shift a channel of the image.
        heads: for tensors (batch, heads, tokens, head_dim): the scales a channel and the shifts are split over so many
            heads. `per_head`: so are the scales a token, token-major (index token * heads + head).
        switches: shared by the model.
        like: its device and dtype are those of the shifts.

    The parameters are called `scale_norm`, `bias_in` and `bias_out` because `Trainer` exempts parameters from weight
    decay by such names.
    """

    def __init__(
        self,
        bits: int,
        *,
        positive: bool = False,
        axis: int | None = -2,
        size: int = 1,
        bias_in: int = 0,
        bias_out: int = 0,
        heads: int = 1,
        per_head: bool = False,
        switches: Switches,
        like: Tensor,
    ) -> None:
        super().__init__()
        self.bits, self.positive, self.axis = bits, positive, axis
        self.heads, self.per_head = heads, per_head
        self.switches = switches
        self.scale_norm = nn.Parameter(torch.ones(size, device=like.device, dtype=torch.float32))
        self.bias_in = nn.Parameter(like.new_zeros(bias_in)) if bias_in else None
        self.bias_out = nn.Parameter(like.new_zeros(bias_out)) if bias_out else None
        self.register_buffer("initialized", torch.zeros((), dtype=torch.bool, device=like.device))
        self._ready = False
        self._tries = 0
        self._seen: list[Tensor] = []

    @property
    def ready(self) -> bool:
        """Whether the scales have values: the saved flag, which the host reads only until it is set.

        It may be set in place by others: an average of the weights, the broadcast with which DDP starts. A compiler
        reads it when it traces a step that comes after a first one, for which `_tries` makes it trace anew.
        """
        if torch.compiler.is_compiling():
            return self._ready or (self._tries > 0 and _read(self.initialized))
        if not self._ready:
            self.synchronize()
        return self._ready

    @property
    def largest(self) -> int:
        """The largest magnitude of a code."""
        return max(map(abs, ops.code_range(self.bits, self.positive)))

    @property
    def scale(self) -> Tensor:
        """(size,) float32."""
        return self.scale_norm

    def extra_repr(self) -> str:
        kind = {None: "one", -1: "a channel", -2: "a token"}[self.axis]
        return f"bits={self.bits}, positive={self.positive}, scales={self.scale_norm.numel()} ({kind})"

    def forward(self, x: Tensor) -> Tensor:
        """The dequantised x, of its shape and dtype.

        Raises:
            ValueError: another number of tokens than there are scales.
        """
        if not self.switches.rounding:
            return self.shifted(x)
        return ops.quantize_activation(x, self.activation(x))

    def shifted(self, x: Tensor) -> Tensor:
        """x with both shifts, and no rounding."""
        for shift in (self.bias_in, self.bias_out):
            x = x if shift is None else x + self._along(shift, x).to(x.dtype)
        return x

    def activation(self, x: Tensor) -> ops.Activation:
        """Scales and shifts as they broadcast against x, given their first values where they have none yet."""
        self._check_tokens(x)
        known = self.ready and not self.switches.calibrating
        return self._against(x, self.scale_norm if known else self._first_scale(x))

    def kept_activation(self, x: Tensor) -> ops.Activation:
        """The same right after a training forward that gave first values; x tells shapes only."""
        return self._against(x, self._kept_scale())

    def _against(self, x: Tensor, scale: Tensor) -> ops.Activation:
        bias_in, bias_out = (None if b is None else self._along(b, x) for b in (self.bias_in, self.bias_out))
        return ops.Activation(self._view(scale, x), bias_in, bias_out, self.bits, self.positive)

    def _view(self, scale: Tensor, x: Tensor) -> Tensor:
        if self.axis is None:
            return scale
        if self.axis == -1:
            return self._along(scale, x)
        if self.per_head:
            return scale.view(-1, self.heads).t().unsqueeze(-1)
        return scale.unsqueeze(-1)

    def _along(self, values: Tensor, x: Tensor) -> Tensor:
        if self.heads > 1 and values.numel() == self.heads * x.shape[-1]:
            return values.view(self.heads, 1, x.shape[-1])
        return values if values.numel() == x.shape[-1] else values.repeat_interleave(x.shape[-1] // values.numel())

    def _check_tokens(self, x: Tensor) -> None:
        tokens = self.scale_norm.numel() // (self.heads if self.per_head else 1)
        if self.axis == -2 and x.shape[-2] != tokens:
            raise ValueError(
                f"got {x.shape[-2]} tokens, and the quantiser has scales for {tokens}; keep the input size of the "
                'conversion, or convert with activation_scale="tensor"'
            )

    def _first_scale(self, x: Tensor) -> Tensor:
        """The scales from this batch: kept while training or calibrating, only used while evaluating."""
        training = self.training or self.switches.calibrating
        if training and x.numel() == 0:
            raise ValueError("a batch without images gives no scales; start with one that has some")
        scale = self._statistics(x)
        if self.switches.calibrating:
            self._seen.append(scale)
        elif training:
            self._keep(mean_over_ranks(scale))
            return self._kept_scale()
        else:
            self.switches.warn_once(
                "this OFQ model is not calibrated: each batch is quantised with scales of its own. Call "
                "hf_ext.ofq_quantizer.calibrate(model, batches), or train a step, first"
            )
        return scale

    @torch.no_grad()
    def _statistics(self, x: Tensor) -> Tensor:
        x = x.detach().float()
        if self.bias_in is not None:
            x = x + self._along(self.bias_in, x).float()
        if x.dim() == 4 and self.axis == -1:
            x = x.transpose(1, 2).flatten(2)
        if self.per_head and self.axis == -2:
            x = x.transpose(1, 2).flatten(1, 2)
        return ops.lsq_init(x, self.bits, self.positive, self.axis)

    @torch.no_grad()
    def _keep(self, scale: Tensor) -> None:
        """Unless one is NaN or inf, on whatever rank: then the next batch starts anew. The host waits for nothing."""
        first = scale.isfinite().all() & ~self.initialized
        self.scale_norm.copy_(torch.where(first, scale, self.scale_norm))
        self.initialized.logical_or_(first)
        self._tries += 1

    def _kept_scale(self) -> Tensor:
        """The scales; NaN where none were kept, so that the loss tells of the batch.

        The sum keeps nothing for backward: a checkpoint's recomputation, which finds scales, keeps as much without it.
        """
        return self.scale_norm + torch.where(self.initialized, 0.0, torch.nan)

    @torch.no_grad()
    def calibrated_scale(self) -> Tensor | None:
        """The mean of the scales that the calibration saw, over its batches and the ranks; None if it did not run."""
        return mean_over_ranks(torch.stack(self._seen).mean(0)) if self._seen else None

    @torch.no_grad()
    def take(self, scale: Tensor) -> None:
        """Keep these scales."""
        self.scale_norm.copy_(scale)
        self.initialized.fill_(True)
        self._ready = True

    def forget_calibration(self) -> None:
        """Drop what the calibration saw."""
        self._seen = []

    def finite(self) -> bool:
        """Whether all scales and shifts are finite."""
        return all(bool(parameter.isfinite().all()) for parameter in self.parameters())

    def reset(self) -> None:
        """Back to the state of a new quantiser."""
        with torch.no_grad():
            self.scale_norm.fill_(1.0)
            for shift in (self.bias_in, self.bias_out):
                if shift is not None:
                    shift.zero_()
            self.initialized.fill_(False)
        self._ready = False

    def synchronize(self) -> None:
        """Read `ready` from the saved flag: after tensors were replaced from outside."""
        self._ready = not self.initialized.is_meta and bool(self.initialized)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, tensor in (*self._parameters.items(), *self._buffers.items()):
            if tensor is not None:  # a checkpoint of the unquantised model has none of them
                state_dict.setdefault(prefix + name, tensor.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.synchronize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ActivationQuantizer":
        exact = self.scale_norm.data
        super()._apply(fn, recurse)
        restore_float32(self.scale_norm, exact)
        self.synchronize()
        return self


def restore_float32(parameter: nn.Parameter, exact: Tensor) -> None:
    """Undo the rounding of a cast to half precision, not the move to another device."""
    if parameter.dtype != exact.dtype and not parameter.is_meta:
        parameter.data = exact.to(parameter.device)


@torch.compiler.assume_constant_result
def _read(flag: Tensor) -> bool:
    return bool(flag)


def mean_over_ranks(scale: Tensor) -> Tensor:
    """The same on all of them."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        scale = scale.clone()
        dist.all_reduce(scale)
        scale /= dist.get_world_size()
    return scale
