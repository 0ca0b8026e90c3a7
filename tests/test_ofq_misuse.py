"""What users type by mistake, and what other libraries do to a quantised model: each is refused with its cure."""

import logging
from typing import Any, ClassVar

import numpy as np
import pytest
import timm
import torch
from ofq_deployed import full, quantized
from ofq_models import VIT, build
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_ext.ofq_quantizer import (
    ConfidenceAnnealing,
    ConfidenceAnnealingCallback,
    OFQConfig,
    OscillationTracker,
    activation_quantizers,
    calibrate,
    distillation_loss,
    distillation_loss_func,
    export_fp,
    quantize,
    save_packed,
)

# --- what is converted


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["*"], r"\['\*'\] leaves nothing to quantise"),
        (["blocks", "patch_embed", "head"], "leaves nothing to quantise"),
        (["*.norm1"], "'.*norm1' matches 'blocks.0.norm1', and no module .* linear layer or a convolution"),
        (["head", "blocks.?.mlp.act"], "mlp.act' matches 'blocks.0.mlp.act'"),
    ],
    ids=["star", "all parts", "norms", "one of two"],
)
def test_patterns_that_leave_nothing_or_take_out_nothing(patterns, message):
    model = build("vit")
    with pytest.raises(ValueError, match=message):
        quantize(model, OFQConfig(skip_modules=patterns))
    assert type(model.head) is nn.Linear


def test_ends_alone_may_be_left():
    model = quantize(build("vit"), OFQConfig(skip_modules=["blocks"]))
    assert set(activation_quantizers(model)) == {"patch_embed.proj:input", "head:input"}


@pytest.mark.parametrize("scale", ["token", "tensor"])
def test_naflexvit_is_refused_by_name(scale):
    name = "naflexvit_base_patch16_gap"
    if not timm.is_model(name):
        pytest.skip("this timm has no NaFlexViT")
    sizes = {"embed_dim": 48, "depth": 1, "num_heads": 3}
    with pytest.raises(ValueError, match=r"NaFlexVit, which OFQ cannot quantise: its number of tokens varies"):
        timm.create_model(f"ofq_w2a2.{name}", ofq={"activation_scale": scale}, **sizes)


@pytest.mark.parametrize("ofq", [OFQConfig(), "tensor"], ids=["config", "string"])
def test_options_of_a_string_are_a_dict(ofq):
    with pytest.raises(TypeError, match=r"ofq takes a dict .*quantize takes an OFQConfig"):
        timm.create_model("ofq_w2a2.vit_tiny_patch16_224", ofq=ofq, **VIT)


# --- batches


X, Y = torch.randn(4, 3, 32, 32), torch.arange(4)
BATCHES = {
    "one tensor": (X, TypeError, r"got one Tensor: write \[batch\]"),
    "one dict": ({"x": X}, TypeError, r"got one dict: write \[batch\]"),
    "images and labels": ((X, Y), ValueError, r"torch.int64 \(4,\).*\[\(images, labels\)\]"),
    "numpy": ([X.numpy()], TypeError, "not ndarray"),
    "text": (["abc"], TypeError, "not str"),
    "bytes of pixels": ([X.to(torch.uint8)], ValueError, r"floats .*torch.uint8 \(4, 3, 32, 32\)"),
    "one image": ([X[0]], ValueError, r"\(3, 32, 32\)"),
    "empty tuple": ([()], TypeError, "not tuple"),
    "keys of transformers": ([{"pixel_values": X, "labels": Y}], TypeError, "'pixel_values', 'labels'.*images alone"),
}


@pytest.mark.parametrize("case", BATCHES)
def test_batches_of_another_kind(case):
    batches, error, message = BATCHES[case]
    model = quantize(build("vit"), OFQConfig())
    with pytest.raises(error, match=message):
        calibrate(model, batches)
    assert not any(a.initialized for a in activation_quantizers(model).values())


# --- numbers


