"""What `hf-ext doctor` finds out: the state of a fresh interpreter in which nobody imported hf_ext."""

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_ext import __version__, _autoload, compat, registry
from hf_ext.doctor_model import examine_model, model_problems

# Hosts come first and nobody imports hf_ext, as in a user's script; what autoload did is read before we come in.
_PROBE = """
import sys
failed = {}
for module in ["torch", *sys.argv[2:]]:
    try:
        __import__(module)
    except BaseException as error:
        failed[module] = error
autoload = sys.modules.get("hf_ext._autoload")
from hf_ext import doctor
doctor.answer(sys.argv[1], autoload, failed)
"""


def examine(model: Path | None = None) -> dict[str, Any]:
    """Everything `hf-ext doctor --json` prints; "problems" holds a cause and its cure a line, "ok" says there is none.

    Args:
        model: a folder with a config.json or adapter_config.json: which of our strings it carries.
    """
    probe = _probe()
    versions = {
        library: dict(zip(("installed", "tested", "ok"), compat.supported(library), strict=True))
        for library in compat.TESTED
    }
    report = {
        "ok": False,
        "problems": [],
        "channel": probe["channel"],
        "python": sys.version.split()[0],
        "hf_ext": {"version": __version__, "path": str(Path(__file__).parent), "editable": _editable()},
        "versions": versions,
        "hosts": probe["hosts"],
        "engines": probe["engines"],
        "model": None if model is None else examine_model(model, probe["channel"]),
    }
    report["problems"] = [
        *probe["problems"],
        *_version_problems(versions),
        *_switch_problems(probe["channel"]),
        *model_problems(report["model"]),
    ]
    report["ok"] = not report["problems"]
    return report


def summary(report: dict[str, Any]) -> str:
    """The state of things in one line."""
    hosts = [f"{name} {host['version'] or '-'} {host['state']}" for name, host in report["hosts"].items()]
    return f"hf_ext {report['hf_ext']['version']}, names reach scripts by: {report['channel']}; {', '.join(hosts)}"


# --- inside the fresh interpreter


def answer(path: str, autoload: ModuleType | None, failed: dict[str, BaseException]) -> None:
    """Write what the probe saw to `path`. `failed`: modules that did not import."""
    hosts, problems = _hosts(autoload, failed)
    report = {"channel": autoload.CHANNEL[0] if autoload else "off", "hosts": hosts, "problems": problems}
    try:
        from hf_ext.anchor_attention.choice import available_engines

        report["engines"] = [{"name": name, **status._asdict()} for name, status in available_engines().items()]
    except Exception as error:
        report["engines"] = []
        problems.append(f"no attention engine: {type(error).__name__}: {error}")
    Path(path).write_text(json.dumps(report))


def _hosts(autoload: ModuleType | None, failed: dict[str, BaseException]) -> tuple[dict[str, Any], list[str]]:
    hosts, problems, seen = {}, [], set()
    for row in registry.TABLE:
        library = row.module.partition(".")[0]
        installed, tested, _ = compat.supported(library)
        state, reason = autoload.STATE.get(row.module, ("off", None)) if autoload else ("off", None)
        error = _root_cause(failed.get(row.module))
        again = row.module in seen  # as with a second method of the same module: what is wrong there was said
        seen.add(row.module)
        if installed is None:
            state, reason = "waiting", f"{library} is not installed"
        elif error is not None and _autoload.switched_off() and "torchvision::nms" in str(error):
            reason = (
                f"HF_EXT_AUTOLOAD=0 leaves it broken on this CPU build of torch ({error}); `import hf_ext` cures it"
            )
        elif error is not None:
            state, reason = "failed", f"import {row.module} failed: {type(error).__name__}: {error}"
            if not again:
                problems.append(f"{reason}. {compat.import_cure(library, error)}")
        elif state == "failed" and not again:
            names = [name for other in registry.TABLE if other.module == row.module for name in other.names]
            problems.append(
                f"{library} {installed} (tested {tested}): could not add {', '.join(names)}: {reason}. "
                f"`HF_EXT_DEBUG=1 {sys.executable} -c 'import {row.module}'` shows the traceback."
            )
        host = {"state": state, "names": list(row.names), "reason": reason, "module": row.module, "version": installed}
        known = hosts.setdefault(row.host, host)
        if known is not host:
            known["names"] += row.names
    if "torch" in failed:
        problems.insert(0, f"import torch failed: {failed['torch']!r}. Reinstall torch.")
    return hosts, problems


def _root_cause(error: BaseException | None) -> BaseException | None:
    """transformers' lazy imports wrap what went wrong in a text that does not say it."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return error


# --- around it


def _probe() -> dict[str, Any]:
    modules = dict.fromkeys(row.module for row in registry.TABLE)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "probe.json")
        # -P: a script's own folder is not ours to look into, and the working directory must not stand in for it.
        command = [sys.executable, "-P", "-c", _PROBE, path, *modules]
        done = subprocess.run(command, capture_output=True, text=True)
        if not os.path.exists(path):
            problem = f"a fresh interpreter died (exit {done.returncode}): {done.stderr.strip()[-2000:]}"
            return {"channel": "off", "hosts": {}, "engines": [], "problems": [problem]}
        return json.loads(Path(path).read_text())


def _version_problems(versions: dict[str, dict[str, Any]]) -> list[str]:
    problems = [
        f"{library} {version['installed']} is untested (tested: {version['tested']}). "
        f"Names are added where its interfaces still exist. `pip install '{library}{version['tested']}'` is safe."
        for library, version in versions.items()
        if not version["ok"]
    ]
    return problems + compat.pair_problems()


def _switch_problems(channel: str) -> list[str]:
    if channel != "off" or _autoload.switched_off():
        return []
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        return [
            "TORCH_DEVICE_BACKEND_AUTOLOAD switches PyTorch's autoload off, so scripts do not get our names. Unset it, "
            "or start scripts with `python -m hf_ext.run SCRIPT`, or `import hf_ext` in them."
        ]
    return [
        "PyTorch found no entry point of hf_ext, so scripts do not get our names: the package is on the path but not "
        "installed. `pip install hf-ext` (in a checkout: `pip install -e .`)."
    ]


def _editable() -> bool:
    try:
        origin = json.loads(metadata.distribution("hf-ext").read_text("direct_url.json") or "{}")
    except metadata.PackageNotFoundError:
        return False
    return origin.get("dir_info", {}).get("editable", False)
