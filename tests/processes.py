"""Fresh interpreters for the tests, and a house of stand-ins for torch and the hosts that import in milliseconds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import hf_ext
from hf_ext.registry import TABLE, Row

SWITCHES = ("HF_EXT_AUTOLOAD", "HF_EXT_DEBUG", "TORCH_DEVICE_BACKEND_AUTOLOAD", "PYTHONWARNINGS")


def run(*arguments: Any, env: dict[str, str] | None = None, cwd: Any = "/", timeout: float = 100) -> Any:
    """`python *arguments`, with none of our switches set but those in `env`.

    The working directory is not the checkout: a name that is found there would prove nothing about the installation.
    """
    environment = {key: value for key, value in os.environ.items() if key not in SWITCHES} | (env or {})
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        timeout=timeout,
        capture_output=True,
        encoding="utf-8",
    )


def run_python(code: str, *flags: str, **where: Any) -> Any:
    return run(*flags, "-c", dedent(code), **where)


def answer(process: Any) -> Any:
    """The JSON in the last line of what a successful process printed."""
    assert process.returncode == 0, process.stdout + process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text), encoding="utf-8")


def first_on_path(folder: Path) -> dict[str, str]:
    """Environment in which `folder` is searched first; without byte code, which would outlive a quick edit."""
    rest = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": f"{folder}{os.pathsep}{rest}" if rest else str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def copy_package(folder: Path) -> dict[str, str]:
    """A copy of hf_ext to plant faults in, and the environment that prefers it to the installed one."""
    shutil.copytree(Path(hf_ext.__file__).parent, folder / "hf_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return first_on_path(folder)


# --- what a hook may leave on a host's module: nothing

TRACES = '''
import inspect, sys, types

def traces(name):
    """What is left of us on the imported module `name`."""
    module = sys.modules[name]
    module.__name__  # the first touch ends the watch over a module that imported torch while half loaded
    loader = module.__loader__
    found = [f"{key} is ours" for key, value in list(vars(module).items())
             if str(getattr(value, "__module__", "")).startswith("hf_ext")]
    if type(module) is not types.ModuleType:
        found.append(f"class {type(module)}")
    if module.__spec__.loader is not loader or type(loader).__module__.startswith("hf_ext"):
        found.append(f"loader {loader}")
    if not inspect.getsource(module):
        found.append("no source")
    return [f"{name}: {what}" for what in found]
'''

# --- the house: a copy of hf_ext whose register functions are stand-ins, a torch, and every host of the table

_TORCH = """
import os

NAMES = {}  # what hooks that run before a host have to prepare
if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "1":
    from hf_ext._autoload import arm
    arm()
LATE = True
"""

_HOST = """
EARLY = True
import torch
NAMES = {"own": "the host's"}
"""

_STAND_IN = """
from functools import partial
from importlib import import_module

import torch

def __getattr__(path):
    verb, _, row = path.partition(" ")
    if not row:
        raise AttributeError(path)
    return partial(globals()[verb], *row.split(" "))

def table(module, when):
    return torch.NAMES if when == "before" else import_module(module).NAMES

def add(module, when, *names):
    table(module, when).update(dict.fromkeys(names, "ours"))

def remove(module, when, *names):
    for name in names:
        table(module, when).pop(name, None)
"""

_CHECK = """
import json
from importlib import import_module

import torch

def problems():
    found = []
    for module, when, names in ROWS:
        host = import_module(module)
        table = torch.NAMES if when == "before" else host.NAMES
        found += [f"{module} lacks {name}" for name in names if table.get(name) != "ours"]
        found += traces(module)
    return found

def check():
    print(json.dumps(problems()))
"""


def build_house(folder: Path) -> dict[str, str]:
    """Write the house into `folder`; the environment to run in. `import house; house.check()` prints what is wrong."""
    env = copy_package(folder)
    rows = [(row.module, row.when, list(row.names)) for row in TABLE]
    files = {"torch/__init__.py": _TORCH, "house.py": f"{TRACES}\nROWS = {rows!r}\n{_CHECK}"}
    for row in TABLE:
        files |= _host(row)
    write(folder, files | {"hf_ext/stand_in.py": _STAND_IN})
    append(folder / "hf_ext/registry.py", _stand_in_table())
    return env


def append(path: Path, code: str) -> None:
    path.write_text(path.read_text(encoding="utf-8") + dedent(code), encoding="utf-8")


def edit_host(folder: Path, module: str, code: str) -> None:
    write(folder, {f"{module.replace('.', '/')}/__init__.py": code})


def _host(row: Row) -> dict[str, str]:
    """Every module is a package, so that a host may be the parent of another."""
    *parents, _ = row.module.split(".")
    files = {"/".join([*parents[: i + 1], "__init__.py"]): "" for i in range(len(parents))}
    leaf = f"{row.module.replace('.', '/')}/__init__.py"
    if row.when == "before":
        needs = f"import torch\nassert {set(row.names)!r} <= torch.NAMES.keys(), 'executed before its hook ran'\n"
        return files | {f"{parents[0]}/__init__.py": f"import torch\nimport {row.module}\n", leaf: needs}
    return files | {leaf: _HOST}


def _stand_in_table() -> str:
    return """
    from dataclasses import replace as _replace

    def _stand_in(row, verb):
        return " ".join([f"hf_ext.stand_in:{verb}", row.module, row.when, *row.names])

    TABLE = tuple(_replace(row, add=_stand_in(row, "add"), remove=_stand_in(row, "remove")) for row in TABLE)
    """
