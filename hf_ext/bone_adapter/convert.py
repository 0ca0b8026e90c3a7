"""Bone directories to MiSS and back, and development checkpoints to what later versions read."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hf_ext.bone_adapter.base import features, open_base
from hf_ext.bone_adapter.check import require_sound
from hf_ext.bone_adapter.checkpoint import (
    BLOCK,
    blocks_of,
    is_development_file,
    path_of,
    read_directory,
    require_free,
    shared_options,
    split_foreign,
    write_directory,
)

MISS_BLOCK = "miss_block"

# PEFT 0.17 knows only this spelling, though its documentation says MiSS_only; later versions take both.
MISS_ONLY = "miss_only"

_log = logging.getLogger(__name__)


def upgrade_checkpoint(directory: str | Path, output_dir: str | Path) -> None:
    """Rewrite a checkpoint of November 2024 so that every later version reads it: `init_weights: "bat"`.

    Development versions of PEFT wrote bat blocks under `init_weights: true`, which soon after meant the tile form.
    Tensors of other adapters are dropped.

    Raises:
        ValueError: it is no such checkpoint, or not a sound one; there is something at `output_dir`.
    """
    require_free(output_dir)
    config, state_dict = read_directory(directory)
    require_sound(directory, config, state_dict)
    tensors, _ = split_foreign(state_dict)
    if not is_development_file(config["init_weights"], tensors):
        raise ValueError(
            f"{directory} is no development checkpoint, its blocks are those of init_weights="
            f"{config['init_weights']!r}; there is nothing to upgrade"
        )
    write_directory(output_dir, {**config, "init_weights": "bat"}, tensors)


def convert_to_miss(bone_dir: str | Path, output_dir: str | Path) -> None:
    """Rewrite a Bone checkpoint as one of MiSS, PEFT's successor of Bone; the function it computes stays the same.

    PEFT's MiSS refuses r > in_features when it loads the result; Bone does not. Blocks do not tell in_features: where
    the base model that the config names can be opened offline, a logged warning names such layers.

    Raises:
        ValueError: form "bat_row", which MiSS has not; an unsound checkpoint; there is something at `output_dir`.
    """
    require_free(output_dir)
    config, state_dict = read_directory(bone_dir)
    form = require_sound(bone_dir, config, state_dict).form
    if form == "bat_row":
        raise ValueError(
            f'{bone_dir}: MiSS has no form for init_weights="bat_row"; convert_to_lora(rank=...) approximates it'
        )
    bias = config.get("bias", "none")
    miss = {
        **shared_options(config),
        "peft_type": "MISS",
        "r": config["r"],
        "init_weights": config["init_weights"] if form == "tile" else form,
        "bias": MISS_ONLY if bias == "bone_only" else bias,
        "miss_dropout": 0.0,
        "mini_r": 1,
    }
    tensors, _ = split_foreign(state_dict)
    write_directory(output_dir, miss, _renamed(tensors, BLOCK, MISS_BLOCK))
    if narrow := _narrower_than_r(config, map(path_of, blocks_of(tensors))):
        _log.warning(f"PEFT's MiSS will refuse {output_dir}: r={config['r']} > in_features of {', '.join(narrow)}")


def from_miss(miss_dir: str | Path, output_dir: str | Path) -> None:
    """Rewrite a MiSS checkpoint as one of Bone; the function it computes stays the same, but for dropout in training.

    Raises:
        ValueError: MiSS's form "mini", which Bone has not; not a sound MiSS checkpoint (tensors are named as they would
            be in a Bone file); there is something at `output_dir`.
    """
    require_free(output_dir)
    config, state_dict = read_directory(miss_dir)
    if config.get("peft_type") != "MISS":
        raise ValueError(f'{miss_dir}: peft_type: found {config.get("peft_type")!r}, expected "MISS"')
    if config.get("init_weights") == "mini":
        raise ValueError(
            f'{miss_dir}: Bone has no form for init_weights="mini"; PEFT\'s own convert_to_lora is exact for it'
        )
    if config.get("miss_dropout"):
        warnings.warn(f"miss_dropout={config['miss_dropout']} is dropped: Bone has no dropout", stacklevel=2)
    bias = config.get("bias", "none")
    tensors = _renamed(split_foreign(state_dict, MISS_BLOCK)[0], MISS_BLOCK, BLOCK)
    bone = {
        **shared_options(config),
        "peft_type": "BONE",
        "r": config.get("r"),
        "init_weights": config.get("init_weights"),
        "bias": "bone_only" if str(bias).lower() == MISS_ONLY else bias,
    }
    form = require_sound(miss_dir, bone, tensors).form
    if is_development_file(bone["init_weights"], tensors):
        bone["init_weights"] = form
    write_directory(output_dir, bone, tensors)


def _narrower_than_r(config: Mapping[str, Any], paths: Iterable[str]) -> list[str]:
    """The layers with fewer inputs than r; none if the base model cannot be asked."""
    try:
        base = open_base(config, None, offline=True)
        return [path for path in paths if features(base.get_submodule(path))[0] < config["r"]]
    except Exception:  # the conversion needs no base, and a base of any kind fails in ways of its own
        return []


def _renamed(state_dict: Mapping[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {
        f"{name.removesuffix(old)}{new}" if name.endswith(f".{old}") else name: tensor
        for name, tensor in state_dict.items()
    }
