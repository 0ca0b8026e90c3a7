"""peft: its closed enum of methods, its quantised layers, and what differs from 0.19 to 0.21."""

import warnings
from collections.abc import Iterator, Mapping
from copy import copy
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from packaging.version import Version

from hf_ext.compat.names import Entry, claim_all, refuse_foreign, release, release_all

# --- peft >= 0.19: an enum of methods that is closed, and that no longer lists Bone

_PEFT_TYPES: dict[str, Any] = {}  # one object a name for the life of the process: pickles and identities hold


def has_native_bone() -> bool:
    """Whether peft has Bone itself: 0.14 to 0.18."""
    return find_spec("peft.tuners.bone") is not None


def peft_type(name: str) -> Any:
    """The member `name` of peft's enum of methods, whether or not it is listed there at the moment."""
    from peft.utils.peft_types import PeftType

    if name in PeftType.__members__:
        return _PEFT_TYPES.setdefault(name, PeftType[name])
    if name not in _PEFT_TYPES:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        _PEFT_TYPES[name] = member
    return _PEFT_TYPES[name]


def add_peft_method(name: str, public: Mapping[str, type], config: type, model: type) -> None:
    """List `name` in peft's enum and its tables, and offer the classes in `public` as attributes of peft.

    Raises:
        RegistrationError: somebody else holds the name of the method or of a class; then nothing is added.
    """
    import peft
    from peft.utils.peft_types import PeftType, register_peft_method

    member = peft_type(name.upper())
    entries = _peft_entries(member, config, model)
    classes = [(vars(peft), attribute, ours) for attribute, ours in public.items()]
    refuse_foreign([*entries, *classes], "peft", "Uninstall or unregister one of the two.")
    release(entries)  # register_peft_method takes no name twice, not even our own
    type.__setattr__(PeftType, member.name, member)
    PeftType._member_map_[member.name] = PeftType._value2member_map_[member.value] = member
    if member.name not in PeftType._member_names_:
        PeftType._member_names_.append(member.name)
    register_peft_method(name=name, config_cls=config, model_cls=model)
    claim_all(classes, host="peft")


def remove_peft_method(name: str, public: Mapping[str, type], config: type, model: type) -> None:
    """Undo `add_peft_method`.

    Raises:
        RegistrationError: somebody put their own there meanwhile, which stays.
    """
    import peft
    from peft.utils.peft_types import PeftType

    member = peft_type(name.upper())
    entries = _peft_entries(member, config, model)
    entries += [(vars(peft), attribute, ours) for attribute, ours in public.items()]
    release(entries)
    still_used = any(member in table for table, _, _ in entries)
    if member.name in PeftType._member_map_ and not still_used:
        type.__delattr__(PeftType, member.name)
        PeftType._member_names_.remove(member.name)
        del PeftType._member_map_[member.name], PeftType._value2member_map_[member.value]
    release_all(entries, host="peft")


def _peft_entries(member: Any, config: type, model: type) -> list[Entry]:
    from peft import mapping

    return [
        (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, member, config),
        (mapping.PEFT_TYPE_TO_TUNER_MAPPING, member, model),
        (mapping.PEFT_TYPE_TO_PREFIX_MAPPING, member, f"{member.value.lower()}_"),
    ]


# --- peft: layers. `quantization_utils` came with 0.20; before, only plain layers are served.


def quantization_backend(base_layer: Any, **kwargs: Any) -> Any | None:
    """peft's reader and writer of a quantised layer, or None for a plain one.

    Raises:
        ValueError: a quantised layer that this version of peft, or peft at all, cannot read and write.
    """
    if find_spec("peft.utils.quantization_utils") is None:
        library = type(getattr(base_layer, "weight", None)).__module__.partition(".")[0]
        if library in ("bitsandbytes", "torchao"):
            raise ValueError(
                f"peft {metadata.version('peft')} cannot read the {library} weight of a {type(base_layer).__name__}: "
                "`pip install -U 'peft>=0.20'`, or load the model without quantisation."
            )
        return None
    from peft.utils import resolve_quantization_backend

    try:
        return resolve_quantization_backend(base_layer, **kwargs)
    except ValueError as error:  # torchao weights of a model that transformers did not quantise
        raise ValueError(
            f"{error} Load the model with from_pretrained(..., quantization_config=TorchAoConfig(...)) instead of "
            "quantising it afterwards."
        ) from error


