"""Checkpoints written by the PEFT releases that had Bone, with the logits, gradients and merged weights of that time.

Skipped where the reference data does not lie beside the checkout.
"""

import json
from pathlib import Path

import pytest
import torch
from bone_native import OURS
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_ext.bone_adapter import BoneConfig, reference, upgrade_checkpoint
from hf_ext.bone_adapter.checkpoint import form_of

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "bone_adapter"
pytestmark = [
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference data"),
    OURS,
    # As the old releases left them: a warning of the host about keys that it does not know.
    pytest.mark.filterwarnings("ignore:Unexpected keyword arguments"),
    pytest.mark.filterwarnings("ignore:Ignored .* tensors of other adapters"),
    pytest.mark.filterwarnings("ignore:.*disabling adapter layers with bias"),
]
INDEX = json.loads((GOLDEN / "index.json").read_text()) if GOLDEN.is_dir() else {"cases": {}, "input_ids": []}
IDS = torch.tensor(INDEX["input_ids"])
SINGLE = [case for case in INDEX["cases"] if "multi" not in case]
MULTI = [case for case in INDEX["cases"] if "multi" in case]
DEVELOPMENT = "peft_dev_2024_11/block_div_r8"
BF16 = [case for case in SINGLE if case.endswith("bf16")]
FP32 = [case for case in SINGLE if case not in BF16]


def golden(case):
    values = load_file(GOLDEN / case / "golden.safetensors")
    # The old release trained these biases and did not save them.
    return values | {"logits": values.get("reloaded_logits", values["logits"])} if "logits" in values else values


def base_of(case):
    entry = INDEX["cases"][case]
    return AutoModelForCausalLM.from_pretrained(GOLDEN / entry["base"], dtype=getattr(torch, entry["dtype"]))


def load(case, **options):
    return PeftModel.from_pretrained(base_of(case), GOLDEN / case, **options)


def assert_close(actual, expected, tolerance=2e-5):
    assert (actual.float() - expected).abs().max() <= tolerance * (expected.max() - expected.min())


def by_peft(case, tmp_path):
    return load(case)


def by_peft_on_meta(case, tmp_path):
    return load(case, low_cpu_mem_usage=True)


def by_auto_peft(case, tmp_path):
    return AutoPeftModelForCausalLM.from_pretrained(GOLDEN / case)


def by_transformers(case, tmp_path):
    return AutoModelForCausalLM.from_pretrained(upgraded(case, tmp_path))


def by_load_adapter(case, tmp_path):
    model = base_of(case)
    model.load_adapter(str(upgraded(case, tmp_path)))
    return model


def upgraded(case, tmp_path):
    """transformers' own loading does not ask us, and the remedy for development files is to rewrite them."""
    if case != DEVELOPMENT:
        return GOLDEN / case
    upgrade_checkpoint(GOLDEN / case, tmp_path / "upgraded")
    return tmp_path / "upgraded"


WAYS = [by_peft, by_peft_on_meta, by_auto_peft, by_transformers, by_load_adapter]


@pytest.fixture(autouse=True)
def beside_the_bases(monkeypatch):
    monkeypatch.chdir(GOLDEN)  # their configs name `base_div`, a relative path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", FP32)
def test_logits(case, way, tmp_path):
    with torch.no_grad():
        assert_close(way(case, tmp_path).eval()(IDS).logits, golden(case)["logits"])


# The biases that the bias_only case was trained with are not in its file.
@pytest.mark.parametrize("case", [case for case in FP32 if "bias_only" not in case])
def test_gradients(case):
    expected = {k.removeprefix("grad."): v for k, v in golden(case).items() if k.startswith("grad.")}
    if not expected:
        pytest.skip("no gradients in this case")
    model = load(case, is_trainable=True)
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert abs(loss - golden(case).get("loss", loss)) < 2e-5 * loss
    actual = dict(model.named_parameters())
    for name, gradient in expected.items():
        assert (actual[name].grad - gradient).norm() <= 1e-4 * gradient.norm(), name


@pytest.mark.parametrize("case", [case for case in FP32 if "gt_in" not in case and "bias_only" not in case])
@pytest.mark.parametrize("safe", [False, True], ids=["merge", "safe_merge"])
def test_merged(case, safe):
    expected = golden(case)
    model = load(case).merge_and_unload(safe_merge=safe)
    weights = model.state_dict()
    for name in [name for name in expected if name.startswith("merged.")]:
        assert_close(weights[name.removeprefix("merged.")], expected[name])
    with torch.no_grad():
        assert_close(model(IDS).logits, expected["merged_logits"])


