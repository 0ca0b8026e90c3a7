"""Bone adapters as LoRA checkpoints, for servers that know nothing else."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from hf_ext.bone_adapter.base import BaseModel, features, open_base, weight_of, without_adapters
from hf_ext.bone_adapter.check import require_sound
from hf_ext.bone_adapter.checkpoint import (
    PREFIX,
    blocks_of,
    path_of,
    read_directory,
    require_free,
    shared_options,
    split_foreign,
    write_directory,
)
from hf_ext.bone_adapter.ops import updated_weight

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 512)  # what vLLM takes as --max-lora-rank

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoraExport:
    """A Bone adapter as LoRA.

    Args:
        config: for `get_peft_model`.
        state_dict: tensors by the names they have in a file: `base_model.model.<path>.lora_A.weight` (rank, in),
            `….lora_B.weight` (out, rank), and the saved biases and modules as they were.
        errors: path of a layer -> ‖dW - B A‖ / ‖dW‖, Frobenius norms; 0 where the export is exact.
    """

    config: LoraConfig
    state_dict: dict[str, Tensor]
    errors: dict[str, float]


@torch.no_grad()
def convert_to_lora(
    model_or_dir: nn.Module | str | Path,
    output_dir: str | Path | None = None,
    *,
    adapter_name: str = "default",
    rank: int | None = None,
    base_model: BaseModel | None = None,
) -> LoraExport:
    """Express a Bone adapter as LoRA, exactly in the tile form, approximately in the block-affine forms.

    Tile form (arXiv 2409.15371): dW = B A with A[k mod r, k] = 1 and B the transposed block, rank r, scale 1. The
    block-affine forms have a dW of any rank, which is cut to `rank` by a singular value decomposition in float64.

    Args:
        model_or_dir: a model with the adapter, or the directory of an adapter.
        output_dir: where an ordinary LoRA checkpoint is written, if given.
        adapter_name: which adapter of the model.
        rank: of the export, for the block-affine forms; the tile form has rank r.
        base_model: for a directory, in place of the base model it names: a model, a path or a name on the hub, for the
            tile form also a transformers config. The tile form reads its shapes only, the others its weights.

    Raises:
        ValueError: neither a model nor a path; a block-affine form without `rank`, or the tile form with another than
            r; a block-affine adapter that is merged; an unknown adapter; an unsound checkpoint; there is something at
            `output_dir`.
        RuntimeError: a block-affine form on weights that are not whole in this process.
    """
    if output_dir is not None:
        require_free(output_dir)
    live = isinstance(model_or_dir, nn.Module)
    if not live and not isinstance(model_or_dir, str | os.PathLike):
        raise ValueError(
            f"model_or_dir: found {model_or_dir!r}, a {type(model_or_dir).__name__}, expected a model with the "
            "adapter, or the directory of an adapter"
        )
    if live and base_model is not None:
        raise ValueError("base_model is for directories; the model given has its own")
    where = f"adapter {adapter_name!r}" if live else model_or_dir
    config, state_dict = _of_model(model_or_dir, adapter_name) if live else read_directory(model_or_dir)
    form = require_sound(where, config, state_dict).form
    rank = _rank(form, config["r"], rank)
    if live:
        base = _inside(model_or_dir)
    else:
        base = open_base(config, base_model, weights=form != "tile")
        require_sound(where, config, state_dict, base)
    own, _ = split_foreign(state_dict)
    blocks = blocks_of(own)
    layers = {path_of(name): base.get_submodule(path_of(name)) for name in blocks}
    factors, errors = _factors(form, blocks, layers, rank)
    saved = {name: tensor.detach().to("cpu", copy=True) for name, tensor in own.items() if name not in blocks}
    options = _options(config, rank, any(isinstance(without_adapters(layer), Conv1D) for layer in layers.values()))
    export = LoraExport(LoraConfig(**options), factors | saved, errors)
    if output_dir is not None:
        write_directory(output_dir, {**options, "peft_type": "LORA"}, export.state_dict)
    _say_rank(rank)
    return export


def _of_model(model: nn.Module, adapter_name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config, tensors by the names they have in a file) of one adapter of a model."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(f"the model has no adapter {adapter_name!r}; it has {', '.join(configs) or 'none'}")
    prefix = "" if isinstance(model, PeftModel) else "base_model." if isinstance(model, BaseTuner) else PREFIX
    tensors = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return configs[adapter_name].to_dict(), {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _inside(model: nn.Module) -> nn.Module:
    """The model that PEFT wrapped, its layers still with their adapters."""
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def _rank(form: str, r: int, rank: int | None) -> int:
    if form == "tile":
        if rank not in (None, r):
            raise ValueError(f"rank={rank}: the tile form is exported exactly, with rank r={r}; leave rank out")
        return r
    if type(rank) is not int or rank < 1:
        raise ValueError(
            f"rank={rank!r}: the {form} form is no LoRA of a fixed rank; name the rank to cut it to, an integer of at "
            "least 1, and look at the errors of the result"
        )
    return rank


def _factors(
    form: str, blocks: Mapping[str, Tensor], layers: Mapping[str, nn.Module], rank: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """(A and B of every layer by their names in a file, relative error by path of the layer)."""
    factors, errors = {}, {}
    for name, block in tqdm(blocks.items(), "LoRA", disable=form == "tile"):
        path = path_of(name)
        a, b, errors[path] = _exact(layers[path], block) if form == "tile" else _cut(form, layers[path], block, rank)
        factors |= {f"{PREFIX}{path}.lora_A.weight": a.cpu(), f"{PREFIX}{path}.lora_B.weight": b.cpu()}
    return factors, errors


def _exact(layer: nn.Module, block: Tensor) -> tuple[Tensor, Tensor, float]:
    """(A, B, 0) of a tile form block (r, out)."""
    columns = torch.arange(features(layer)[0], device=block.device)
    a = block.new_zeros(len(block), len(columns))
    a[columns % len(block), columns] = 1
    return a, block.T.contiguous(), 0.0


def _cut(form: str, layer: nn.Module, block: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """(A, B, relative error) of a block-affine form; where the layer has no `rank` dimensions, the rest is zero."""
    if getattr(layer, "merged", False):
        raise ValueError(f"the {form} form is exported from the weights before merging; unmerge_adapter() first")
    weight = weight_of(layer).double()
    delta = updated_weight(form, weight, block.to(weight)) - weight
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    root = s[:rank].sqrt()
    a, b = (root[:, None] * v[:rank]).float(), (u[:, :rank] * root).float()
    error = torch.linalg.norm(delta - b.double() @ a.double()) / torch.linalg.norm(delta).clamp(min=1e-300)
    missing = rank - len(root)
    return F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing)), error.item()


def _options(config: Mapping[str, Any], rank: int, transposed: bool) -> dict[str, Any]:
    bias = config.get("bias", "none")
    return {
        **shared_options(config),
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "lora_only" if bias == "bone_only" else bias,
        "fan_in_fan_out": transposed,
    }


def _say_rank(rank: int) -> None:
    enough = next((served for served in SERVED_RANKS if served >= rank), None)
    if enough is None:
        _log.warning(f"LoRA rank {rank} is above {SERVED_RANKS[-1]}, the largest --max-lora-rank that servers take")
    else:
        _log.info(f"LoRA rank {rank}: a server such as vLLM needs --max-lora-rank {enough}")
