"""Ways to damage a file, and what may come of reading it: the right values, or an error of a sensible class by name."""

import json
import random
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

SENSIBLE = (ValueError, OSError, RuntimeError, SafetensorError)
SECONDS, MEGABYTES = 30, 500  # no damaged file of these tests may cost more to read

Damage = Callable[[Path], None]


# --- whole files


def cut(share: float) -> Damage:
    """All but the last byte where `share` is 1."""

    def damage(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: min(int(share * len(content)), len(content) - 1)])

    return damage


def replaced(content: bytes) -> Damage:
    def damage(path: Path) -> None:
        path.write_bytes(content)

    return damage


def missing(path: Path) -> None:
    path.unlink()


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 9)


def declared(header: bytes, size: int | None = None) -> Damage:
    """A safetensors file that says so of its header, with 64 bytes of data."""
    return replaced(struct.pack("<Q", len(header) if size is None else size) + header + bytes(64))


def _tensor(shape: list[int], end: int) -> bytes:
    return json.dumps({"weights": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}).encode()


# Of any file. What is left is never what was there.
OF_FILES: dict[str, Damage] = {
    **{f"cut at {share:.0%}": cut(share) for share in (0.03, 0.3, 0.7, 0.95, 1)},
    "empty": replaced(b""),
    "missing": missing,
    "folder": folder,
    "noise": replaced(bytes(range(256)) * 8),
    "zeros": replaced(bytes(4096)),
    "pointer of git-lfs": replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    "page of a proxy": replaced(b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>"),
}
OF_SAFETENSORS: dict[str, Damage] = {
    "bytes behind": longer,
    "header of 2^40 bytes": declared(_tensor([16], 64), 2**40),
    "header of 2^63 bytes": declared(_tensor([16], 64), 2**63),
    "header of 90 MB that is not there": declared(_tensor([16], 64), 90_000_000),
    "tensor of 2^42 numbers": declared(_tensor([2**42], 2**44)),
    "tensor of 2^64 numbers": declared(_tensor([2**32, 2**32], 64)),
    "tensor before the file": declared(_tensor([16], 64).replace(b"[0, 64]", b"[-64, 0]")),
    "tensor beyond the file": declared(_tensor([16], 64).replace(b"[0, 64]", b"[64, 128]")),
    "header of lists": declared(b"[" * 100_000),
}
OF_JSON: dict[str, Damage] = {
    name: replaced(text.encode())
    for name, text in {
        "list": "[]",
        "number": "5",
        "null": "null",
        "string": '"config"',
        "empty object": "{}",
        "two objects": "{}{}",
        "marks of a merge": '<<<<<<< ours\n{"k": 3}\n=======\n{"k": 4}\n>>>>>>> theirs\n',
        "integer of 10000 digits": '{"k": ' + "9" * 10_000 + "}",
    }.items()
}


def swapped(one: Path, other: Path) -> None:
    """Each under the name of the other."""
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def restored(source: Path, target: Path) -> Path:
    """`target` as an undamaged copy of `source`."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    return target


# --- parts of files


def flips(content: bytes, count: int, seed: int = 0, start: int = 0, end: int | None = None) -> Iterator[bytes]:
    """`count` copies with one byte between start and end changed: a bit of it, or all of it."""
    draw = random.Random(seed)
    for number in range(count):
        at = draw.randrange(start, len(content) if end is None else end)
        mask = 1 << draw.randrange(8) if number % 2 else draw.randrange(1, 256)
        yield content[:at] + bytes([content[at] ^ mask]) + content[at + 1 :]


def header_end(content: bytes) -> int:
    """Where the header of a safetensors file ends."""
    return 8 + struct.unpack("<Q", content[:8])[0]


STRANGERS: tuple[Any, ...] = (None, True, -3, 2**70, 0.5, float("nan"), "strange", "", [], [None], {}, {"a": 1})


def mistyped(document: Any, keep: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """(place and value, document) with one value, at any depth, of another type; none at or below a name in `keep`."""
    for place, value in _places(document, keep):
        for stranger in STRANGERS:
            if type(stranger) is not type(value):
                yield f"{'.'.join(map(str, place))} = {stranger!r}"[:80], _put(document, place, stranger)


def _places(document: Any, keep: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    children = document.items() if isinstance(document, dict) else enumerate(document)
    for name, value in children:
        if name in keep:
            continue
        yield (name,), value
        if isinstance(value, dict | list):
            yield from (((name, *place), inner) for place, inner in _places(value, keep))


def _put(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    copy = json.loads(json.dumps(document))
    *parents, last = place
    inner = copy
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return copy


# --- what may come of it


def outcome(read: Callable[[], Any], is_right: Callable[[Any], Any], *names: Any) -> str:
    """One word, "right" or "refused", or else what is wrong.

    That is another value, an error of another class or with none of `names` in it, no end, or too much memory.
    """
    before = _most_memory()
    try:
        found = _alarmed(read)
    except SENSIBLE as error:
        if isinstance(error, RecursionError | TimeoutError):
            return f"{type(error).__name__}: {error}"
        text = str(error)
        said = not names or any(str(name) in text for name in names)
        verdict = "refused" if said else f"names nothing: {type(error).__name__}: {text[:200]}"
    except Exception as error:
        verdict = f"{type(error).__name__}: {str(error)[:200]}"
    else:
        verdict = _judged(found, is_right)
    grown = _most_memory() - before
    return verdict if grown < MEGABYTES else f"{verdict}, and took {grown:.0f} MB"


def _judged(found: Any, is_right: Callable[[Any], Any]) -> str:
    try:
        return "right" if is_right(found) else "another value, silently"
    except Exception as error:
        return f"loaded, and fails in use: {type(error).__name__}: {str(error)[:100]}"


def wrong(outcomes: dict[str, str]) -> dict[str, str]:
    """Those that are neither right nor refused."""
    return {name: verdict for name, verdict in outcomes.items() if verdict not in ("right", "refused")}


def _most_memory() -> float:
    """Peak of this process, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _alarmed(read: Callable[[], Any]) -> Any:
    def ring(*_: Any) -> None:
        raise TimeoutError(f"still reading after {SECONDS} s")

    former = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        return read()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
