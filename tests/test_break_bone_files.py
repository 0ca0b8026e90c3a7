"""Damaged directories of Bone adapters, for every reader of them: PEFT, the check, the exports and the swap."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bone_files import IDS, LLAMA, adapter, merged, model_of, write_adapter
from bone_native import ours_only
from damage import OF_FILES, OF_JSON, OF_SAFETENSORS, flips, header_end, mistyped, outcome, restored, swapped, wrong
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from hf_ext.bone_adapter import BoneConfig, check_checkpoint, convert_to_lora, convert_to_miss, hotswap_adapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


class Saved:
    """An adapter directory, its copy to be damaged, and what every reader has to find in it."""

    def __init__(self, init_weights: Any, r: int, folder: Path) -> None:
        self.base, self.good, self.copy = model_of(LLAMA), folder / "good", folder / "copy"
        self.config, tensors = adapter(self.base, init_weights, r)
        write_adapter(self.good, self.config, tensors)
        self.tensors, self.rank = tensors, None if init_weights is True else 8
        with torch.no_grad():
            self.expected = merged(self.base, self.config, tensors)(IDS).logits
        self.lora = self.as_lora(self.good).state_dict
        self.swapping = get_peft_model(
            copy.deepcopy(self.base), BoneConfig(r=r, target_modules=["q_proj"], init_weights=init_weights)
        )
        self.base_folder, self.said = folder / "base", []
        self.base.save_pretrained(self.base_folder)

    def restored(self) -> Path:
        return restored(self.good, self.copy)

    # --- readers: what they return is judged by the method of the same name with `_is_right`

    def by_peft(self, folder: Path) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = PeftModel.from_pretrained(copy.deepcopy(self.base), folder).eval()
        self.said = [str(warning.message) for warning in caught]
        return model

    @torch.no_grad()
    def by_peft_is_right(self, model: Any) -> bool:
        """Or it was said which tensors are missing, as PEFT does: an adapter may have been saved in part."""
        return torch.allclose(model(IDS).logits, self.expected, atol=1e-4) or any("bone_block" in x for x in self.said)

    def as_lora(self, folder: Path) -> Any:
        return convert_to_lora(folder, base_model=self.base, rank=self.rank)

    def as_lora_is_right(self, export: Any) -> bool:
        found = export.state_dict
        return found.keys() == self.lora.keys() and all(torch.equal(found[name], self.lora[name]) for name in found)

    def checked(self, folder: Path) -> Any:
        return check_checkpoint(folder, self.base)

    def checked_is_right(self, report: Any) -> bool:
        return (report.tensors, report.r) == (len(self.tensors), self.config["r"])

    def outcome(self, reader: str, *names: Any) -> str:
        read: Callable[[Path], Any] = getattr(self, reader)
        return outcome(lambda: read(self.copy), getattr(self, f"{reader}_is_right"), *names)


@pytest.fixture(scope="module", params=[(True, 8), ("bat", 4)], ids=["tile", "bat"])
def saved(request, tmp_path_factory) -> Saved:
    return Saved(*request.param, tmp_path_factory.mktemp("bone"))


READERS = ["by_peft", "as_lora", "checked"]
OWN = ["as_lora", "checked"]  # PEFT opens the files by itself, with the errors of its libraries
UNCHECKED = ours_only("which looks at no option and no number of a file")
CHECKING = [pytest.param("by_peft", marks=UNCHECKED), *OWN]
WHOLE = [(CONFIG, kind, damage) for kind, damage in (OF_FILES | OF_JSON).items()]
WHOLE += [(TENSORS, kind, damage) for kind, damage in (OF_FILES | OF_SAFETENSORS).items()]


@pytest.mark.parametrize("reader", OWN)
def test_damaged_files_are_refused_by_name(saved, reader):
    found = {}
    for name, kind, damage in WHOLE:
        damage(saved.restored() / name)
        found[f"{name}: {kind}"] = saved.outcome(reader, saved.copy)
    swapped(saved.restored() / CONFIG, saved.copy / TENSORS)
    found["swapped"] = saved.outcome(reader, saved.copy)
    assert set(found.values()) == {"refused"}, wrong(found) or found


def test_peft_loads_nothing_wrong_from_damaged_files(saved):
    """Its own errors of whatever class, but no model."""
    for name, kind, damage in WHOLE:
        damage(saved.restored() / name)
        with pytest.raises(Exception) as caught:
            saved.by_peft(saved.copy)
        assert isinstance(caught.value, Exception), kind


@pytest.mark.parametrize("reader", READERS)
def test_a_changed_byte_of_the_header_is_refused_or_said(saved, reader):
    """Bytes of the values are in nobody's checksum; their format has none."""
    content, found = (saved.good / TENSORS).read_bytes(), {}
    for number, changed in enumerate(flips(content, 60, end=header_end(content))):
        (saved.restored() / TENSORS).write_bytes(changed)
        found[str(number)] = saved.outcome(reader, *([saved.copy] if reader in OWN else []))
    assert wrong(found) == {}


