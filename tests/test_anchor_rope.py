"""Precision of rotary phases, and the drift of attention when all positions are shifted."""

import re
from typing import Any

import pytest
import torch
from anchor_models import SHAPE, build, check_text, config_of
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_ext import compat
from hf_ext.anchor_attention import AnchorUnsupportedError, check_rope_precision, rope, rope_drift

LONG = {**SHAPE, "head_dim": 64, "num_hidden_layers": 1, "max_position_embeddings": 100_000}


def rope_config(kind: str, **numbers: Any) -> Any:
    """In the spelling that every version reads."""
    return config_of("llama", **LONG, rope_scaling={"rope_type": kind, **numbers})


FACTORS = [1.0 + i / 16 for i in range(32)]
KINDS = {
    "default": lambda: config_of("llama", **LONG),
    "linear": lambda: rope_config("linear", factor=4.0),
    "dynamic": lambda: rope_config("dynamic", factor=4.0),
    "yarn": lambda: rope_config("yarn", factor=4.0, original_max_position_embeddings=25_000),
    "llama3": lambda: rope_config(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
    "longrope": lambda: longrope(),
    "gemma3": lambda: config_of(
        "gemma3_text",
        **{**SHAPE, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention", "full_attention"]},
    ),
    "partly_rotated": lambda: config_of("gpt_neox", **{**SHAPE, "hidden_size": 128, "num_key_value_heads": 4}),
}


def longrope() -> Any:
    scaling = {"type": "longrope", "short_factor": FACTORS, "long_factor": [2 * x for x in FACTORS]}
    return config_of(
        "phi3", **{**LONG, "hidden_size": 256}, rope_scaling=scaling, original_max_position_embeddings=4096
    )


def loaded(config: Any, tmp_path: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.smoke] * (k == "default")) for k in KINDS])
def test_a_model_loaded_in_bfloat16_is_precise_and_one_cast_to_it_is_not(kind, tmp_path):
    model = loaded(KINDS[kind](), tmp_path)
    precise = check_rope_precision(model)
    assert precise.ok, precise.findings
    assert precise.findings == []
    for cast in (model.bfloat16(), model.float()):  # the second does not heal the first
        report = check_rope_precision(cast)
        assert not report.ok
        names = {name for name, _ in cast.named_buffers() if name.endswith("inv_freq")}
        assert {finding.name for finding in report.findings} == names


@pytest.mark.smoke
def test_errors_of_a_cast_are_those_of_the_formula():
    """3.7e-3 relative and 122 rad at position 100,000, for heads of 128 and a base of 10,000."""
    model = LlamaForCausalLM(config_of("llama", **{**LONG, "head_dim": 128})).to(torch.bfloat16)
    exact = [10_000 ** (-2 * i / 128) for i in range(64)]
    rounded = torch.tensor(exact, dtype=torch.float32).to(torch.bfloat16).tolist()
    relative = max(abs(a - b) / b for a, b in zip(rounded, exact, strict=True))
    phase = 100_000 * max(abs(a - b) for a, b in zip(rounded, exact, strict=True))
    finding = check_rope_precision(model).findings[0]
    assert finding.name == "model.rotary_emb.inv_freq"
    assert finding.relative_error == pytest.approx(relative, rel=1e-6)
    assert finding.phase_error == pytest.approx(phase, rel=1e-6)
    for words in (finding.name, "bfloat16", "3.7e-03", "122 rad", "100,000", "from_pretrained"):
        assert words in str(finding)


@pytest.mark.parametrize("error, ok", [(0.8e-5, True), (1.5e-5, False)])
@pytest.mark.parametrize("frequency", [0, 17, 31])
def test_the_limit_is_1e_5_of_each_frequency(frequency, error, ok):
    model = LlamaForCausalLM(config_of("llama", **LONG))
    model.model.rotary_emb.inv_freq[frequency] *= 1 + error
    assert check_rope_precision(model).ok is ok


