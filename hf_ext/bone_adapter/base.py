"""The base model of an adapter: opened for its shapes or its weights, and the layers in it that the adapter is for."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from hf_ext import compat

BaseModel = str | Path | PretrainedConfig | nn.Module

_CLASS_OF_TASK = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def open_base(
    config: Mapping[str, Any], base_model: BaseModel | None, *, weights: bool = False, offline: bool = False
) -> nn.Module:
    """The base model of the adapter with this adapter_config.json.

    Args:
        config: of the adapter.
        base_model: a model, which is returned as it is; a path or a name on the hub; a transformers config; None: the
            base that `config` names.
        weights: whether they are needed. Without, a model is built on the meta device, which takes no memory.
        offline: look on this machine only, and ask nothing of anybody.

    Raises:
        ValueError: no base is named or it cannot be opened; weights are needed of what has none; a model that carries
            adapters already.
    """
    if isinstance(base_model, nn.Module):
        if any(isinstance(module, BaseTunerLayer) for module in base_model.modules()):
            raise ValueError(
                f"base_model, a {type(base_model).__name__}, carries adapters already; pass the bare model"
            )
        return base_model
    if isinstance(base_model, PretrainedConfig):
        if weights:
            raise ValueError("base_model is a config, and this form needs the weights; pass the model or its path")
        return _on_meta(config, base_model)
    named = config.get("base_model_name_or_path")
    source = named if base_model is None else str(base_model)
    if not source:
        raise ValueError("the adapter names no base_model_name_or_path; pass base_model, a model or its path")
    options = {"revision": config["revision"]} if base_model is None and config.get("revision") else {}
    if offline:
        options |= {"local_files_only": True, "trust_remote_code": False}
    try:
        base_config = transformers.AutoConfig.from_pretrained(source, **options)
        if not weights:
            return _on_meta(config, base_config)
        return _class_for(config, base_config).from_pretrained(source, dtype="auto", **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the base model {source!r} cannot be opened; pass base_model, a model or its path: {error}"
        ) from error


def _on_meta(config: Mapping[str, Any], base_config: PretrainedConfig) -> nn.Module:
    kind = _class_for(config, base_config)
    with torch.device("meta"):
        return kind(base_config) if issubclass(kind, nn.Module) else kind.from_config(base_config)


def _class_for(config: Mapping[str, Any], base_config: PretrainedConfig) -> Any:
    """The class the adapter was trained on: by its task, else by the class it noted, else by that of the base."""
    names = [
        _CLASS_OF_TASK.get(config.get("task_type")),
        (config.get("auto_mapping") or {}).get("base_model_class"),
        *(base_config.architectures or []),
        "AutoModel",
    ]
    return next(getattr(transformers, name) for name in names if name and hasattr(transformers, name))


# --- the layers that are adapted


def targets(config: Mapping[str, Any], base: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of what the config's target_modules and their exceptions mean in `base`, by PEFT's own matching.

    Raises:
        ValueError: they mean nothing in it; target_modules is None and PEFT has no default for this type of model.
    """
    options = _options(config)
    if options.target_modules is None:
        kind = getattr(getattr(base, "config", None), "model_type", None)
        if kind not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
            raise ValueError(f"target_modules: found null, expected names, as PEFT has no default for {kind!r}")
        options.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING[kind]
    options = _maybe_include_all_linear_layers(options, base)
    found = {path: module for path, module in base.named_modules() if check_target_module_exists(options, path)}
    if not found:
        raise ValueError(f"target_modules: found {_names(options)}, none of which {type(base).__name__} has")
    return found


def may_be_target(config: Mapping[str, Any], path: str) -> bool:
    """Whether the config means the module at `path`, as far as this can be told without the model."""
    options = _options(config)
    by_model = options.target_modules is None or str(options.target_modules).lower() == "all-linear"
    return by_model or bool(check_target_module_exists(options, path))


def _options(config: Mapping[str, Any]) -> SimpleNamespace:
    """The attributes PEFT's matching reads; its config class for Bone is not in every version."""
    names = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "task_type")
    options = {name: config.get(name) for name in names}
    return SimpleNamespace(target_modules=config.get("target_modules"), target_parameters=None, **options)


def _names(options: SimpleNamespace) -> str:
    chosen = options.target_modules
    return repr(chosen) if isinstance(chosen, str) else ", ".join(sorted(chosen))


# --- one layer


def without_adapters(layer: nn.Module) -> nn.Module:
    """The layer itself, where adapters are wrapped around it."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer or a Conv1D.

    Raises:
        ValueError: it is neither.
    """
    base = without_adapters(layer)
    if isinstance(base, Conv1D):
        return tuple(base.weight.shape)
    sizes = getattr(base, "in_features", None), getattr(base, "out_features", None)
    if not all(isinstance(size, int) for size in sizes):
        raise ValueError(
            f"{type(base).__name__} is not supported; Bone adapts torch.nn.Linear, Conv1D, and quantised ones"
        )
    return sizes


def weight_of(layer: nn.Module) -> Tensor:
    """(out, in), dequantised where PEFT's layer around it can do that.

    Raises:
        ValueError: it is quantised, and nothing here can read it.
        RuntimeError: it is not whole in this process.
    """
    base = without_adapters(layer)
    why = "The change of a block-affine form follows from the weight of the layer"
    compat.require_whole_weight(base.weight, why, "Export where the model is whole")
    quantised = getattr(layer, "quantization_backend", None) is not None
    weight = compat.dequantized(layer) if quantised else base.weight.detach()
    if not weight.is_floating_point():
        raise ValueError(f"the weight of a {type(base).__name__} is {weight.dtype}; load the base model unquantised")
    return weight.T if isinstance(base, Conv1D) else weight
