"""Folders of saved models: what they say of themselves, who reads them, and who refuses to."""

import copy
import pickle
from pathlib import Path

import ofq_models
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from ofq_hosts import images, stock
from ofq_models import VIT, build, local_dir
from processes import answer, run_python
from safetensors import safe_open
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTForImageClassification
from transformers.quantizers import HfQuantizer

from hf_ext.ofq_quantizer import OFQConfig, activation_quantizers, calibrate, checkpoints, quantize, quantizer

OFQ = {"quant_method": "ofq"}
VIT_NAME = "vit_tiny_patch16_224"


def calibrated(kind: str = "vit", **options: int) -> nn.Module:
    model = quantize(stock(kind), OFQConfig(**options))
    return calibrate(model, [images(model)])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images(model)).logits


# --- who reads them


READS = """
import json, sys
import torch

if {alone} and not torch.version.cuda:  # torchvision is built for CUDA, and transformers imports it
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{{name}}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
from transformers import AutoModelForImageClassification

found = {{}}
for folder in {folders!r}:
    try:
        if "timm folder" in folder:
            model = timm.create_model(f"local-dir:{{folder}}", pretrained=True)
        else:
            model = AutoModelForImageClassification.from_pretrained(folder)
        found[folder] = "QuantLinear" in {{type(module).__name__ for module in model.modules()}}
    except Exception as error:
        found[folder] = f"{{type(error).__name__}}: {{error}}"
assert not {alone} or "hf_ext.ofq_quantizer" not in sys.modules
print(json.dumps(found))
"""


def read(folders: list[Path], alone: bool) -> list[bool | str]:
    """Per folder: whether its model is quantised, or the error; in a process with or without hf_ext."""
    code = READS.format(alone=alone, folders=[str(folder) for folder in folders])
    return list(answer(run_python(code, env={"HF_EXT_AUTOLOAD": "0"} if alone else None)).values())


@pytest.mark.smoke
def test_process_without_hf_ext_refuses_what_we_saved(tmp_path):
    """In one process with models of full precision, which it reads."""
    kinds = ["vit", "swin", "timm"]
    for kind in kinds:
        stock(kind).save_pretrained(tmp_path / "stock" / kind)
        calibrated(kind).save_pretrained(tmp_path / "saved" / kind)
    if not local_dir.args[0]:
        kinds.append("timm folder")
        sizes = {"model_args": VIT | {"depth": 1}}
        for name, folder in ((VIT_NAME, "stock"), (f"ofq_w2a2.{VIT_NAME}", "saved")):
            model = timm.create_model(name, **VIT | {"depth": 1})
            save_for_hf(model, tmp_path / folder / "timm folder", safe_serialization=True, **sizes)
    plain, ours = ([tmp_path / folder / kind for kind in kinds] for folder in ("stock", "saved"))
    found = read(plain + ours, alone=True)
    assert found[: len(kinds)] == [False] * len(kinds)
    for kind, error in zip(kinds, found[len(kinds) :], strict=True):
        expected = "Unknown model (ofq_w2a2)" if kind == "timm folder" else "ismatch"
        assert isinstance(error, str) and expected in error, (kind, error)
    assert read(ours, alone=False) == [True] * len(kinds)


def test_configurations_that_the_host_ignores_or_refuses(tmp_path):
    """As README says; if a host changes its mind, README has to."""
    config = stock("vit").config
    config.quantization_config = OFQ
    model = AutoModelForImageClassification.from_config(config)
    assert not any("quantizer" in name for name, _ in model.named_modules())
    saved = calibrated(w_bits=3)
    saved.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="passing a dict config"):
        ViTForImageClassification.from_pretrained(tmp_path, quantization_config=OFQ | {"w_bits": 4})
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        again = ViTForImageClassification.from_pretrained(tmp_path, quantization_config=OFQConfig(w_bits=4))
    assert again.config.quantization_config.w_bits == 3
    assert torch.equal(logits(again), logits(saved))


# --- what they say


def test_file_and_card_say_what_the_extra_axis_is(tmp_path):
    calibrated().save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        notes = file.metadata()
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    card = (tmp_path / "README.md").read_text()
    assert shapes["classifier.weight"] == (1, 3, 32)
    assert shapes["vit.layernorm.weight"] == (32,)
    assert "extra leading axis" in card
    if not hasattr(HfQuantizer, "get_state_dict_and_metadata"):
        pytest.skip("this transformers has no metadata of a quantiser in its files")
    assert "extra leading axis" in notes["ofq"]
    assert notes["ofq"] in card


