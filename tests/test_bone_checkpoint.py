"""Adapter directories: what check_checkpoint says of sound and of damaged ones, and how they are written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from bone_files import GPT2, LLAMA, adapter, block_of, key, model_of, write_adapter
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import LlamaConfig

from hf_ext.bone_adapter import checkpoint
from hf_ext.bone_adapter.check import CheckpointReport, check_checkpoint
from hf_ext.bone_adapter.convert import upgrade_checkpoint

Q0, V0, DOWN1 = (key(f"model.layers.{n}") for n in ("0.self_attn.q_proj", "0.self_attn.v_proj", "1.mlp.down_proj"))


@pytest.fixture(scope="module")
def base():
    return model_of(LLAMA)


@pytest.fixture(scope="module")
def base_path(base, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    base.save_pretrained(path)
    return path


def problems(folder: Path, base_model: Any = None) -> list[str]:
    """The lines of the one error."""
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        check_checkpoint(folder, base_model)
    return str(caught.value).splitlines()[1:]


# ---------------------------------------------------------------- sound ones


@pytest.mark.parametrize("how", ["alone", "path", "config", pytest.param("model", marks=pytest.mark.smoke)])
@pytest.mark.parametrize(
    ("init_weights", "form", "parameters"),
    # q 24x24, v 24 -> 12, down 40 -> 24, twice
    [
        (True, "tile", 2 * 4 * (24 + 12 + 24)),
        (False, "tile", 2 * 4 * (24 + 12 + 24)),
        ("bat", "bat", 2 * 4 * (24 + 12 + 24)),
        ("bat_row", "bat_row", 2 * 4 * (24 + 24 + 40)),
    ],
    ids=["true", "false", "bat", "bat_row"],
)
def test_sound_file_is_described(base, base_path, tmp_path, init_weights, form, parameters, how):
    folder = write_adapter(tmp_path / "a", *adapter(base, init_weights, r=4))
    given = {"alone": None, "path": str(base_path), "config": LLAMA, "model": base}[how]
    expected = CheckpointReport(form, 4, 6, parameters, "float32", [], [], how != "alone")
    assert check_checkpoint(folder, given) == expected


def test_old_bin_files_are_read(base, tmp_path):
    config, tensors = adapter(base)
    tensors[Q0] = tensors[Q0].bfloat16()
    report = check_checkpoint(write_adapter(tmp_path / "a", config, tensors, old=True), base)
    assert (report.tensors, report.dtype) == (6, "bfloat16, float32")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_bin_files_are_not_executed(base, tmp_path):
    config, tensors = adapter(base)
    folder = write_adapter(tmp_path / "a", config, {**tensors, "bomb": Bomb()}, old=True)
    with pytest.raises(ValueError, match=r"adapter_model\.bin .*cannot be read"):
        check_checkpoint(folder)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.1.mlp.down_proj"]},
        {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": r".*\.(q_proj|up_proj)"},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"target_modules": ["v_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    ],
    ids=["excluded", "layers", "layers_pattern", "regex", "all-linear", "default", "saved"],
)
def test_targets_are_those_of_pefts_own_injection(base, tmp_path, options):
    """PEFT's LoRA with the same options says which layers have one: with those the file is sound, and less one not."""
    lora = get_peft_model(model_of(LLAMA), LoraConfig(**options)).get_base_model()
    paths = [path for path, module in lora.named_modules() if isinstance(module, LoraLayer)]
    config, _ = adapter(base)
    generator = torch.Generator().manual_seed(3)
    tensors = {key(path): block_of(base.get_submodule(path), True, 8, generator) for path in paths}
    head = {"base_model.model.lm_head.weight": base.lm_head.weight} if options.get("modules_to_save") else {}
    folder = write_adapter(tmp_path / "a", {**config, **options}, tensors | head)
    assert check_checkpoint(folder, base).tensors == len(paths) > 0
    check_checkpoint(folder)

    lost = tensors.pop(key(paths[-1]))
    folder = write_adapter(tmp_path / "b", {**config, **options}, tensors | head)
    shape = ", ".join(map(str, lost.shape))
    assert problems(folder, base) == [f"- {key(paths[-1])}: found nothing, expected a tensor of shape ({shape})"]


