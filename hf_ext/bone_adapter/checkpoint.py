"""Adapter directories: read with clear errors, written whole or not at all, and the oddities of old files."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, TaskType, load_peft_weights
from safetensors.torch import save_file
from torch import Tensor

from hf_ext.checks import did_you_mean, listed, nearest, read_object

PREFIX = "base_model.model."  # of every key in a file
BLOCK = "bone_block"
BIAS = ("none", "all", "bone_only")

_SHARED = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"),
)
OPTIONS = (*_SHARED, "peft_type", "peft_version", "r", "init_weights", "bias", "target_parameters")

# Of the options that say where an adapter goes: (type of an item, whether one may stand without a list).
_ITEMS: dict[str, tuple[type, bool]] = {
    "target_modules": (str, True),
    "exclude_modules": (str, True),
    "layers_to_transform": (int, True),
    "layers_pattern": (str, True),
    "modules_to_save": (str, False),
}


def shared_options(config: Mapping[str, Any]) -> dict[str, Any]:
    """What every method of PEFT that adapts layers calls by the same name.

    A converted file gets these and its own method's keys only, so that the oldest PEFT with that method can read it.
    """
    return {name: config[name] for name in _SHARED if name in config}


def form_of(init_weights: Any) -> str:
    """The form that a config's `init_weights` stands for: "tile", "bat" or "bat_row".

    Raises:
        ValueError: it stands for none.
    """
    if isinstance(init_weights, bool):
        return "tile"
    if init_weights in ("bat", "bat_row"):
        return init_weights
    hint = did_you_mean(init_weights, ("true", "false", "bat", "bat_row"))
    raise ValueError(f'init_weights: found {init_weights!r}, expected true, false, "bat" or "bat_row"{hint}')


def meant_options(config: Mapping[str, Any]) -> dict[str, str | None]:
    """{option that Bone has not: the one that it almost spells}. Real options of other methods differ by more."""
    return {name: nearest(name, OPTIONS, likeness=0.88) for name in config if name not in OPTIONS}


def option_problems(config: Mapping[str, Any]) -> list[str]:
    """What cannot be right, a line each, in the options that Bone shares with PEFT's other methods.

    Args:
        config: options by name, of a file or of a config object; a set counts as a list. What is absent is sound.
    """
    problems = [
        f"{name}: found {config[name]!r}, expected {_items_in_words(*of)}"
        for name, of in _ITEMS.items()
        if not _are_items(config.get(name), *of)
    ]
    problems += [
        f"{name}: found {config[name]!r}, expected a regular expression, which a string is, or a list of names: {why}"
        for name in ("target_modules", "exclude_modules")
        if (why := _broken_pattern(config.get(name)))
    ]
    mapping = config.get("auto_mapping")
    if mapping is not None and not _is_mapping_to_class(mapping):
        problems.append(
            f"auto_mapping: found {mapping!r}, expected null or an object whose base_model_class is a string"
        )
    task = config.get("task_type")
    if task is not None and task not in list(TaskType):
        allowed = [known.value for known in TaskType]
        problems.append(f"task_type: found {task!r}, expected null or one of {listed(task, allowed)}")
    if config.get("target_parameters"):
        problems.append(
            f"target_parameters: found {config['target_parameters']!r}, expected null: Bone adapts linear layers, not "
            "bare parameters such as the 3-D weights of fused experts"
        )
    return problems or _conflicts(config)


def _are_items(value: Any, kind: type, alone: bool) -> bool:
    if value is None:
        return True
    if not isinstance(value, list | tuple | set | frozenset):
        return alone and isinstance(value, kind) and not isinstance(value, bool)
    return all(isinstance(item, kind) and not isinstance(item, bool) for item in value)


def _broken_pattern(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None


def _is_mapping_to_class(value: Any) -> bool:
    return isinstance(value, Mapping) and isinstance(value.get("base_model_class"), str | None)


def _items_in_words(kind: type, alone: bool) -> str:
    one, many = {str: ("a string", "strings"), int: ("an integer", "integers")}[kind]
    return f"null, {one} or a list of {many}" if alone else f"null or a list of {many}"


def _conflicts(config: Mapping[str, Any]) -> list[str]:
    """Options of the right types that do not go together."""
    problems, names = [], config.get("target_modules")
    if isinstance(names, str):
        problems += [
            f"{name}: found {config[name]!r}, expected null, as target_modules={names!r} is no list of names; a "
            "regular expression can say itself which layers it means"
            for name in ("layers_to_transform", "layers_pattern")
            if config.get(name) is not None
        ]
    elif config.get("layers_pattern") and config.get("layers_to_transform") is None:
        problems.append(
            f"layers_pattern: found {config['layers_pattern']!r}, expected null, as it does nothing without "
            "layers_to_transform"
        )
    return problems


# --- a directory


def read_directory(directory: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors by name, on the CPU) of an adapter directory, whatever its method.

    The weights are `adapter_model.safetensors`, or the older `adapter_model.bin`, of which only tensors are unpickled.

    Raises:
        ValueError: no such directory; a file of it is missing, truncated, or something else than it should be.
    """
    directory = _path(directory)
    if not directory.is_dir():
        raise ValueError(
            f"{directory} is not a directory; fetch an adapter from the hub with huggingface_hub.snapshot_download"
        )
    return _read_config(directory), _read_tensors(directory)


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{directory} has no {CONFIG_NAME}: it is not the directory of an adapter")
    return read_object(path, "save_pretrained")


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    names = [name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (directory / name).is_file()]
    if not names:
        raise ValueError(f"{directory} has neither {SAFETENSORS_WEIGHTS_NAME} nor {WEIGHTS_NAME}")
    path = directory / names[0]
    try:
        tensors = load_peft_weights(str(directory), device="cpu")
    except Exception as error:  # each format has errors of its own, and bytes that are not its format have any
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read, it is truncated or no file of this kind; "
            f"fetch it again: {error}"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds something else than tensors by name")
    return tensors


