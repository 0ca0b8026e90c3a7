"""A head that came into the model after its conversion: full precision there, quantised where its file is read."""

import logging

import pytest
import timm
import torch
from ofq_deployed import logits, quantized
from ofq_models import VIT, build, images, local_dir
from safetensors.torch import load_file
from timm.models._hub import save_for_hf
from torch import nn

from hf_ext.ofq_quantizer import OFQConfig, activation_quantizers, calibrate, export_fp, quantize, report, save_packed

SAVED = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}


def with_another_head() -> nn.Module:
    model = calibrate(quantize(build("vit"), OFQConfig()), [images(build("vit"), 4)])
    model.reset_classifier(7)
    return model


@pytest.fixture
def said(caplog, monkeypatch):
    """The warnings about this."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_ext"), "propagate", True)
    caplog.set_level("WARNING")
    return lambda: [record.message for record in caplog.records if "num_classes=, num_labels=" in record.message]


def test_a_packed_file_of_it_is_refused(tmp_path):
    model = with_another_head()
    (row,) = (row for row in report(model).layers if row.name == "head")
    assert row.status == "full_precision"
    with pytest.raises(ValueError, match=r"^head came into the model after its conversion.*num_classes="):
        save_packed(model, tmp_path / "packed")
    assert not list(tmp_path.iterdir())
    model.reset_classifier(0)
    save_packed(model, tmp_path / "packed")


@local_dir
def test_a_folder_of_timm_with_it_is_warned_of_when_it_is_read(tmp_path, said):
    model = timm.create_model("ofq_w2a2.vit_tiny_patch16_224", **VIT)
    calibrate(model, [images(model, 4)]).reset_classifier(7)
    save_for_hf(model, tmp_path, model_args=SAVED | {"num_classes": 7})
    assert not said()
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert len(said()) == 1
    assert again.head.weight_bits == 8


@local_dir
def test_a_latent_checkpoint_of_it_is_what_it_says(tmp_path):
    model = with_another_head()
    export_fp(model, tmp_path)
    stock = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(stock.head.weight, model.head.weight)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_that_quantises_less_is_warned_of(prefix, said):
    model = with_another_head()
    target: nn.Module = timm.create_model("ofq_w2a2.vit_tiny_patch16_224", **VIT | {"num_classes": 7})
    container = nn.ModuleDict({"module": target}) if prefix else target
    container.load_state_dict({f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()})
    (message,) = said()
    assert "not head.input_quantizer:" in message
    assert not activation_quantizers(target)["head:input"].initialized


def test_checkpoints_as_they_are_meant_are_not_warned_of(said):
    model, x = quantized()
    stock, other = build("vit", seed=1), quantize(build("vit", num_classes=7), OFQConfig())
    saved = model.state_dict()
    quantize(build("vit"), OFQConfig()).load_state_dict(saved)
    model.load_state_dict(stock.state_dict())
    other.load_state_dict({name: x for name, x in saved.items() if not name.startswith("head.")}, strict=False)
    other.load_state_dict(
        {name: x for name, x in saved.items() if name not in ("head.weight", "head.bias")}
        | {"head.weight_scale_norm": torch.ones(7)},
        strict=False,
    )
    assert not said()
    assert logits(model, x).isfinite().all()


@pytest.mark.parametrize("kind", ["hf_vit", "hf_swin"])
def test_a_file_of_transformers_is_not_warned_of(kind, tmp_path, said):
    """Its names are others than those in the model."""
    model, x = quantized(kind)
    other, _ = quantized(kind)
    other.classifier.weight.data.neg_()
    model.save_pretrained(tmp_path)
    assert not other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False).missing_keys
    assert torch.equal(logits(model, x), logits(other, x))
    assert not said()


def test_a_saved_model_of_transformers_says_so(tmp_path, said):
    model, _ = quantized("hf_vit")
    model.save_pretrained(tmp_path / "one")
    assert not said()
    model.classifier = nn.Linear(48, 5)
    model.save_pretrained(tmp_path / "other")
    assert [message.split(" ")[0] for message in said()] == ["classifier"]
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        type(model).from_pretrained(tmp_path / "other")
