"""OFQ as transformers sees it: converts on `from_pretrained`, trains, saves, resumes.

Saved files hold the latent weights. So that a process without hf_ext does not take them for an ordinary model, each
quantised weight is written with one extra leading axis, at which every loader that does not know of it stops.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from hf_ext import compat
from hf_ext.ofq_quantizer.config import OFQConfig

# Every import of transformers' quantisers imports this module, and the layers bring numba: a tenth of a second.
if TYPE_CHECKING:
    from hf_ext.ofq_quantizer.layers import QuantWeight

logger = logging.get_logger(__name__)

NOTE = (
    "quantization-aware training, latent weights: each quantised weight has one extra leading axis of length 1, so "
    "that a loader which does not know OFQ stops. hf_ext reads it; hf_ext.ofq_quantizer.export_fp writes the ordinary "
    "file"
)

CARD = """{head}
# {kind}, quantised with OFQ

{w_bits}-bit weights and {a_bits}-bit activations, after [arXiv 2302.02210](https://arxiv.org/abs/2302.02210). Where
hf_ext is installed, this reads the folder, to evaluate the model or to train it on:

```python
from transformers import {kind}

model = {kind}.from_pretrained("{here}")
```

What the files hold: {note}.
"""

_ROLES = ("input", "q", "k", "v", "probs", "qkx")


class OFQHfQuantizer(compat.QuantizerHooks, HfQuantizer):
    """The quantiser behind `quantization_config={"quant_method": "ofq", ...}`.

    Whether a folder holds full-precision weights, to be converted, or a saved OFQ model is read off its weights: its
    config.json has a `quantization_config` in either case.
    """

    quantization_config: OFQConfig
    added = rf"\.weight_scale_norm$|\.({'|'.join(_ROLES)})_quantizer\.\w+$"

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: a device map with "disk".
        """
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(f'an OFQ model cannot be offloaded, and device_map={device_map} has "disk"; name a device')

    def convert(self, model: nn.Module) -> None:
        from hf_ext.ofq_quantizer.convert import quantize  # imports the models, which import the module we hook

        quantize(model, self.quantization_config)
        self._weight_names = compat.renamings(_disk_names(model))

    def get_weight_conversions(self) -> list[Any]:
        """How names in files become names in the model, beyond what the host knows."""
        return self._weight_names

    def owns(self, key: str) -> bool:
        return key.endswith("_quantizer.scale_norm")

    def expect(self, model: nn.Module) -> None:
        for layer in _quantised(model).values():
            layer.weight = nn.Parameter(layer.weight.detach().unsqueeze(0), layer.weight.requires_grad)
            # transformers 4 loads tensor by tensor: neither does a weight bring its scale, nor the scale a weight.
            layer._complete_scale = _leave_out

    def finish(self, model: nn.Module, missing: set[str]) -> None:
        from hf_ext.ofq_quantizer.layers import QuantWeight
        from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer

        anew = set()
        for name, module in model.named_modules():
            if isinstance(module, QuantWeight):
                if vars(module).pop("_complete_scale", None) is not None:
                    module.weight = nn.Parameter(module.weight.detach()[0], module.weight.requires_grad)
                if module.weight.is_meta:
                    raise ValueError(f"{name}.weight was offloaded, and OFQ models cannot be; give device_map a device")
                module.scale_was_loaded = f"{name}.weight_scale_norm" not in missing
                if not module.scale_was_loaded:
                    module.weight_scale_norm.data.copy_(module.first_weight_scale(module.weight))
                    anew.add(name)
            elif isinstance(module, ActivationQuantizer):
                if any(f"{name}.{child}" in missing for child in module.state_dict()):
                    module.reset()
                    anew.add(name)
                module.synchronize()
        if self.pre_quantized and anew:
            logger.warning(
                f"the checkpoint lacks {len(anew)} quantisers of this model, or has them in other shapes, such as "
                f"{min(anew)}: these start anew, and need calibration or training"
            )
        _introduce(model, self)

    def saved_state(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        from hf_ext.ofq_quantizer.checkpoints import CURE, later_layers

        state = model.state_dict()
        if later := later_layers(model):
            logger.warning_once(
                f"{', '.join(later)} came into the model after its conversion, and from_pretrained will refuse to read "
                f"it from this folder, where it expects quantised layers: {CURE}"
            )
        for name in _quantised(model):
            state[f"{name}.weight"] = state[f"{name}.weight"].unsqueeze(0)
        return state, {"ofq": NOTE}

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        if safe_serialization is False:
            logger.warning("OFQ models are saved as safetensors files only; leave out safe_serialization=False")
        return safe_serialization is not False

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def adopt(model: nn.Module, config: OFQConfig) -> None:
    """Have a converted model of transformers train, save and resume as one that `from_pretrained` converted."""
    _introduce(model, OFQHfQuantizer(config))


def _introduce(model: nn.Module, quantizer: OFQHfQuantizer) -> None:
    model.hf_quantizer, model.is_quantized = quantizer, True
    model.quantization_method = quantizer.quantization_config.quant_method
    model.config.quantization_config = quantizer.quantization_config
    model.add_model_tags("ofq")
    compat.use_disk_names(model, _disk_names(model))
    compat.leave_card(model, model_card)


def model_card(model: nn.Module) -> str:
    """What README.md says beside a saved model: how to read it, and what its extra axis is."""
    config = model.config.quantization_config
    return CARD.format(
        head=compat.front_matter("transformers", model.model_tags, model.config.name_or_path),
        kind=type(model).__name__,
        here=compat.HERE,
        w_bits=config.w_bits,
        a_bits=config.a_bits,
        note=NOTE,
    )


def _disk_names(model: nn.Module) -> list[tuple[str, str]]:
    return compat.disk_names(model.config.model_type, [f"{role}_quantizer" for role in _ROLES])


def _quantised(model: nn.Module) -> "dict[str, QuantWeight]":
    from hf_ext.ofq_quantizer.layers import QuantWeight

    return {name: module for name, module in model.named_modules() if isinstance(module, QuantWeight)}


def _leave_out(*_: Any) -> None:
    """In the place of what completes a checkpoint of full precision, while one of ours is loaded."""
