"""From a full-precision model to a quantised one, and back for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from hf_ext.ofq_quantizer.attention import QuantAttention
from hf_ext.ofq_quantizer.checkpoints import tell_of_missing_quantizers
from hf_ext.ofq_quantizer.config import OFQConfig
from hf_ext.ofq_quantizer.layers import QuantConv2d, QuantLinear, QuantWeight
from hf_ext.ofq_quantizer.plan import make_plan
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer, Switches


def quantize(model: nn.Module, config: OFQConfig, *, name: str = "ofq") -> nn.Module:
    """Quantise a vision transformer of timm or transformers in place; every tensor it has keeps its name and value.

    `name` is what HF_EXT_DEBUG=1 calls it. Returns the model, not calibrated yet: the first training step gives the
    scales their values, or `calibrate` does.

    Raises:
        ValueError: the model has no attention that is supported, or one that is not; it is quantised already; its
            number of tokens varies; QKR is not defined for it; a skip pattern takes out nothing, or all of them
            everything. The model is untouched.
        TypeError: the config is no OFQConfig.
    """
    if not isinstance(config, OFQConfig):
        raise TypeError(f"config must be an OFQConfig, not {type(config).__name__}; OFQConfig.from_dict reads a dict")
    plan = make_plan(model, config)
    switches = Switches(config, name)
    modules = dict(model.named_modules())
    for path, (tokens, unsigned) in plan.low_bit.items():
        convert_linear(modules[path], switches, tokens, unsigned)
    for path in plan.boundary:
        _convert_boundary(modules[path], switches)
    for path, (adapter, tokens) in plan.attentions.items():
        modules[path].__class__ = adapter
        modules[path].set_up(switches, tokens)
    for path, why in plan.left.items():
        modules[path].left_as_is = why
    if hasattr(model, "add_model_tags"):  # of transformers
        from hf_ext.ofq_quantizer.hf_quantizer import adopt

        adopt(model, config)
    model.register_load_state_dict_pre_hook(tell_of_missing_quantizers)  # after that of `adopt`, which renames
    return model


def convert_linear(layer: nn.Linear, switches: Switches, tokens: int | None, unsigned: bool) -> QuantLinear:
    """Turn a linear layer into a low-bit one; `tokens` None: its caller quantises the input."""
    config = switches.config
    layer.__class__ = QuantLinear
    layer.set_up_weight(switches, config.w_bits, learnable_scale=False)
    if tokens is not None:
        one = config.activation_scale == "tensor"
        layer.input_quantizer = ActivationQuantizer(
            config.a_bits,
            positive=unsigned,
            axis=None if one else -2,
            size=1 if one else tokens,
            bias_in=layer.in_features,
            bias_out=layer.in_features,
            switches=switches,
            like=layer.weight,
        ).train(layer.training)
    return layer


def _convert_boundary(layer: nn.Linear | nn.Conv2d, switches: Switches) -> None:
    bits, channels = switches.config.boundary_bits, layer.weight.shape[1]
    layer.__class__ = QuantLinear if isinstance(layer, nn.Linear) else QuantConv2d
    layer.set_up_weight(switches, bits, learnable_scale=True)
    layer.input_quantizer = ActivationQuantizer(
        bits, axis=None, bias_in=channels, bias_out=channels, switches=switches, like=layer.weight
    ).train(layer.training)


def quantized_switches(model: nn.Module) -> list[Switches]:
    """The switches of every OFQ model inside `model`.

    Raises:
        ValueError: there is none.
    """
    found = {
        id(part.switches): part.switches for part in model.modules() if isinstance(part, QuantWeight | QuantAttention)
    }
    if not found:
        raise ValueError(
            f"this {type(model).__name__} is not quantised by OFQ; call hf_ext.ofq_quantizer.quantize first"
        )
    return list(found.values())


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """Every quantiser of an activation, by "<module>:<role>": input, q, k, v, probs, qkx.

    Each has `bits`, `positive`, `axis`, `scale` (1-D, float32), `bias_in`, `bias_out` (or None) and `initialized`.
    """
    quantized_switches(model)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ActivationQuantizer):
            owner, _, child = name.rpartition(".")
            found[f"{owner}:{child.removesuffix('_quantizer')}"] = module
    return found


@contextmanager
def full_precision(model: nn.Module) -> Iterator[nn.Module]:
    """Inside, nothing is rounded; shifts and the algebra of QKR stay.

    A switch of the whole model: forwards of other threads meanwhile round nothing either. Give them a copy of it.
    """
    switches = quantized_switches(model)
    before = [switch.rounding for switch in switches]
    for switch in switches:
        switch.rounding = False
    try:
        yield model
    finally:
        for switch, rounding in zip(switches, before, strict=True):
            switch.rounding = rounding