def test_layers_pattern_is_heeded(base, tmp_path):
    config, tensors = adapter(base, layers_to_transform=[0, 1], layers_pattern="layers")
    check_checkpoint(write_adapter(tmp_path / "a", config, tensors), base)
    assert len(problems(write_adapter(tmp_path / "b", {**config, "layers_pattern": "blocks"}, tensors), base)) == 7


def test_conv1d_is_known_by_its_transposed_weight(tmp_path):
    gpt2 = model_of(GPT2)
    config, tensors = adapter(gpt2, "bat", target_modules=["c_attn", "c_fc"])
    assert tensors[key("transformer.h.0.attn.c_attn")].shape == (9, 8, 8)
    assert check_checkpoint(write_adapter(tmp_path / "a", config, tensors), gpt2).tensors == 4


def test_tensors_of_other_adapters_are_listed_and_ignored(base, tmp_path):
    config, tensors = adapter(base)
    tensors |= {f"{Q0}.b": torch.full((3,), torch.nan), f"{V0}.other": torch.zeros(2, 2)}
    report = check_checkpoint(write_adapter(tmp_path / "a", config, tensors), base)
    assert report.foreign == [f"{Q0}.b", f"{V0}.other"]
    assert report.tensors == 6


# ---------------------------------------------------------------- biases and saved modules


def with_biases(base, bias):
    config, tensors = adapter(base, bias=bias)
    for path in ("0.self_attn.q_proj", "0.self_attn.v_proj", "1.self_attn.q_proj", "1.self_attn.v_proj"):
        tensors[f"base_model.model.model.layers.{path}.base_layer.bias"] = torch.ones(24 if "q_" in path else 12)
    if bias == "all":
        for layer in "01":
            for path, size in (("k_proj", 12), ("o_proj", 24)):
                tensors[f"base_model.model.model.layers.{layer}.self_attn.{path}.bias"] = torch.ones(size)
    return config, tensors


@pytest.mark.parametrize("bias", ["bone_only", "all"])
def test_biases_may_all_be_missing_but_not_one(base, tmp_path, bias):
    config, tensors = with_biases(base, bias)
    assert check_checkpoint(write_adapter(tmp_path / "all", config, tensors), base).notes == []
    _, none = adapter(base)
    for given in (base, None):
        notes = check_checkpoint(write_adapter(tmp_path / f"none{given is base}", config, none), given).notes
        assert len(notes) == 1
        assert f"bias: found '{bias}' and no biases; PEFT before 0.21" in notes[0]
    name = "base_model.model.model.layers.1.self_attn." + ("k_proj.bias" if bias == "all" else "v_proj.base_layer.bias")
    tensors[name] = torch.ones(3)
    assert problems(write_adapter(tmp_path / "short", config, tensors), base) == [
        f"- {name}: found shape (3), expected (12)"
    ]
    del tensors[name]
    assert problems(write_adapter(tmp_path / "one", config, tensors), base) == [
        f"- {name}: found nothing, expected a tensor of shape (12)"
    ]


def test_saved_modules_must_be_there_but_may_be_resized(base, tmp_path):
    config, tensors = adapter(base, modules_to_save=["lm_head", "score"])  # of the second there is none
    name = "base_model.model.lm_head.weight"
    assert problems(write_adapter(tmp_path / "a", config, tensors), base) == [
        f"- {name}: found nothing, expected a tensor of shape (29, 24)"
    ]
    tensors[name] = torch.ones(31, 24)
    notes = check_checkpoint(write_adapter(tmp_path / "b", config, tensors), base).notes
    assert notes == [f"{name}: found shape (31, 24), the base model has (29, 24); resize it before loading"]
    tensors[name][3, 3] = torch.inf
    assert problems(write_adapter(tmp_path / "c", config, tensors), base) == [
        f"- {name}: found NaN or infinity in 1 of 744 values, expected finite ones"
    ]