@pytest.mark.parametrize("value", ["0.1", None, True, float("nan"), [0.1]], ids=repr)
def test_ranges_are_numbers(value):
    model, _ = quantized()
    for use in (
        lambda: ConfidenceAnnealing(model, boundary_range=value),
        lambda: ConfidenceAnnealingCallback(start_step=1, boundary_range=value),
        lambda: OscillationTracker(model, momentum=value),
    ):
        with pytest.raises(ValueError, match=r"outside \(0, "):
            use()
    if value is not None:
        with pytest.raises(ValueError, match=r"start_ratio=.* is outside \[0, 1\]"):
            ConfidenceAnnealingCallback(start_ratio=value)


def test_numbers_of_numpy_are_numbers():
    model, _ = quantized()
    assert ConfidenceAnnealing(model, np.float32(0.25)).boundary_range == 0.25
    assert ConfidenceAnnealingCallback(start_ratio=np.float64(0.5)).start_ratio == 0.5


LOGITS = torch.randn(4, 10)


@pytest.mark.parametrize(
    ("student", "labels", "teacher", "error", "message"),
    [
        (LOGITS, Y, (LOGITS, LOGITS), TypeError, "teacher_logits are a tensor .*not a tuple.*evaluation mode"),
        ((LOGITS,) * 3, Y, LOGITS, ValueError, "one tensor, or two .*not 3"),
        (LOGITS, Y.float(), LOGITS, ValueError, r"integer dtype, not torch.float32: labels.long\(\)"),
    ],
    ids=["two teachers", "three students", "indices as floats"],
)
def test_what_the_loss_does_not_take(student, labels, teacher, error, message):
    with pytest.raises(error, match=message):
        distillation_loss(student, labels, teacher)


def test_indices_of_any_integer_dtype():
    assert torch.equal(distillation_loss(LOGITS, Y.int(), LOGITS), distillation_loss(LOGITS, Y, LOGITS))


# --- products of floats