@pytest.mark.parametrize("kind, factors", [("default", [1.0] * 32), ("longrope", FACTORS)])
def test_recomputation_is_in_float64(kind, factors):
    """Against the formula in Python's floats: the host's own float32 would be off by 1e-8 at least."""
    expected = rope._expected(AutoModelForCausalLM.from_config(KINDS[kind]()).model.rotary_emb)["inv_freq"][0]
    assert expected.dtype == torch.float64
    exact = [10_000 ** (-2 * i / 64) / factor for i, factor in enumerate(factors)]
    assert expected.tolist() == pytest.approx(exact, rel=1e-14)


@pytest.mark.parametrize("kind, length", [("dynamic", 100_100), ("longrope", 4200)])
def test_frequencies_that_grew_with_a_long_row_are_precise_too(kind, length):
    rotary = AutoModelForCausalLM.from_config(KINDS[kind]()).model.rotary_emb
    before = rotary.inv_freq.clone()
    rotary(torch.zeros(1), torch.arange(length)[None])
    assert not torch.equal(rotary.inv_freq, before)
    assert check_rope_precision(rotary).findings == []
    rotary.inv_freq *= 1.001
    assert not check_rope_precision(rotary).ok


def test_a_config_changed_after_loading_is_noticed():
    model = LlamaForCausalLM(config_of("llama", **LONG))
    if hasattr(model.config, "rope_parameters"):
        model.config.rope_parameters["rope_theta"] = 500_000.0
    else:
        model.config.rope_theta = 500_000.0
    assert not check_rope_precision(model).ok


@pytest.mark.parametrize("dtype, ok", [(torch.long, True), (torch.int32, True), (torch.bfloat16, False)])
def test_positions_have_to_be_integers(dtype, ok):
    report = check_rope_precision(LlamaForCausalLM(config_of("llama")), torch.arange(8)[None].to(dtype))
    assert report.ok is ok
    assert [finding.name for finding in report.findings] == ["position_ids"] * (not ok)


class ByProduct(nn.Module):
    def forward(self, x, position_ids):
        return (self.inv_freq[None, :, None] @ position_ids[:, None, :].float()).transpose(1, 2)


class ByMultiplication(nn.Module):
    def forward(self, x, position_ids):
        return position_ids[..., None] * self.inv_freq


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("kind", [ByProduct, ByMultiplication])
def test_tf32_matters_where_phases_come_from_a_matrix_product(kind, tf32, monkeypatch):
    monkeypatch.setattr(compat, "tf32_on", lambda device: tf32)
    model = LlamaForCausalLM(config_of("llama"))
    rotary = model.model.rotary_emb
    rotary.__class__ = type("Rotary", (type(rotary),), {"forward": torch.no_grad()(kind.forward)})
    found = [str(finding) for finding in check_rope_precision(model).findings]
    assert any("TF32" in text for text in found) is (tf32 and kind is ByProduct)


@pytest.mark.parametrize(
    "precision, device, on", [("high", "cuda", True), ("high", "cpu", False), ("highest", "cuda", False)]
)
def test_tf32_is_read_from_torch(precision, device, on):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        assert compat.tf32_on(torch.device(device)) is on
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_model_without_frequencies_is_ok_and_is_told_that_nothing_was_compared():
    report = check_rope_precision(AutoModelForCausalLM.from_config(config_of("gpt2")))
    assert report.ok
    assert ["nothing was compared" in str(finding) for finding in report.findings] == [True]


class OldRotary(nn.Module):
    """As remote code has it: numbers instead of a config."""

    def __init__(self, dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1 / base ** (torch.arange(0, dim, 2) / dim), persistent=False)


class NeedsMore(OldRotary):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__(8)
        self.config = config


@pytest.mark.parametrize(
    "rotary", [lambda: OldRotary(8), lambda: NeedsMore(config_of("llama"), 0)], ids=["no_config", "more_arguments"]
)
def test_frequencies_that_no_config_explains_are_not_guessed(rotary):
    report = check_rope_precision(nn.ModuleDict({"rotary": rotary()}))
    assert not report.ok
    assert [finding.name for finding in report.findings] == ["rotary.inv_freq"]
    assert "cannot be verified" in str(report.findings[0])