def test_bias_of_a_saved_module_is_no_saved_bias(tmp_path):
    """Else the file would seem to have one bias of many."""
    gpt2 = model_of(GPT2)
    config, tensors = adapter(gpt2, target_modules=["c_attn"], modules_to_save=["ln_f"], bias="all")
    tensors |= {f"base_model.model.transformer.ln_f.{name}": torch.ones(24) for name in ("weight", "bias")}
    (note,) = check_checkpoint(write_adapter(tmp_path / "a", config, tensors), gpt2).notes
    assert "found 'all' and no biases" in note


# ---------------------------------------------------------------- damaged tensors

DAMAGES = {
    "nan": (lambda t: t.index_fill(1, torch.tensor([3]), torch.nan), "found NaN or infinity in 8 of 192 values"),
    "inf": (lambda t: t.index_fill(0, torch.tensor([0]), -torch.inf), "found NaN or infinity in 24 of 192 values"),
    "integer": (lambda t: t.to(torch.int8), "found int8, expected floating-point numbers"),
    "bool": (lambda t: t > 0, "found bool, expected floating-point numbers"),
    "wrong r": (lambda t: t[:4].clone(), "found shape (4, 24), expected (8, {out})"),
    "transposed": (lambda t: t.T.contiguous(), "found shape (24, 8), expected (8, {out}) (it is transposed)"),
    "rank 3": (lambda t: t.reshape(8, 24, 1), "found shape (8, 24, 1), expected (8, {out})"),
    "rank 1": (lambda t: t.flatten(), "found shape (192), expected (8, {out})"),
    "no values": (lambda t: t[:, :0].clone(), "found shape (8, 0), expected (8, {out})"),
}


@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "base"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensor_is_named(base, tmp_path, damage, with_base):
    change, text = DAMAGES[damage]
    config, tensors = adapter(base)
    tensors[Q0] = change(tensors[Q0])
    (line,) = problems(write_adapter(tmp_path / "a", config, tensors), base if with_base else None)
    assert line.startswith(f"- {Q0}: {text.format(out=24 if with_base else 'out_features')}")


def test_size_that_only_the_base_model_tells(base, tmp_path):
    config, tensors = adapter(base)
    tensors[V0] = torch.zeros(8, 24)
    folder = write_adapter(tmp_path / "a", config, tensors)
    check_checkpoint(folder)
    assert problems(folder, base) == [f"- {V0}: found shape (8, 24), expected (8, 12)"]


def test_bat_blocks_are_no_row_blocks(base, tmp_path):
    """By the base model: both forms have 3-D blocks, and on the square q_proj the same shape."""
    config, tensors = adapter(base, "bat", r=4)
    folder = write_adapter(tmp_path / "a", {**config, "init_weights": "bat_row"}, tensors)
    lines = problems(folder, base)
    assert f"- {V0}: found shape (3, 4, 4), expected (6, 4, 4)" in lines
    assert not [line for line in lines if "q_proj" in line]


@pytest.mark.parametrize("init_weights", ["bat", "bat_row"])
def test_tile_blocks_are_no_affine_blocks(base, tmp_path, init_weights):
    config, tensors = adapter(base, True)
    lines = problems(write_adapter(tmp_path / "a", {**config, "init_weights": init_weights}, tensors))
    size = "out_features" if init_weights == "bat" else "in_features"
    assert f"- {Q0}: found shape (8, 24), expected ({size} / 8, 8, 8)" in lines
    assert len(lines) == 6


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.7.other"])
@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "base"])
def test_tensor_without_a_target(base, tmp_path, name, with_base):
    config, tensors = adapter(base)
    tensors[key(name)] = torch.zeros(8, 12)
    (line,) = problems(write_adapter(tmp_path / "a", config, tensors), base if with_base else None)
    assert line == f"- {key(name)}: found a tensor of shape (8, 12), expected none: it belongs to no target"