@pytest.fixture
def plain(caplog, monkeypatch):
    """How often a model said that it multiplies floats."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_ext"), "propagate", True)
    caplog.set_level("WARNING")
    return lambda: ["multiplies rounded floats" in record.message for record in caplog.records].count(True)


@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
@pytest.mark.parametrize("case", ["autocast", "bfloat16", "half", "double"])
def test_a_model_that_multiplies_floats_says_so_once(case, qkr, plain):
    model, x = quantized(qk_reparam=qkr)
    model(x)
    assert plain() == 0
    dtype = torch.float32 if case == "autocast" else getattr(torch, {"double": "float64"}.get(case, case))
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
            model.to(dtype).train()(x.to(dtype))
        model.eval()(x.to(dtype))
    assert plain() == 1


@pytest.mark.parametrize("case", ["layer", "logits", "values"])
def test_a_model_whose_sums_are_too_long_says_so_once(case, plain, monkeypatch):
    """Sums of a layer's input, of a head's width, of tokens: one at a time is said not to fit."""
    from hf_ext.ofq_quantizer import ops

    model, x = quantized(w_bits=4, a_bits=3)
    terms = {"layer": 192, "logits": 16, "values": 17}[case]
    monkeypatch.setattr(ops, "integer_sums_fit", lambda columns, *_: columns != terms)
    for _ in range(2):
        model(x)
    assert plain() == 1


def test_a_model_that_rounds_nothing_or_multiplies_integers_does_not_say_so(plain):
    from hf_ext.ofq_quantizer import full_precision, to_int8

    model, x = quantized()
    with full_precision(model):
        model.double()(x.double())
    to_int8(quantized()[0])(x)
    assert plain() == 0


# --- LoRA


def adapted(model: nn.Module, targets: Any) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets))


def test_lora_of_layers_that_quantise_their_own_input():
    model, x = quantized()
    expected = model(x)
    wrapped = adapted(model, ["qkv", "fc1", "fc2"]).train()
    assert torch.equal(wrapped(x), expected)
    wrapped(x).sum().backward()
    assert all(p.grad is not None for p in wrapped.parameters() if p.requires_grad)


LORA = {
    "qkr": ("vit", {"qk_reparam": True}, ["qkv"]),
    "beit": ("beit", {}, ["qkv"]),
    "eva02": ("eva02_split", {}, ["q_proj"]),
}


@pytest.mark.parametrize("case", LORA)
def test_lora_of_layers_that_their_attention_calls(case):
    kind, options, targets = LORA[case]
    model, x = quantized(kind, **options)
    with pytest.raises(RuntimeError, match="leave queries, keys and values out of target_modules"):
        adapted(model, targets)(x)


@pytest.mark.parametrize("options", [{}, {"qk_reparam": True}], ids=["plain", "qkr"])
def test_lora_of_queries_of_transformers(options):
    model, x = quantized("hf_vit", **options)
    (query,) = (name for name, layer in model.named_modules() if layer is attention_of(model).projections[0])
    with pytest.raises(RuntimeError, match="leave queries, keys and values out of target_modules"):
        adapted(model, [query])(x)


def attention_of(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if hasattr(module, "projections"))


def test_lora_of_a_patch_embedding_is_refused_when_it_is_made():
    model, _ = quantized()
    with pytest.raises(TypeError, match=r"QuantConv2d is not built .*leave patch embeddings out"):
        adapted(model, ["patch_embed.proj"])


def test_lora_of_a_skipped_query_of_transformers_works():
    model, x = full("hf_vit")
    name = next(name for name, layer in model.named_modules() if name.endswith(("q_proj", "query")))
    model = calibrate(quantize(model, OFQConfig(skip_modules=[name])), [x])
    expected = model(x).logits
    assert torch.equal(adapted(model, [name])(x).logits, expected)


# --- what is left behind


class Wrapper(nn.Module):
    """Of images whose size nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("vit")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Failing(Wrapper):
    """Of known images, on which it does not run."""

    pretrained_cfg: ClassVar = {"input_size": (3, 16, 16)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not on an image alone")


def watched(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]


@pytest.mark.parametrize(
    ("kind", "text"), [(Wrapper, "does not tell the size of its images"), (Failing, "not on an image alone")]
)
def test_a_refused_model_keeps_no_hook(kind, text):
    model = kind()
    with pytest.raises(ValueError, match=text):
        quantize(model, OFQConfig())
    assert not watched(model)


def test_a_quantised_model_keeps_no_hook():
    assert not watched(quantize(build("vit"), OFQConfig()))


@pytest.mark.parametrize("save", [save_packed, export_fp])
def test_saving_draws_no_random_number_from_the_training_around_it(save, tmp_path):
    model, _ = quantized()
    before = torch.get_rng_state()
    save(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_hook_of_the_distillation_comes_off():
    model, teacher = build("vit"), build("vit")
    loss_func = distillation_loss_func(model, teacher)
    assert model._forward_pre_hooks
    loss_func.remove()
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("config", ['{"model_type": "llama"}', "{", "[]"], ids=["transformers", "damaged", "a list"])
def test_a_model_of_something_else_is_not_overwritten(config, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="of no such model of full precision; name another folder"):
        export_fp(quantized()[0], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_packed_model_is_not_overwritten_by_an_export_and_an_export_is(tmp_path):
    model, _ = quantized()
    save_packed(model, tmp_path / "packed")
    with pytest.raises(ValueError, match="name another folder"):
        export_fp(model, tmp_path / "packed")
    for _ in range(2):
        export_fp(model, tmp_path / "plain")


def test_a_model_that_is_not_quantised_cannot_be_packed(tmp_path):
    with pytest.raises(ValueError, match=r"is not quantised by OFQ; call hf_ext.ofq_quantizer.quantize first"):
        save_packed(build("vit"), tmp_path / "packed")
