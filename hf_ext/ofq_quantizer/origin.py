"""What a model says of itself, and the model of full precision that is built from it."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_ext import compat
from hf_ext.ofq_quantizer.probe import timm_model

FORMAT = "ofq_packed"  # what the config of a packed model says


def describe(model: nn.Module, model_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """JSON from which `build` makes the model again, with random weights.

    Raises:
        ValueError: an argument that JSON does not know, or a model that is neither of timm nor of transformers.
    """
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        config = model.config.to_dict()
        config.pop("quantization_config", None)
        about = {"library": "transformers", "class": _stock_class(model).__name__, "config": config}
    elif timm_model(model) is model:
        cfg = {name: value for name, value in model.pretrained_cfg.items() if name != "state_dict"}
        base = compat.timm_base(cfg)
        args = compat.timm_model_args(model) | (model_args or {})
        about = {"library": "timm", "base": base, "model_args": args, "pretrained_cfg": cfg}
    else:
        raise ValueError(
            f"{type(model).__name__} is no model of timm or transformers; pass the model itself, unwrapped"
        )
    try:
        return json.loads(json.dumps(about | {"dtype": dtype}))
    except TypeError as error:
        raise ValueError(f"the description of this model does not fit into JSON ({error}); pass model_args") from error


def build(about: dict[str, Any]) -> nn.Module:
    """The model of full precision that `describe` described, with random weights."""
    dtype = getattr(torch, about["dtype"])
    if about["library"] == "timm":
        model = compat.create_timm_model(about["base"], False, **about["model_args"])
        kept = {name: value for name, value in about["pretrained_cfg"].items() if name not in ("architecture", "tag")}
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | kept
        return model.to(dtype)
    import transformers

    kind = getattr(transformers, about["class"])
    return kind(kind.config_class.from_dict(about["config"])).to(dtype)


def save_plain(model: nn.Module, directory: str | Path, model_args: dict[str, Any] | None) -> None:
    """Write a model of full precision as its host does.

    Raises:
        ValueError: the folder has the model of another library, or a packed one.
    """
    file, of_timm = Path(directory, "config.json"), timm_model(model) is model
    if file.exists() and not _is_plain(file, "architecture" if of_timm else "model_type"):
        raise ValueError(f"{file} is there, and of no such model of full precision; name another folder")
    if of_timm:
        compat.save_timm_model(model, directory, model_args)
    else:
        model.save_pretrained(directory)


def _is_plain(file: Path, mark: str) -> bool:
    """Whether it is a config of the library that has `mark` in all of its own, and not of a packed model."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(config, dict) and mark in config and config.get("format") != FORMAT


def _stock_class(model: nn.Module) -> type:
    return next(kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers."))