@pytest.mark.parametrize("kind", ["vit", "deit", "swin", "timm"])
def test_command_on_the_card_loads_the_model(kind, tmp_path):
    model = calibrated(kind, w_bits=3)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("transformers", None)
    assert "ofq" in card.data.tags
    assert "3-bit weights and 2-bit activations" in card.text
    [code] = [part for part in card.text.split("```") if part.startswith("python\n")]
    names = {}
    exec(code.removeprefix("python\n").replace("PATH_OF_THIS_FOLDER", str(tmp_path)), names)
    assert torch.equal(logits(names["model"]), logits(model))


@pytest.mark.parametrize("source, base", [("google/vit-base-patch16-224", True), ("vit", True), ("a/b/c", False)])
def test_card_names_a_base_model_of_the_hub(source, base, tmp_path, monkeypatch):
    model = calibrated()
    model.config._name_or_path = source
    model.save_pretrained(tmp_path / "saved")
    assert ModelCard.load(tmp_path / "saved" / "README.md").data.base_model == (source if base else None)
    (tmp_path / source).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("again")
    assert ModelCard.load(tmp_path / "again" / "README.md").data.base_model is None


def test_card_is_written_once_by_the_main_process(tmp_path):
    model = calibrated()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    model.save_pretrained(tmp_path / "other process", is_main_process=False)
    assert not (tmp_path / "other process" / "README.md").exists()


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copy_saves_itself(clone, tmp_path):
    model = calibrated()
    copied = clone(model)
    with torch.no_grad():
        copied.classifier.bias.add_(1)
    del model
    copied.save_pretrained(tmp_path)
    again = ViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(again.classifier.bias, copied.classifier.bias)
    assert (tmp_path / "README.md").exists()


# --- models other than the one that was saved


@local_dir
@pytest.mark.parametrize("channels", [1, 4])
def test_images_of_other_channels(channels, tmp_path, monkeypatch):
    """timm adapts the weight; its scales follow, and the quantiser of the images starts anew, of which one is told."""
    heard: list[str] = []
    monkeypatch.setattr(checkpoints.logger, "warning", heard.append)
    recorded = {"safe_serialization": True, "model_args": VIT | {"depth": 1}}
    model = timm.create_model(f"ofq_w2a2.{VIT_NAME}", **VIT | {"depth": 1}).eval()
    calibrate(model, [ofq_models.images(model, 4)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape))
    save_for_hf(model, tmp_path / "ours", **recorded)
    plain = build("vit", depth=1)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    save_for_hf(plain, tmp_path / "plain", **recorded)
    expected = timm.create_model(f"local-dir:{tmp_path}/plain", pretrained=True, in_chans=channels)
    with pytest.warns(UserWarning, match=rf"patch_embed\.proj has {channels} channels, and 3 in the file.*alibrate"):
        again = timm.create_model(f"local-dir:{tmp_path}/ours", pretrained=True, in_chans=channels)
    assert not heard, "it is no layer that was of full precision"
    own = again.state_dict()
    assert all(torch.equal(own[name], value) for name, value in expected.state_dict().items())
    rows = own["patch_embed.proj.weight"].flatten(1).abs().mean(1)
    torch.testing.assert_close(own["patch_embed.proj.weight_scale_norm"], 2 * rows / 127**0.5)
    for name, value in model.state_dict().items():
        assert name.startswith("patch_embed.proj.") or torch.equal(own[name], value), name
    unready = [role for role, a in activation_quantizers(again).items() if not a.ready]
    assert unready == ["patch_embed.proj:input"]
    assert not own["patch_embed.proj.input_quantizer.bias_in"].any()
    x = torch.randn(2, channels, 32, 32)
    calibrate(again, [x])
    assert again.eval()(x).shape == (2, 10)


def test_weights_of_a_model_with_other_bits_are_noticed(tmp_path, monkeypatch):
    """Names and shapes are the same; it may be meant, as a step to fewer bits."""
    heard: list[str] = []
    monkeypatch.setattr(quantizer.logger, "warning", heard.append)
    saved = quantize(build("vit"), OFQConfig(w_bits=4, a_bits=3))
    torch.save(saved.state_dict(), tmp_path / "weights.pth")
    state = torch.load(tmp_path / "weights.pth", weights_only=True)
    for same in (quantize(build("vit"), OFQConfig(w_bits=4, a_bits=3)), quantize(build("swin"), OFQConfig())):
        own = state if same.state_dict().keys() == state.keys() else build("swin").state_dict()
        same.load_state_dict(own)
    assert not heard
    other = quantize(build("vit"), OFQConfig())
    for _ in range(2):
        other.load_state_dict(state)
    assert len(heard) == 1
    assert "w_bits=4 and not 2, a_bits=3 and not 2" in heard[0]
