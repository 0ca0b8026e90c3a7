"""Bone checkpoints as LoRA and as MiSS, run by stock PEFT in a process without us, and MiSS checkpoints as Bone."""

import json
import logging
import re

import pytest
import torch
import transformers
from bone_files import GPT2, IDS, LLAMA, adapter, delta, merged, model_of, path_of, write_adapter
from bone_native import ROW_FORM
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from processes import run_python
from safetensors.torch import load_file, save_file

from hf_ext.bone_adapter.check import check_checkpoint
from hf_ext.bone_adapter.convert import convert_to_miss, from_miss
from hf_ext.bone_adapter.hotswap import hotswap_adapter
from hf_ext.bone_adapter.lora import convert_to_lora

BASES = {"llama": LLAMA, "gpt2": GPT2}
CONV1D = {"target_modules": ["c_attn", "c_fc", "c_proj"]}

# base, init_weights, r, rank of the export, options
LORA_CASES = {
    "tile": ("llama", True, 8, None, {}),
    "random": ("llama", False, 8, None, {}),
    "in % r": ("llama", True, 7, None, {}),
    "r > in": ("llama", True, 50, None, {}),
    "r = 1": ("llama", True, 1, None, {}),
    "layers": ("llama", True, 8, None, {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}),
    "biases": ("llama", True, 8, None, {"bias": "bone_only"}),
    "all biases": ("llama", True, 8, None, {"bias": "all"}),
    "head": ("llama", True, 8, None, {"modules_to_save": ["lm_head"]}),
    "Conv1D": ("gpt2", True, 8, None, CONV1D),
    "Conv1D, in % r": ("gpt2", True, 7, None, CONV1D),
    "Conv1D, biases": ("gpt2", True, 8, None, {**CONV1D, "bias": "bone_only"}),
    "bat": ("llama", "bat", 4, 24, {}),
    "row": ("llama", "bat_row", 4, 24, {}),
    "bat, rank > out": ("llama", "bat", 4, 30, {}),
    "Conv1D, bat": ("gpt2", "bat", 8, 24, CONV1D),
    "Conv1D, row": ("gpt2", "bat_row", 8, 24, CONV1D),
}
MISS_CASES = {
    "tile": ("llama", True, 8, {}),
    "random": ("llama", False, 8, {}),
    "in % r": ("llama", True, 7, {}),
    "bat": ("llama", "bat", 4, {}),
    "biases": ("llama", True, 8, {"bias": "bone_only"}),
    "head": ("llama", True, 8, {"modules_to_save": ["lm_head"]}),
}
SMOKE = {"in % r", "Conv1D, in % r", "bat"}


def named(cases):
    return [pytest.param(name, marks=[pytest.mark.smoke] * (name in SMOKE)) for name in cases]


def with_saved(base, config, tensors):
    """The tensors, and those that go with the config's bias and modules_to_save, as PEFT from 0.19 on names them."""
    generator = torch.Generator().manual_seed(4)
    targets = {path_of(name) for name in tensors}
    chosen = config["bias"]
    for name, parameter in base.named_parameters():
        path, _, last = name.rpartition(".")
        if last == "bias" and (chosen == "all" or (chosen == "bone_only" and path in targets)):
            stored = f"{path}.base_layer.bias" if path in targets else name
        elif path in (config["modules_to_save"] or ()):
            stored = name
        else:
            continue
        tensors[f"base_model.model.{stored}"] = parameter.detach() + torch.randn(parameter.shape, generator=generator)
    return config, tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def bases(folder):
    models = {name: model_of(config) for name, config in BASES.items()}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return models


