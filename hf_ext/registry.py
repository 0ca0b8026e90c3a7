"""THE table: which names we add to which host, and the functions that add and remove them."""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from hf_ext import _autoload
from hf_ext.compat import RegistrationError

__all__ = ["TABLE", "RegistrationError", "Row", "apply", "register", "status", "unregister"]


@dataclass(frozen=True)
class Row:
    """Names added to one host.

    `module` is the module of the host whose import triggers us, `when` says whether we run before or after it
    executes. `add` and `remove` are "module:function". `add` returns None once its names are in, or "native" (the host
    has them itself) or "not needed"; it raises `RegistrationError` where a name belongs to somebody else.
    """

    host: str
    module: str
    when: str
    names: tuple[str, ...]
    add: str
    remove: str


TABLE = (
    Row(
        host="torchvision",
        module="torchvision._meta_registrations",
        when="before",
        names=("torchvision::nms", "torchvision::qnms"),
        add="hf_ext.compat:add_torchvision_schemas",
        remove="hf_ext.compat:remove_torchvision_schemas",
    ),
    Row(
        host="transformers",
        module="transformers.modeling_utils",
        when="after",
        names=("anchor", "anchor_continuous"),
        add="hf_ext.anchor_attention.register:add",
        remove="hf_ext.anchor_attention.register:remove",
    ),
    Row(
        host="transformers",
        module="transformers.modeling_utils",
        when="after",
        names=("mcq_recalibrated",),
        add="hf_ext.mcq_bias.register:add_to_transformers",
        remove="hf_ext.mcq_bias.register:remove_from_transformers",
    ),
    Row(
        host="peft",
        module="peft.tuners",
        when="after",
        names=("BONE",),
        add="hf_ext.bone_adapter.register:add",
        remove="hf_ext.bone_adapter.register:remove",
    ),
    Row(
        host="transformers.quantizers",
        module="transformers.quantizers.auto",
        when="after",
        names=("ofq",),
        add="hf_ext.ofq_quantizer.register:add_to_transformers",
        remove="hf_ext.ofq_quantizer.register:remove_from_transformers",
    ),
    Row(
        host="timm",
        module="timm.models",
        when="after",
        names=tuple(f"ofq_w{w}a{a}{qkr}" for w in (2, 3, 4) for a in (2, 3, 4, 8) for qkr in ("", "_qkr")),
        add="hf_ext.ofq_quantizer.register:add_to_timm",
        remove="hf_ext.ofq_quantizer.register:remove_from_timm",
    ),
    Row(
        host="evaluate",
        # The last module that evaluate imports. Not `evaluate` itself: that may be watched only on the first touch of
        # it, and `from evaluate.loading import load` never touches it.
        module="evaluate.saving",
        when="after",
        names=("anchored_mcq_bias",),
        add="hf_ext.mcq_bias.register:add_to_evaluate",
        remove="hf_ext.mcq_bias.register:remove_from_evaluate",
    ),
)


_LEFT_BEHIND: set[Row] = set()  # what `unregister` could not remove


def register() -> dict[str, dict[str, Any]]:
    """Add our names to every host, now where it is imported and on its import where it is not. Idempotent.

    Returns `status()`. Hosts that failed before are tried again.

    Raises:
        RegistrationError: a name is already taken by somebody else (theirs stays; the other hosts are served first).
    """
    for module in [module for module, (state, _) in _autoload.STATE.items() if state == "failed"]:
        _autoload.STATE[module] = _autoload.WAITING
        _autoload.ERRORS.pop(module, None)
    _autoload.arm("import")
    for error in _autoload.ERRORS.values():
        if isinstance(error, RegistrationError):
            raise error
    return status()


def unregister() -> dict[str, dict[str, Any]]:
    """Take every name of ours out again, so that each host is as if we had never been imported.

    Returns `status()`. A later `register()` works again. Living modules keep working where the host does not look the
    name up again.

    Raises:
        RegistrationError: somebody wrapped or replaced what we added. Theirs stays, everything else is removed; call
            again when it is gone.
    """
    errors = []
    for row in TABLE:
        if _autoload.STATE.get(row.module, _autoload.OFF)[0] == "registered" or row in _LEFT_BEHIND:
            _LEFT_BEHIND.discard(row)
            try:
                _resolve(row.remove)()
            except RegistrationError as error:
                errors.append(error)
                _LEFT_BEHIND.add(row)
    _autoload.disarm()
    if errors:
        raise errors[0]
    return status()


def status() -> dict[str, dict[str, Any]]:
    """State of every host: {host: {"state", "names", "reason", "module"}}.

    state: "waiting" (host not imported yet), "running", "registered", "native" (the host has the names itself),
    "not needed", "failed" (see "reason"), "off".
    """
    report = {}
    for row in TABLE:
        state, reason = _autoload.STATE.get(row.module, _autoload.OFF)
        entry = report.setdefault(row.host, {"state": state, "names": [], "reason": reason, "module": row.module})
        entry["names"] += row.names
    return report


def apply(host: str) -> tuple[str, str | None]:
    """Run the `add` of every row of `host`, or of none: an error takes those before it back.

    Returns the state to record, and None: there is a reason for failures only, and these are raised.
    """
    outcomes, added = set(), []
    try:
        for row in (row for row in TABLE if row.host == host):
            outcomes.add(_resolve(row.add)())
            added.append(row)
    except BaseException:
        for row in reversed(added):
            _resolve(row.remove)()
        raise
    return (outcomes.pop() or "registered", None) if len(outcomes) == 1 else ("registered", None)


def _resolve(path: str) -> Any:
    module, _, function = path.partition(":")
    return getattr(import_module(module), function)
