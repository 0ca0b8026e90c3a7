"""OFQ through `from_pretrained`, `Trainer` and `save_pretrained`: ViT, DeiT and Swin of transformers, and timm inside.

Oracles: the host's own model of the same weights, and StatsQ's codes in float64.
"""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from ofq_hosts import MODELS, images, stock
from ofq_models import codes_of
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
    ViTModel,
)

from hf_ext import compat
from hf_ext.compat import RegistrationError
from hf_ext.ofq_quantizer import OFQConfig, calibrate, full_precision, quantize

OFQ = {"quant_method": "ofq"}
smoke_vit = [pytest.param("vit", marks=pytest.mark.smoke), *[kind for kind in MODELS if kind != "vit"]]
HEADS = ("classifier", "cls_classifier", "distillation_classifier", "timm_model.head")


@pytest.fixture
def folder(tmp_path):
    """A function from a kind of model to a folder with its weights."""

    def write(kind):
        stock(kind).save_pretrained(tmp_path / kind)
        return tmp_path / kind

    return write


def load(folder, **options):
    kind = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    classes = (DeiTForImageClassificationWithTeacher, ViTForImageClassification)
    cls = next((cls for cls in classes if cls.__name__ == kind), AutoModelForImageClassification)
    return cls.from_pretrained(folder, **options)


def calibrated(folder, **options):
    model = load(folder, quantization_config=OFQ | options)
    return calibrate(model, [images(model)])


def logits(model):
    with torch.no_grad():
        return model.eval()(images(model).to(model.dtype)).logits


def low_bit(kind):
    """Names of the linear layers of the blocks, off the stock model."""
    model = stock(kind)
    return [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name not in HEADS]


def trainer(model, folder, **options):
    if hasattr(model, "distillation_classifier"):  # its forward knows no labels
        model.forward = partial(with_loss, model.forward)
    data = [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(images(model).to(model.dtype))]
    arguments = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True} | options
    settings = TrainingArguments(
        str(folder), **arguments, save_strategy="steps", save_steps=2, report_to=[], disable_tqdm=True
    )
    settings.label_names = ["labels"]
    return Trainer(model, settings, train_dataset=data)


def with_loss(forward, pixel_values, labels=None):
    output = forward(pixel_values)
    return (
        {"loss": nn.functional.cross_entropy(output.logits, labels), "logits": output.logits}
        if labels is not None
        else output
    )


def assert_same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    assert [
        name for name in one if not torch.equal(one[name], other[name]) or one[name].dtype != other[name].dtype
    ] == []


# --- loading full-precision weights


@pytest.mark.parametrize("kind", smoke_vit)
def test_conversion_keeps_every_tensor_and_adds_first_values(kind, folder):
    before = load(folder(kind)).state_dict()
    after = load(folder(kind), quantization_config=OFQ).state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    added = {name: after[name] for name in after if name not in before}
    for name, tensor in added.items():
        layer, _, last = name.rpartition(".")
        if last == "weight_scale_norm":
            rows = before[f"{layer}.weight"].double().flatten(1)
            expected = 2 * rows.abs().mean(1) / 127**0.5
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=0)
        else:
            first = {"scale_norm": 1.0, "bias_in": 0.0, "bias_out": 0.0, "initialized": False}[last]
            assert torch.equal(tensor, torch.full_like(tensor, first)), name
    assert {"weight_scale_norm", "scale_norm", "bias_in", "initialized"} <= {name.split(".")[-1] for name in added}


@pytest.mark.smoke
def test_config_beside_weights_of_full_precision_converts_them(folder, tmp_path):
    """As `run_image_classification --model_name_or_path` has it: the host takes such a folder for a quantised model."""
    path = folder("vit")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": OFQ | {"w_bits": 3}}))
    model = AutoModelForImageClassification.from_pretrained(path)
    assert_same_state(model, quantize(stock("vit"), OFQConfig(w_bits=3)))
    trainer(model, tmp_path / "out").train()
    assert all(flag for name, flag in model.state_dict().items() if name.endswith(".initialized"))


def test_skipped_layer_stays_as_it_is(folder):
    name = low_bit("vit")[0]  # a query, key or value, beside two that are quantised
    model = calibrated(folder("vit"), skip_modules=[name])
    assert type(model.get_submodule(name)) is nn.Linear
    assert logits(model).isfinite().all()


def test_disk_in_a_device_map_is_refused(folder):
    with pytest.raises(ValueError, match="disk"):
        load(folder("vit"), quantization_config=OFQ, device_map={"": "disk"})


