"""Adds our names to each host right after the host was imported.

torch calls `arm` at the end of `import torch` (entry-point group `torch.backends`); `import hf_ext` and
`python -m hf_ext.run` call it as well. torch turns any exception raised here into a broken `import torch`, for
everybody in the environment. Hence: standard library only, every error caught, kept for `hf-ext doctor` and shown
once as a warning.
"""

from __future__ import annotations

import os
import sys
import time
from _thread import RLock, get_ident

TYPE_CHECKING = False  # importing typing would cost more than everything else here
if TYPE_CHECKING:
    from typing import Any

ModuleType = type(sys)

# module whose import triggers us -> (when we run relative to it, host). `registry.TABLE` holds the same rows.
HOOKS: dict[str, tuple[str, str]] = {
    "torchvision._meta_registrations": ("before", "torchvision"),
    "transformers.modeling_utils": ("after", "transformers"),
    "peft.tuners": ("after", "peft"),
    "transformers.quantizers.auto": ("after", "transformers.quantizers"),
    "timm.models": ("after", "timm"),
    "evaluate.saving": ("after", "evaluate"),
}

OFF = ("off", None)
WAITING = ("waiting", None)

STATE: dict[str, tuple[str, str | None]] = {}  # module -> waiting|running|registered|native|not needed|failed|off, why
ERRORS: dict[str, BaseException] = {}  # module -> what its registration raised
CPU_SECONDS: dict[str, float] = {}  # module -> what its registration cost
CHANNEL: list[str] = []  # "autoload" | "import" | "run", in the order they came

_LOCKS = {module: RLock() for module in HOOKS}
_UNSEEN: set[str] = set()  # hook modules that neither our finder nor `arm` has met
_EXECUTING: set[str] = set()  # hook modules that our loader executes right now
_LOADING: dict[str, int] = {}  # our own modules that are half loaded -> the thread that loads them
_DEFERRED: set[str] = set()  # hook modules that came while one of ours was half loaded
_TOLD: set[str] = set()  # causes already shown


