"""Small files: the codes of the weights packed to their bits, or the latent weights as an ordinary checkpoint."""

import json
from collections.abc import Mapping
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_ext import compat
from hf_ext.checks import read_object
from hf_ext.ofq_quantizer.checkpoints import CURE, later_layers
from hf_ext.ofq_quantizer.config import OFQConfig
from hf_ext.ofq_quantizer.convert import quantize, quantized_switches
from hf_ext.ofq_quantizer.freezing import drop_latents, freeze, frozen_copy, require_finite_weights
from hf_ext.ofq_quantizer.frozen import FrozenWeight
from hf_ext.ofq_quantizer.origin import FORMAT, build, describe, save_plain
from hf_ext.ofq_quantizer.packed_card import packed_card
from hf_ext.ofq_quantizer.packing import pack_codes, unpack_codes
from hf_ext.ofq_quantizer.probe import image_shape
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer

# Stops whoever takes the folder for a checkpoint of its own: timm by the architecture, the automatic classes of
# transformers by the type of model, and its other classes, which would start anew what they miss, by the dtype.
STOPS = dict.fromkeys(("format", "architecture", "model_type", "dtype"), FORMAT)
CONFIG, TENSORS = "config.json", "model.safetensors"
VERSION = 2
SEAL = "config_sha256"
FIELDS = ("ofq", "base", "sha256", SEAL)


def save_packed(model: nn.Module, directory: str | Path, model_args: dict[str, Any] | None = None) -> None:
    """Write a calibrated model with the codes of its weights packed to their bits; `load_packed` reads it.

    Args:
        model: a quantised model of timm or transformers, in any mode.
        directory: gets config.json, model.safetensors and, unless somebody's own is there, README.md; made where it is
            missing.
        model_args: for a model of timm whose arguments timm has not recorded: those of its `create_model`.

    Raises:
        ValueError: the model is not quantised or not calibrated, a weight or a scale has NaN or inf, the model cannot
            be built again from what it says of itself, or the folder has files of others under these names.
    """
    directory = Path(directory)
    config = quantized_switches(model)[0].config
    _require_free(directory)
    if later := later_layers(model):
        raise ValueError(
            f"{', '.join(later)} came into the model after its conversion, and would be quantised where the file is "
            f"read: {CURE}"
        )
    frozen = frozen_copy(model).cpu()
    about = describe(model, model_args)
    tensors = _packed_tensors(frozen)
    _check_rebuilt(frozen, tensors, about, config)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / TENSORS, metadata={"format": FORMAT})
    fields = {"ofq": config.to_dict(), "base": about, "sha256": _digest(directory / TENSORS)}
    fields = STOPS | {"format_version": VERSION} | fields
    (directory / CONFIG).write_text(json.dumps(fields | {SEAL: _seal(fields)}, indent=1) + "\n")
    if compat.may_write_card(directory):
        compat.write_card(directory, packed_card(about, config, (directory / TENSORS).stat().st_size))


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    model_args: dict[str, Any] | None = None,
    *,
    commit_message: str = "Upload packed OFQ model",
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Pack a calibrated model and upload it to the hub with a card; `load_packed(repo_id)` reads it.

    Args:
        model, model_args: as for `save_packed`.
        repo_id: "user/name"; made where it is missing. A card that it has stays, unless it is an unedited one of ours.
        commit_message: of the one commit.
        private: of a repository that is made now; None: public, unless its organisation has another default.
        token: None: the stored one.
        revision: branch to write to, made where it is missing.
        create_pr: propose the commit as a pull request.

    Returns:
        The URL of the commit.

    Raises:
        ValueError: as `save_packed` does, before anything is uploaded; or `repo_id` is no id.
    """
    return compat.push_folder(
        lambda folder: save_packed(model, folder, model_args),
        repo_id,
        commit_message=commit_message,
        private=private,
        token=token,
        revision=revision,
        create_pr=create_pr,
    )


def load_packed(
    source: str | Path,
    *,
    revision: str | None = None,
    token: bool | str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> nn.Module:
    """Read what `save_packed` wrote: a model in evaluation mode that gives the same logits, bit for bit.

    It holds integers, and no latent weights to train.

    Args:
        source: a folder, or a repository "user/name" of the hub.
        revision, token, cache_dir, local_files_only: of the repository, as in `from_pretrained` of transformers.

    Raises:
        FileNotFoundError: no such folder or repository, or without config.json or model.safetensors.
        ValueError: it is none of `save_packed`, of a newer one, or damaged.
    """
    directory = compat.folder_of(
        source,
        (CONFIG, TENSORS),
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    config = _read_config(directory / CONFIG)
    if _seal(config) != config[SEAL]:
        raise ValueError(
            f"{directory / CONFIG} is damaged or was edited: its checksum is not the one in its {SEAL!r}; save or copy "
            "it again"
        )
    if _digest(directory / TENSORS) != config["sha256"]:
        raise ValueError(
            f"{directory / TENSORS} is damaged: its checksum is not the one in {CONFIG}; save or copy it again"
        )
    try:
        # Copies: what load_file gives is the file itself, and changes or vanishes with it.
        tensors = {name: tensor.clone() for name, tensor in load_file(directory / TENSORS).items()}
        return _filled(config["base"], OFQConfig.from_dict(config["ofq"]), tensors)
    except (ImportError, MemoryError):  # of this machine, and not of the file
        raise
    except KeyError as error:
        raise ValueError(f"{directory / CONFIG} lacks {error} in 'base'") from error
    except Exception as error:  # the hosts assert, index and have classes of their own
        raise ValueError(
            f"{directory / CONFIG} and {TENSORS} do not make a model: {type(error).__name__}: {error}"
        ) from error


def export_fp(model: nn.Module, directory: str | Path, model_args: dict[str, Any] | None = None) -> None:
    """Write the latent weights as an ordinary checkpoint, which timm or transformers loads without hf_ext.

    `timm.create_model("local-dir:DIRECTORY", pretrained=True)` and `from_pretrained(DIRECTORY)` read it. Scales and
    shifts are left out; the logits are those of a model that rounds nothing and shifts nothing.

    Args:
        model, directory, model_args: as for `save_packed`.

    Raises:
        ValueError: the model is not quantised, has no latent weights any more or NaN or inf in them, or cannot be built
            again; or the folder has a config.json of something else.
    """
    require_finite_weights(model)
    if any(isinstance(module, FrozenWeight) for module in model.modules()):
        raise ValueError("this model holds integers and no latent weights; export the model it was made from")
    with torch.random.fork_rng(devices=[]):  # exporting must not change the training that goes on
        plain = build(about := describe(model, model_args))
    own = model.state_dict()
    try:
        plain.load_state_dict({name: own[name] for name in plain.state_dict()}, strict=True, assign=True)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"this model cannot be built again from {about} ({error}); pass model_args") from error
    save_plain(plain, directory, model_args)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path, "save_packed")
    if config.get("format") != FORMAT:
        raise ValueError(f"{path.parent} was not written by save_packed: its {CONFIG} does not say {FORMAT!r}")
    version = config.get("format_version")
    if version != VERSION:
        raise ValueError(
            f"{path} has format_version={version!r}, and this hf_ext reads {VERSION}; a higher one takes a newer "
            "hf_ext, and a model of a lower one has to be packed again"
        )
    for field in FIELDS:
        if field not in config:
            raise ValueError(f"{path} lacks the field {field!r}; save_packed writes {', '.join(map(repr, FIELDS))}")
    return config


def _require_free(directory: Path) -> None:
    """Raise rather than overwrite somebody's trained checkpoint; a packed model may be replaced."""
    there = [name for name in (CONFIG, TENSORS) if (directory / name).exists()]
    if there:
        try:
            _read_config(directory / CONFIG)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{directory / there[0]} is there, and no packed model of this hf_ext; name another folder"
            ) from error


