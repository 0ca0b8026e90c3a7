"""timm: its table of models, and how it builds and loads them."""

from collections.abc import Callable
from typing import Any

from hf_ext.compat.names import Entry, claim_all, refuse_foreign, release


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


def remove_timm_models(entry_points: dict[str, Callable[..., Any]]) -> None:
    """The undo; tables are as they were before.

    Raises:
        RegistrationError: somebody put their own there meanwhile, which stays.
    """
    registry, entries = _registry(), _entries(entry_points)
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


def create_timm_model(name: str, pretrained: bool, pretrained_model_args: Any = None, **kwargs: Any) -> Any:
    """timm.create_model; `pretrained_model_args`, which timm >= 1.0.20 hands to entry points, describe a checkpoint
    that the caller loads by itself."""
    import timm

    return timm.create_model(name, pretrained=pretrained, **kwargs)


def load_timm_weights(model: Any, in_chans: int = 3, cache_dir: Any = None, **kwargs: Any) -> None:
    """Load the weights that `model.pretrained_cfg` names, with timm's adaptation to other classes and channels."""
    from timm.models._builder import load_pretrained

    load_pretrained(model, model.pretrained_cfg, model.num_classes, in_chans, cache_dir=cache_dir)


def _entries(entry_points: dict[str, Callable[..., Any]]) -> list[Entry]:
    return [(_registry()._model_entrypoints, name, function) for name, function in entry_points.items()]


def _registry() -> Any:
    from timm.models import _registry

    return _registry