def arm(channel: str = "autoload") -> None:
    """Watch for the hosts, and register at once with those already imported. Idempotent; never raises."""
    try:
        if channel == "autoload" and switched_off():
            if not CHANNEL:
                _forget_ourselves()
            return
        if channel not in CHANNEL:
            CHANNEL.append(channel)
        for name in HOOKS:
            if STATE.get(name, OFF) == OFF:
                STATE[name] = WAITING
        _remove_finders(but=_FINDER)
        if _FINDER not in sys.meta_path:
            sys.meta_path.insert(0, _FINDER)
        for name in HOOKS:
            # None stands for a forbidden import. What our own loader executes registers by itself.
            if sys.modules.get(name) is not None and name not in _EXECUTING:
                _catch_up(sys.modules[name], name)
            elif name not in _EXECUTING:
                _UNSEEN.add(name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        _complain("hf_ext could not arm its import hooks", error)


def switched_off() -> bool:
    return os.environ.get("HF_EXT_AUTOLOAD", "1").lower() in ("0", "false", "no", "off")


def disarm() -> None:
    """Stop watching; hosts imported from now on get nothing until `arm` is called again."""
    _remove_finders()
    for name in HOOKS:
        STATE[name] = OFF
    ERRORS.clear()
    _UNSEEN.clear()


def fire(name: str) -> None:
    """Run the register function behind hook module `name`, once, and keep the outcome in STATE. Never raises."""
    with _LOCKS[name]:
        if STATE.get(name, OFF) != WAITING:
            return
        if _must_wait(name):
            return
        STATE[name] = ("running", None)
        outcome = WAITING
        started = time.thread_time()
        try:
            from hf_ext import registry

            outcome = registry.apply(HOOKS[name][1])
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if _LOADING:  # another thread holds one of our modules half loaded; it tries again when it is done
                _DEFERRED.add(name)
            else:
                outcome = _failed(name, error)
        finally:
            CPU_SECONDS[name] = time.thread_time() - started
            STATE[name] = outcome


def _remove_finders(but: _Finder | None = None) -> None:
    """Those of earlier imports of this module, too (coverage purges sys.modules): two would ask each other for ever."""
    for finder in list(sys.meta_path):
        kind = type(finder)
        if finder is not but and (kind.__module__, kind.__name__) == (__name__, "_Finder") and finder in sys.meta_path:
            sys.meta_path.remove(finder)


def _look_again() -> None:
    """Find hosts whose import began before our finder was there, in another thread, and reached sys.modules after.

    Never waits: the import that asks our finder may be the one that the holder of the lock is waiting for.
    """
    for name in tuple(_UNSEEN):
        if sys.modules.get(name) is not None and _LOCKS[name].acquire(blocking=False):
            try:
                _UNSEEN.discard(name)
                _catch_up(sys.modules[name], name)
            finally:
                _LOCKS[name].release()


def _must_wait(name: str) -> bool:
    """Whether a module of ours imports this host right now; our register function would find that module half loaded.

    A hook that runs before its host never waits: it is needed now, and uses no module of ours that imports a host.
    """
    waits = HOOKS[name][0] == "after" and _loading_here()
    if waits:
        _DEFERRED.add(name)
    return waits


def _loading_here() -> bool:
    return get_ident() in tuple(_LOADING.values())


def _forget_ourselves() -> None:
    """Leave no trace, else a later `import hf_ext` in the script would find a cached module that does nothing."""
    for name in [name for name in sys.modules if name == "hf_ext" or name.startswith("hf_ext.")]:
        del sys.modules[name]


def _failed(name: str, error: BaseException) -> tuple[str, str]:
    ERRORS[name] = error
    _complain(f"hf_ext could not add its names to {HOOKS[name][1]}", error)
    return ("failed", f"{type(error).__name__}: {error}")


def _complain(what: str, error: BaseException) -> None:
    cause = f"{type(error).__name__}: {error}"
    if cause in _TOLD:
        return
    _TOLD.add(cause)
    try:
        if os.environ.get("HF_EXT_DEBUG") == "1":
            import traceback

            traceback.print_exception(error)
        import warnings

        warnings.warn(f"{what}: {cause}. Run `hf-ext doctor`.", RuntimeWarning, stacklevel=2)
    except Exception:
        pass  # e.g. python -W error: a warning must not break the import that we were called from


def _catch_up(module: ModuleType, name: str) -> None:
    if HOOKS[name][0] == "after" and getattr(module.__spec__, "_initializing", False):
        if type(module) is ModuleType:
            module.__class__ = _HalfImported
        elif not isinstance(module, _HalfImported):
            STATE[name] = _failed(name, TypeError(f"half imported, {name} is a {type(module)}; import hf_ext after it"))
    else:
        fire(name)


class _HalfImported(ModuleType):
    """The class of a host module that imported torch while it was itself being imported (the finder is too late).

    It registers on the first attribute access after the import ended, then gives the module its own class back.
    """

    def __getattribute__(self, attribute: str) -> Any:
        get = ModuleType.__getattribute__
        if attribute not in ("__spec__", "__dict__", "__class__"):
            spec = get(self, "__spec__")
            # Waiting comes before the lock: whoever holds it may need the module of ours that this thread loads.
            if not spec._initializing and not _must_wait(spec.name):
                _settle(self, spec.name)
        return get(self, attribute)


def _settle(module: ModuleType, name: str) -> None:
    # Should the holder of the lock ever wait for an import of this thread: better a name too late than a standstill.
    if not _LOCKS[name].acquire(timeout=10):
        return
    try:
        if STATE.get(name, OFF)[0] != "running":  # else our own registration touches the module
            fire(name)
            # Last: until our names are in, every other thread has to wait for the lock above.
            module.__class__ = ModuleType
    finally:
        _LOCKS[name].release()


class _Loader:
    """Stands in for a module's real loader during one import, and hands the module back to it."""

    def __init__(self, loader: Any, name: str) -> None:
        self._loader, self._name = loader, name

    def __getattr__(self, attribute: str) -> Any:
        if attribute == "_loader":  # a copy asks before __init__ ran
            raise AttributeError(attribute)
        return getattr(self._loader, attribute)

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._execute(module)


class _HostLoader(_Loader):
    def _execute(self, module: ModuleType) -> None:
        _EXECUTING.add(self._name)
        try:
            if HOOKS[self._name][0] == "before":
                fire(self._name)
            self._loader.exec_module(module)
        finally:
            _EXECUTING.discard(self._name)
        fire(self._name)


class _OwnLoader(_Loader):
    def _execute(self, module: ModuleType) -> None:
        _LOADING[self._name] = get_ident()
        try:
            self._loader.exec_module(module)
        finally:
            _LOADING.pop(self._name, None)  # a reload of this very module has emptied it
            if not _loading_here():
                for name in [_DEFERRED.pop() for _ in range(len(_DEFERRED))]:
                    # Not available: another thread is registering it, and may be waiting for this very module.
                    if _LOCKS[name].acquire(blocking=False):
                        try:
                            fire(name)
                        finally:
                            _LOCKS[name].release()


class _Finder:
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name in HOOKS:
            loader = _HostLoader if STATE.get(name) == WAITING else None
            _UNSEEN.discard(name)
        elif name.startswith("hf_ext."):
            loader = _OwnLoader
        else:
            loader = None
            if _UNSEEN:
                _look_again()
        if loader is None:
            return None
        for finder in sys.meta_path:
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec is not None:
                    if hasattr(spec.loader, "exec_module"):
                        spec.loader = loader(spec.loader, name)
                    return spec
        return None


_FINDER = _Finder()