def test_tensor_without_pefts_prefix(base, tmp_path):
    config, tensors = adapter(base)
    tensors["model.layers.0.self_attn.q_proj.bone_block"] = tensors.pop(Q0)
    folder = write_adapter(tmp_path / "a", config, tensors)
    assert len(problems(folder)) == 1
    assert len(problems(folder, base)) == 2


def test_r_that_does_not_divide_is_told_with_the_layer(base, tmp_path):
    config, tensors = adapter(base, "bat", r=8)  # v_proj: 12 outputs
    (first, second) = problems(write_adapter(tmp_path / "a", config, tensors), base)
    assert first.startswith("- model.layers.0.self_attn.v_proj: ")
    assert second.startswith("- model.layers.1.self_attn.v_proj: ")
    assert {"8", "24", "12"} <= set(re.findall(r"\d+", first))


def test_layer_that_bone_cannot_adapt(base, tmp_path):
    config, tensors = adapter(base)
    config["target_modules"] = [*config["target_modules"], "embed_tokens"]
    (line,) = problems(write_adapter(tmp_path / "a", config, tensors), base)
    assert line.startswith("- model.embed_tokens: Embedding is not supported; Bone adapts torch.nn.Linear")


@pytest.mark.parametrize("with_base", [False, True], ids=["alone", "base"])
def test_file_without_blocks(base, tmp_path, with_base):
    config, _ = adapter(base)
    folder = write_adapter(tmp_path / "a", config, {f"{Q0}.b": torch.zeros(8, 24)})
    assert problems(folder, base if with_base else None) == ["- found no bone_block tensor, expected one a target"]


def test_targets_that_the_base_has_not(tmp_path):
    config, tensors = adapter(model_of(LLAMA))
    lines = problems(write_adapter(tmp_path / "a", config, tensors), GPT2)
    assert lines[0] == "- target_modules: found down_proj, q_proj, v_proj, none of which GPT2LMHeadModel has"
    assert len(lines) == 7


# ---------------------------------------------------------------- damaged configs


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"r": None}, "r: found None, expected an integer of at least 1"),
        ({"r": "8"}, "r: found '8', expected an integer of at least 1"),
        ({"r": 0}, "r: found 0, expected an integer of at least 1"),
        ({"r": True}, "r: found True, expected an integer of at least 1"),
        ({"r": 8.0}, "r: found 8.0, expected an integer of at least 1"),
        (
            {"init_weights": "Bat"},
            "init_weights: found 'Bat', expected true, false, \"bat\" or \"bat_row\"; did you mean 'bat'?",
        ),
        ({"init_weights": 1}, 'init_weights: found 1, expected true, false, "bat" or "bat_row"'),
        ({"init_weights": None}, 'init_weights: found None, expected true, false, "bat" or "bat_row"'),
        ({"peft_type": "MISS"}, "peft_type: found 'MISS', expected \"BONE\""),
        ({"peft_type": None}, 'peft_type: found None, expected "BONE"'),
        ({"bias": "lora_only"}, "bias: found 'lora_only', expected one of none, all, bone_only"),
        ({"target_modules": [1]}, "target_modules: found [1], expected null, a string or a list of strings"),
        ({"exclude_modules": 3}, "exclude_modules: found 3, expected null, a string or a list of strings"),
        (
            {"layers_to_transform": "0"},
            "layers_to_transform: found '0', expected null, an integer or a list of integers",
        ),
        (
            {"layers_to_transform": [True]},
            "layers_to_transform: found [True], expected null, an integer or a list of integers",
        ),
        (
            {"layers_to_transform": 0, "layers_pattern": [0]},
            "layers_pattern: found [0], expected null, a string or a list of strings",
        ),
        (
            {"layers_pattern": "layers"},
            "layers_pattern: found 'layers', expected null, as it does nothing without layers_to_transform",
        ),
        (
            {"layers_to_transform": 0, "target_modules": ".*_proj"},
            "layers_to_transform: found 0, expected null, as target_modules='.*_proj' is no list of names; a regular "
            "expression can say itself which layers it means",
        ),
        ({"modules_to_save": "lm_head"}, "modules_to_save: found 'lm_head', expected null or a list of strings"),
        (
            {"target_parameters": ["x"]},
            "target_parameters: found ['x'], expected null: Bone adapts linear layers, not bare parameters such as the "
            "3-D weights of fused experts",
        ),
        (
            {"init_weight": "bat"},
            "init_weight: found an option of this name, expected init_weights, which it seems to mean",
        ),
        (
            {"target_module": None},
            "target_module: found an option of this name, expected target_modules, which it seems to mean",
        ),
        ({"R": 8}, "R: found an option of this name, expected r, which it seems to mean"),
    ],
    ids=lambda value: "-".join(f"{name}-{is_}" for name, is_ in value.items()) if isinstance(value, dict) else "",
)
def test_damaged_option_is_named(base, tmp_path, change, text):
    config, tensors = adapter(base)
    assert problems(write_adapter(tmp_path / "a", {**config, **change}, tensors), base) == [f"- {text}"]


