"""Linear layers and patch embeddings with low-bit weights and inputs.

A layer of the host becomes one of these by a change of its class: its parameters stay the same objects under their own
names, and the tensors of the quantiser are added beside them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ext.ofq_quantizer import ops
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer, Switches, mean_over_ranks, restore_float32


class QuantWeight(nn.Module):
    """What both kinds of layer share: the weight's quantiser, and how it travels through checkpoints.

    `weight_scale_norm` is the learnable scale a row of a boundary layer (LSQ, 8 bits); None where StatsQ takes the
    scale from the row itself. `scale_was_loaded`: it came with a checkpoint.
    """

    weight: Tensor
    switches: Switches
    weight_bits: int
    weight_scale_norm: nn.Parameter | None
    scale_was_loaded: bool
    input_quantizer: ActivationQuantizer | None
    executed: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            f"a {type(self).__name__} is not built but made of a layer by hf_ext.ofq_quantizer.quantize. PEFT's LoRA "
            "builds layers like the one it adapts: leave patch embeddings out of its target_modules"
        )

    def set_up_weight(self, switches: Switches, weight_bits: int, learnable_scale: bool) -> None:
        """Turn a layer of the host, whose class has just been changed, into a quantised one."""
        self.switches, self.weight_bits, self.executed = switches, weight_bits, False
        self.input_quantizer, self.scale_was_loaded = None, False
        scale = self.first_weight_scale(self.weight) if learnable_scale else None
        self.register_parameter("weight_scale_norm", None if scale is None else nn.Parameter(scale))

    def first_weight_scale(self, weight: Tensor) -> Tensor:
        """(rows,) float32: LSQ's initial scales for these weights."""
        return ops.lsq_init(weight.detach().float().flatten(1), self.weight_bits, axis=0)

    def renew_weight_scale(self) -> None:
        """Where training gives the input its first values: the weight may be another than that of the conversion."""
        a = self.input_quantizer
        if self.weight_scale_norm is not None and a.training and a.switches.rounding and not a.ready:
            self.take_first_weight_scale()

    @torch.no_grad()
    def take_first_weight_scale(self) -> None:
        """The scales that `weight_scale_norm` starts from, of the weight as it is now.

        Not where a checkpoint brought them, where the input has values already, or for a row with NaN or inf.
        """
        if self.weight_scale_norm is None:
            return
        first = self.weight_scale_norm if self.scale_was_loaded else self.first_weight_scale(self.weight)
        first = mean_over_ranks(first)
        new = first.isfinite() & ~self.input_quantizer.initialized
        self.weight_scale_norm.copy_(torch.where(new, first, self.weight_scale_norm))

    def ran(self) -> None:
        """Note that a forward passes through the quantised code; inside `full_precision` none does."""
        if self.switches.rounding:
            self.executed = True

    def weight_quantizer(self) -> ops.WeightQuantizer:
        """The weight's quantiser, as the operations take it."""
        return ops.WeightQuantizer(
            self.weight_bits, self.switches.config.weight_scale_coefficient, self.weight_scale_norm
        )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        weight = state_dict.get(key)
        if weight is not None and weight.dim() == self.weight.dim() + 1 and weight.shape[0] == 1:
            state_dict[key] = weight = weight[0]  # the axis by which our files stop loaders that do not know us
        if self.weight_scale_norm is not None:
            self._complete_scale(state_dict, prefix + "weight_scale_norm", weight)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _complete_scale(self, state_dict: dict[str, Any], key: str, weight: Tensor | None) -> None:
        if weight is None:  # hosts drop the head's weight, and not what they do not know, for another number of classes
            state_dict.pop(key, None)
        elif weight.shape == self.weight.shape:
            self.scale_was_loaded = key in state_dict
            if not self.scale_was_loaded:  # a checkpoint of the unquantised model
                state_dict[key] = self.first_weight_scale(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantWeight":
        exact = None if self.weight_scale_norm is None else self.weight_scale_norm.data
        super()._apply(fn, recurse)
        if exact is not None:
            restore_float32(self.weight_scale_norm, exact)
        return self


class QuantLinear(QuantWeight, nn.Linear):
    """y = ActQ(x) WQ(W)^T + b.

    `input_quantizer` is None where an attention quantises the input once for several of these layers and calls
    `product`. `reparametrized`: the attention reads this weight only as a factor of a product (QKR).
    """

    reparametrized: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, ..., in_features) -> (batch, ..., out_features).

        Raises:
            RuntimeError: somebody else than its attention calls a layer whose input the attention quantises.
        """
        if self.input_quantizer is None:
            raise RuntimeError(
                "the input of this layer is quantised by its attention, which has to call it; a wrapper such as PEFT's "
                "LoRA cannot stand between them: leave queries, keys and values out of target_modules"
            )
        self.renew_weight_scale()
        return self.product(x, self.input_quantizer, self.bias)

    def product(self, x: Tensor, quantizer: ActivationQuantizer, bias: Tensor | None) -> Tensor:
        """The same with a quantiser and a bias of the caller's."""
        self.ran()
        tokens = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        y = linear(tokens, self.weight, bias, quantizer, self.weight_quantizer())
        return y.view(*x.shape[:-1], self.out_features)

    def low_bit_weights(self) -> dict[str, Tensor]:
        """The weight that StatsQ rounds, under no further name."""
        return {} if self.reparametrized or self.weight_scale_norm is not None else {"": self.weight}


class QuantConv2d(QuantWeight, nn.Conv2d):
    """A patch embedding: a convolution without overlap and padding is a linear layer of the patches."""

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, in_channels, height, width) -> (batch, out_channels, height / patch, width / patch)."""
        self.ran()
        self.renew_weight_scale()
        patches, grid = self.patches(x)
        y = linear(patches, self.weight.flatten(1), self.bias, self.input_quantizer, self.weight_quantizer())
        return y.transpose(1, 2).unflatten(2, grid)

    def patches(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(batch, rows * columns, in_channels * kernel) from images, and (rows, columns)."""
        (tall, wide), (rows, columns) = self.kernel_size, (x.shape[2] // self.stride[0], x.shape[3] // self.stride[1])
        x = x[:, :, : rows * tall, : columns * wide].unflatten(3, (columns, wide)).unflatten(2, (rows, tall))
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), (rows, columns)


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, quantizer: ActivationQuantizer, weights: ops.WeightQuantizer
) -> Tensor:
    """x (batch, tokens, in) -> (batch, tokens, out), rounded unless the model is in `full_precision`."""
    if not quantizer.switches.rounding:
        return F.linear(quantizer.shifted(x), weight, bias)
    quantizer.switches.tell_if_plain(x, (x.shape[-1], quantizer.largest, ops.largest_of_weight(weight, weights)))
    return ops.quantized_linear(x, weight, bias, quantizer.activation(x), weights)