def test_a_model_on_the_meta_device_is_not_ok():
    with torch.device("meta"):
        report = check_rope_precision(LlamaForCausalLM(config_of("llama")))
    assert not report.ok
    assert "meta device" in str(report.findings[0])


# ---------------------------------------------------------------- drift

IDS = torch.randint(3, 67, (2, 12), generator=torch.Generator().manual_seed(3))
DRIFTING = ["llama", "qwen2", "mistral", "gemma2", "gpt_oss"]


def drifting(model_type: str, dtype: torch.dtype = torch.float64) -> Any:
    """Phases grow with the square of the position, so that a shift changes attention by far more than rounding."""
    model = build(config_of(model_type), "eager", dtype)
    model.model.rotary_emb.register_forward_pre_hook(squared, with_kwargs=True)
    return model


def squared(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    args = tuple(x**2 if isinstance(x, Tensor) and not x.is_floating_point() else x for x in args)
    return args, {name: x**2 if name == "position_ids" else x for name, x in kwargs.items()}


def at(shift: int) -> Tensor:
    return torch.arange(shift, shift + IDS.shape[1]).expand(IDS.shape)


def weights_of(model: Any, shift: int) -> list[Tensor]:
    with torch.no_grad():
        return model(IDS, position_ids=at(shift), output_attentions=True).attentions


def first_logits(model: Any, shift: int) -> Tensor:
    """(layers, B, heads, L): projections, rotation and product written out; 0 where a window hides the key."""
    config, logits = model.config, []
    with torch.no_grad():
        states = model(IDS, position_ids=at(shift), output_hidden_states=True).hidden_states
        for layer, x in zip(model.model.layers, states[:-1], strict=True):
            x, attention = layer.input_layernorm(x), layer.self_attn
            q = attention.q_proj(x).unflatten(-1, (config.num_attention_heads, -1)).transpose(1, 2)
            k = attention.k_proj(x).unflatten(-1, (config.num_key_value_heads, -1)).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, *model.model.rotary_emb(x, position_ids=at(shift)))
            first = k[:, [h // (q.shape[1] // k.shape[1]) for h in range(q.shape[1])], 0]
            scores = torch.einsum("bhld,bhd->bhl", q, first) / q.shape[-1] ** 0.5
            if config.model_type == "gemma2":
                scores = 3.0 * torch.tanh(scores / 3.0)
            if getattr(attention, "sliding_window", None) or config.model_type == "mistral":
                scores[..., 5:] = 0
            logits.append(scores)
    return torch.stack(logits)


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=[pytest.mark.smoke] * (t == "llama")) for t in DRIFTING])
def test_drift_of_weights_is_equation_4(model_type):
    model = drifting(model_type)
    length, per_head, of_first = IDS.shape[1], [], 0.0
    for a, b in zip(weights_of(model, 2), weights_of(model, 9), strict=True):
        head_sums = torch.zeros(a.shape[1], dtype=torch.float64)
        for j in range(1, length + 1):
            moved = (a - b)[..., j - 1].abs().sum(-1).mean(0) / (length - j + 1)
            head_sums += moved
            of_first += moved.sum().item() if j == 1 else 0.0
        per_head.append(head_sums)
    expected = torch.stack(per_head)
    drift = rope_drift(model, IDS, 2, 9)
    assert expected.sum() > 1
    torch.testing.assert_close(drift.per_head, expected, rtol=1e-10, atol=0)
    assert drift.d == pytest.approx(expected.sum().item(), rel=1e-10)
    assert drift.first_key_share == pytest.approx(of_first / expected.sum().item(), rel=1e-10)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "mistral", "gemma2"])
def test_drift_of_logits_is_equation_5(model_type):
    model = drifting(model_type)
    moved = (first_logits(model, 2) - first_logits(model, 9)).abs().sum() / IDS.shape[1] / IDS.shape[0]
    assert moved > 1
    assert rope_drift(model, IDS, 2, 9).d_logit == pytest.approx(moved.item(), rel=1e-10)


