"""Names in the tables of a host: claimed together or not at all, and given back."""

import sys
from collections.abc import Iterable, MutableMapping
from typing import Any


class RegistrationError(RuntimeError):
    """A name of ours is in use by somebody else. The text names the host, the name and the holder."""


Entry = tuple[MutableMapping[str, Any], str, Any]  # table of a host, name, ours


def claim_all(entries: Iterable[Entry], host: str) -> None:
    """Write `table[name] = ours` for all `entries`, or none if somebody else holds a name.

    Raises:
        RegistrationError: naming the host, the name, and the module and file of its holder.
    """
    entries = list(entries)
    refuse_foreign(entries, host, "Uninstall or unregister one of the two.")
    for table, name, ours in entries:
        table[name] = ours


def release_all(entries: Iterable[Entry], host: str) -> None:
    """Delete `table[name]` wherever it is ours.

    Raises:
        RegistrationError: somebody put their own there meanwhile, which stays.
    """
    entries = list(entries)
    release(entries)
    refuse_foreign(entries, host, "What hf_ext had there was replaced after it registered.")


def release(entries: list[Entry]) -> None:
    for table, name, ours in entries:
        if name in table and _same(table[name], ours):
            del table[name]


def refuse_foreign(entries: list[Entry], host: str, advice: str) -> None:
    for table, name, ours in entries:
        holder = table.get(name, ours)
        if not _same(holder, ours):
            raise RegistrationError(f"{host} already has {name!r}, from {origin(holder)}; hf_ext leaves it. {advice}")


def _same(thing: Any, ours: Any) -> bool:
    """Also true of our twin from an earlier import of its module (sys.modules may have been purged)."""
    if isinstance(thing, type):
        return isinstance(ours, type) and (thing.__module__, thing.__qualname__) == (ours.__module__, ours.__qualname__)
    code = getattr(thing, "__code__", None)
    return thing == ours or (code is not None and code == getattr(ours, "__code__", None))


def is_from(function: Any, file: str) -> bool:
    """Whether `function` was written in `file`; a partial or another callable was not."""
    return getattr(getattr(function, "__code__", None), "co_filename", None) == file


def source_of(function: Any) -> str:
    """Where to look for it; functools.wraps lets a wrapper carry another module's name."""
    return f"{origin(function)} [{getattr(getattr(function, '__code__', None), 'co_filename', 'no source')}]"


def origin(thing: Any) -> str:
    module = getattr(thing, "__module__", type(thing).__module__)
    return f"{module} ({getattr(sys.modules.get(module), '__file__', None) or 'no file'})"
