"""What `hf-ext doctor` finds out: the state of a fresh interpreter in which nobody imported hf_ext."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from hf_ext import __version__, _autoload, compat, registry

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
        *_model_problems(report["model"]),
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
    hosts, problems = {}, []
    for row in registry.TABLE:
        library = row.module.partition(".")[0]
        installed, tested, _ = compat.supported(library)
        state, reason = autoload.STATE.get(row.module, ("off", None)) if autoload else ("off", None)
        error = _root_cause(failed.get(row.module))
        if installed is None:
            state, reason = "waiting", f"{library} is not installed"
        elif error is not None and _autoload.switched_off() and "torchvision::nms" in str(error):
            reason = (
                f"HF_EXT_AUTOLOAD=0 leaves it broken on this CPU build of torch ({error}); `import hf_ext` cures it"
            )
        elif error is not None:
            state, reason = "failed", f"import {row.module} failed: {type(error).__name__}: {error}"
            problems.append(f"{reason}. {compat.import_cure(library, error)}")
        elif state == "failed":
            problems.append(
                f"{library} {installed} (tested {tested}): could not add {', '.join(row.names)}: {reason}. "
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


# --- --model DIR


def examine_model(folder: Path, channel: str) -> dict[str, Any]:
    """Which attention names the config.json of `folder` carries, and whether they take effect here.

    Raises:
        ValueError: not a folder with a config.json that holds an object.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"--model {folder}: there is no config.json in it")
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"--model {folder}: config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"--model {folder}: config.json holds a {type(config).__name__}, not an object")
    strings = []
    for key, value in _attention_keys(config):
        reason = _why_no_effect(value, folder, channel)
        strings.append({"file": file.name, "key": key, "value": value, "effective": not reason, "reason": reason})
    return {"path": str(folder), "strings": strings}


def _attention_keys(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key == "attn_implementation":
            yield prefix + key, value
        elif isinstance(value, dict):
            yield from _attention_keys(value, f"{prefix}{key}.")


def _why_no_effect(value: Any, folder: Path, channel: str) -> str | None:
    from hf_ext.anchor_attention.support import NAMES

    if value not in NAMES:
        near = get_close_matches(str(value), NAMES, n=1)
        return f"not a name of hf_ext; did you mean {near[0]!r}?" if near else "not a name of hf_ext"
    if not compat.reads_attention_from_config():
        return "this transformers ignores the key; pass attn_implementation to from_pretrained (it is read from 5.5 on)"
    if channel == "off":
        return "autoload is off: `import hf_ext` in the script"
    return _why_refused(folder)


def _why_refused(folder: Path) -> str | None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from hf_ext.anchor_attention.support import why_unsupported

    try:
        config = AutoConfig.from_pretrained(folder)
        return why_unsupported(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    except (KeyError, ValueError, OSError) as error:
        return f"transformers knows no causal language model for it ({type(error).__name__}: {error})"


def _model_problems(model: dict[str, Any] | None) -> list[str]:
    """Names that were meant to be ours and do nothing; a stock name is nobody's problem."""
    return [
        f"{model['path']}/{string['file']}: {string['key']} = {string['value']!r} has no effect: {string['reason']}"
        for string in (model["strings"] if model else [])
        if not string["effective"] and string["reason"] != "not a name of hf_ext"
    ]
