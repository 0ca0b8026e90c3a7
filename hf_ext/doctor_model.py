"""`hf-ext doctor --model DIR`: which of our strings a model folder carries, and whether they take effect here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_ext import compat, registry
from hf_ext.checks import did_you_mean, read_object

FOREIGN = "not a name of hf_ext"
OFF = "autoload is off: `import hf_ext` in the script"
NO_ROW_FORM = (
    "this PEFT has a Bone of its own, which takes init_weights='bat_row' for True and trains the tile form; install "
    "peft>=0.19"
)


def examine_model(folder: Path, channel: str) -> dict[str, Any]:
    """The attention names and the quantisation method of config.json, and the adapter type of adapter_config.json.

    Raises:
        ValueError: not a folder with one of the two files, or one does not hold an object.
    """
    files = {name: folder / name for name in ("config.json", "adapter_config.json") if (folder / name).is_file()}
    if not files:
        raise ValueError(f"--model {folder}: there is no config.json in it, and no adapter_config.json")
    strings = []
    for name, file in files.items():
        config = read_object(file, "save_pretrained")
        for key, value, host in _strings(config):
            reason = _why_no_effect(value, host, folder, channel) or _why_invalid(host, config)
            strings.append({"file": name, "key": key, "value": value, "effective": not reason, "reason": reason})
    return {"path": str(folder), "strings": strings}


def model_problems(model: dict[str, Any] | None) -> list[str]:
    """Names that were meant to be ours and do nothing; a stock name is nobody's problem."""
    return [
        f"{model['path']}/{string['file']}: {string['key']} = {string['value']!r} has no effect: {string['reason']}"
        for string in (model["strings"] if model else [])
        if not string["effective"] and string["reason"] != FOREIGN
    ]


def _strings(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(key, value, the host that reads it) of every string in which one of our names may stand."""
    for key, value in config.items():
        if key == "attn_implementation":
            named = {f".{part}": name for part, name in value.items()} if isinstance(value, dict) else {"": value}
            yield from ((f"{prefix}{key}{part}", name, "transformers") for part, name in named.items())
        elif prefix + key == "peft_type":
            yield key, value, "peft"
        elif prefix + key == "quantization_config.quant_method":
            yield prefix + key, value, "transformers.quantizers"
        elif isinstance(value, dict):
            yield from _strings(value, f"{prefix}{key}.")


def _why_no_effect(value: Any, host: str, folder: Path, channel: str) -> str | None:
    names = registry.status()[host]["names"]
    if value not in names:
        return FOREIGN + did_you_mean(value, names, likeness=0.6)  # BOFT is no misspelt BONE
    if host == "transformers" and not compat.reads_attention_from_config():
        return "this transformers ignores the key; pass attn_implementation to from_pretrained (it is read from 5.5 on)"
    if channel == "off" and not (host == "peft" and compat.has_native_bone()):
        return OFF
    return _why_refused(value, folder) if host == "transformers" else None


def _why_invalid(host: str, config: dict[str, Any]) -> str | None:
    """What is wrong with the options beside one of our names."""
    if host == "peft" and compat.has_native_bone() and config.get("init_weights") == "bat_row":
        return NO_ROW_FORM
    if host == "peft":
        from hf_ext.bone_adapter.check import config_problems
        from hf_ext.bone_adapter.config import BoneConfig

        defaults = {"r": BoneConfig.r, "init_weights": BoneConfig.init_weights}
        return "; ".join(config_problems(defaults | config)) or None
    if host == "transformers.quantizers":
        from hf_ext.ofq_quantizer.config import OFQConfig

        try:
            OFQConfig.from_dict(config["quantization_config"])
        except ValueError as error:
            return str(error)
    return None


def _why_refused(name: str, folder: Path) -> str | None:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from hf_ext.anchor_attention.support import NAMES, why_unsupported

    if name not in NAMES:
        return None
    try:
        config = AutoConfig.from_pretrained(folder)
        return why_unsupported(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], config)
    except (KeyError, ValueError, OSError) as error:
        return f"transformers knows no causal language model for it ({type(error).__name__}: {error})"
