"""Damaged folders of OFQ: packed ones, and configurations that transformers reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import OF_FILES, OF_JSON, OF_SAFETENSORS, flips, mistyped, outcome, restored, swapped, wrong
from ofq_deployed import logits, quantized, resealed
from transformers import ViTForImageClassification

from hf_ext.ofq_quantizer import OFQConfig, load_packed, save_packed

CONFIG, TENSORS = "config.json", "model.safetensors"


class Saved:
    """A packed folder, its copy to be damaged, and the logits that every load has to give."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.model, self.x = quantized(kind)
        self.good, self.copy = folder / "good", folder / "copy"
        save_packed(self.model, self.good)
        self.expected = logits(load_packed(self.good), self.x)
        self.config = json.loads((self.good / CONFIG).read_text())

    def restored(self) -> Path:
        return restored(self.good, self.copy)

    def configured(self, config: Any) -> Path:
        (self.restored() / CONFIG).write_text(json.dumps(config))
        return self.copy

    def outcome(self) -> str:
        return outcome(lambda: load_packed(self.copy), self.is_right, self.copy)

    def is_right(self, model: Any) -> bool:
        return torch.equal(logits(model, self.x), self.expected)


@pytest.fixture(scope="module", params=["vit", "hf_vit"], ids=["timm", "transformers"])
def saved(request, tmp_path_factory) -> Saved:
    return Saved(request.param, tmp_path_factory.mktemp(request.param))


def test_damaged_files_are_refused_by_name(saved):
    found = {}
    for name, damages in {CONFIG: OF_FILES | OF_JSON, TENSORS: OF_FILES | OF_SAFETENSORS}.items():
        for kind, damage in damages.items():
            damage(saved.restored() / name)
            found[f"{name}: {kind}"] = saved.outcome()
    swapped(saved.restored() / CONFIG, saved.copy / TENSORS)
    found["swapped"] = saved.outcome()
    assert wrong(found) == {}
    assert {what for what, verdict in found.items() if verdict == "right"} <= {f"{CONFIG}: cut at 100%"}  # of a newline


def test_files_of_another_packed_model_are_refused(saved, tmp_path):
    """Of the same shapes, so that nothing but the checksum tells."""
    with torch.no_grad():
        other, _ = quantized("vit" if saved.config["base"]["library"] == "timm" else "hf_vit")
        next(other.parameters()).neg_()
    save_packed(other, tmp_path / "other")
    for name in (CONFIG, TENSORS):
        (saved.restored() / name).write_bytes((tmp_path / "other" / name).read_bytes())
        assert saved.outcome() == "refused"


def test_a_changed_byte_of_the_tensors_is_refused(saved):
    found = {}
    for number, content in enumerate(flips((saved.good / TENSORS).read_bytes(), 40)):
        (saved.restored() / TENSORS).write_bytes(content)
        found[str(number)] = saved.outcome()
    assert set(found.values()) == {"refused"}, wrong(found) or found


def test_options_of_another_type_are_refused(saved):
    """What a stranger happens to be allowed for (null for no bits at the boundary) does not fit the tensors."""
    found = {}
    changed = list(mistyped(saved.config, keep=("base", "ofq")))
    changed += [(f"ofq.{name}", saved.config | {"ofq": ofq}) for name, ofq in mistyped(saved.config["ofq"])]
    for where, config in changed[::2]:
        saved.configured(config)
        if not where.startswith("ofq.weight_scale_coefficient = 1"):  # a number, and of trained scales only
            found[where] = saved.outcome()
    harmless = {"architecture", "model_type", "dtype"}  # only stop other loaders
    assert wrong(found) == {}
    assert {where.split(" ")[0] for where, verdict in found.items() if verdict == "right"} <= {
        *harmless,
        "ofq.quant_method",
        "ofq.reference_compat",
        "format_version",
    }


@pytest.mark.parametrize("change", ["a_bits", "base"])
def test_a_changed_digit_of_the_configuration_is_refused(saved, change):
    config = json.loads(json.dumps(saved.config))
    if change == "a_bits":
        config["ofq"]["a_bits"] = 3
    elif config["base"]["library"] == "timm":
        config["base"]["model_args"]["num_heads"] = 1
    else:
        config["base"]["config"]["num_attention_heads"] = 4
    saved.configured(config)
    assert saved.outcome() == "refused"


def test_a_description_that_the_host_refuses_is_named(saved):
    if saved.config["base"]["library"] == "timm":
        part, changes = "model_args", {"num_heads": 5, "global_pool": "nowhere", "img_size": []}
    else:
        part, changes = "config", {"hidden_size": "48", "num_attention_heads": None, "image_size": []}
    found = {}
    for name, value in changes.items():
        config = json.loads(json.dumps(saved.config))
        config["base"][part][name] = value
        saved.configured(resealed(config))
        found[name] = saved.outcome()
    assert set(found.values()) == {"refused"}, found


def test_a_loaded_model_outlives_its_file(tmp_path):
    model, x = quantized()
    save_packed(model, tmp_path / "one")
    loaded = load_packed(tmp_path / "one")
    expected = logits(load_packed(tmp_path / "one"), x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    save_packed(model, tmp_path / "other")
    (tmp_path / "one" / TENSORS).write_bytes((tmp_path / "other" / TENSORS).read_bytes())  # of equal length
    assert torch.equal(logits(loaded, x), expected)


# --- configurations


def test_options_of_another_type_are_refused_by_their_name():
    values = OFQConfig(skip_modules=["head"], boundary_bits=None).to_dict()
    found = {}
    for where, options in mistyped(values):
        same = outcome(lambda options=options: OFQConfig.from_dict(options), lambda _: True, where.split(" ")[0][:12])
        found[where] = same
    assert wrong(found) == {}
    accepted = {where for where, verdict in found.items() if verdict == "right"}
    assert {where.split(" ")[0] for where in accepted} <= {"weight_scale_coefficient", "skip_modules"}, accepted
    assert {where for where in accepted if where.startswith("skip")} == {"skip_modules = []"} & accepted


def test_options_of_another_type_stop_transformers(tmp_path):
    model, x = quantized("hf_vit")
    model.save_pretrained(tmp_path / "good")
    config = json.loads((tmp_path / "good" / CONFIG).read_text())
    found = {}
    for where, options in list(mistyped(config["quantization_config"], keep=("quant_method",)))[::4]:
        try:
            OFQConfig.from_dict(options)
        except ValueError:
            folder = restored(tmp_path / "good", tmp_path / "copy")
            (folder / CONFIG).write_text(json.dumps(config | {"quantization_config": options}))
            name = where.split(" ")[0]
            found[where] = outcome(lambda: ViTForImageClassification.from_pretrained(tmp_path / "copy"), bool, name)
    assert len(found) > 15
    assert set(found.values()) == {"refused"}, found
    restored(tmp_path / "good", tmp_path / "copy")
    assert torch.equal(logits(ViTForImageClassification.from_pretrained(tmp_path / "copy"), x), logits(model, x))
