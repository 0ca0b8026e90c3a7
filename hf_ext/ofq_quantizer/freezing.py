"""The integers of a quantised model's weights, and models that keep nothing else of these."""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import Tensor, nn

from hf_ext.ofq_quantizer import ops
from hf_ext.ofq_quantizer.attention import QuantAttention
from hf_ext.ofq_quantizer.calibration import require_calibrated
from hf_ext.ofq_quantizer.convert import quantized_switches
from hf_ext.ofq_quantizer.frozen import FrozenConv2d, FrozenLinear, FrozenWeight, IntegerWeight
from hf_ext.ofq_quantizer.layers import QuantLinear, QuantWeight

__all__ = ["IntegerWeight", "drop_latents", "freeze", "frozen_copy", "integer_weights", "require_finite_weights"]


@torch.no_grad()
def freeze(model: nn.Module) -> dict[str, IntegerWeight]:
    """The integer weights of a quantised model by the name of their layer.

    QKR: "<attention>.qk" (heads * width, width) is that of the product of queries and keys and, where one layer makes
    queries, keys and values, "<attention>.v" that of the values.

    Raises:
        ValueError: a weight has NaN or inf, with the layer and the row; the model is not quantised.
    """
    require_finite_weights(model)
    weights = dict(integer_weights(model))
    for name, weight in weights.items():
        _require_finite(name, weight.scale[:, None])
    return weights


def require_finite_weights(model: nn.Module) -> None:
    """Raise where the weight of a quantised layer has no codes.

    Raises:
        ValueError: a weight has NaN or inf, with the layer and the row; the model is not quantised.
    """
    quantized_switches(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantWeight) and not module.weight.is_meta:
            _require_finite(name, module.weight)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy for inference without latent weights, and in evaluation mode; it computes the same, bit for bit.

    Raises:
        ValueError: as `freeze` does; the model is not calibrated, or computes in integers already.
    """
    if any(switch.integer for switch in quantized_switches(model)):
        raise ValueError(f"this {type(model).__name__} was made by to_int8; use the model that to_int8 was given")
    require_calibrated(model)
    return drop_latents(deepcopy(model))


@torch.no_grad()
def drop_latents(model: nn.Module) -> nn.Module:
    """Replace the latent weights by their integers, in place."""
    weights = freeze(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantAttention) and module.reparametrized and module.qk is None:
            _drop_factors(module, *(weights.get(f"{name}.{child}".removeprefix(".")) for child in ("qk", "v")))
        elif isinstance(module, QuantWeight) and name in weights and not isinstance(module, FrozenWeight):
            module.__class__ = FrozenLinear if isinstance(module, QuantLinear) else FrozenConv2d
            module.hold(weights[name])
    return model.eval()


def _drop_factors(attention: QuantAttention, product: IntegerWeight, values: IntegerWeight | None) -> None:
    like, switches = attention.value_weight, attention.switches
    attention.u = attention.query_bias_direction()
    attention.qk = FrozenLinear.of(product, None, switches, like)
    if values is not None:
        attention.v = FrozenLinear.of(values, attention.factor(2)[1], switches, like)
    for layer in attention.projections if values is not None else attention.projections[:2]:
        del layer.weight
        layer.weight = torch.empty(layer.out_features, layer.in_features, dtype=like.dtype, device="meta")
        layer.bias = None


@torch.no_grad()
def integer_weights(model: nn.Module) -> Iterator[tuple[str, IntegerWeight]]:
    """What `freeze` returns; the scale of a row with NaN or inf is one of them, and its codes mean nothing."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            yield name, module.integer_weight()
        elif isinstance(module, QuantWeight) and not getattr(module, "reparametrized", False):
            yield name, _integers(module.weight.flatten(1), module.weight_quantizer())
        elif isinstance(module, QuantAttention):
            for child, weight in module.low_bit_weights().items():
                full = f"{name}.{child}".removeprefix(".")
                yield full, _integers(weight, module.projections[-1].weight_quantizer())


def _integers(weight: Tensor, quantizer: ops.WeightQuantizer) -> IntegerWeight:
    if quantizer.scale is None:
        codes, scale = ops.statsq_codes(weight, quantizer.bits, quantizer.coefficient)
    else:
        codes, scale = ops.weight_integers(weight, quantizer)
        scale = scale.where(weight.isfinite().all(1), torch.nan)
    return IntegerWeight(codes.to(torch.int8), scale, quantizer.bits, "statsq" if quantizer.scale is None else "lsq")


def _require_finite(name: str, weight: Tensor) -> None:
    broken = ~weight.flatten(1).isfinite().all(1)
    if broken.any():
        raise ValueError(
            f"{name}: row {int(broken.nonzero()[0])} of its weight, or the scale of that row, is NaN or inf, as in "
            f"{int(broken.sum())} of {len(weight)} rows; these have no codes, so go back to a checkpoint without"
        )