def write_directory(output_dir: str | Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter directory under a temporary name, then rename it: all of it or nothing.

    An empty directory is filled, not replaced: it may be the working directory of a process, or a mount point.

    Raises:
        ValueError: there is something at `output_dir` already.
    """
    output_dir = _path(output_dir).resolve()
    require_free(output_dir)
    fill = output_dir.exists()
    partial = (output_dir if fill else output_dir.parent) / f".{output_dir.name}.{uuid4().hex}"
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
        text = json.dumps(config, indent=2, sort_keys=True, default=sorted)  # sets of names
        (partial / CONFIG_NAME).write_text(text, encoding="utf-8")
        owned = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(owned, partial / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        if fill:
            _move_files(partial, output_dir)
        else:
            partial.rename(output_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_files(source: Path, to: Path) -> None:
    """The config last: without it a directory is no adapter."""
    moved = []
    try:
        for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
            if (to / name).exists():
                raise ValueError(f"{to / name} appeared while it was written; nothing is overwritten")
            (source / name).rename(to / name)
            moved.append(to / name)
    except BaseException:
        for path in moved:
            path.unlink()
        raise


def _path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError(f"found {value!r}, a {type(value).__name__}, expected the path of a directory")
    return Path(value)


def require_free(output_dir: str | Path) -> None:
    """Raise unless `output_dir` does not exist, or is an empty directory.

    Raises:
        ValueError: naming it.
    """
    output_dir = _path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists already; name a new or an empty directory, nothing is overwritten")


# --- its tensors


def split_foreign(state_dict: Mapping[str, Tensor], block: str = BLOCK) -> tuple[dict[str, Tensor], list[str]]:
    """(own tensors, names of foreign ones): `<path>.bone_block.<name>` belongs to another adapter, called <name>.

    PEFT up to 0.18 wrote the tensors of every adapter of a model into the file of each.
    """
    foreign = {name: tensor for name, tensor in state_dict.items() if re.search(rf"\.{block}\.[^.]+$", name)}
    return {name: tensor for name, tensor in state_dict.items() if name not in foreign}, list(foreign)


def path_of(name: str) -> str:
    """The path, in the base model, of the layer that a block belongs to."""
    return name.removeprefix(PREFIX).removesuffix(f".{BLOCK}")


def blocks_of(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's own `bone_block` tensors."""
    return {name: tensor for name, tensor in state_dict.items() if name.endswith(f".{BLOCK}")}


def is_development_file(init_weights: Any, state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a file was written in November 2024, when `init_weights: true` still meant the bat form.

    Most of its blocks decide, so that one damaged block is the one that is complained of.
    """
    blocks = blocks_of(state_dict).values()
    return isinstance(init_weights, bool) and 2 * sum(block.ndim == 3 for block in blocks) > len(blocks)


def tensor_problems(state_dict: Mapping[str, Tensor], expected: Mapping[str, Sequence[int | str]]) -> list[str]:
    """What is wrong with these tensors, a line each: NaN and infinity, integers, a wrong shape.

    Args:
        state_dict: tensors by name. Those without an entry in `expected` are checked for NaN and infinity only.
        expected: shapes by name. A str in a shape stands for any size of at least 1, and says which.
    """
    problems = []
    for name, tensor in state_dict.items():
        shape = expected.get(name)
        if shape is not None and not tensor.is_floating_point():
            dtype = str(tensor.dtype).removeprefix("torch.")
            problems.append(f"{name}: found {dtype}, expected floating-point numbers")
        if broken := _non_finite(tensor):
            problems.append(
                f"{name}: found NaN or infinity in {broken} of {tensor.numel()} values, expected finite ones"
            )
        if shape is not None and not _fits(tensor.shape, shape):
            hint = " (it is transposed)" if _fits(tensor.shape[::-1], shape) else ""
            problems.append(f"{name}: found shape {shown(tensor.shape)}, expected {shown(shape)}{hint}")
    return problems


def shown(shape: Sequence[int | str]) -> str:
    """A shape in words."""
    return f"({', '.join(map(str, shape))})"


def _non_finite(tensor: Tensor) -> int:
    if not tensor.is_floating_point() or tensor.is_meta:
        return 0
    # Eight-bit floats are stored but hardly computed with.
    return int((~torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor)).sum())


def _fits(found: Sequence[int], expected: Sequence[int | str]) -> bool:
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(n >= 1 if isinstance(m, str) else n == m for n, m in pairs)