@pytest.mark.parametrize(("task", "near"), [("CAUSALLM", "CAUSAL_LM"), ("seq_cls", "SEQ_CLS"), (7, None)])
def test_unknown_task_is_told_with_those_of_peft(base, tmp_path, task, near):
    config, tensors = adapter(base, task_type=task)
    (line,) = problems(write_adapter(tmp_path / "a", config, tensors), base)
    assert line.startswith(f"- task_type: found {task!r}, expected null or one of ")
    assert "'SEQ_2_SEQ_LM', " in line
    assert line.partition("; did you mean ")[2] == (f"{near!r}?" if near else "")


def test_options_of_newer_versions_are_a_note(base, tmp_path):
    config, tensors = adapter(base, init_lora_weights=True, rank=8, target_parameters=[])
    assert check_checkpoint(write_adapter(tmp_path / "a", config, tensors), base).notes == [
        "found options that Bone has not, which loading ignores: init_lora_weights, rank"
    ]


@pytest.mark.parametrize("kind", [list, tuple, set])
def test_options_of_a_config_object_may_be_sets(kind):
    sound = {"target_modules": kind(["q"]), "exclude_modules": kind(["v"]), "modules_to_save": kind(["head"])}
    assert checkpoint.option_problems(sound | {"layers_to_transform": kind([0]), "layers_pattern": kind(["h"])}) == []
    (line,) = checkpoint.option_problems(sound | {"exclude_modules": kind([1])})
    assert line == f"exclude_modules: found {kind([1])!r}, expected null, a string or a list of strings"


@pytest.mark.parametrize("option", ["r", "init_weights", "peft_type"])
def test_missing_option_is_named(base, tmp_path, option):
    config, tensors = adapter(base)
    del config[option]
    (line,) = problems(write_adapter(tmp_path / "a", config, tensors))
    assert line.startswith(f"- {option}: found None, expected ")


def test_every_problem_is_listed(base, tmp_path):
    config, tensors = adapter(base)
    tensors[Q0][0, 0] = torch.nan
    tensors[V0] = torch.zeros(4, 12)
    del tensors[DOWN1]
    tensors[key("model.x")] = torch.zeros(8, 8)
    named = {line[2:].split(": ")[0] for line in problems(write_adapter(tmp_path / "a", config, tensors), base)}
    assert named == {Q0, V0, DOWN1, key("model.x")}

    config |= {"r": None, "peft_type": "LORA"}
    named = {line[2:].split(": ")[0] for line in problems(write_adapter(tmp_path / "b", config, tensors), base)}
    assert named == {"r", "peft_type", Q0}


