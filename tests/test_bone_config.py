"""BoneConfig: what it refuses and how it says so, what it writes, and who can read that."""

import copy
import json
import pickle
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftConfig, get_peft_config, get_peft_model
from torch import nn

from hf_ext import BoneConfig
from hf_ext.compat import has_native_bone

if has_native_bone():
    pytest.skip("this peft has a Bone of its own", allow_module_level=True)

OWN = {
    "r",
    "target_modules",
    "exclude_modules",
    "init_weights",
    "bias",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
}
FORMS = {True: "tile", False: "tile", "bat": "bat", "bat_row": "bat_row"}


def said(**options: Any) -> str:
    """What the refusal says."""
    with pytest.raises(ValueError) as caught:
        BoneConfig(**options)
    return str(caught.value)


def written(config: BoneConfig, folder: Path) -> dict[str, Any]:
    config.save_pretrained(folder)
    return json.loads((folder / "adapter_config.json").read_text())


def file(folder: Path, **changes: Any) -> Path:
    """A file as PEFT 0.18 wrote it."""
    content = {
        "auto_mapping": None,
        "base_model_name_or_path": "someone/base",
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "BONE",
        "peft_version": "0.18.1",
        "r": 8,
        "revision": None,
        "target_modules": ["q_proj"],
        "task_type": "CAUSAL_LM",
        **changes,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


# ---------------------------------------------------------------- defaults


@pytest.mark.smoke
def test_defaults():
    config = BoneConfig()
    assert {name: getattr(config, name) for name in OWN} == {
        "r": 64,
        "target_modules": None,
        "exclude_modules": None,
        "init_weights": True,
        "bias": "none",
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": None,
    }
    assert (config.task_type, config.inference_mode, config.base_model_name_or_path) == (None, False, None)
    assert config.peft_type is peft.PeftType("BONE")
    assert config.peft_type.value == "BONE"
    assert not config.is_prompt_learning


def test_r_is_the_first_field_of_its_own():
    """As in PEFT's: fields of PeftConfig come first, so no one passes these by position; the order of ours is kept."""
    names = [field.name for field in fields(BoneConfig) if field.name in OWN]
    assert names[0] == "r"


@pytest.mark.parametrize("init_weights", FORMS, ids=str)
def test_form(init_weights):
    assert BoneConfig(init_weights=init_weights).form == FORMS[init_weights]


def test_an_unknown_keyword_is_pythons_own_error():
    with pytest.raises(TypeError, match="rank"):
        BoneConfig(rank=8)


# ---------------------------------------------------------------- validation


@pytest.mark.parametrize("r", [1, 3, 64, 5000])
def test_r_that_is_allowed(r):
    assert BoneConfig(r=r).r == r


@pytest.mark.parametrize("r", [0, -1, True, False, "8", 2.5, 8.0, None, [8]], ids=repr)
def test_r_that_is_refused(r):
    message = said(r=r)
    assert repr(r) in message
    assert re.search(r"\br\b", message)
    assert re.search(r"int.*\b1\b", message)


@pytest.mark.parametrize("init_weights", [1, 0, 1.0, None, "true", "tile", "mini", "zeros", ["bat"]], ids=repr)
def test_init_weights_that_is_refused(init_weights):
    message = said(init_weights=init_weights)
    assert f"init_weights={init_weights!r}" in message or f"init_weights: {init_weights!r}" in message
    assert all(allowed in message for allowed in ("True", "False", "'bat'", "'bat_row'"))


@pytest.mark.parametrize(
    ("init_weights", "nearest"),
    [
        ("Bat", "bat"),
        ("BAT", "bat"),
        ("bats", "bat"),
        ("batrow", "bat_row"),
        ("bat-row", "bat_row"),
        ("row", "bat_row"),
    ],
)
def test_nearest_init_weights(init_weights, nearest):
    message = said(init_weights=init_weights)
    assert repr(init_weights) in message
    assert message.count(f"'{nearest}'") == 2  # once among the allowed, once as the suggestion


@pytest.mark.parametrize("bias", ["none", "all", "bone_only"])
def test_bias_that_is_allowed(bias):
    assert BoneConfig(bias=bias).bias == bias


@pytest.mark.parametrize("bias", [None, True, "", 3, ["all"]], ids=repr)
def test_bias_that_is_refused(bias):
    message = said(bias=bias)
    assert "bias" in message
    assert repr(bias) in message
    assert all(repr(allowed) in message for allowed in ("none", "all", "bone_only"))


@pytest.mark.parametrize(
    ("bias", "nearest"),
    [
        ("lora_only", "bone_only"),
        ("Bone_only", "bone_only"),
        ("All", "all"),
        ("None", "none"),
        ("miss_only", "bone_only"),
    ],
)
def test_nearest_bias(bias, nearest):
    message = said(bias=bias)
    assert repr(bias) in message
    assert message.count(f"'{nearest}'") == 2


@pytest.mark.parametrize(
    "options",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0},
        {"layers_pattern": "layers"},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("target", [".*q_proj", "all-linear"])
def test_a_pattern_for_modules_excludes_a_choice_of_layers(target, options):
    message = said(target_modules=target, **options)
    assert repr(target) in message
    assert "target_modules" in message
    assert any(f"{name}" in message for name in options)


@pytest.mark.parametrize("target", [None, ["q_proj"]], ids=str)
def test_layers_pattern_needs_layers_to_transform(target):
    message = said(target_modules=target, layers_pattern="layers")
    assert "layers_pattern" in message
    assert "'layers'" in message
    assert "layers_to_transform" in message


@pytest.mark.parametrize("layers", [0, [0], [0, 2]], ids=str)
def test_layers_that_are_allowed(layers):
    config = BoneConfig(target_modules=["q_proj"], layers_to_transform=layers, layers_pattern="layers")
    assert (config.layers_to_transform, config.layers_pattern) == (layers, "layers")
    assert BoneConfig(target_modules=["q_proj"], layers_to_transform=layers).layers_pattern is None


def test_target_parameters_are_refused_by_name():
    assert "target_parameters" in said(target_parameters=["mlp.experts.down_proj"])


def test_task_type_is_the_hosts():
    assert BoneConfig(task_type="CAUSAL_LM").task_type == "CAUSAL_LM"
    with pytest.raises(ValueError, match="CAUSAL_ML"):
        BoneConfig(task_type="CAUSAL_ML")


# ---------------------------------------------------------------- the file


@pytest.mark.smoke
def test_the_file_has_no_key_that_old_peft_does_not_know(tmp_path):
    """`target_parameters` neither: PEFT 0.18's class has no such field."""
    keys = set(written(BoneConfig(r=8, target_modules=["q_proj"], task_type="CAUSAL_LM"), tmp_path))
    assert keys == OWN | {field.name for field in fields(PeftConfig)}


@pytest.mark.parametrize("init_weights", FORMS, ids=str)
def test_init_weights_is_written_as_it_was_given(tmp_path, init_weights):
    content = written(BoneConfig(init_weights=init_weights), tmp_path)
    assert content["init_weights"] == init_weights
    assert type(content["init_weights"]) is type(init_weights)
    assert content["peft_type"] == "BONE"


FULL = {
    "r": 6,
    "init_weights": "bat_row",
    "bias": "bone_only",
    "target_modules": ["v_proj", "q_proj"],
    "exclude_modules": ["lm_head"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
    "modules_to_save": ["score"],
    "task_type": "SEQ_CLS",
    "base_model_name_or_path": "someone/base",
    "revision": "main",
}


@pytest.mark.parametrize("reader", [BoneConfig, PeftConfig], ids=lambda kind: kind.__name__)
def test_round_trip_through_the_file(tmp_path, reader):
    config = BoneConfig(**FULL)
    config.save_pretrained(tmp_path)
    back = reader.from_pretrained(str(tmp_path))
    assert type(back) is BoneConfig
    assert back.to_dict() == config.to_dict()
    assert {key: back.to_dict()[key] for key in ("target_modules", "exclude_modules")} == {
        "target_modules": {"q_proj", "v_proj"},
        "exclude_modules": {"lm_head"},
    }


@pytest.mark.parametrize("target", ["all-linear", ".*q_proj", ["q_proj"], None], ids=str)
def test_target_modules_round_trip(tmp_path, target):
    content = written(BoneConfig(target_modules=target), tmp_path)
    assert content["target_modules"] == target
    assert PeftConfig.from_pretrained(str(tmp_path)).target_modules == (set(target) if type(target) is list else target)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_duplicates_are_equal(duplicate):
    config = BoneConfig(**FULL)
    twin = duplicate(config)
    assert twin == config
    assert twin.peft_type is config.peft_type


def test_get_peft_config():
    config = get_peft_config({"peft_type": "BONE", "r": 8, "init_weights": "bat", "task_type": "CAUSAL_LM"})
    assert (type(config), config.r, config.form, config.task_type) == (BoneConfig, 8, "bat", "CAUSAL_LM")


@pytest.mark.smoke
@pytest.mark.parametrize("init_weights", [True, False, "bat"], ids=str)
def test_a_file_of_peft_018_is_read(tmp_path, init_weights):
    config = PeftConfig.from_pretrained(str(file(tmp_path, init_weights=init_weights)))
    assert type(config) is BoneConfig
    assert (config.r, config.init_weights, config.target_modules) == (8, init_weights, {"q_proj"})
    assert (config.inference_mode, config.base_model_name_or_path) == (True, "someone/base")


@pytest.mark.parametrize(
    ("key", "value"),
    [("init_weights", "mini"), ("init_weights", 1), ("r", "8"), ("r", 8.5), ("r", 0), ("bias", "lora_only")],
    ids=str,
)
def test_a_bad_value_in_a_file_is_refused(tmp_path, key, value):
    with pytest.raises(ValueError, match=rf"{key}.*{re.escape(repr(value))}"):
        PeftConfig.from_pretrained(str(file(tmp_path, **{key: value})))


def test_target_parameters_in_a_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="target_parameters"):
        PeftConfig.from_pretrained(str(file(tmp_path, target_parameters=["experts.down_proj"])))


# ---------------------------------------------------------------- one config, two models


@pytest.mark.parametrize("init_weights", FORMS, ids=str)
def test_a_config_shared_by_two_models(init_weights):
    """Each model has blocks of its own, and neither leaves anything in the config that the other trips over."""
    config = BoneConfig(r=4, init_weights=init_weights, target_modules=["0"])
    before = config.to_dict()
    small, large = (get_peft_model(nn.Sequential(nn.Linear(8, size)), config) for size in (8, 16))
    assert {key: config.to_dict()[key] for key in OWN} == {key: before[key] for key in OWN}
    blocks = [model.base_model.model[0].bone_block["default"] for model in (small, large)]
    kept = blocks[1].detach().clone()
    with torch.no_grad():
        blocks[0].fill_(1)
    assert torch.equal(blocks[1], kept)
    small.base_model.delete_adapter("default")
    assert large(torch.ones(1, 8)).shape == (1, 16)


@pytest.mark.parametrize(("option", "near"), [("R", "r"), ("target_module", "target_modules"), ("Bias", "bias")])
def test_misspelt_option_is_an_error_in_a_file_too(option, near, tmp_path):
    """PEFT leaves out of a file what it does not know, and goes on with the default."""
    with pytest.raises(TypeError, match=f"BoneConfig has no option '{option}'; did you mean '{near}'"):
        BoneConfig(**{option: "x"})
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BONE", option: "x"}))
    with pytest.raises(TypeError, match=f"did you mean '{near}'"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_option_of_a_later_version_is_left_out_as_peft_does(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "BONE", "r": 4, "something_new": 1}))
    with pytest.warns(UserWarning, match="something_new"):
        assert PeftConfig.from_pretrained(str(tmp_path)).r == 4
