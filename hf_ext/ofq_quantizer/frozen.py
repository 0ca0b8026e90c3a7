"""Quantised layers that hold the integers of their weights, and no latent weights any more."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from hf_ext.ofq_quantizer import ops
from hf_ext.ofq_quantizer.layers import QuantConv2d, QuantLinear, QuantWeight, linear
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer, Switches, restore_float32

Method = Literal["statsq", "lsq"]


@dataclass(frozen=True, eq=False)
class IntegerWeight:
    """A weight as codes and a scale a row.

    Attributes:
        codes: int8 (rows, columns), in [-2^(bits-1), 2^(bits-1) - 1]. The columns of a convolution are its channels
            and kernel, flattened.
        scale: (rows,) float32.
        bits: 2 to 4 for StatsQ, 8 for LSQ.
        method: "statsq", whose levels lie between the codes (c + 1/2), or "lsq".
    """

    codes: Tensor
    scale: Tensor
    bits: int
    method: Method

    @property
    def integers(self) -> Tensor:
        """int8 (rows, columns), what a product multiplies: LSQ's codes, 2c + 1 for StatsQ's."""
        return self.codes if self.method == "lsq" else self.codes * 2 + 1

    @property
    def step(self) -> Tensor:
        """(rows,): the weight is integers times step."""
        return self.scale if self.method == "lsq" else self.scale / 2**self.bits

    def dequantize(self) -> Tensor:
        """(rows, columns) float32, bit for bit what the model multiplies by."""
        return self.integers.float() * self.step[:, None]


class FrozenWeight(QuantWeight):
    """Goes before a quantised layer; computes the same as it, bit for bit.

    Buffers `integers` int8 (rows, columns) and `step` (rows,) float32 stand in the place of the parameter `weight`,
    which is computed from them on every access.
    """

    integers: Tensor
    step: Tensor
    method: Method
    weight_shape: torch.Size

    def hold(self, weight: IntegerWeight) -> None:
        """Take these integers for the latent weight, which is dropped."""
        latent = self._parameters.pop("weight")
        self.method, self.weight_shape = weight.method, latent.shape
        self.weight_scale_norm = None
        self.register_buffer("integers", weight.integers)
        self.register_buffer("step", weight.step)
        self.register_buffer("_like", latent.new_empty(0), persistent=False)  # tells dtype and device

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, in the dtype of the model."""
        return (self.integers.float() * self.step[:, None]).to(self._like.dtype).view(self.weight_shape)

    def weight_quantizer(self) -> ops.WeightQuantizer:
        """That of `operand`."""
        return ops.WeightQuantizer(self.weight_bits, self.switches.config.weight_scale_coefficient, self.step)

    @property
    def operand(self) -> Tensor:
        """What a product takes for the weight. LSQ finds its integers in the dequantised weight again."""
        return self.weight.flatten(1) if self.method == "lsq" else self.integers

    def integer_weight(self) -> IntegerWeight:
        """What `hold` was given."""
        if self.method == "lsq":
            return IntegerWeight(self.integers, self.step, self.weight_bits, "lsq")
        codes = (self.integers - 1).div(2, rounding_mode="floor")
        return IntegerWeight(codes, self.step * 2**self.weight_bits, self.weight_bits, "statsq")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenWeight":
        exact = self.step
        super()._apply(fn, recurse)
        restore_float32(self.step, exact)
        return self


class FrozenLinear(FrozenWeight, QuantLinear):
    """A linear layer of integers."""

    @classmethod
    def of(cls, weight: IntegerWeight, bias: Tensor | None, switches: Switches, like: Tensor) -> "FrozenLinear":
        """A layer of its own, without a quantiser of its input; `like` tells dtype and device."""
        rows, columns = weight.codes.shape
        layer = nn.Linear(columns, rows, bias=False, device=like.device, dtype=like.dtype)
        layer.__class__ = QuantLinear
        layer.set_up_weight(switches, weight.bits, learnable_scale=False)
        layer.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        layer.__class__ = cls
        layer.hold(weight)
        return layer

    def product(self, x: Tensor, quantizer: ActivationQuantizer, bias: Tensor | None) -> Tensor:
        if not self.switches.rounding:
            return super().product(x, quantizer, bias)
        self.executed = True
        tokens = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        y = linear(tokens, self.operand, bias, quantizer, self.weight_quantizer())
        return y.view(*x.shape[:-1], self.out_features)

    def low_bit_weights(self) -> dict[str, Tensor]:
        """None: there is nothing to anneal."""
        return {}


class FrozenConv2d(FrozenWeight, QuantConv2d):
    """A patch embedding of integers."""