# ---------------------------------------------------------------- files that cannot be read


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_weights(base, tmp_path, size, old):
    folder = write_adapter(tmp_path / "a", *adapter(base), old=old)
    cut(folder / ("adapter_model.bin" if old else "adapter_model.safetensors"), size)
    with pytest.raises(ValueError, match=r"adapter_model\.\w+ \(\d+ bytes\) cannot be read, it is truncated"):
        check_checkpoint(folder, base)


NOT_JSON = r"/adapter_config\.json is damaged.*: it is not JSON \("


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda folder: cut(folder / "adapter_config.json", 40), NOT_JSON),
        (lambda folder: cut(folder / "adapter_config.json", 0), NOT_JSON),
        (lambda folder: (folder / "adapter_config.json").write_bytes(b"\xff\xfe"), NOT_JSON),
        (lambda folder: (folder / "adapter_config.json").write_text("[1]"), r"holds a list, not an object"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"a has no adapter_config\.json"),
        (
            lambda folder: (folder / "adapter_model.safetensors").unlink(),
            r"a has neither adapter_model\.safetensors nor",
        ),
        (lambda folder: folder.rename(folder.with_name("b")), r"a is not a directory; .*snapshot_download"),
    ],
    ids=["cut", "empty", "bytes", "list", "no config", "no weights", "no directory"],
)
def test_unreadable_directory(base, tmp_path, break_it, text):
    folder = write_adapter(tmp_path / "a", *adapter(base))
    break_it(folder)
    with pytest.raises(ValueError, match=text):
        check_checkpoint(folder)


def test_bin_that_holds_no_tensors(base, tmp_path):
    config, _ = adapter(base)
    folder = write_adapter(tmp_path / "a", config, {"epoch": 3}, old=True)
    with pytest.raises(ValueError, match="something else than tensors by name"):
        check_checkpoint(folder)


# ---------------------------------------------------------------- the base model


def test_base_model_that_cannot_be_opened(base, tmp_path):
    folder = write_adapter(tmp_path / "a", *adapter(base))
    with pytest.raises(ValueError, match=r"base model '.*nowhere' cannot be opened; pass base_model"):
        check_checkpoint(folder, tmp_path / "nowhere")


def test_base_model_with_adapters_is_refused(base, tmp_path):
    folder = write_adapter(tmp_path / "a", *adapter(base))
    model = get_peft_model(model_of(LLAMA), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="carries adapters already"):
        check_checkpoint(folder, model)