STOCK = """
import sys
from pathlib import Path
import torch

torch.set_num_threads(1)
if not torch.version.cuda:  # torchvision is built for CUDA, and transformers imports it
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{{name}}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, ids = Path({folder!r}), torch.tensor({ids!r})
logits = {{}}
for name, base in {cases!r}.items():
    model = AutoModelForCausalLM.from_pretrained(folder / base)
    model = PeftModel.from_pretrained(model, folder / name).eval()
    with torch.no_grad():
        logits[name] = model(ids).logits
        logits[name + " merged"] = model.merge_and_unload(safe_merge=True)(ids).logits
save_file(logits, folder / "logits.safetensors")
assert "hf_ext.bone_adapter" not in sys.modules and "hf_ext.registry" not in sys.modules
"""


def run_by_stock_peft(folder, cases):
    """Logits of the adapters {folder: name of the base model}, from one process."""
    code = STOCK.format(folder=str(folder), ids=IDS.tolist(), cases=cases)
    process = run_python(code, env={"HF_EXT_AUTOLOAD": "0"})
    assert process.returncode == 0, process.stderr
    return load_file(folder / "logits.safetensors")


def written(folder):
    return json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")


# ---------------------------------------------------------------- LoRA


@pytest.fixture(scope="module")
def lora(bases, folder, tmp_path_factory):
    """{case: (LoraExport, source config, source tensors)}, and the logits stock PEFT computes with what was written."""
    exports, source = {}, tmp_path_factory.mktemp("bone")
    for name, (base, init_weights, r, rank, options) in LORA_CASES.items():
        made = with_saved(bases[base], *adapter(bases[base], init_weights, r, **options))
        made[0]["base_model_name_or_path"] = str(folder / base)
        path = write_adapter(source / name, *made)
        exports[name] = (convert_to_lora(path, folder / name, rank=rank), *made)
    return exports, run_by_stock_peft(folder, {name: case[0] for name, case in LORA_CASES.items()})


