"""check_model: what it says of models that carry AnchorAttention, and of those that only seem to."""

from typing import Any

import pytest
import torch
from anchor_models import SHAPE, build, check_text, config_of, skip_without_positions
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_ext import compat
from hf_ext.anchor_attention import AnchorUnsupportedError, ModelReport, check_model

# (windows, softcap, sinks) of the configs in anchor_models
CARRIERS: dict[str, tuple[dict[int, int], float | None, bool]] = {
    "llama": ({}, None, False),
    "mistral": ({0: 5, 1: 5, 2: 5}, None, False),
    "gemma2": ({0: 5}, 3.0, False),
    "gpt_oss": ({0: 5}, None, True),
    "gpt2": ({}, None, False),
}
SMALL = {**SHAPE, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mamba": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "llama4_text": {**SMALL, "head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2},
}


def stock(model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    return build(config_of(model_type, **REFUSED.get(model_type, {})), "eager", dtype)


def llama_of(kind: type, implementation: str = "sdpa") -> Any:
    """Weights large enough that a leak is visible."""
    model = kind._from_config(config_of("llama"), attn_implementation=implementation).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model


# ---------------------------------------------------------------- models that carry it


@pytest.mark.parametrize("probe", [True, False], ids=["probed", "asked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", [pytest.param(t, marks=[pytest.mark.smoke] * (t == "llama")) for t in CARRIERS])
def test_models_that_carry_it(model_type, dtype, probe):
    skip_without_positions(model_type)
    report = check_model(stock(model_type, dtype), probe=probe, strict=True)
    assert report == ModelReport(True, [], model_type, *CARRIERS[model_type], [])


def test_the_window_is_known_where_only_the_mask_has_it():
    """phimoe tells it to no layer, and its config names no kinds of layers."""
    config = config_of("phimoe", **{**SMALL, "sliding_window": 5, "num_local_experts": 2})
    assert check_model(build(config, "eager", torch.float32)).windows == {0: 5, 1: 5}


def test_the_window_is_known_where_only_a_layer_has_it():
    model = stock("qwen2")
    model.model.layers[1].self_attn.sliding_window = 4
    assert check_model(model).windows == {1: 4}


def test_a_window_that_no_layer_asks_for_is_none():
    """Llama does not read the key that its config may carry."""
    model = build(config_of("llama", sliding_window=5), "eager", torch.float32)
    assert check_model(model).windows == {}


def test_a_wrapped_model_is_judged_by_what_is_inside():
    model = get_peft_model(stock("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert check_model(model, strict=True) == ModelReport(True, [], "llama")


class Rounding(LlamaForCausalLM):
    """All rows move a little with any token of the batch, as where experts compute the tokens of all rows together."""

    scale = (1e-4, 1e-4, 1e-4)

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        out.logits[:, :, :] += torch.tensor(self.scale)[:, None, None] * (input_ids.sum() % 97 / 97)
        return out


class FirstRowOnly(Rounding):
    scale = (1e-4, 0.0, 0.0)


def test_rounding_that_a_row_without_change_shows_too_is_no_leak():
    assert check_model(llama_of(Rounding)).supported
    assert not check_model(llama_of(FirstRowOnly)).supported


# ---------------------------------------------------------------- models that do not


@pytest.mark.parametrize("probe", [True, False], ids=["probed", "asked"])
@pytest.mark.parametrize("model_type", REFUSED)
def test_models_of_a_refused_kind(model_type, probe):
    model = stock(model_type)
    report = check_model(model, probe=probe)
    assert (report.supported, report.model_type) == (False, model_type)
    assert len(report.reasons) == 1
    with pytest.raises(AnchorUnsupportedError) as caught:
        check_model(model, probe=probe, strict=True)
    check_text(str(caught.value), model_type, report.reasons[0])


class Convolution(LlamaForCausalLM):
    """Each token's state takes in its predecessor's between two layers, whatever document that is of."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[0].register_forward_hook(self._mix)

    @staticmethod
    def _mix(module: nn.Module, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        x = x + nn.functional.pad(x, (0, 0, 1, -1))
        return (x, *out[1:]) if isinstance(out, tuple) else x


class LooksAhead(Convolution):
    @staticmethod
    def _mix(module: nn.Module, args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        x = x + nn.functional.pad(x, (0, 0, -1, 1))
        return (x, *out[1:]) if isinstance(out, tuple) else x


class IgnoresPositions(LlamaForCausalLM):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs)


class TearsApart(LlamaForCausalLM):
    """Every position 0: each token is a document of its own."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids=input_ids, position_ids=torch.zeros_like(position_ids), **kwargs)


class Raises(LlamaForCausalLM):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        raise KeyError("pixel_values")


class AddsTheMask(LlamaForCausalLM):
    """One layer treats the mask as a tensor, as bloom does."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model.layers[1].register_forward_pre_hook(
            lambda module, args, kwargs: kwargs["attention_mask"] + 1.0, with_kwargs=True
        )


class NotANumber(LlamaForCausalLM):
    def forward(self, input_ids=None, position_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        out.logits[:] = float("nan")
        return out


class LongerOutput(LlamaForCausalLM):
    """As where a learned prompt goes before every row."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        out = super().forward(input_ids=input_ids, position_ids=position_ids, **kwargs)
        out.logits = torch.cat([out.logits[:, :2], out.logits], dim=1)
        return out


LIARS = {
    Convolution: ["leak into one another"],
    LooksAhead: ["a token sees later ones"],
    IgnoresPositions: ["leak into one another", "other position_ids"],
    TearsApart: ["no token sees those before it", "other position_ids"],
    Raises: ["KeyError", "pixel_values"],
    AddsTheMask: ["mask"],
    NotANumber: ["not finite"],
    LongerOutput: ["(3, 15)", "(3, 13)"],
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.smoke] * (k is Convolution)) for k in LIARS])
def test_models_that_pass_as_a_class_and_fail_when_run(kind):
    model = llama_of(kind)
    assert check_model(model, probe=False).supported
    report = check_model(model)
    assert not report.supported
    for words in LIARS[kind]:
        assert any(words in reason for reason in report.reasons), report.reasons
    with pytest.raises(AnchorUnsupportedError) as caught:
        check_model(model, strict=True)
    check_text(str(caught.value), kind.__name__, *LIARS[kind])


class OwnAttention(nn.Module):
    """Without the attention function, and of no token but its own."""

    def forward(self, hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
        return hidden_states, None


def test_layers_that_bypass_the_attention_function_are_named():
    model = llama_of(LlamaForCausalLM)
    model.model.layers[1].self_attn = OwnAttention()
    report = check_model(model)
    assert not report.supported
    assert report.bypassing == ["model.layers.1"]
    assert ["model.layers.1" in reason for reason in report.reasons] == [True]


def test_layers_that_cannot_be_found_are_not_taken_for_granted():
    model = llama_of(LlamaForCausalLM)
    model.config.num_hidden_layers = 2  # of three, so that the host runs two of them
    report = check_model(model)
    assert ["no list of decoder layers" in reason for reason in report.reasons] == [True]


def test_a_model_on_the_meta_device_can_be_asked_but_not_probed():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama"))
    report = check_model(model)
    assert not report.supported
    assert "meta device" in report.reasons[0]
    assert "probe=False" in report.reasons[0]
    assert check_model(model, probe=False).supported


def test_something_else_than_a_model():
    with pytest.raises(ValueError, match="Linear"):
        check_model(nn.Linear(2, 2))


# ---------------------------------------------------------------- what it leaves behind


@pytest.mark.parametrize("kind", [LlamaForCausalLM, Convolution, Raises])
@pytest.mark.parametrize("implementation", ["anchor", "sdpa"])
def test_the_model_is_left_as_it_was(kind, implementation):
    model = llama_of(kind, implementation).train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    tables = [dict(table) for table in compat.attention_tables()]
    random = torch.random.get_rng_state()
    check_model(model)
    assert model.config._attn_implementation == implementation
    assert [module.training for module in model.modules()] == modes
    assert [dict(table) for table in compat.attention_tables()] == tables
    assert torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), random)


def test_it_needs_no_registered_name():
    """HF_EXT_AUTOLOAD=0, or after unregister()."""
    attentions, masks = compat.attention_tables()
    taken = attentions.pop("anchor"), masks.pop("anchor")
    try:
        assert check_model(llama_of(LlamaForCausalLM)).supported
    finally:
        attentions["anchor"], masks["anchor"] = taken


def test_parts_keep_their_own_implementations():
    """A composite model, whose vision part has another one than its text."""
    config = config_of(
        "gemma3",
        text_config={**SMALL, "head_dim": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation={"text_config": "eager", "vision_config": "sdpa"}
    )
    configs = [model.config, model.config.text_config, model.config.vision_config]
    names = [config._attn_implementation for config in configs]
    assert names[1:] == ["eager", "sdpa"]
    assert check_model(model).supported
    assert [config._attn_implementation for config in configs] == names


@pytest.mark.parametrize("what", [None, "gpt2"])
def test_what_is_no_model_is_refused(what):
    with pytest.raises(ValueError, match=type(what).__name__):
        check_model(what)