def _digest(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {path.name}; a folder written by save_packed is expected")
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _seal(config: dict[str, Any]) -> str:
    """Of all fields but itself, whatever their order and the spaces between them."""
    fields = {name: value for name, value in config.items() if name != SEAL}
    return sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _packed_tensors(frozen: nn.Module) -> dict[str, torch.Tensor]:
    weights = freeze(frozen)
    tensors = dict(frozen.state_dict())
    for name in _flags(frozen):
        del tensors[name]
    for name, module in frozen.named_modules():
        if isinstance(module, FrozenWeight):
            del tensors[f"{name}.integers"]
            tensors[f"{name}.codes"] = pack_codes(weights[name].codes, weights[name].bits)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _flags(model: nn.Module) -> dict[str, torch.Tensor]:
    """That every scale has its value, which holds of a packed model and is not saved."""
    return {
        f"{name}.initialized": torch.ones((), dtype=torch.bool)
        for name, module in model.named_modules()
        if isinstance(module, ActivationQuantizer)
    }


def _filled(about: dict[str, Any], config: OFQConfig, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The model that these packed tensors are of."""
    model, tensors = drop_latents(quantize(build(about), config)), dict(tensors)
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            _require(tensors, f"{name}.codes")
            codes = unpack_codes(tensors.pop(f"{name}.codes"), module.weight_bits, module.integers.shape[1])
            tensors[f"{name}.integers"] = codes if module.method == "lsq" else codes * 2 + 1
    tensors |= _flags(model)
    for name in model.state_dict():  # a quantiser would start anew without its scales
        _require(tensors, name)
    model.load_state_dict(tensors, strict=True, assign=True)  # each tensor in its own dtype
    return model


def _require(tensors: dict[str, torch.Tensor], name: str) -> None:
    if name not in tensors:
        raise ValueError(f"{TENSORS} lacks the tensor {name!r}")


def _check_rebuilt(
    frozen: nn.Module, tensors: dict[str, torch.Tensor], about: dict[str, Any], config: OFQConfig
) -> None:
    """Better now than when the file is all that is left: not all that matters shows in the shapes of the tensors."""
    try:
        with torch.random.fork_rng(devices=[]):  # saving must not change the training that goes on
            again = _filled(about, config, tensors)
            image = torch.randn(1, *image_shape(frozen), dtype=getattr(torch, about["dtype"]))
        same = all(map(torch.equal, _outputs(frozen, image), _outputs(again, image)))
    except (TypeError, RuntimeError, KeyError, ValueError) as error:
        raise ValueError(f"this model cannot be built again from {about} ({error}); pass model_args") from error
    if not same:
        raise ValueError(
            f"a model built from {about} computes something else than this one; pass model_args, the arguments of its "
            "create_model"
        )


@torch.no_grad()
def _outputs(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    output: Any = model(image)
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else (output,)
    return [value.nan_to_num() for value in values if isinstance(value, torch.Tensor)]
