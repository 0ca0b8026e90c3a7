"""timm: its table of models, and how it builds and loads them."""

import json
import warnings
from collections.abc import Callable, Collection
from functools import wraps
from inspect import signature
from typing import Any

from hf_ext.compat.names import Entry, claim_all, is_from, refuse_foreign, release


def add_timm_models(entry_points: dict[str, Callable[..., Any]]) -> None:
    """Enter functions into timm's table of models, by their names.

    Raises:
        RegistrationError: somebody else holds a name; then nothing is added.
    """
    registry = _registry()
    claim_all(_entries(entry_points), host="timm")
    for name, function in entry_points.items():
        module = function.__module__.rpartition(".")[2]
        registry._model_to_module[name] = module
        registry._module_to_models[module].add(name)
    _wrap_resolver(entry_points)


def remove_timm_models(entry_points: dict[str, Callable[..., Any]]) -> None:
    """The undo; tables are as they were before.

    Raises:
        RegistrationError: somebody put their own there meanwhile, which stays.
    """
    registry, entries = _registry(), _entries(entry_points)
    _unwrap_resolver()
    release(entries)
    for name, function in entry_points.items():
        if name in registry._model_entrypoints:
            continue
        module = function.__module__.rpartition(".")[2]
        registry._model_to_module.pop(name, None)
        if module in registry._module_to_models:
            registry._module_to_models[module].discard(name)
            if not registry._module_to_models[module]:
                del registry._module_to_models[module]
    refuse_foreign(entries, "timm", "What hf_ext had there was replaced after it registered.")


# --- timm 1.0.31 has its scripts turn a name into arguments of create_model beforehand. For a name without a
# configuration of its own that loses what follows the dot. Goes when timm keeps it.
_RESOLVER = "resolve_model_input_args"


def _wrap_resolver(recipes: Collection[str]) -> None:
    """Have `recipe.architecture` resolved as the architecture is, and created under the recipe. Idempotent."""
    from timm import models

    original = getattr(models, _RESOLVER, None)
    if original is None or is_from(original, __file__):
        return

    @wraps(original)
    def resolve_model_input_args(model_name: str, args: Any = None, **kwargs: Any) -> dict[str, Any]:
        recipe, _, architecture = model_name.partition(".")
        if recipe not in recipes or not architecture or kwargs.get("pretrained_cfg"):
            return original(model_name, args, **kwargs)
        resolved = original(architecture, args, **kwargs) | {"model_name": recipe, "pretrained_cfg": architecture}
        overlay = kwargs.get("pretrained_cfg_overlay")
        return resolved if overlay is None else resolved | {"pretrained_cfg_overlay": overlay}

    setattr(models, _RESOLVER, resolve_model_input_args)


def _unwrap_resolver() -> None:
    """Put back the very function that was there; what somebody put there since stays."""
    from timm import models

    current = getattr(models, _RESOLVER, None)
    if is_from(current, __file__):
        setattr(models, _RESOLVER, current.__wrapped__)


def load_timm_weights(model: Any, in_chans: int = 3, cache_dir: Any = None, **kwargs: Any) -> None:
    """Load the weights that `model.pretrained_cfg` names, with timm's adaptation to other classes and channels."""
    from timm.models._builder import load_pretrained

    load_pretrained(model, model.pretrained_cfg, model.num_classes, in_chans, _other_channels, cache_dir=cache_dir)


def timm_base(cfg: dict[str, Any]) -> str:
    """Name with which `create_model` builds the architecture of this configuration; a recipe of ours has it as tag."""
    from timm.models import is_model

    architecture, tag = cfg["architecture"], cfg.get("tag")
    name = tag if architecture.startswith("ofq_") else f"{architecture}.{tag}" if tag else architecture
    return name if is_model(name.split(".")[0]) else architecture


# --- Before timm 1.0.31 a model does not know what `create_model` was given. `create_timm_model` has it recorded there,
# --- and for models that somebody else made, the usual arguments are read off. Goes when 1.0.31 is the lowest version.


def create_timm_model(name: str, pretrained: bool, pretrained_model_args: Any = None, **kwargs: Any) -> Any:
    """timm.create_model; `pretrained_model_args`, which timm >= 1.0.20 hands to entry points, describe a checkpoint
    that the caller loads by itself."""
    import timm

    model = timm.create_model(name, pretrained=pretrained, **kwargs)
    if not _records_args():
        apart = signature(timm.create_model).parameters  # where weights come from, and what is done with the model
        model._model_args = {name: value for name, value in kwargs.items() if name not in apart and _is_json(value)}
    return model


def timm_model_args(model: Any) -> dict[str, Any]:
    """What `create_model` was given, as far as it is known."""
    if _records_args():
        from timm.models import get_model_args

        return {name: value for name, value in get_model_args(model).items() if name != "ofq"}
    given = {name: value for name, value in getattr(model, "_model_args", {}).items() if not name.endswith("_rate")}
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    read_off = {"num_classes": model.num_classes, "in_chans": _first_channels(model)}
    return given | read_off | ({} if size is None else {"img_size": list(size)})


def _records_args() -> bool:
    import timm.models

    return hasattr(timm.models, "get_model_args")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def save_timm_model(model: Any, directory: Any, model_args: dict[str, Any] | None) -> None:
    """config.json and model.safetensors, for `create_model("local-dir:DIRECTORY")`."""
    from timm.models._hub import save_for_hf

    save_for_hf(model, directory, model_args=model_args or timm_model_args(model), safe_serialization=True)


def timm_classes(module: str, name: str) -> tuple[type, ...]:
    """The class timm.models.MODULE.NAME; none where this timm has no such module (NaFlexViT came after 1.0.15)."""
    import timm.models

    home = getattr(timm.models, module, None)
    return () if home is None else (getattr(home, name),)


def _other_channels(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
    """The weights of images of other channels without what timm does not adapt: all but weight and bias of the first
    convolution.

    timm sums or repeats the weight. Its scales are left out, to be taken from the result; the modules inside keep
    their new values, since shifts of three channels have no equivalent on a sum of these.
    """
    names = model.pretrained_cfg.get("first_conv") or ()
    for name in (names,) if isinstance(names, str) else names:
        saved, own = state_dict[f"{name}.weight"].shape, model.get_submodule(name).weight.shape
        if saved == own:
            continue
        warnings.warn(
            f"{name} has {own[1]} channels, and {saved[1]} in the file: timm adapts its weight, and the quantiser of "
            "its input starts anew. Calibrate the model, or train it.",
            stacklevel=2,
        )
        state_dict = {
            key: x
            for key, x in state_dict.items()
            if not key.startswith(f"{name}.") or key in (f"{name}.weight", f"{name}.bias")
        }
        inside = model.get_submodule(name).state_dict(prefix=f"{name}.")
        state_dict |= {key: x for key, x in inside.items() if key.count(".") > name.count(".") + 1}
    return state_dict


def _first_channels(model: Any) -> int:
    return next(module.in_channels for module in model.modules() if hasattr(module, "in_channels"))


def _entries(entry_points: dict[str, Callable[..., Any]]) -> list[Entry]:
    return [(_registry()._model_entrypoints, name, function) for name, function in entry_points.items()]


def _registry() -> Any:
    from timm.models import _registry

    return _registry
