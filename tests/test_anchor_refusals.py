"""Models that cannot carry attn_implementation="anchor", and what the name leaves behind in those that can."""

import copy
import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from anchor_models import CONFIGS, ROWS, VISIBLE, build, check_text, config_of, logits, skip_without_positions
from anchor_oracle import (
    assert_equal,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    GPT2LMHeadModel,
    GPT2Model,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from hf_ext import compat
from hf_ext.anchor_attention import support
from hf_ext.anchor_attention.support import AnchorUnsupportedError

# ---------------------------------------------------------------- refusals

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT_SMALL = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
    "gpt_bigcode": {**GPT_SMALL, "bos_token_id": 1, "eos_token_id": 2},
    "ctrl": {**GPT_SMALL, "dff": 16},
    "persimmon": SMALL,
    "llama4_text": {**SMALL, "head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2},
    "mamba": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    "jamba": {**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "bamba": {**SMALL, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8},
    "recurrent_gemma": {**SMALL, "num_key_value_heads": 1, "lru_width": 16},
    "lfm2": SMALL,
    "qwen3_next": {**SMALL, "num_experts": 2},
    "t5": {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}
BIDIRECTIONAL = {"bert": SMALL, "roberta": SMALL}


def auto_class(model_type: str) -> Any:
    return {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM}.get(
        model_type, AutoModelForCausalLM
    )


def load(model_type: str, how: str) -> Any:
    config = config_of(model_type, **{**REFUSED, **BIDIRECTIONAL}[model_type])
    if how == "from_config":
        return auto_class(model_type).from_config(config, attn_implementation="anchor")
    model = auto_class(model_type).from_config(config)
    model.set_attn_implementation("anchor")
    return model


LOADS = ["from_config", "set_attn_implementation"]


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=[pytest.mark.smoke] * (t == "mamba")) for t in REFUSED])
def test_models_that_cannot_carry_it_are_refused_at_load(model_type):
    with pytest.raises(AnchorUnsupportedError) as caught:
        load(model_type, "from_config")
    check_text(str(caught.value), model_type)


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_cannot_carry_it_never_get_it_later(model_type):
    """Either we refuse, or the host itself logs that the class cannot be switched, and leaves it as it was."""
    try:
        model = load(model_type, "set_attn_implementation")
    except AnchorUnsupportedError as error:
        check_text(str(error), model_type)
    else:
        assert not model._can_set_attn_implementation()
        assert model.config._attn_implementation != "anchor"


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention", "mamba", "conv", "recurrent"])
def test_layers_of_any_other_kind_are_refused(kind):
    config = config_of("llama")
    config.layer_types = ["full_attention", kind, "full_attention"]
    with pytest.raises(AnchorUnsupportedError) as caught:
        LlamaForCausalLM._from_config(config, attn_implementation="anchor")
    check_text(str(caught.value), "LlamaForCausalLM", kind)


