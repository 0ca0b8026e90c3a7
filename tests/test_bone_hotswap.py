"""hotswap_adapter: new values in the same parameters, or an error that changes nothing."""

import json

import pytest
import torch
from bone_native import ROW_FORM, ours_only
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hf_ext import BoneConfig
from hf_ext.bone_adapter import hotswap_adapter

OWN_BIASES = ours_only("which does not save biases")

IDS = torch.arange(12).view(2, 6)
CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 24,
}


def base(**options):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, **options)).eval()


def adapter(tmp_path, name, seed, base_options=(), **options):
    """A directory with random values, and the logits they give."""
    options = {"r": 4, "init_weights": True, "target_modules": ["q_proj", "down_proj"]} | options
    model = get_peft_model(base(**dict(base_options)), BoneConfig(**options)).eval()
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name, model(IDS).logits


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="tile"),
        pytest.param({"init_weights": "bat"}, id="bat"),
        pytest.param({"init_weights": "bat_row"}, id="bat_row", marks=ROW_FORM),
        pytest.param({"bias": "bone_only", "base_options": {"attention_bias": True}}, id="biases", marks=OWN_BIASES),
        pytest.param({"modules_to_save": ["lm_head"]}, id="saved head"),
    ],
)
def test_values_change_and_parameters_stay(tmp_path, options):
    first, _ = adapter(tmp_path, "first", 1, **options)
    second, expected = adapter(tmp_path, "second", 2, **options)
    model = PeftModel.from_pretrained(base(**options.get("base_options", {})), first).eval()
    before = {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()}
    hotswap_adapter(model, second)
    assert torch.equal(model(IDS).logits, expected)
    assert {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()} == before


def test_a_compiled_model_is_not_compiled_again(tmp_path):
    first, _ = adapter(tmp_path, "first", 1)
    second, expected = adapter(tmp_path, "second", 2)
    model = PeftModel.from_pretrained(base(), first).eval()
    compiled = []
    forward = torch.compile(model, backend=lambda graph, _: compiled.append(graph) or graph.forward)
    with torch.no_grad():
        forward(IDS)
        count = len(compiled)
        hotswap_adapter(forward, second)
        assert torch.allclose(forward(IDS).logits, expected, atol=1e-6)
    assert count
    assert len(compiled) == count


def test_without_a_peft_model_around_it(tmp_path):
    first, _ = adapter(tmp_path, "first", 1)
    second, expected = adapter(tmp_path, "second", 2)
    model = base()
    model.load_adapter(str(first), adapter_name="mine")
    hotswap_adapter(model, second, adapter_name="mine")
    assert torch.equal(model(IDS).logits, expected)


def damaged(path, change):
    tensors = load_file(path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, path / "adapter_model.safetensors")


def last(tensors):
    return sorted(tensors)[-1]


@pytest.mark.parametrize(
    ("options", "change", "said"),
    [
        ({"r": 8}, None, r"\('BONE', 'tile', 8\), and the loaded adapter is \('BONE', 'tile', 4\)"),
        ({"init_weights": "bat"}, None, r"'bat', 4\), and the loaded"),
        ({"target_modules": ["q_proj"]}, None, "down_proj.bone_block: not in the file"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, None, "up_proj.bone_block: nothing in the model"),
        ({}, lambda tensors: tensors.pop(last(tensors)), "not in the file"),
        ({}, lambda tensors: tensors[last(tensors)].fill_(torch.nan), "found NaN or infinity in"),
        ({}, lambda tensors: tensors.update({last(tensors): torch.zeros(4, 4)}), r"found shape \(4, 4\)"),
    ],
    ids=["r", "form", "fewer layers", "more layers", "missing tensor", "NaN", "shape"],
)
def test_another_adapter_is_refused_and_nothing_changes(tmp_path, options, change, said):
    first, expected = adapter(tmp_path, "first", 1)
    second, _ = adapter(tmp_path, "second", 2, **options)
    if change:
        damaged(second, change)
    model = PeftModel.from_pretrained(base(), first).eval()
    with pytest.raises(ValueError, match=said):
        hotswap_adapter(model, second)
    assert torch.equal(model(IDS).logits, expected)


@OWN_BIASES
def test_a_file_without_the_biases_that_were_trained_is_refused(tmp_path):
    """PEFT up to 0.18 did not save them: those of the other adapter would stay."""
    options = {"bias": "bone_only", "base_options": {"attention_bias": True}}
    first, expected = adapter(tmp_path, "first", 1, **options)
    second, _ = adapter(tmp_path, "second", 2, **options)
    damaged(second, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.endswith(".bias")])
    model = PeftModel.from_pretrained(base(attention_bias=True), first).eval()
    with pytest.raises(ValueError, match=r"q_proj.base_layer.bias: not in the file"):
        hotswap_adapter(model, second)
    assert torch.equal(model(IDS).logits, expected)


def test_an_unknown_adapter_is_named(tmp_path):
    first, _ = adapter(tmp_path, "first", 1)
    model = PeftModel.from_pretrained(base(), first)
    with pytest.raises(ValueError, match="No adapter 'defualt' in this model; there are default"):
        hotswap_adapter(model, first, adapter_name="defualt")


def test_a_merged_adapter_is_refused(tmp_path):
    first, _ = adapter(tmp_path, "first", 1)
    model = PeftModel.from_pretrained(base(), first)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged into the weights: unmerge_adapter"):
        hotswap_adapter(model, first)


def test_another_method_is_refused(tmp_path):
    first, _ = adapter(tmp_path, "first", 1)
    model = PeftModel.from_pretrained(base(), first)
    config = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "MISS"}))
    with pytest.raises(ValueError, match=r"\('MISS', 'tile', 4\)"):
        hotswap_adapter(model, first)