def quantization_arguments(model: Any) -> dict[str, Any]:
    """What `quantization_backend` needs to know of the whole model."""
    if find_spec("peft.utils.quantization_utils") is None:
        return {}
    from peft.utils import get_quantization_kwargs

    return get_quantization_kwargs(model)


def quantization_repr(layer: Any) -> str:
    if find_spec("peft.utils.quantization_utils") is None:
        return ""
    from peft.utils import quantization_extra_repr

    return quantization_extra_repr(layer)


def in_out_features(base_layer: Any) -> tuple[int, int]:
    from peft.tuners.tuners_utils import _get_in_out_features

    return _get_in_out_features(base_layer)


def device_of(base_layer: Any) -> Any | None:
    """Where a layer computes; None where it has no weight by a name that we know."""
    weight = next((w for n in ("weight", "qweight", "W_q") if (w := getattr(base_layer, n, None)) is not None), None)
    hook = getattr(base_layer, "_hf_hook", None)
    if weight is not None and weight.is_meta and getattr(hook, "execution_device", None) is not None:
        import torch

        return torch.device(hook.execution_device)  # accelerate brings an offloaded weight there for its forward
    return None if weight is None else weight.device


def version_of(base_layer: Any) -> int | None:
    """Changes with every write into the weight of a plain layer but those of peft and of ours."""
    weight = getattr(base_layer, "weight", None)
    return None if weight is None or weight.is_inference() else weight._version


def require_whole_weight(weight: Any, why: str, instead: str) -> None:
    """Raise unless every value of `weight` is here, in this process.

    Raises:
        RuntimeError: partitioned by DeepSpeed ZeRO-3, sharded by FSDP2 or tensor parallelism, or offloaded.
    """
    from torch.distributed.tensor import DTensor

    if hasattr(weight, "ds_id"):
        raise RuntimeError(f"{why}, and DeepSpeed ZeRO-3 has partitioned it. {instead}, or use ZeRO-2.")
    if isinstance(weight, DTensor):
        raise RuntimeError(f"{why}, and it is sharded over processes. {instead}: save the adapter for it.")
    if weight.is_meta:
        raise RuntimeError(f"{why}, and it is offloaded. {instead}, or load the model without offloading.")


def is_plain(weight: Any) -> bool:
    """Whether arithmetic on this weight means what it says: not so for float8, packed integers, or other classes."""
    from torch import Tensor, bfloat16, float16, float32, float64

    return type(weight.data) is Tensor and weight.dtype in (bfloat16, float16, float32, float64)


# bitsandbytes repacks a 4-bit weight in place at its first forward in eval mode (CPU with AVX512-BF16; used with 0.50).
# A packed layer dequantises to noise, gives its input no gradient, and its state_dict() damages it. Goes with all that.


def keep_weight_readable(base_layer: Any) -> None:
    if getattr(base_layer, "support_avx512bf16_for_cpu", False):
        base_layer.support_avx512bf16_for_cpu = False


def require_readable(base_layer: Any, why: str) -> None:
    """Raise where bitsandbytes has packed the weight already.

    Raises:
        ValueError: it has.
    """
    state = getattr(getattr(base_layer, "weight", None), "quant_state", None)
    if getattr(state, "packing_format_for_cpu", False):
        raise ValueError(
            f"{why}, and bitsandbytes has packed this 4-bit weight for inference, at a forward in eval mode without an "
            "adapter. Load the model again and put the adapter on before the first forward."
        )


def dequantized(layer: Any) -> Any:
    """The weight of a quantised layer `(out, in)` in floating point.

    Raises:
        ValueError: it is packed.
    """
    require_readable(layer.get_base_layer(), "the weight has to be dequantised")
    return layer.get_base_weight()


