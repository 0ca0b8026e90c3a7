"""Confidence-guided annealing (CGA, arXiv 2302.02210): in the last part of training, weights that are far from every
rounding threshold stand still, and the others settle.
"""

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging

from hf_ext.checks import is_number
from hf_ext.ofq_quantizer.attention import QuantAttention
from hf_ext.ofq_quantizer.config import OFQConfig
from hf_ext.ofq_quantizer.convert import quantized_switches
from hf_ext.ofq_quantizer.layers import QuantLinear
from hf_ext.ofq_quantizer.ops import low_confidence

logger = logging.get_logger(__name__)


class Annealed(NamedTuple):
    """A weight that StatsQ rounds, itself or as a factor: how it is quantised, and which of its elements learn now."""

    config: OFQConfig
    learning: Callable[[], Tensor]


class ConfidenceAnnealing:
    """Of the low-bit weights, lets only those learn that lie near a rounding threshold: within `boundary_range` steps.

    At every step, from the weights as they are then: gradients of all others become 0 before anybody clips them, and
    what the optimizer does to these others all the same (decay, momentum) is undone bit for bit. Biases, norms, scales,
    shifts and 8-bit layers learn on. Under QKR an element of W_q or W_k stands still when all entries of W_q^T W_k that
    depend on it do. There is nothing to save: after a resume, attach again.

    Holds a second copy of the low-bit weights while the optimizer steps, and none in between.

    Args:
        model: a quantised model; may be wrapped (DDP, torch.compile), not sharded.
        boundary_range: (0, 0.5], in steps between two levels; 0.5 lets all weights between the outermost levels learn.

    Raises:
        ValueError: boundary_range; a model that is not quantised, sharded over processes, or without gradients.
    """

    def __init__(self, model: nn.Module, boundary_range: float = 0.005) -> None:
        check_boundary_range(boundary_range)
        self.boundary_range = boundary_range
        self._switches = quantized_switches(model)
        found = annealed_weights(model, boundary_range)
        self._weights = {weight: how for weight, how in found.items() if weight.requires_grad}
        if not self._weights:
            raise ValueError("no low-bit weight of this model requires gradients, so that there is nothing to anneal")
        if any(isinstance(weight, DTensor) for weight in self._weights):
            raise ValueError("annealing needs whole weights, and these are sharded; train with DDP instead of FSDP")
        self._bands: dict[nn.Parameter, float] = {}
        self._kept: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}
        self._learning: list[Tensor] = []
        self._handles: list[Any] = []

    def attach(self, optimizer: Any) -> "ConfidenceAnnealing":
        """Anneal from now on, in each step of this optimizer; also through accelerate's wrapper, after `prepare`.

        Raises:
            TypeError: an optimizer without step hooks.
            ValueError: the model is being annealed already; the optimizer lacks low-bit weights that learn.
        """
        optimizer = stepping(optimizer)
        if any(switches.boundary_range is not None for switches in self._switches):
            raise ValueError("this model is being annealed already; call detach() on that ConfidenceAnnealing first")
        held = {weight for group in optimizer.param_groups for weight in group["params"]}
        if missing := self._weights.keys() - held:
            raise ValueError(
                f"the optimizer does not hold {len(missing)} of the {len(self._weights)} low-bit weights that require "
                "gradients; attach to the optimizer that holds all of them, or set requires_grad to False"
            )
        self._bands = {weight: self._band(weight, how.config) for weight, how in self._weights.items()}
        for switches in self._switches:
            switches.boundary_range = self.boundary_range
        self._handles = [weight.register_post_accumulate_grad_hook(self._mask) for weight in self._weights]
        self._handles.append(optimizer.register_step_pre_hook(self._before_step))
        restoring = optimizer.register_step_post_hook(self._after_step)
        restoring.hooks_dict_ref().move_to_end(restoring.id, last=False)  # before hooks that look at the weights
        self._handles.append(restoring)
        return self

    def detach(self) -> None:
        """Let all weights learn again; undoes all of `attach`."""
        for handle in self._handles:
            handle.remove()
        for switches in self._switches if self._handles else ():
            switches.boundary_range = None
        self._handles, self._kept = [], {}

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    @property
    def frozen_share(self) -> float:
        """Share of the low-bit weights that stood still in the last step; waits for the device.

        Raises:
            RuntimeError: before the first step.
        """
        if not self._learning:
            raise RuntimeError("frozen_share is of the last step: attach(optimizer) and take one first")
        return 1 - sum(map(int, self._learning)) / sum(weight.numel() for weight in self._weights)

    def _mask(self, weight: nn.Parameter) -> None:
        """After each backward, also within an accumulation."""
        _clear(weight.grad, self._weights[weight].learning())

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self._warn_of_large_steps(optimizer)
        self._learning = []
        for weight, annealed in self._weights.items():
            learning = annealed.learning()
            _clear(weight.grad, learning)  # once more: the loop may have added something since backward
            self._kept[weight] = learning, weight.detach().clone()
            self._learning.append(learning.sum())

    @torch.no_grad()
    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        for weight, (learning, before) in self._kept.items():
            weight.copy_(torch.where(learning, weight, before))
        self._kept = {}

    def _band(self, weight: Tensor, config: OFQConfig) -> float:
        """boundary_range * s / n, s the mean scale of the rows."""
        scale = config.weight_scale_coefficient * float(weight.detach().abs().mean())
        return self.boundary_range * scale / 2 ** (config.w_bits - 1)

    def _warn_of_large_steps(self, optimizer: Any) -> None:
        for group in optimizer.param_groups if self._bands else ():
            bands = [self._bands[weight] for weight in group["params"] if weight in self._bands]
            lr = float(group["lr"])
            if bands and lr > median(bands):
                logger.warning(
                    f"lr={lr:.2g} is more than boundary_range * s / n, {median(bands):.2g} in most layers: with "
                    "steps about as long as lr (AdamW, Lion) everything freezes within a few of them. Use a smaller lr "
                    "(published: 1e-5) or a larger boundary_range."
                )
                self._bands = {}