@pytest.mark.parametrize("case", FP32)
def test_merging_changes_no_logits(case):
    """Also r larger than in_features, which the old release could not merge."""
    with torch.no_grad():
        assert_close(load(case).merge_and_unload()(IDS).logits, golden(case)["logits"])


def in_float64(case, adapter_dtype):
    """The logits of a file by float64 loops."""
    adapter = load_file(GOLDEN / case / "adapter_model.safetensors")
    form = form_of(json.loads((GOLDEN / case / "adapter_config.json").read_text())["init_weights"])
    model = base_of(case).double()
    for name, block in adapter.items():
        layer = model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".bone_block"))
        layer.weight.data = reference.FORMS[form](layer.weight.data, block.to(adapter_dtype).double())
    return model(IDS).logits


@pytest.mark.parametrize("way", [way for way in WAYS if way is not by_auto_peft])
@pytest.mark.parametrize("case", BF16)
@torch.no_grad()
def test_bfloat16_is_as_near_to_float64_as_it_was(case, way, tmp_path):
    # transformers rounds the adapter to the base's dtype when it loads it.
    exact = in_float64(case, torch.bfloat16 if way in (by_transformers, by_load_adapter) else torch.float32)
    model = way(case, tmp_path)
    error = (model(IDS).logits.double() - exact).norm()
    then = (golden(case)["logits"].double() - in_float64(case, torch.float32)).norm()
    assert error <= 2 * then


@pytest.mark.parametrize("case", MULTI)
@pytest.mark.parametrize("order", ["a", "b", "ab", "ba"])
@torch.no_grad()
def test_several_adapters_in_their_order(case, order):
    model = PeftModel.from_pretrained(base_of(case), GOLDEN / case / "a", adapter_name="a")
    model.load_adapter(GOLDEN / case / "b", adapter_name="b")
    model.base_model.set_adapter(list(order))
    assert_close(model(IDS).logits, golden(case)[order])
    model.merge_adapter()
    assert_close(model(IDS).logits, golden(case)[order])


@pytest.mark.parametrize("case", MULTI)
@torch.no_grad()
def test_a_file_with_foreign_tensors_leaves_the_other_adapter_alone(case):
    """a's file also holds tensors called b."""
    model = PeftModel.from_pretrained(base_of(case), GOLDEN / case / "b", adapter_name="b")
    model.load_adapter(GOLDEN / case / "a", adapter_name="a")
    assert_close(model(IDS).logits, golden(case)["b"])


@pytest.mark.parametrize("case", SINGLE)
def test_config_survives(case, tmp_path):
    old = json.loads((GOLDEN / case / "adapter_config.json").read_text())
    config = PeftConfig.from_pretrained(GOLDEN / case)
    assert type(config) is BoneConfig
    config.save_pretrained(tmp_path)
    new = json.loads((tmp_path / "adapter_config.json").read_text())
    ours = ["r", "init_weights", "bias", "layers_to_transform", "layers_pattern", "modules_to_save", "peft_type"]
    assert {key: new[key] for key in ours} == {key: old[key] for key in ours}
    assert sorted(new["target_modules"]) == sorted(old["target_modules"])


FORM_CASES = sorted({k.rpartition(".")[0] for k in load_file(GOLDEN / "forms.safetensors")}) if GOLDEN.is_dir() else []


@pytest.mark.parametrize("case", FORM_CASES)
def test_forms(case):
    """The layer against plain loops in float64 by somebody else."""
    values = {k.rpartition(".")[2]: v for k, v in load_file(GOLDEN / "forms.safetensors").items() if case + "." in k}
    form = case.partition("_in")[0]
    base = torch.nn.Sequential(torch.nn.Linear(values["W"].shape[1], len(values["W"]))).double()
    base[0].weight.data, base[0].bias.data = values["W"], values["bias"]
    r = values["b"].shape[0] if form == "tile" else values["b"].shape[-1]
    config = BoneConfig(r=r, init_weights=True if form == "tile" else form, target_modules=["0"])
    layer = inject_adapter_in_model(config, base)[0]
    layer.bone_block["default"] = torch.nn.Parameter(values["b"])
    x = values["x"].requires_grad_()
    y = layer(x)
    y.backward(values["g"])
    for actual, name in [(y, "y"), (x.grad, "dx"), (layer.bone_block["default"].grad, "db")]:
        assert torch.allclose(actual, values[name], rtol=0, atol=1e-11), name
    layer.merge()
    assert torch.allclose(layer.weight, values["merged"], rtol=0, atol=1e-11)
