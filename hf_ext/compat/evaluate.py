"""evaluate: the function that finds a metric by its name. There is no table to enter one into."""

import inspect
import os
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

from hf_ext.compat.names import is_from, source_of

_FACTORY = "evaluation_module_factory"
_wrapped: tuple[Callable, Callable] | None = None  # (what was there, our wrapper), while ours is at work


def wrap_evaluate_factory(name: str, module: str) -> None:
    """Have evaluate find the metric `name` in the importable module `module`, without network or cache. Idempotent.

    `load`, and through it `combine` and evaluators, look the wrapped function up when they are called. Any other call
    passes through as it came, and so does `name` where the working directory holds NAME/NAME.py, which wins as for any
    metric. `evaluate.inspect` and `evaluate.evaluation_suite` have the function from their import on: they keep it.
    """
    global _wrapped
    from evaluate import loading

    current = getattr(loading, _FACTORY)
    if _wrapped is not None and current is _wrapped[1]:
        return
    original = _without_ours(current)

    @wraps(original)
    def evaluation_module_factory(*args: Any, **kwargs: Any) -> Any:
        asked = args[0] if args else kwargs.get("path")
        at_work = _wrapped is not None and _wrapped[1] is evaluation_module_factory
        if not at_work or asked != name or os.path.isfile(os.path.join(name, f"{name}.py")):
            return original(*args, **kwargs)
        _refuse_revision(name, module, *args[2:3] or [kwargs.get("revision")])
        found = inspect.getsourcefile(loading.import_main_class(module))
        return loading.ImportableModule(module, loading.files_to_hash([found]))

    setattr(loading, _FACTORY, evaluation_module_factory)
    _wrapped = original, evaluation_module_factory


def unwrap_evaluate_factory() -> None:
    """Put back the very function that was there. Where somebody wrapped ours since, ours only passes calls on."""
    global _wrapped
    from evaluate import loading

    if _wrapped is None:
        return
    original, ours = _wrapped
    _wrapped = None
    current = getattr(loading, _FACTORY)
    if current is ours:
        setattr(loading, _FACTORY, original)
    elif current is not original:
        warnings.warn(
            f"evaluate.loading.{_FACTORY} was replaced by {source_of(current)} after hf_ext wrapped it. Theirs stays, "
            "and what hf_ext had there passes every call on.",
            RuntimeWarning,
            stacklevel=3,
        )


def _without_ours(function: Callable) -> Callable:
    """What `function` wraps, where it is a wrapper of ours.

    An earlier import of this module may have left one, and so may somebody who wrapped ours and has put it back since.
    """
    while is_from(function, __file__):
        function = function.__wrapped__
    return function


def _refuse_revision(name: str, module: str, revision: Any) -> None:
    if revision is not None:
        raise ValueError(
            f"revision={revision!r}: {name!r} comes with {module.partition('.')[0]}, which is installed, and has no "
            "revisions on the hub. Leave revision out."
        )
