"""What of a model was quantised, and what was not and why."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor, nn

from hf_ext.ofq_quantizer import ops
from hf_ext.ofq_quantizer.attention import QuantAttention
from hf_ext.ofq_quantizer.convert import quantized_switches
from hf_ext.ofq_quantizer.freezing import integer_weights
from hf_ext.ofq_quantizer.frozen import FrozenWeight, IntegerWeight
from hf_ext.ofq_quantizer.layers import QuantConv2d, QuantLinear, QuantWeight
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer

COLUMNS = (
    "layer",
    "kind",
    "status",
    "w bits",
    "a bits",
    "codes used",
    "clipped",
    "executed",
    "packed bytes",
    "fp32 bytes",
)


@dataclass(frozen=True)
class LayerReport:
    """One linear layer or convolution of the full-precision model, or a product of queries and keys (QKR).

    Attributes:
        name: of the module, or "<attention>.qk".
        kind: "linear", "conv" or "qk_product".
        status: "quantized", "skipped" (by skip_modules) or "full_precision".
        reason: why it is not quantised, what stands for it, or how many rows have NaN or inf; None otherwise.
        w_bits, a_bits: of weight and input; None where it is not quantised, or where "<attention>.qk" stands for it.
        codes_used: how many different codes the weight has; None where it has NaN or inf.
        clipped_share: share of weights beyond the scale, which the quantiser clips; None once latent weights are gone,
            or where they have NaN or inf.
        executed: whether a forward has passed through the quantised code since the conversion.
        packed_bytes, fp32_bytes: of the weight, packed and in the full-precision model; packed without its scales. A
            product stands in no full-precision model, and has 0.
    """

    name: str
    kind: Literal["linear", "conv", "qk_product"]
    status: Literal["quantized", "skipped", "full_precision"]
    reason: str | None
    w_bits: int | None
    a_bits: int | None
    codes_used: int | None
    clipped_share: float | None
    executed: bool
    packed_bytes: int
    fp32_bytes: int


@dataclass(frozen=True)
class OFQReport:
    """All layers; prints as a table.

    `total_bytes` is that of the tensors which `save_packed` writes. Its files have in addition a header with the
    tensors' names and shapes, about 100 bytes each, and config.json.
    """

    layers: list[LayerReport]
    total_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(*COLUMNS, title=f"{self.total_bytes / 2**20:.2f} MiB packed")
        for layer in self.layers:
            status = layer.status if layer.reason is None else f"{layer.status}: {layer.reason}"
            clipped = None if layer.clipped_share is None else f"{layer.clipped_share:.2%}"
            numbers = (layer.w_bits, layer.a_bits, layer.codes_used, clipped)
            yes = "yes" if layer.executed else "no"
            shown = ("-" if number is None else str(number) for number in numbers)
            table.add_row(
                layer.name, layer.kind, status, *shown, yes, f"{layer.packed_bytes:,}", f"{layer.fp32_bytes:,}"
            )
        yield table

    def __str__(self) -> str:
        console = Console(width=160)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


@torch.no_grad()
def report(model: nn.Module) -> OFQReport:
    """Every linear layer and convolution of a quantised model: bits, codes, clipping, whether it ran, bytes.

    Raises:
        ValueError: the model is not quantised.
    """
    quantized_switches(model)
    weights = dict(integer_weights(model))
    layers = list(_rows(model, weights))
    return OFQReport(layers, _total_bytes(model, weights))


def _rows(model: nn.Module, weights: dict[str, IntegerWeight]) -> Iterator[LayerReport]:
    for name, module in model.named_modules():
        if isinstance(module, QuantAttention) and f"{name}.qk" in weights:
            a_bits = module.input_quantizer.bits
            yield _quantized(
                f"{name}.qk", "qk_product", weights[f"{name}.qk"], a_bits, module, _clipped_product(module)
            )
        elif isinstance(module, FrozenWeight) and f"{name.rpartition('.')[0]}.qk" in weights and name in weights:
            yield from _frozen_part(model, name, module, weights)
        elif isinstance(module, QuantWeight) and getattr(module, "reparametrized", False):
            yield _factor(model, name, module, weights)
        elif isinstance(module, QuantWeight) and name in weights:
            kind = "conv" if isinstance(module, QuantConv2d) else "linear"
            clipped = None if isinstance(module, FrozenWeight) else _clipped(module.weight, module.weight_quantizer())
            yield _quantized(name, kind, weights[name], _input_bits(model, name, module), module, clipped)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            yield _left(name, module)


def _quantized(
    name: str, kind: Any, weight: IntegerWeight, a_bits: int, module: Any, clipped: float | None
) -> LayerReport:
    (rows, columns), broken = weight.codes.shape, int((~weight.scale.isfinite()).sum())
    return LayerReport(
        name,
        kind,
        "quantized",
        f"NaN or inf in {broken} of {rows} rows" if broken else None,
        weight.bits,
        a_bits,
        None if broken else len(weight.codes.unique()),
        None if broken else clipped,
        module.executed,
        rows * -(-columns * weight.bits // 8),
        0 if kind == "qk_product" else weight.codes.numel() * 4,
    )


def _factor(model: nn.Module, name: str, layer: QuantLinear, weights: dict[str, IntegerWeight]) -> LayerReport:
    """A layer that QKR reads as factors; where it makes the values too, those are its own."""
    attention = name.rpartition(".")[0]
    values = weights.get(f"{attention}.v")
    a_bits = model.get_submodule(attention).input_quantizer.bits
    bytes_ = layer.out_features * layer.in_features * 4
    reason = f"queries and keys as {attention}.qk"
    if values is None:
        return LayerReport(name, "linear", "quantized", reason, None, a_bits, None, None, layer.executed, 0, bytes_)
    latent = None if layer.weight.is_meta else _clipped(layer.weight.chunk(3)[2], layer.weight_quantizer())
    row = _quantized(name, "linear", values, a_bits, layer, latent)
    reason = reason if row.reason is None else f"{reason}; {row.reason} of the values"
    return LayerReport(**asdict(row) | {"reason": reason, "fp32_bytes": bytes_})


def _frozen_part(
    model: nn.Module, name: str, layer: FrozenWeight, weights: dict[str, IntegerWeight]
) -> Iterator[LayerReport]:
    """What became of the projections of an attention under QKR, once nothing but integers is kept."""
    attention, _, part = name.rpartition(".")
    if part == "qk":  # has its row as the product
        return
    row = _quantized(name, "linear", weights[name], _input_bits(model, name, layer), layer, None)
    if part == "v":  # the third of a layer that made all three
        whole = {"name": f"{attention}.qkv", "fp32_bytes": 3 * row.fp32_bytes}
        row = replace(row, reason=f"queries and keys as {attention}.qk", **whole)
    yield row


def _left(name: str, module: nn.Module) -> LayerReport:
    status, reason = getattr(module, "left_as_is", ("full_precision", "came into the model after the conversion"))
    kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
    bytes_ = module.weight.numel() * 4
    stored = module.weight.numel() * module.weight.element_size()
    return LayerReport(name, kind, status, reason, None, None, None, None, False, stored, bytes_)


def _input_bits(model: nn.Module, name: str, layer: QuantWeight) -> int:
    shared = model.get_submodule(name.rpartition(".")[0])
    return (layer.input_quantizer or shared.input_quantizer).bits


def _clipped(weight: Tensor, quantizer: ops.WeightQuantizer) -> float:
    weight = weight.detach().float().flatten(1)
    if quantizer.scale is None:
        outside = weight.abs() > quantizer.coefficient * weight.abs().mean(1, keepdim=True)
    else:
        low, high = ops.code_range(quantizer.bits, False)
        ratio = weight / quantizer.scale[:, None].clamp(min=ops.SMALLEST_SCALE)
        outside = (ratio < low) | (ratio > high)
    return outside.float().mean().item()


def _clipped_product(attention: QuantAttention) -> float | None:
    weights = attention.low_bit_weights()
    return _clipped(weights["qk"], attention.projections[-1].weight_quantizer()) if weights else None


def _total_bytes(model: nn.Module, weights: dict[str, IntegerWeight]) -> int:
    """Codes and scales of the integer weights, and every other tensor that stays."""
    packed = sum(w.codes.shape[0] * (-(-w.codes.shape[1] * w.bits // 8) + 4) for w in weights.values())
    modules = list(model.modules())
    gone = {id(tensor) for module in modules for tensor in _dropped(module)}
    stays = [tensor for tensor in model.state_dict(keep_vars=True).values() if id(tensor) not in gone]
    new = [tensor for module in modules if _has_factors(module) for tensor in _instead_of_factors(module)]
    return packed + sum(tensor.nbytes for tensor in stays + new)


def _dropped(module: nn.Module) -> list[Tensor | None]:
    """What a packed model has in another form, or not at all."""
    if isinstance(module, ActivationQuantizer):
        return [module.initialized]
    if _has_factors(module):
        return [layer.bias for layer in (module.projections if _is_joint(module) else module.projections[:2])]
    if isinstance(module, QuantWeight):
        names = ("integers", "step", "weight_scale_norm") + (() if isinstance(module, FrozenWeight) else ("weight",))
        return [getattr(module, name, None) for name in names]
    return []


def _instead_of_factors(attention: QuantAttention) -> list[Tensor]:
    bias = attention.factor(2)[1] if _is_joint(attention) else None
    return [tensor for tensor in (attention.query_bias_direction(), bias) if tensor is not None]


def _has_factors(module: nn.Module) -> bool:
    """QKR with its latent weights."""
    return isinstance(module, QuantAttention) and module.reparametrized and module.qk is None


def _is_joint(attention: QuantAttention) -> bool:
    return len(attention.projections) == 1