def test_base_model_is_neither_changed_nor_copied(base, tmp_path):
    folder = write_adapter(tmp_path / "a", *adapter(base))
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    check_checkpoint(folder, base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_head_of_the_task_is_there(base_path, tmp_path):
    """Under SEQ_CLS PEFT saves `score`, which the causal model of the same base has not."""
    config, tensors = adapter(model_of(LLAMA), task_type="SEQ_CLS", modules_to_save=["classifier", "score"])
    folder = write_adapter(tmp_path / "a", config, tensors)
    assert problems(folder, base_path) == [
        "- base_model.model.score.weight: found nothing, expected a tensor of shape (2, 24)"
    ]


@pytest.mark.parametrize(
    ("noted", "architectures", "prefix"),
    [
        ("LlamaForCausalLM", None, "model."),
        (None, ["LlamaForCausalLM"], "model."),
        ("NoSuchClass", ["Neither"], ""),
        (None, None, ""),
    ],
    ids=["noted", "of the base", "unknown", "nothing"],
)
def test_without_a_task_the_class_is_the_noted_one(base, tmp_path, noted, architectures, prefix):
    """Or that of the base, or else AutoModel, in which layers have shorter names."""
    mapping = noted and {"base_model_class": noted, "parent_library": "transformers.models.llama.modeling_llama"}
    config, tensors = adapter(base, task_type=None, auto_mapping=mapping)
    tensors = {name.replace(".model.model.", f".model.{prefix}"): tensor for name, tensor in tensors.items()}
    base_config = LlamaConfig(**{**LLAMA.to_dict(), "architectures": architectures})
    assert check_checkpoint(write_adapter(tmp_path / "a", config, tensors), base_config).tensors == 6


# ---------------------------------------------------------------- the functions of the load path


def test_tensor_problems_of_the_load_path():
    good = torch.ones(2, 3)
    expected = {"a": (2, 3), "b": (2, 3), "missing": (1,)}
    assert checkpoint.tensor_problems({"a": good, "b": good.bfloat16(), "other": torch.ones(4).int()}, expected) == []
    broken = {"a": good / 0, "b": good.long(), "other": torch.tensor([torch.nan])}
    assert checkpoint.tensor_problems(broken, expected) == [
        "a: found NaN or infinity in 6 of 6 values, expected finite ones",
        "b: found int64, expected floating-point numbers",
        "other: found NaN or infinity in 1 of 1 values, expected finite ones",
    ]


def test_eight_bit_floats_can_be_asked():
    broken = torch.tensor([1.0, torch.nan]).to(torch.float8_e4m3fn)
    (line,) = checkpoint.tensor_problems({"a": broken}, {"a": (2,)})
    assert "found NaN or infinity in 1 of 2 values" in line


@pytest.mark.parametrize(
    ("init_weights", "shapes", "old"),
    [
        (True, [(3, 8, 8), (2, 8, 8)], True),
        (False, [(3, 8, 8)], True),
        (True, [(8, 24)], False),
        (True, [(3, 8, 8), (8, 24)], False),
        (True, [(3, 8, 8), (8, 24), (2, 8, 8)], True),
        ("bat", [(3, 8, 8)], False),
        ("bat_row", [(3, 8, 8)], False),
        (1, [(3, 8, 8)], False),
        (True, [], False),
    ],
)
def test_development_files_are_known_by_most_of_their_blocks(init_weights, shapes, old):
    tensors = {key(str(i)): torch.zeros(shape) for i, shape in enumerate(shapes)}
    tensors |= {f"{key('0')}.b": torch.zeros(8, 24), "base_model.model.lm_head.weight": torch.zeros(2, 2)}
    assert checkpoint.is_development_file(init_weights, tensors) is old


def test_foreign_tensors_are_told_by_the_end_of_the_name():
    own = ["a.bone_block", "bone_block.x.bone_block", "backbone_block.c", "a.bone_block.x.weight", "lm_head.weight"]
    foreign = ["a.bone_block.b", "bone_block.x.bone_block.default"]
    found = checkpoint.split_foreign(dict.fromkeys([*own, *foreign], torch.zeros(1)))
    assert (list(found[0]), found[1]) == (own, foreign)


# ---------------------------------------------------------------- development checkpoints, and writing


def development(base):
    config, tensors = adapter(base, "bat", r=4)
    return {**config, "init_weights": True}, tensors


def test_development_file_is_sound_with_a_note(base, tmp_path):
    report = check_checkpoint(write_adapter(tmp_path / "a", *development(base)), base)
    assert report.form == "bat"
    assert len(report.notes) == 1
    assert "November 2024" in report.notes[0]
    assert "upgrade_checkpoint" in report.notes[0]


def test_only_the_damaged_block_of_a_development_file_is_listed(base, tmp_path):
    config, tensors = development(base)
    tensors[V0] = torch.zeros(4, 12)
    (line,) = problems(write_adapter(tmp_path / "a", config, tensors), base)
    assert line == f"- {V0}: found shape (4, 12), expected (3, 4, 4)"


def test_upgrade_changes_the_form_and_drops_foreign_tensors(base, tmp_path):
    config, tensors = development(base)
    head = {"base_model.model.lm_head.weight": torch.ones(29, 24)}
    folder = write_adapter(tmp_path / "a", config, tensors | head | {f"{Q0}.b": torch.zeros(2)})
    upgrade_checkpoint(folder, tmp_path / "new" / "b")
    assert json.loads((tmp_path / "new/b/adapter_config.json").read_text()) == {**config, "init_weights": "bat"}
    written = load_file(tmp_path / "new/b/adapter_model.safetensors")
    assert written.keys() == (tensors | head).keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in (tensors | head).items())
    assert check_checkpoint(tmp_path / "new/b", base).notes == []