# --- training, saving, resuming


@pytest.mark.parametrize("kind", smoke_vit)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_trained_model_reloads_bit_equal(kind, dtype, folder, tmp_path):
    model = load(folder(kind), quantization_config=OFQ, dtype=dtype)
    trainer(model, tmp_path / "out").train()
    model.save_pretrained(tmp_path / "saved")
    reloaded = load(tmp_path / "saved", dtype="auto", device_map={"": "cpu"})
    scales = [tensor for name, tensor in reloaded.state_dict().items() if name.endswith("scale_norm")]
    assert reloaded.dtype == dtype
    assert {scale.dtype for scale in scales} == {torch.float32}
    assert any(not torch.equal(scale, scale.bfloat16().float()) for scale in scales)
    vars(model).pop("forward", None)
    assert_same_state(model, reloaded)
    assert torch.equal(logits(model), logits(reloaded))
    # In a mapped file tensors start anywhere, for which kernels sum in another order; now and then logits would differ.
    assert {parameter.data_ptr() % 64 for parameter in reloaded.parameters()} == {0}


@pytest.mark.parametrize("kind", smoke_vit)
def test_resumed_training_is_bit_equal(kind, folder, tmp_path):
    options = {"qk_reparam": kind == "swin"}
    whole, resumed = (load(folder(kind), quantization_config=OFQ | options) for _ in range(2))
    trainer(whole, tmp_path / "out").train()
    trainer(resumed, tmp_path / "out").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_same_state(whole, resumed)


@pytest.mark.smoke
def test_trainer_decays_weights_and_no_quantiser(folder, tmp_path):
    model = load(folder("vit"), quantization_config=OFQ)
    optimizer = trainer(model, tmp_path, weight_decay=0.1).create_optimizer()
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name.split(".")[-1] for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names == {"weight", "cls_token", "position_embeddings"}


