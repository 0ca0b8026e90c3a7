"""What hf_ext costs a process that does not use it: the hook at the end of `import torch`, and `import hf_ext`."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator

from hf_ext.bench.harness import Row
from hf_ext.registry import TABLE

# The work of torch's autoload for one entry point: load it, call it. Timed inside the process, since a whole
# `import torch` varies by more between two runs than this costs.
_HOOK = """
import time, os
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
from importlib.metadata import entry_points
hook = next(entry for entry in entry_points(group="torch.backends") if entry.name == "hf_ext")
torch.__spec__._initializing = True  # as it is when torch itself calls the hook
start = time.process_time()
hook.load()()
print(time.process_time() - start)
"""
_IMPORT = """
import time
start = time.process_time()
import hf_ext
print(time.process_time() - start)
"""
_LATER = """
import time
import hf_ext, sys
finder = next(finder for finder in sys.meta_path if type(finder).__module__ == "hf_ext._autoload")
start = time.process_time()
for _ in range(100_000):
    finder.find_spec("some_module", None, None)
print((time.process_time() - start) / 100_000)
"""
_FIRST_FIRE = """
import sys, torch, {module}
print(sys.modules["hf_ext._autoload"].CPU_SECONDS["{module}"])
"""


def rows(quick: bool = False) -> Iterator[Row]:
    """Least CPU seconds of several fresh processes, those with and without the hook in turn.

    `quick`: of one process each, and of one host.
    """
    repeats = 1 if quick else 7
    _seconds(_HOOK)  # which compiles what it imports, as an installed package is
    hook, off = _interleaved(lambda: _seconds(_HOOK), lambda: _seconds(_HOOK, HF_EXT_AUTOLOAD="0"), repeats)
    yield _at_most("hook at the end of `import torch`", hook, "HF_EXT_AUTOLOAD=0", off, 2e-3)
    later = min(_seconds(_LATER) for _ in range(repeats))
    yield _at_most("what each later import of another module pays", later, "", None, 1e-6)
    import_alone = min(_seconds(_IMPORT) for _ in range(repeats))
    yield _at_most("`import hf_ext` in a fresh process", import_alone, "", None, 5e-3)
    hosts = dict.fromkeys(row.module for row in TABLE if row.when == "after")
    for module in list(hosts)[: 1 if quick else None]:
        added = min(_seconds(_FIRST_FIRE.format(module=module)) for _ in range(1 if quick else 3))
        yield _at_most(f"adding the names to {module}", added, "", None, 30e-3)


def _at_most(what: str, ours: float, peer_name: str, peer: float | None, limit: float) -> Row:
    target = f"<= {limit * 1e3:g} ms" if limit >= 1e-3 else f"<= {limit * 1e6:g} us"
    return Row(what, peer_name, ours, peer, target=target, met=ours <= limit)


def _interleaved(a: Callable[[], float], b: Callable[[], float], repeats: int) -> tuple[float, float]:
    pairs = [(a(), b()) for _ in range(repeats)]
    return min(x for x, _ in pairs), min(y for _, y in pairs)


def _seconds(code: str, **env: str) -> float:
    inherited = {k: v for k, v in os.environ.items() if k not in ("HF_EXT_AUTOLOAD", "PYTHONDONTWRITEBYTECODE")}
    done = subprocess.run([sys.executable, "-c", code], env=inherited | env, capture_output=True, text=True, check=True)
    return float(done.stdout)