def test_exact_phases_do_not_drift_and_rounded_ones_do():
    drifts = [rope_drift(build(config_of("llama"), "sdpa", dtype), IDS).d for dtype in (torch.float64, torch.bfloat16)]
    assert drifts[0] < 1e-4 < 1e-2 < drifts[1]


def test_no_shift_is_no_drift():
    drift = rope_drift(build(config_of("llama"), "sdpa"), IDS, 3, 3)
    assert (drift.d, drift.d_logit) == (0.0, 0.0)
    assert drift.first_key_share != drift.first_key_share


def test_a_wrapped_model_drifts_as_its_inside_does():
    inside = drifting("llama")
    wrapped = get_peft_model(drifting("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert rope_drift(wrapped, IDS).d == pytest.approx(rope_drift(inside, IDS).d, rel=1e-10)


def state(model: Any) -> tuple:
    tables = [dict(table) for table in compat.attention_tables()]
    return model.config._attn_implementation, [module.training for module in model.modules()], tables


@pytest.mark.parametrize("implementation", ["anchor", "sdpa", "eager"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(implementation, fails):
    model = build(config_of("llama"), implementation).train()
    model.model.layers[1].eval()
    before = state(model)
    if fails:
        hook = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            rope_drift(model, IDS)
        hook.remove()
    else:
        assert not rope_drift(model, IDS).per_head.requires_grad
    assert state(model) == before
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((IDS[0],), r"(B, L).*\(12,\)"),
        ((IDS[:, :1],), r"at least 2, not \(2, 1\)"),
        ((IDS, -1, 16), "-1"),
        ((IDS, 0, 1.5), r"1\.5"),
        ((IDS, 0, 117), "117.*128.*max_position_embeddings is 128"),
    ],
    ids=["one_row", "one_token", "negative", "fraction", "too_far"],
)
def test_bad_input_of_the_drift(arguments, words):
    with pytest.raises(ValueError) as caught:
        rope_drift(build(config_of("llama")), *arguments)
    assert not isinstance(caught.value, AnchorUnsupportedError)
    assert re.search(words.replace("(B, L)", r"\(B, L\)"), str(caught.value))


def test_the_last_position_may_be_used():
    assert rope_drift(build(config_of("llama")), IDS, 0, 116).d > 0


class WithoutPositions(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask)


class SwallowsPositions(LlamaForCausalLM):
    def forward(self, input_ids=None, position_ids=None):
        return super().forward(input_ids=input_ids)


@pytest.mark.parametrize("kind", [WithoutPositions, SwallowsPositions])
def test_a_model_that_swallows_positions_has_no_drift_to_measure(kind):
    with pytest.raises(AnchorUnsupportedError) as caught:
        rope_drift(kind(config_of("llama")), IDS)
    check_text(str(caught.value), kind.__name__, "position_ids")


def test_attention_that_cannot_be_watched_is_refused():
    config = config_of("gptj", vocab_size=67, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(AnchorUnsupportedError) as caught:
        rope_drift(model, IDS)
    check_text(str(caught.value), "gptj", "table of attention functions")


@pytest.mark.parametrize("what", [None, "gpt2"])
def test_what_is_no_model_is_refused(what):
    with pytest.raises(ValueError, match=type(what).__name__):
        check_rope_precision(what)
    with pytest.raises(ValueError, match=type(what).__name__):
        rope_drift(what, torch.ones(1, 4).long())


@pytest.mark.parametrize(
    "ids, word",
    [([[1, 2]], "list"), (torch.ones(1, 4), "float32"), (torch.ones(0, 4).long(), r"\(0, 4\)")],
    ids=["list", "floats", "no rows"],
)
def test_what_are_no_token_ids_is_refused(ids, word):
    with pytest.raises(ValueError, match=f"input_ids must be .*{word}"):
        rope_drift(build(config_of("llama")), ids)