def check_boundary_range(boundary_range: float) -> None:
    if not is_number(boundary_range) or not 0 < boundary_range <= 0.5:
        raise ValueError(
            f"boundary_range={boundary_range!r} is outside (0, 0.5], in quantisation steps; published: 0.005"
        )


def stepping(optimizer: Any) -> Any:
    """The optimizer whose step is really called, out of accelerate's wrapper.

    Raises:
        TypeError: its step runs no hooks.
    """
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    # torch marks a step that runs hooks; wrappers such as timm's Lookahead have the methods, and never call the hooks.
    if not hasattr(optimizer, "register_step_pre_hook") or not getattr(type(optimizer).step, "hooked", False):
        raise TypeError(
            f"the step of {type(optimizer).__name__} runs no hooks, so that weights cannot be restored after it: use a "
            "subclass of torch.optim.Optimizer that is not a wrapper of another"
        )
    return optimizer


def annealed_weights(model: nn.Module, boundary_range: float) -> dict[nn.Parameter, Annealed]:
    """Every parameter that annealing holds still, whole or in part."""
    weights: dict[nn.Parameter, Annealed] = {}
    for module in model.modules():
        if isinstance(module, QuantLinear):
            config = module.switches.config
            for weight in module.low_bit_weights().values():
                weights[weight] = Annealed(config, partial(_near_threshold, weight, config, boundary_range))
        elif isinstance(module, QuantAttention) and module.reparametrized:
            weights |= _factors(module, boundary_range)
    return weights


def _factors(attention: QuantAttention, boundary_range: float) -> dict[nn.Parameter, Annealed]:
    """The parameters that QKR reads as factors: one for query, key and value, or two for query and key."""
    config, projections = attention.switches.config, attention.projections
    if len(projections) == 1:
        return {projections[0].weight: Annealed(config, partial(_joint, attention, boundary_range))}
    roles = () if config.reference_compat else (0, 1)
    return {projections[i].weight: Annealed(config, partial(_factor, attention, boundary_range, i)) for i in roles}