def test_model_that_quantize_converted_saves_and_resumes_like_one_that_was_loaded(folder, tmp_path):
    loaded = load(folder("vit"), quantization_config=OFQ)
    converted = quantize(load(folder("vit")), OFQConfig())
    for model, path in ((loaded, tmp_path / "one"), (converted, tmp_path / "other")):
        calibrate(model, [images(model)]).save_pretrained(path)
    one, other = (load_file(tmp_path / path / "model.safetensors") for path in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(logits(load(tmp_path / "other")), logits(converted))
    converted.load_state_dict(
        {name: -tensor for name, tensor in loaded.state_dict().items() if "weight" in name}, False
    )
    trainer(converted, tmp_path / "out")._load_from_checkpoint(str(tmp_path / "one"))
    assert_same_state(loaded, converted)


@pytest.mark.smoke
@pytest.mark.parametrize("saved", [False, True], ids=["full-precision weights", "saved model"])
def test_head_for_other_classes_starts_anew_on_request_only(saved, folder, tmp_path):
    path, options = folder("vit"), {"quantization_config": OFQ}
    before = load(path, **options)
    if saved:
        calibrate(before, [images(before)]).save_pretrained(tmp_path / "saved")
        path, options = tmp_path / "saved", {}
    with pytest.raises(RuntimeError, match=r"(?i)mismatch"):
        load(path, num_labels=5, **options)
    old, new = before.state_dict(), load(path, num_labels=5, ignore_mismatched_sizes=True, **options).state_dict()
    changed = {name for name in new if old[name].shape != new[name].shape or not torch.equal(old[name], new[name])}
    assert changed == {"classifier.weight", "classifier.bias", "classifier.weight_scale_norm"}
    scale = 2 * new["classifier.weight"].double().abs().mean(1) / 127**0.5
    torch.testing.assert_close(new["classifier.weight_scale_norm"].double(), scale, rtol=1e-6, atol=0)


def test_backbone_of_a_saved_model_keeps_its_quantisers(folder, tmp_path):
    model = calibrated(folder("vit"))
    model.save_pretrained(tmp_path / "saved")
    backbone = ViTModel.from_pretrained(tmp_path / "saved")
    assert type(backbone.pooler.dense) is nn.Linear  # a pooling head, and not in the file
    del backbone.pooler
    assert_same_state(backbone, model.vit)


# --- what is computed


@pytest.mark.parametrize("kind", smoke_vit)
@pytest.mark.parametrize("options", [{}, {"qk_reparam": True}], ids=["plain", "qkr"])
def test_without_rounding_it_is_the_stock_model(kind, options, folder):
    model = calibrated(folder(kind), **options)
    with full_precision(model):
        torch.testing.assert_close(logits(model), logits(stock(kind)), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(stock(kind))).abs().max() > 0.1


@pytest.mark.parametrize("kind", smoke_vit)
def test_every_layer_of_the_blocks_reads_its_weight_through_codes(kind, folder):
    """Two weights of a row that share a code may change places; their signs may not change."""
    model = calibrated(folder(kind))
    expected = logits(model)
    for name in low_bit(kind):
        weight = model.get_submodule(name).weight.data
        first, second = same_code(weight)
        weight[0, [first, second]] = weight[0, [second, first]]
        assert torch.equal(logits(model), expected), name
        weight.neg_()
        assert not torch.equal(logits(model), expected), name
        weight.neg_()
    assert len(low_bit(kind)) >= 8


def same_code(weight):
    """Columns of two different weights of the first row that share a code."""
    row, codes = weight[0], codes_of(weight[:1])[0][0]
    pairs = ((i, j) for i in range(len(row)) for j in range(i) if codes[i] == codes[j] and row[i] != row[j])
    return next(pairs)


@pytest.mark.parametrize("kind", MODELS)
def test_first_and_last_layers_read_their_weight_through_8_bits(kind, folder):
    model = calibrated(folder(kind))
    expected = logits(model)
    layers = [layer for layer in model.modules() if getattr(layer, "weight_scale_norm", None) is not None]
    assert len(layers) == (3 if kind == "deit" else 2)
    for layer in layers:
        scale = layer.weight_scale_norm.detach().view(-1, *[1] * (layer.weight.dim() - 1))
        nearest = (layer.weight / scale).round() * scale
        assert not torch.equal(nearest, layer.weight)
        layer.weight.data.copy_(nearest)
        assert torch.equal(logits(model), expected)
        layer.weight.data.add_(scale)
        assert not torch.equal(logits(model), expected)
        layer.weight.data.copy_(nearest)


@pytest.mark.smoke
@pytest.mark.parametrize(("kind", "options"), [("vit", {}), ("swin", {"qk_reparam": True})], ids=["vit", "swin qkr"])
def test_attentions_are_the_rounded_probabilities(kind, options, folder):
    def attentions(model):
        model.set_attn_implementation("eager")
        with torch.no_grad():
            return model(images(model), output_attentions=True).attentions

    model = calibrated(folder(kind), activation_scale="tensor", **options)
    scales = [scale for name, scale in model.state_dict().items() if name.endswith("probs_quantizer.scale_norm")]
    codes = attentions(model)[0] / scales[0]
    torch.testing.assert_close(codes, codes.round().clamp(0, 3), rtol=0, atol=1e-5)
    assert codes.round().unique().numel() > 1
    with full_precision(model):
        torch.testing.assert_close(attentions(model), attentions(load(folder(kind))), rtol=1e-4, atol=1e-5)


# --- registration


@pytest.mark.smoke
def test_name_in_use_by_somebody_else_is_left_to_them():
    from transformers.quantizers import auto

    class Theirs: ...

    class Ours: ...

    auto.AUTO_QUANTIZER_MAPPING["ofq_test"] = Theirs
    try:
        with pytest.raises(RegistrationError, match="ofq_test"):
            compat.add_quantizer("ofq_test", Ours, Ours)
        assert "ofq_test" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        del auto.AUTO_QUANTIZER_MAPPING["ofq_test"]
        compat.add_quantizer("ofq_test", Ours, Ours)
        assert auto.AUTO_QUANTIZER_MAPPING["ofq_test"] is Ours
        compat.remove_quantizer("ofq_test", Ours, Ours)
        assert "ofq_test" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING.keys() | auto.AUTO_QUANTIZER_MAPPING.keys()
        loading = sys.modules.get("transformers.core_model_loading")  # not in transformers 4
        assert loading is None or "hf_ext" not in loading.set_param_for_module.__code__.co_filename
    finally:
        auto.AUTO_QUANTIZER_MAPPING.pop("ofq_test", None)


def test_somebody_elses_callable_in_the_place_of_a_wrapped_function_is_passed_by(monkeypatch):
    """A partial has no code to tell its file by."""
    loading = pytest.importorskip("transformers.core_model_loading")

    class Ours: ...

    theirs = partial(loading.set_param_for_module)
    monkeypatch.setattr(loading, "set_param_for_module", theirs)
    compat.add_quantizer("ofq_test", Ours, Ours)
    compat.remove_quantizer("ofq_test", Ours, Ours)
    assert loading.set_param_for_module is theirs