@pytest.mark.parametrize("reader", CHECKING)
def test_options_of_another_type_are_refused_or_harmless(saved, reader):
    found = {}
    for where, config in list(mistyped(saved.config, keep=("peft_type",)))[::2]:
        (saved.restored() / CONFIG).write_text(json.dumps(config))
        found[where] = saved.outcome(reader)
    assert wrong(found) == {}


@UNCHECKED
@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_a_name_of_a_layer_that_is_a_list_is_refused_by_the_option(option):
    with pytest.raises(ValueError, match=option):
        BoneConfig(**{option: [["q_proj"], "v_proj"]})


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("reader", CHECKING)
def test_a_pattern_that_is_no_regular_expression_is_refused_by_the_option(saved, reader, option):
    (saved.restored() / CONFIG).write_text(json.dumps(saved.config | {option: "*.q_proj"}))
    assert saved.outcome(reader, option) == "refused"


def test_options_of_another_type_are_named_where_the_base_is_a_path(saved):
    found = {}
    for option in ("auto_mapping", "task_type"):
        for value in ("strange", ["CAUSAL_LM"], {"a": 1}, 5):
            (saved.restored() / CONFIG).write_text(json.dumps(saved.config | {option: value}))
            read = [lambda: check_checkpoint(saved.copy, saved.base_folder)]
            read.append(lambda: convert_to_lora(saved.copy, base_model=saved.base_folder, rank=saved.rank))
            for number, function in enumerate(read):
                found[f"{option} = {value!r}, {number}"] = outcome(function, lambda _: True, saved.copy, option)
    assert wrong(found) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("reader", CHECKING)
def test_one_value_that_is_no_number_is_refused(saved, reader, value):
    tensors = load_file(saved.good / TENSORS)
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[7] = value
    save_file(tensors, saved.restored() / TENSORS)
    assert saved.outcome(reader, name.removeprefix("base_model.model.").removesuffix(".bone_block")) == "refused"


# --- readers that write into something


def test_a_failed_swap_leaves_the_loaded_adapter(saved):
    before = {name: tensor.clone() for name, tensor in saved.swapping.state_dict().items()}
    for name, _, damage in WHOLE:
        damage(saved.restored() / name)
        assert outcome(lambda: hotswap_adapter(saved.swapping, saved.copy), bool, saved.copy) == "refused"
    saved.restored()
    with pytest.raises(ValueError, match="cannot be swapped in"):  # of other layers
        hotswap_adapter(saved.swapping, saved.copy)
    assert all(torch.equal(tensor, before[name]) for name, tensor in saved.swapping.state_dict().items())


@pytest.mark.parametrize("convert", [convert_to_miss, convert_to_lora])
def test_a_failed_conversion_writes_nothing(saved, convert, tmp_path):
    options = {} if convert is convert_to_miss else {"base_model": saved.base, "rank": saved.rank}
    for name, kind, damage in WHOLE:
        damage(saved.restored() / name)
        read = outcome(lambda: convert(saved.copy, tmp_path / "out", **options), bool, saved.copy)
        assert (read, kind) == ("refused", kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_a_failed_load_of_a_second_adapter_leaves_the_first(saved):
    """Its values, its place as the active one, and what the model computes."""
    model = saved.by_peft(saved.good)
    with torch.no_grad():
        expected = model(IDS).logits
    for number, damage in enumerate([OF_FILES["cut at 70%"], OF_SAFETENSORS["tensor beyond the file"]]):
        damage(saved.restored() / TENSORS)
        with pytest.raises(Exception):  # noqa: B017, PEFT's own
            model.load_adapter(saved.copy, f"other{number}")
        with torch.no_grad():
            assert torch.equal(model(IDS).logits, expected)
        assert model.active_adapters == ["default"]