@torch.no_grad()
def _near_threshold(weight: Tensor, config: OFQConfig, boundary_range: float) -> Tensor:
    return low_confidence(weight, config.w_bits, boundary_range, config.weight_scale_coefficient)


@torch.no_grad()
def _product(attention: QuantAttention, boundary_range: float) -> Tensor:
    """Which entries of A learn (heads, width, width): A_h[i, j] is of column i of W_q,h and column j of W_k,h."""
    learning = _near_threshold(attention.qk_product(), attention.switches.config, boundary_range)
    return learning.unflatten(0, (attention.heads, -1))


def _columns(attention: QuantAttention, product: Tensor, role: int) -> Tensor:
    """Where W_q (role 0) or W_k (1), (heads * head_dim, width), learns: columns of a head that reach such an entry."""
    return product.any(2 - role).repeat_interleave(len(attention.query_weight) // attention.heads, 0)


def _factor(attention: QuantAttention, boundary_range: float, role: int) -> Tensor:
    return _columns(attention, _product(attention, boundary_range), role)


def _joint(attention: QuantAttention, boundary_range: float) -> Tensor:
    config = attention.switches.config
    value = _near_threshold(attention.value_weight, config, boundary_range)
    if config.reference_compat:
        return torch.cat([torch.ones_like(value, dtype=torch.bool)] * 2 + [value])
    product = _product(attention, boundary_range)
    return torch.cat([_columns(attention, product, 0), _columns(attention, product, 1), value])


@torch.no_grad()
def _clear(gradient: Tensor | None, learning: Tensor) -> None:
    """Set to 0 what belongs to elements that stand still; a product with 0 would turn inf into NaN."""
    if gradient is not None:
        gradient.masked_fill_(~learning, 0)


class ConfidenceAnnealingCallback(TrainerCallback):
    """Anneals the last part of a run of `Trainer`; the `ConfidenceAnnealing` is `.annealing`.

    Args:
        start_step: annealing begins when so many steps are done.
        start_ratio: the same as a share of `max_steps`, in [0, 1]. Give one of the two.
        boundary_range: as for `ConfidenceAnnealing`.

    Raises:
        ValueError: both starts or none, or a value outside its range.
    """

    def __init__(
        self, start_step: int | None = None, start_ratio: float | None = None, boundary_range: float = 0.005
    ) -> None:
        if (start_step is None) == (start_ratio is None):
            raise ValueError(f"give one of start_step and start_ratio, not {start_step!r} and {start_ratio!r}")
        if start_step is not None and (type(start_step) is not int or start_step < 0):
            raise ValueError(f"start_step={start_step!r} is no number of steps; start_ratio takes a share of them")
        if start_ratio is not None and not (is_number(start_ratio) and 0 <= start_ratio <= 1):
            raise ValueError(f"start_ratio={start_ratio!r} is outside [0, 1]; start_step takes a number of steps")
        check_boundary_range(boundary_range)
        self.start_step, self.start_ratio, self.boundary_range = start_step, start_ratio, boundary_range
        self.annealing: ConfidenceAnnealing | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        """Also refuses what cannot be annealed: at the start of the run, not when annealing begins."""
        self.on_train_end(args, state, control)  # an earlier run may have ended with an exception
        self.annealing = ConfidenceAnnealing(model, self.boundary_range)
        stepping(optimizer)

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
        if not self.annealing.attached and self._is_due(state):
            self.annealing.attach(optimizer)

    def _is_due(self, state: Any) -> bool:
        if self.start_step is not None:
            return state.global_step >= self.start_step
        return state.global_step / state.max_steps >= self.start_ratio  # a product would round 0.55 * 100 up

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.annealing is not None:
            self.annealing.detach()