class WithoutPositions(LlamaForCausalLM):
    """The Trainer drops columns that `forward` does not name: here, it would drop the positions."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_forward_without_position_ids_is_refused():
    with pytest.raises(AnchorUnsupportedError) as caught:
        WithoutPositions._from_config(config_of("llama"), attn_implementation="anchor")
    check_text(str(caught.value), "WithoutPositions", "position_ids")


class OwnGPT2(GPT2LMHeadModel):
    def forward(self, input_ids=None, position_ids=None, head_mask=None, **others):
        return super().forward(input_ids=input_ids, position_ids=position_ids, **others)


def old_forward(self, input_ids=None, position_ids=None, head_mask=None, **others):
    raise AssertionError("it computes")


@pytest.mark.parametrize("model_class", [GPT2LMHeadModel, OwnGPT2])
def test_a_gpt2_that_keeps_positions_to_itself_is_refused(model_class, monkeypatch):
    """As in transformers 4, whose layers are handed none."""
    monkeypatch.setattr(GPT2Model, "forward", old_forward)
    with pytest.raises(AnchorUnsupportedError) as caught:
        model_class._from_config(config_of("gpt2"), attn_implementation="anchor")
    check_text(str(caught.value), model_class.__name__, "position_ids", "this version of transformers")
    model_class._from_config(config_of("gpt2"), attn_implementation="sdpa")


def test_a_subclass_of_gpt2_with_another_signature_is_what_the_host_is():
    skip_without_positions("gpt2")
    OwnGPT2._from_config(config_of("gpt2"), attn_implementation="anchor")


class OwnMasks(LlamaForCausalLM):
    """As OPT and BioGPT are written in transformers 4.56."""


def test_a_class_that_builds_its_masks_itself_is_refused(monkeypatch):
    """Its layers call the attention function, and hand it a finished mask."""
    module = ModuleType("modeling_own_masks")
    module.__file__ = __file__  # some hosts read it
    module.ALL_ATTENTION_FUNCTIONS = {}
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(OwnMasks, "__module__", module.__name__)
    with pytest.raises(AnchorUnsupportedError) as caught:
        OwnMasks._from_config(config_of("llama"), attn_implementation="anchor")
    check_text(str(caught.value), "OwnMasks", "masks itself")
    module.create_causal_mask = None
    OwnMasks._from_config(config_of("llama"), attn_implementation="anchor")


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("model_type", BIDIRECTIONAL)
def test_bidirectional_models_are_refused_before_they_compute(model_type, how):
    with pytest.raises(AnchorUnsupportedError) as caught:
        model = load(model_type, how)
        if not model._can_set_attn_implementation():
            assert model.config._attn_implementation != "anchor"
            pytest.skip("this transformers cannot switch it, and leaves it as it was")
        model(input_ids=torch.ones(1, 4, dtype=torch.long))
    check_text(str(caught.value))


# ---------------------------------------------------------------- warnings


class NewConfig(LlamaConfig):
    model_type = "brand_new"


class NewForCausalLM(LlamaForCausalLM):
    config_class = NewConfig


def warnings_of(caplog: Any, model_class: type, config: Any) -> list[str]:
    """From loading it twice."""
    support._caution.cache_clear()
    with caplog.at_level("WARNING", logger=support.__name__):
        for _ in range(2):
            model_class._from_config(copy.deepcopy(config), attn_implementation="anchor")
    return [record.getMessage() for record in caplog.records if record.name == support.__name__]


def test_a_type_that_nobody_has_tried_loads_with_one_warning(caplog):
    (text,) = warnings_of(caplog, NewForCausalLM, NewConfig(**CONFIGS["llama"]))
    assert "'brand_new'" in text
    assert "check_model" in text


@pytest.mark.skipif(not RobertaForCausalLM._supports_attention_backend, reason="this transformers cannot switch it")
def test_a_type_whose_positions_begin_elsewhere_loads_with_one_warning(caplog):
    (text,) = warnings_of(caplog, RobertaForCausalLM, RobertaConfig(**SMALL, is_decoder=True))
    assert "padding_idx + 1" in text


def test_a_type_that_is_exact_loads_without_a_word(caplog):
    assert not warnings_of(caplog, LlamaForCausalLM, config_of("llama"))


def test_a_refused_model_keeps_its_own_attention():
    model = auto_class("gpt_bigcode").from_config(config_of("gpt_bigcode", **REFUSED["gpt_bigcode"])).eval()
    ids = torch.arange(1, 7)[None]
    before, implementation = logits(model, input_ids=ids), model.config._attn_implementation
    with pytest.raises(AnchorUnsupportedError):
        model.set_attn_implementation("anchor")
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, input_ids=ids), before)


@pytest.mark.parametrize("first, second", [("sdpa", "anchor"), ("anchor", "sdpa")])
def test_the_implementation_can_be_exchanged(first, second):
    config = config_of("llama")
    model = build(config, first)
    model.set_attn_implementation(second)
    expected = logits(build(config, second), input_ids=ROWS.input_ids, position_ids=ROWS.position_ids)
    assert torch.equal(logits(model, input_ids=ROWS.input_ids, position_ids=ROWS.position_ids), expected)


def test_nothing_of_it_is_saved(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    assert "anchor" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation != "anchor"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="anchor")
    batch = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids}
    assert_equal(logits(again, **batch), logits(plain, **batch, attention_mask=VISIBLE[:, None]), 1e-5)


@pytest.mark.skipif(not compat.reads_attention_from_config(), reason="this transformers ignores the key")
def test_the_key_in_a_config_file_takes_effect_and_a_keyword_wins(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attn_implementation": "anchor"}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "anchor"
    chosen = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert chosen.config._attn_implementation == "sdpa"