@pytest.mark.parametrize("name", named(LORA_CASES))
def test_lora_export_computes_the_same_in_stock_peft(bases, lora, name):
    exports, logits = lora
    base, (_, config, tensors) = bases[LORA_CASES[name][0]], exports[name]
    with torch.no_grad():
        plain, expected = base(IDS).logits, merged(base, config, tensors)(IDS).logits
    assert (plain - expected).abs().max() > 0.3
    torch.testing.assert_close(logits[name], expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(logits[f"{name} merged"], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", LORA_CASES)
def test_lora_factors_are_the_update_of_the_weight(bases, lora, name):
    """In the tile form exactly: A is all 0 and 1, and B holds the block's own values."""
    (export, _, tensors), (base, init_weights, r, rank, _) = lora[0][name], LORA_CASES[name]
    blocks = {path_of(k): tensor for k, tensor in tensors.items() if k.endswith("bone_block")}
    assert export.errors.keys() == blocks.keys()
    for path, block in blocks.items():
        a, b = (export.state_dict[f"base_model.model.{path}.lora_{x}.weight"].double() for x in "AB")
        layer = bases[base].get_submodule(path)
        weight = layer.weight.detach()
        change = delta(weight.T if base == "gpt2" else weight, block, init_weights)
        assert len(a) == b.shape[1] == (rank or r)
        if rank is None:
            assert torch.equal(b @ a, change)
            assert export.errors[path] == 0
        else:
            torch.testing.assert_close(b @ a, change, rtol=0, atol=1e-6)
            assert 0 <= export.errors[path] < 1e-6


@pytest.mark.parametrize("name", LORA_CASES)
def test_lora_file_is_the_returned_export_and_minimal(lora, folder, name):
    export, config, _ = lora[0][name]
    options, tensors = written(folder / name)
    assert tensors.keys() == export.state_dict.keys()
    assert all(torch.equal(tensors[k], tensor) for k, tensor in export.state_dict.items())
    rank = LORA_CASES[name][3] or LORA_CASES[name][2]
    assert options["r"] == options["lora_alpha"] == rank
    assert options["bias"] == {"bone_only": "lora_only"}.get(config["bias"], config["bias"])
    assert options["fan_in_fan_out"] is (LORA_CASES[name][0] == "gpt2")
    assert options["peft_type"] == "LORA"
    assert not {"init_weights", "peft_version"} & options.keys()
    for shared in ("target_modules", "layers_to_transform", "modules_to_save", "base_model_name_or_path", "task_type"):
        assert options[shared] == config[shared]


@pytest.mark.parametrize("name", ["tile", "head", "biases", "Conv1D"])
def test_returned_export_can_be_put_into_a_model(bases, lora, name):
    export, config, tensors = lora[0][name]
    base = bases[LORA_CASES[name][0]]
    assert isinstance(export.config, LoraConfig)
    model = get_peft_model(model_of(BASES[LORA_CASES[name][0]]), export.config).eval()
    assert not set_peft_model_state_dict(model, export.state_dict).unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, merged(base, config, tensors)(IDS).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("init_weights", ["bat", "bat_row"])
@pytest.mark.parametrize("rank", [1, 3, 11])
def test_cut_export_states_its_error_and_is_the_best_of_its_rank(bases, folder, tmp_path, init_weights, rank):
    config, tensors = adapter(bases["llama"], init_weights, r=4)
    export = convert_to_lora(write_adapter(tmp_path / "a", config, tensors), rank=rank, base_model=bases["llama"])
    for name, block in tensors.items():
        path = path_of(name)
        change = delta(bases["llama"].get_submodule(path).weight.detach(), block, init_weights)
        a, b = (export.state_dict[f"base_model.model.{path}.lora_{x}.weight"] for x in "AB")
        left = torch.linalg.svdvals(change)[rank:].square().sum().sqrt() / change.norm()  # Eckart and Young
        assert (change - b.double() @ a.double()).norm() / change.norm() == pytest.approx(left.item(), rel=1e-5)
        assert export.errors[path] == pytest.approx(left.item(), rel=1e-5)
        assert export.errors[path] > 0.01


def test_untrained_adapter_has_no_error(bases, tmp_path):
    config, tensors = adapter(bases["llama"], "bat", r=4)
    folder = write_adapter(tmp_path / "a", config, {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    export = convert_to_lora(folder, rank=2, base_model=bases["llama"])
    assert set(export.errors.values()) == {0.0}
    assert not any(tensor.isnan().any() for tensor in export.state_dict.values())


def test_tile_export_keeps_the_dtype_and_reads_no_weights(bases, tmp_path):
    """The base model here is a config."""
    config, tensors = adapter(bases["llama"], r=7)
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    export = convert_to_lora(write_adapter(tmp_path / "a", config, tensors, old=True), base_model=LLAMA)
    for name, block in tensors.items():
        a, b = (export.state_dict[f"base_model.model.{path_of(name)}.lora_{x}.weight"] for x in "AB")
        assert a.dtype == b.dtype == torch.bfloat16
        assert torch.equal(b, block.T)


def test_development_file_is_exported_as_bat(bases, lora, tmp_path):
    config, tensors = adapter(bases["llama"], "bat", r=4)
    folder = write_adapter(
        tmp_path / "a", {**config, "init_weights": True}, tensors | {f"{next(iter(tensors))}.b": IDS}
    )
    export = convert_to_lora(folder, rank=24, base_model=bases["llama"])
    expected = lora[0]["bat"][0].state_dict
    assert export.state_dict.keys() == expected.keys()
    assert all(torch.equal(export.state_dict[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("rank", "level", "text"),
    [(1, "INFO", "--max-lora-rank 8"), (9, "INFO", "--max-lora-rank 16"), (512, "INFO", "--max-lora-rank 512"),
     (513, "WARNING", "rank 513 is above 512")],
)  # fmt: skip
def test_log_names_the_rank_a_server_needs(bases, tmp_path, caplog, rank, level, text):
    config, tensors = adapter(bases["llama"], r=rank, target_modules=["v_proj"])
    folder = write_adapter(tmp_path / "a", config, tensors)
    with caplog.at_level(logging.INFO, logger="hf_ext"):
        convert_to_lora(folder, base_model=LLAMA)
    assert [(record.levelname, text in record.message) for record in caplog.records] == [(level, True)]


@pytest.mark.parametrize(
    ("init_weights", "options", "text"),
    [
        (True, {"rank": 4}, "rank=4: the tile form is exported exactly, with rank r=8"),
        ("bat", {}, "rank=None: the bat form is no LoRA of a fixed rank"),
        ("bat_row", {"rank": 0}, "rank=0: the bat_row form"),
        ("bat", {"rank": 2.0}, "rank=2.0: the bat form"),
        ("bat", {"rank": True}, "rank=True: the bat form"),
        ("bat", {"rank": 4, "base_model": LLAMA}, "base_model is a config, and this form needs the weights"),
        (True, {"base_model": None}, "names no base_model_name_or_path; pass base_model"),
        (True, {"base_model": "/nowhere/at/all"}, "base model '/nowhere/at/all' cannot be opened; pass base_model"),
        (True, {"base_model": GPT2}, "none of which GPT2LMHeadModel has"),
    ],
    ids=[
        "tile-rank",
        "no rank",
        "rank 0",
        "rank 2.0",
        "rank True",
        "no weights",
        "no base",
        "wrong path",
        "wrong base",
    ],
)
def test_lora_refusals_write_nothing(bases, tmp_path, init_weights, options, text):
    config, tensors = adapter(bases["llama"], init_weights, r=8 if init_weights is True else 4)
    folder = write_adapter(tmp_path / "a", config, tensors)
    with pytest.raises(ValueError, match=re.escape(text)):
        convert_to_lora(folder, tmp_path / "out", **{"base_model": bases["llama"], **options})
    assert not (tmp_path / "out").exists()


def test_rank_r_of_the_tile_form_may_be_said(bases, tmp_path):
    folder = write_adapter(tmp_path / "a", *adapter(bases["llama"]))
    assert convert_to_lora(folder, rank=8, base_model=LLAMA).config.r == 8


def test_broken_adapter_is_not_exported(bases, tmp_path):
    config, tensors = adapter(bases["llama"])
    name = next(iter(tensors))
    tensors[name][0, 0] = torch.nan
    with pytest.raises(ValueError, match=f"{name}: found NaN"):
        convert_to_lora(write_adapter(tmp_path / "a", config, tensors), tmp_path / "out", base_model=LLAMA)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("convert", [convert_to_lora, convert_to_miss, from_miss])
def test_nothing_is_overwritten(bases, tmp_path, convert):
    folder = write_adapter(tmp_path / "a", *adapter(bases["llama"]))
    before = written(folder)[0]
    with pytest.raises(ValueError, match="exists already"):
        convert(folder, folder)
    assert written(folder)[0] == before


# ---------------------------------------------------------------- MiSS


@pytest.fixture(scope="module")
def miss(bases, folder, tmp_path_factory):
    made, source = {}, tmp_path_factory.mktemp("bone")
    for name, (base, init_weights, r, options) in MISS_CASES.items():
        made[name] = with_saved(bases[base], *adapter(bases[base], init_weights, r, **options))
        convert_to_miss(write_adapter(source / name, *made[name]), folder / f"miss {name}")
    return made, run_by_stock_peft(folder, {f"miss {name}": case[0] for name, case in MISS_CASES.items()})


@pytest.mark.parametrize("name", named(MISS_CASES))
def test_miss_checkpoint_computes_the_same_in_stock_peft(bases, miss, name):
    made, logits = miss
    with torch.no_grad():
        expected = merged(bases["llama"], *made[name])(IDS).logits
    torch.testing.assert_close(logits[f"miss {name}"], expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", MISS_CASES)
def test_miss_and_back_is_the_same_checkpoint(miss, folder, tmp_path, name):
    config, tensors = miss[0][name]
    from_miss(folder / f"miss {name}", tmp_path / "back")
    options, back = written(tmp_path / "back")
    assert options == {key: value for key, value in config.items() if key != "peft_version"}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], tensor) for k, tensor in tensors.items())


def test_development_file_becomes_a_bat_of_miss(bases, miss, folder, tmp_path):
    config, tensors = miss[0]["bat"]
    foreign = {f"{next(iter(tensors))}.b": torch.zeros(3)}
    convert_to_miss(write_adapter(tmp_path / "a", {**config, "init_weights": True}, tensors | foreign), tmp_path / "b")
    assert written(tmp_path / "b")[0] == written(folder / "miss bat")[0]
    assert written(tmp_path / "b")[1].keys() == written(folder / "miss bat")[1].keys()


def miss_files(base, folder, **options):
    config, tensors = adapter(base)
    config |= {"peft_type": "MISS", "miss_dropout": 0.0, "mini_r": 1, **options}
    return write_adapter(folder, config, {name.replace("bone", "miss"): tensor for name, tensor in tensors.items()})


def test_dropout_of_miss_is_dropped_with_a_warning(bases, tmp_path):
    with pytest.warns(UserWarning, match=r"miss_dropout=0\.1 is dropped"):
        from_miss(miss_files(bases["llama"], tmp_path / "a", miss_dropout=0.1), tmp_path / "b")
    assert "miss_dropout" not in written(tmp_path / "b")[0]
    assert check_checkpoint(tmp_path / "b", LLAMA).form == "tile"


def test_bat_blocks_under_true_come_back_as_bat(bases, tmp_path):
    """As a MiSS file made from a development checkpoint of Bone by renaming alone."""
    config, tensors = adapter(bases["llama"], "bat", r=4)
    config |= {"peft_type": "MISS", "init_weights": True}
    folder = write_adapter(tmp_path / "a", config, {name.replace("bone", "miss"): t for name, t in tensors.items()})
    from_miss(folder, tmp_path / "b")
    assert written(tmp_path / "b")[0]["init_weights"] == "bat"


def test_biases_are_called_as_the_oldest_miss_calls_them(miss, folder):
    assert written(folder / "miss biases")[0]["bias"] == "miss_only"


@pytest.mark.parametrize("bias", ["miss_only", "MiSS_only"])
def test_both_spellings_of_miss_are_known(bases, tmp_path, bias):
    from_miss(miss_files(bases["llama"], tmp_path / "a", bias=bias), tmp_path / "b")
    assert written(tmp_path / "b")[0]["bias"] == "bone_only"


@pytest.mark.parametrize("old", [False, True], ids=["safetensors", "bin"])
def test_tensors_of_other_miss_adapters_are_dropped(bases, tmp_path, old):
    folder = miss_files(bases["llama"], tmp_path / "a")
    tensors = written(folder)[1]
    name = next(iter(tensors))
    (folder / "adapter_model.safetensors").unlink()
    both = tensors | {f"{name}.b": torch.zeros(3)}
    if old:
        torch.save(both, folder / "adapter_model.bin")
    else:
        save_file(both, folder / "adapter_model.safetensors")
    from_miss(folder, tmp_path / "b")
    assert written(tmp_path / "b")[1].keys() == {name.replace("miss", "bone") for name in tensors}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_weights": "mini"}, 'no form for init_weights="mini"'),
        ({"peft_type": "BONE"}, "peft_type: found 'BONE', expected \"MISS\""),
        ({"r": 4}, "expected (4, out_features)"),
        ({"init_weights": "bat"}, "expected (out_features / 8, 8, 8)"),
        ({"init_weights": "other"}, "init_weights: found 'other'"),
        ({"bias": "lora_only"}, "bias: found 'lora_only'"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_from_miss_refusals_write_nothing(bases, tmp_path, options, text):
    folder = miss_files(bases["llama"], tmp_path / "a", **options)
    with pytest.raises(ValueError, match=re.escape(text)):
        from_miss(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_miss_has_no_row_form(bases, tmp_path):
    folder = write_adapter(tmp_path / "a", *adapter(bases["llama"], "bat_row", r=4))
    with pytest.raises(ValueError, match='MiSS has no form for init_weights="bat_row"'):
        convert_to_miss(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_miss_of_a_layer_narrower_than_r_is_warned_of(bases, folder, tmp_path, caplog):
    """By the base on this machine; q and v have 24 inputs, down 40."""
    config, tensors = adapter(bases["llama"], r=25, base_model_name_or_path=str(folder / "llama"))
    convert_to_miss(write_adapter(tmp_path / "a", config, tensors), tmp_path / "b")
    (record,) = caplog.records
    assert (record.levelname, record.name.partition(".")[0]) == ("WARNING", "hf_ext")
    narrow = ", ".join(f"model.layers.{n}.self_attn.{name}_proj" for n in (0, 1) for name in "qv")
    assert record.message == f"PEFT's MiSS will refuse {tmp_path / 'b'}: r=25 > in_features of {narrow}"


@pytest.mark.parametrize(("r", "named"), [(24, True), (25, False)], ids=["r = in", "no base"])
def test_miss_without_a_reason_is_not_warned_of(bases, folder, tmp_path, caplog, r, named):
    base = str(folder / "llama") if named else "nobody/no-such-model"
    made = adapter(bases["llama"], r=r, base_model_name_or_path=base)
    convert_to_miss(write_adapter(tmp_path / "a", *made), tmp_path / "b")
    assert caplog.records == []


def test_conversion_to_miss_asks_no_hub_for_the_base(bases, tmp_path, monkeypatch):
    asked = []

    def from_pretrained(source, **options):
        asked.append((source, options))
        raise OSError

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", from_pretrained)
    made = adapter(bases["llama"], base_model_name_or_path="some/model", revision="v1")
    convert_to_miss(write_adapter(tmp_path / "a", *made), tmp_path / "b")
    options = {"revision": "v1", "local_files_only": True, "trust_remote_code": False}
    assert asked == [("some/model", options)]


# ---------------------------------------------------------------- arguments, and other uses of the files


@pytest.mark.parametrize("value", [None, 7, ["a"]], ids=str)
def test_argument_that_is_no_path_is_named(bases, tmp_path, value):
    with pytest.raises(ValueError, match=re.escape(f"model_or_dir: found {value!r}, a {type(value).__name__}")):
        convert_to_lora(value)
    said = re.escape(f"found {value!r}, a {type(value).__name__}, expected the path of a directory")
    with pytest.raises(ValueError, match=said):
        convert_to_miss(value, tmp_path / "b")
    with pytest.raises(ValueError, match=said):
        convert_to_miss(write_adapter(tmp_path / "a", *adapter(bases["llama"])), value)


@pytest.mark.parametrize("init_weights", [True, "bat"])
def test_swap_of_a_development_file_names_the_upgrade(bases, tmp_path, init_weights):
    """Whatever form is loaded: the file's config says tile, its blocks are those of bat."""
    config, tensors = adapter(bases["llama"], "bat", r=4)
    old = write_adapter(tmp_path / "old", {**config, "init_weights": True}, tensors)
    model = loaded(model_of(LLAMA), tmp_path, adapter(bases["llama"], init_weights, r=4))
    with pytest.raises(ValueError, match=r"old holds bat blocks under init_weights: true.*upgrade_checkpoint"):
        hotswap_adapter(model, old, adapter_name="one")


# ---------------------------------------------------------------- LoRA from a model


def loaded(base, tmp_path, *adapters):
    """A PeftModel with these (config, tensors) as its adapters, called one and two, and their directories as well."""
    names = ("one", "two")[: len(adapters)]
    paths = [write_adapter(tmp_path / name, *made) for name, made in zip(names, adapters, strict=True)]
    model = PeftModel.from_pretrained(base, paths[0], adapter_name="one").eval()
    for name, path in zip(names[1:], paths[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    return model


def same_export(first, second):
    assert first.state_dict.keys() == second.state_dict.keys()
    assert all(torch.equal(first.state_dict[name], tensor) for name, tensor in second.state_dict.items())
    assert first.errors == second.errors
    assert (first.config.r, first.config.bias, first.config.modules_to_save) == (
        (second.config.r, second.config.bias, second.config.modules_to_save)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("init_weights", "r", "rank", "options"),
    [
        pytest.param(True, 7, None, {}, marks=pytest.mark.smoke),
        pytest.param("bat", 4, 5, {}, marks=pytest.mark.smoke),
        pytest.param("bat_row", 4, 5, {}, marks=ROW_FORM),
        (True, 8, None, {"modules_to_save": ["lm_head"]}),
    ],
    ids=["tile", "bat", "row", "head"],
)
@pytest.mark.parametrize("kind", ["PeftModel", "BoneModel", "injected"])
def test_export_of_a_model_is_that_of_its_directory(bases, tmp_path, kind, init_weights, r, rank, options):
    made = with_saved(bases["llama"], *adapter(bases["llama"], init_weights, r, **options))
    other = adapter(bases["llama"], r=3, target_modules=["q_proj", "up_proj"])
    model = loaded(model_of(LLAMA), tmp_path, other, made)
    if kind == "BoneModel":
        model = model.base_model
    elif kind == "injected":
        configs, model = model.peft_config, model.get_base_model()
        model.peft_config = configs
    export = convert_to_lora(model, tmp_path / "out", adapter_name="two", rank=rank)
    same_export(export, convert_to_lora(tmp_path / "two", rank=rank, base_model=bases["llama"]))
    assert written(tmp_path / "out")[1].keys() == export.state_dict.keys()


def test_export_of_a_model_is_a_copy(bases, tmp_path):
    made = with_saved(bases["llama"], *adapter(bases["llama"], modules_to_save=["lm_head"]))
    model = loaded(model_of(LLAMA), tmp_path, made)
    export = convert_to_lora(model, adapter_name="one")
    for tensor in export.state_dict.values():
        tensor.zero_()
    same = convert_to_lora(model, adapter_name="one").state_dict
    assert all(tensor.any() for tensor in same.values())


def test_merged_model_is_exported_in_the_tile_form_only(bases, tmp_path):
    made = adapter(bases["llama"]), adapter(bases["llama"], "bat", r=4)
    model = loaded(model_of(LLAMA), tmp_path, made[0])
    model.merge_adapter()
    same_export(
        convert_to_lora(model, adapter_name="one"), convert_to_lora(tmp_path / "one", base_model=bases["llama"])
    )
    model = loaded(model_of(LLAMA), tmp_path / "bat", made[1])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"unmerge_adapter\(\) first"):
        convert_to_lora(model, adapter_name="one", rank=4)


def test_model_without_that_adapter(bases, tmp_path):
    model = loaded(model_of(LLAMA), tmp_path, adapter(bases["llama"]))
    with pytest.raises(ValueError, match="the model has no adapter 'default'; it has one"):
        convert_to_lora(model)
    with pytest.raises(ValueError, match="the model has no adapter 'default'; it has none"):
        convert_to_lora(bases["llama"])
    with pytest.raises(ValueError, match="base_model is for directories"):
        convert_to_lora(model, adapter_name="one", base_model=bases["llama"])
    lora = get_peft_model(model_of(LLAMA), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r'peft_type: found .*LORA.*, expected "BONE"'):
        convert_to_lora(lora)
