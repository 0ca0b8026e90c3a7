"""Is this a sound Bone checkpoint? Asked of the files alone, or of the files and the base model they are for."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_ext.bone_adapter.base import BaseModel, features, may_be_target, open_base, targets
from hf_ext.bone_adapter.checkpoint import (
    BIAS,
    BLOCK,
    PREFIX,
    blocks_of,
    form_of,
    is_development_file,
    meant_options,
    option_problems,
    path_of,
    read_directory,
    shown,
    split_foreign,
    tensor_problems,
)
from hf_ext.bone_adapter.ops import block_shape

Shape = tuple[int | str, ...]


@dataclass
class CheckpointReport:
    """What `check_checkpoint` found in a sound checkpoint.

    Args:
        form: "tile", "bat" or "bat_row".
        r: block size.
        tensors: number of the adapter's blocks.
        parameters: number of values in them.
        dtype: of them, such as "float32"; several are listed.
        foreign: names of tensors of other adapters, which loading ignores.
        notes: what is unusual, but loads.
        checked_against_base: whether names and shapes were compared with a base model, or only with each other.
    """

    form: str
    r: int
    tensors: int
    parameters: int
    dtype: str
    foreign: list[str]
    notes: list[str]
    checked_against_base: bool


def check_checkpoint(directory: str | Path, base_model: BaseModel | None = None) -> CheckpointReport:
    """Check a Bone adapter directory without loading it into a model.

    Args:
        directory: with adapter_config.json and adapter_model.safetensors (or the older .bin).
        base_model: a path or a name on the hub, a transformers config, or a model, of which only shapes are used. With
            it, names and shapes have to be those the adapter would have in it; without, only what the files say of each
            other is checked, and a missing tensor cannot be noticed.

    Raises:
        ValueError: every problem, a line each, with the name of the tensor or option, what was found and what was
            expected. A file that cannot be read is reported alone.
    """
    config, state_dict = read_directory(directory)
    # Opening the base reads options: with unsound ones, `require_sound` complains of them and needs no base.
    base = None if base_model is None or any(config_problems(config)) else open_base(config, base_model)
    return require_sound(directory, config, state_dict, base)


def require_sound(
    where: Any, config: Mapping[str, Any], state_dict: Mapping[str, Tensor], base: nn.Module | None = None
) -> CheckpointReport:
    """As `check_checkpoint`, of what was read already; `where` names it in the error.

    Raises:
        ValueError: every problem, a line each.
    """
    tensors, foreign = split_foreign(state_dict)
    blocks = blocks_of(tensors)
    problems = [*config_problems(config), *([] if blocks else [f"found no {BLOCK} tensor, expected one a target"])]
    if problems:  # of an unknown form nothing is expected of any shape
        raise _unsound(where, [*problems, *tensor_problems(tensors, {})])
    development = is_development_file(config["init_weights"], tensors)
    form = "bat" if development else form_of(config["init_weights"])
    expected = _of_files(config, form, tensors) if base is None else _of_base(config, form, tensors, base)
    problems = [*expected.problems, *expected.wrong_names(tensors), *tensor_problems(tensors, expected.shapes)]
    if problems:
        raise _unsound(where, problems)
    return CheckpointReport(
        form=form,
        r=config["r"],
        tensors=len(blocks),
        parameters=sum(block.numel() for block in blocks.values()),
        dtype=", ".join(sorted({str(block.dtype).removeprefix("torch.") for block in blocks.values()})),
        foreign=foreign,
        notes=[*([_DEVELOPMENT] if development else []), *_unknown_options(config), *expected.notes],
        checked_against_base=base is not None,
    )


_DEVELOPMENT = (
    "written by a development version of PEFT, of November 2024: bat blocks under init_weights: true. PeftModel loads "
    "it; for everything else, upgrade_checkpoint"
)


def _unsound(where: Any, problems: list[str]) -> ValueError:
    return ValueError("\n- ".join([f"{where} is not a sound Bone checkpoint:", *problems]))


def config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What cannot be right in an adapter_config.json, a line each."""
    if config.get("peft_type") != "BONE":
        yield f'peft_type: found {config.get("peft_type")!r}, expected "BONE"'
    r = config.get("r")
    if type(r) is not int or r < 1:
        yield f"r: found {r!r}, expected an integer of at least 1"
    if config.get("bias", "none") not in BIAS:
        yield f"bias: found {config['bias']!r}, expected one of {', '.join(BIAS)}"
    try:
        form_of(config.get("init_weights"))
    except ValueError as error:
        yield str(error)
    yield from option_problems(config)
    for name, near in meant_options(config).items():
        if near:
            yield f"{name}: found an option of this name, expected {near}, which it seems to mean"