@pytest.mark.parametrize("init_weights", [True, False, "bat", "bat_row"])
def test_upgrade_refuses_what_is_new_already(base, tmp_path, init_weights):
    folder = write_adapter(tmp_path / "a", *adapter(base, init_weights, r=4))
    with pytest.raises(ValueError, match=rf"no development checkpoint, .*init_weights={init_weights!r}"):
        upgrade_checkpoint(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_upgrade_refuses_what_is_broken(base, tmp_path):
    config, tensors = development(base)
    tensors[Q0][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{Q0}: found NaN"):
        upgrade_checkpoint(write_adapter(tmp_path / "a", config, tensors), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_nothing_is_overwritten(base, tmp_path):
    folder = write_adapter(tmp_path / "a", *development(base))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    for name in ("full", "full/file"):
        with pytest.raises(ValueError, match=rf"{name} exists already"):
            upgrade_checkpoint(folder, tmp_path / name)
    assert (tmp_path / "full/file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    upgrade_checkpoint(folder, tmp_path / "empty")
    assert check_checkpoint(tmp_path / "empty", base).form == "bat"


def test_failure_while_writing_leaves_nothing(base, tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "a", *development(base))

    def full_disk(tensors, path, **_):
        path.write_bytes(b"some")
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        upgrade_checkpoint(folder, tmp_path / "out" / "b")
    assert list((tmp_path / "out").iterdir()) == []


def test_empty_working_directory_is_filled_in_place(base, tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "a", *development(base))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    upgrade_checkpoint(folder, ".")
    assert {path.name for path in Path().iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert check_checkpoint(".", base).form == "bat"


@pytest.mark.parametrize("when", ["writing", "second file"])
def test_failure_leaves_an_empty_directory_empty(base, tmp_path, monkeypatch, when):
    folder = write_adapter(tmp_path / "a", *development(base))
    (tmp_path / "here").mkdir()
    rename = Path.rename

    def once(path, target):
        if target.name == "adapter_config.json":
            raise OSError("no space left")
        return rename(path, target)

    def full_disk(tensors, path, **_):
        path.write_bytes(b"some")
        raise OSError("no space left")

    if when == "writing":
        monkeypatch.setattr(checkpoint, "save_file", full_disk)
    else:
        monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(OSError, match="no space left"):
        upgrade_checkpoint(folder, tmp_path / "here")
    assert list((tmp_path / "here").iterdir()) == []


def test_file_that_appears_meanwhile_is_not_overwritten(base, tmp_path, monkeypatch):
    folder = write_adapter(tmp_path / "a", *development(base))
    mine, save = tmp_path / "here/adapter_config.json", checkpoint.save_file
    mine.parent.mkdir()

    def late(*args, **options):
        save(*args, **options)
        mine.write_text("mine")

    monkeypatch.setattr(checkpoint, "save_file", late)
    with pytest.raises(ValueError, match=r"adapter_config\.json appeared"):
        upgrade_checkpoint(folder, mine.parent)
    assert [(path, path.read_text()) for path in mine.parent.iterdir()] == [(mine, "mine")]


def test_written_directory_has_the_usual_permissions(base, tmp_path):
    """A temporary directory is for its owner only; what is left of it is for everybody."""
    upgrade_checkpoint(write_adapter(tmp_path / "a", *development(base)), tmp_path / "b")
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "a").stat().st_mode