def keep_base(layer: Any) -> Any:
    """What restores the base weight: a copy in host memory, or, of a quantised layer, the objects that hold it.

    peft's backends put new objects in the place of these, except that bitsandbytes changes its 8-bit state in place,
    and the attributes of the 4-bit weight that goes.
    """
    base = layer.get_base_layer()
    if layer.quantization_backend is None:
        return base.weight.detach().to("cpu", copy=True)
    parts = {name: getattr(base, name) for name in ("weight", "quant_state") if hasattr(base, name)}
    if hasattr(base, "state"):
        parts["state"] = copy(base.state)
    return layer.base_layer, parts, dict(vars(parts["weight"])) if "weight" in parts else {}


def kept_weight(layer: Any, kept: Any) -> Any:
    """The kept weight in floating point, laid out as the layer's, on its device; the merged one stays in place."""
    if layer.quantization_backend is None:
        weight = layer.get_base_layer().weight
        return kept.to(weight.device, weight.dtype)
    merged = keep_base(layer)
    restore_base(layer, kept)
    try:
        return dequantized(layer)
    finally:
        restore_base(layer, merged)


def restore_base(layer: Any, kept: Any) -> None:
    """Undo every write since `keep_base`, bit for bit; on the device where the layer is now."""
    base = layer.get_base_layer()
    if layer.quantization_backend is None:
        base.weight.data.copy_(kept)
        return
    device = device_of(base)
    layer.base_layer, parts, of_weight = kept
    base = layer.get_base_layer()
    for name, value in parts.items():
        setattr(base, name, value)
    if of_weight:
        vars(base.weight).update(of_weight)
    if device_of(base) != device:
        base.to(device)


def resolve_all_linear(config: Any, model: Any) -> None:
    """Write the linear layers of `model` in the place of "all-linear", before peft takes fused experts for some."""
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    if str(config.target_modules).lower() != "all-linear":
        return
    _maybe_include_all_linear_layers(config, model)
    if experts := list(_stacked_parameters(model)):
        warnings.warn(
            f"all-linear: {len(experts)} parameters such as {experts[0]} are fused experts, not linear layers, and "
            "stay as they are.",
            stacklevel=3,
        )


def fused_experts(config: Any, model: Any) -> list[str]:
    """Parameters of fused experts that `config` means, by their own names or by those of the layers they were.

    transformers 5 made one 3-D parameter of the linear layers of all experts; peft translates the old names.
    """
    from peft import LoraConfig, import_utils
    from peft.tuners.tuners_utils import check_target_module_exists

    # A LoraConfig, because the translation reads lora_alpha.
    probe = LoraConfig(target_modules=config.target_modules, exclude_modules=config.exclude_modules)
    translates = getattr(import_utils, "is_transformers_ge_v5", False)
    if translates and hasattr(getattr(model, "config", None), "model_type"):
        from peft.utils.transformers_weight_conversion import (
            convert_peft_config_for_transformers,
            get_model_conversion_mapping,
        )

        convert_peft_config_for_transformers(probe, model=model, conversions=get_model_conversion_mapping(model))
    found = set(probe.target_parameters or ())
    if config.target_modules is not None:
        found.update(name for name in _stacked_parameters(model) if check_target_module_exists(config, name))
    return sorted(found)


def _stacked_parameters(model: Any) -> Iterator[str]:
    """A module's own weight is meant by the name of the module; blocks of an adapter are not there to be meant."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 3 and len(parameter) > 1 and not name.endswith(".weight") and ".bone_block." not in name:
            yield name


def warn_of_lost_biases(config: Any) -> None:
    """peft learned with 0.21 to save the biases that an adapter outside its own code trains."""
    installed = metadata.version("peft")
    if config.bias != "none" and not config.inference_mode and Version(installed) < Version("0.21.0"):
        warnings.warn(
            f"peft {installed} trains the biases of bias={config.bias!r} and does not save them: "
            "`pip install -U 'peft>=0.21'`.",
            stacklevel=3,
        )