def _unknown_options(config: Mapping[str, Any]) -> Iterator[str]:
    if names := sorted(meant_options(config)):
        yield f"found options that Bone has not, which loading ignores: {', '.join(names)}"


# --- what a file should hold


@dataclass
class _Expected:
    """By name of the tensor. `shapes`: blocks, biases. `whole`: of modules_to_save. `misfits`: blocks of no shape."""

    shapes: dict[str, Shape]
    whole: dict[str, Shape] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    misfits: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def wrong_names(self, tensors: Mapping[str, Tensor]) -> Iterator[str]:
        for name, shape in (self.shapes | self.whole).items():
            if name not in tensors:
                yield f"{name}: found nothing, expected a tensor of shape {shown(shape)}"
        for name, block in blocks_of(tensors).items():
            if name not in self.shapes and name not in self.misfits:
                yield f"{name}: found a tensor of shape {shown(block.shape)}, expected none: it belongs to no target"


def _of_files(config: Mapping[str, Any], form: str, tensors: Mapping[str, Tensor]) -> _Expected:
    r = config["r"]
    shapes = {
        "tile": (r, "out_features"),
        "bat": (f"out_features / {r}", r, r),
        "bat_row": (f"in_features / {r}", r, r),
    }
    names = [name for name in blocks_of(tensors) if name.startswith(PREFIX) and may_be_target(config, path_of(name))]
    unsaved = config.get("bias", "none") != "none" and not any(name.endswith(".bias") for name in tensors)
    return _Expected(dict.fromkeys(names, shapes[form]), notes=[_without_biases(config)] if unsaved else [])


def _of_base(config: Mapping[str, Any], form: str, tensors: Mapping[str, Tensor], base: nn.Module) -> _Expected:
    expected = _Expected({})
    try:
        layers = targets(config, base)
    except ValueError as error:
        expected.problems.append(str(error))
        layers = {}
    for path, layer in layers.items():
        name = f"{PREFIX}{path}.{BLOCK}"
        try:
            expected.shapes[name] = block_shape(form, config["r"], *features(layer))
        except ValueError as error:
            expected.misfits.add(name)
            expected.problems.append(f"{path}: {error}")
    expected.whole = _whole(config, base)
    biases = _biases(config, base, layers, expected.whole)
    if biases and not tensors.keys() & biases.keys():
        expected.notes.append(_without_biases(config))
    else:
        expected.shapes |= biases
    # Not a problem: the head or the vocabulary may have been resized before the adapter was trained.
    expected.notes += [
        f"{name}: found shape {shown(tensors[name].shape)}, the base model has {shown(shape)}; resize it before loading"
        for name, shape in expected.whole.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return expected


def _without_biases(config: Mapping[str, Any]) -> str:
    return f"bias: found {config['bias']!r} and no biases; PEFT before 0.21 trained them and did not save them"


def _whole(config: Mapping[str, Any], base: nn.Module) -> dict[str, Shape]:
    """Of modules_to_save, which PEFT matches by the end of the name; names that match nothing are ignored."""
    ends = tuple(config.get("modules_to_save") or ())
    return {
        f"{PREFIX}{path}.{name}": tuple(tensor.shape)
        for path, module in base.named_modules()
        if ends and path.endswith(ends)
        for name, tensor in module.state_dict().items()
    }


def _biases(
    config: Mapping[str, Any], base: nn.Module, layers: Mapping[str, nn.Module], whole: Mapping[str, Shape]
) -> dict[str, Shape]:
    """Of every layer, or of the targets, by the names they have once the targets are wrapped."""
    chosen = config.get("bias", "none")
    found = {}
    for name, parameter in base.named_parameters():
        path, _, last = name.rpartition(".")
        if last != "bias" or chosen == "none" or f"{PREFIX}{name}" in whole:
            continue
        if path in layers:
            found[f"{PREFIX}{path}.base_layer.bias"] = tuple(parameter.shape)
        elif chosen == "all":
            found[f"{PREFIX}{name}"] = tuple(parameter.shape)
    return found
