"""Packed folders that are damaged, of another version or of somebody else."""

import hashlib
import json

import pytest
import torch
from ofq_deployed import distance, quantized, resealed
from safetensors.torch import load_file, save_file

from hf_ext.ofq_quantizer import export_fp, load_packed, save_packed


@pytest.fixture
def packed(tmp_path):
    model, x = quantized()
    save_packed(model, tmp_path / "packed")
    return tmp_path / "packed", model, x


def edit(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(resealed(config) if "config_sha256" in config else config))


def seal(folder):
    """As if the tensors had been written so."""
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    edit(folder, lambda config: config.update(sha256=digest))


CONFIGS = {
    "no base": (lambda c: c.pop("base"), "config.json lacks the field 'base'"),
    "no config": (lambda c: c.pop("ofq"), "config.json lacks the field 'ofq'"),
    "no checksum": (lambda c: c.pop("sha256"), "config.json lacks the field 'sha256'"),
    "no checksum of its own": (lambda c: c.pop("config_sha256"), "config.json lacks the field 'config_sha256'"),
    "no version": (lambda c: c.pop("format_version"), "config.json has format_version=None"),
    "newer": (lambda c: c.update(format_version=3), "format_version=3, and this hf_ext reads 2"),
    "older": (lambda c: c.update(format_version=1), "reads 2; .*a model of a lower one has to be packed again"),
    "no library": (lambda c: c["base"].pop("library"), "config.json lacks 'library' in 'base'"),
    "no dtype": (lambda c: c["base"].pop("dtype"), "config.json lacks 'dtype' in 'base'"),
    "unknown model": (lambda c: c["base"].update(base="vit_tinny"), "do not make a model: .*vit_tinny"),
    "other bits": (lambda c: c["ofq"].update(w_bits=3), "do not make a model: .*codes of 3 bits"),
    "other field": (lambda c: c["ofq"].update(wbits=3), "do not make a model: .*'wbits'"),
    "other format": (lambda c: c.update(format="else"), "was not written by save_packed"),
    "base of another kind": (lambda c: c.update(base="vit"), "do not make a model"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_that_lacks_something_is_named(case, packed):
    folder, _, _ = packed
    change, message = CONFIGS[case]
    edit(folder, change)
    with pytest.raises(ValueError, match=f"{folder}.*{message}"):
        load_packed(folder)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"], ids=["cut", "list", "bytes"])
def test_a_configuration_that_is_none_is_named(text, packed):
    (packed[0] / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.json is damaged.*: it (is not JSON|holds a list)"):
        load_packed(packed[0])


def without(tensors, name):
    tensors.pop(name)


TENSORS = {
    "codes": (lambda t: without(t, "blocks.0.mlp.fc1.codes"), "lacks the tensor 'blocks.0.mlp.fc1.codes'"),
    "scale": (lambda t: without(t, "blocks.0.mlp.fc1.input_quantizer.scale_norm"), "fc1.input_quantizer.scale_norm"),
    "one more": (lambda t: t.update(extra=torch.ones(2)), "extra"),
    "fewer rows": (lambda t: t.update({"head.codes": t["head.codes"][1:]}), "head.integers"),
    "other columns": (lambda t: t.update({"head.codes": t["head.codes"][:, 1:].contiguous()}), "bytes a row"),
}


@pytest.mark.parametrize("sealed", [False, True], ids=["checksum", "no checksum"])
@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit_are_named(case, sealed, packed):
    folder, _, _ = packed
    change, message = TENSORS[case]
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "ofq_packed"})
    if sealed:
        seal(folder)
    with pytest.raises(ValueError, match=message if sealed else r"model\.safetensors is damaged"):
        load_packed(folder)


@pytest.mark.parametrize("where", [-1, 9, 5000])
def test_one_bit_of_damage_is_seen(where, packed):
    path = packed[0] / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_packed(packed[0])
    path.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        load_packed(packed[0])
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors; a folder written by save_packed"):
        load_packed(packed[0])
    (packed[0] / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json; a folder written by save_packed"):
        load_packed(packed[0])


def test_a_packed_model_is_replaced_and_a_checkpoint_of_others_is_not(packed, tmp_path):
    folder, model, x = packed
    (folder / "notes.txt").write_text("mine")
    model.head.weight.data.neg_()
    save_packed(model, folder)
    assert distance(load_packed(folder), model, x) == 0
    assert (folder / "notes.txt").read_text() == "mine"
    quantized("hf_vit")[0].save_pretrained(tmp_path / "trained")
    (tmp_path / "tensors").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "tensors/model.safetensors")
    for name, file in (("trained", "config.json"), ("tensors", "model.safetensors")):
        before = {path: path.read_bytes() for path in (tmp_path / name).iterdir()}
        with pytest.raises(ValueError, match=f"{name}/{file} is there, and no packed model"):
            save_packed(model, tmp_path / name)
        assert {path: path.read_bytes() for path in (tmp_path / name).iterdir()} == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_an_exported_checkpoint_has_no_nan(bad, tmp_path):
    model, _ = quantized()
    model.blocks[0].mlp.fc1.weight.data[3, 5] = bad
    with pytest.raises(ValueError, match=r"^blocks\.0\.mlp\.fc1: row 3 "):
        export_fp(model, tmp_path / "plain")
    assert not list(tmp_path.iterdir())


def test_an_exported_checkpoint_of_a_model_that_cannot_be_built_is_refused(tmp_path):
    model, _ = quantized()
    with pytest.raises(ValueError, match=r"cannot be built again .*pass model_args"):
        export_fp(model, tmp_path / "plain", model_args={"depth": 3})
