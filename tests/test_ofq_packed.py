"""Packed files, and ordinary checkpoints of the latent weights.

Oracles: the model that was saved, bit for bit, and the hosts in a process without hf_ext.
"""

import json

import pytest
import timm
import torch
from ofq_deployed import ONE_SCALE, QKR, WIDE, distance, full, quantized
from ofq_models import local_dir
from processes import answer, run_python
from safetensors.torch import load_file
from torch import nn

from hf_ext.ofq_quantizer import (
    OFQConfig,
    activation_quantizers,
    calibrate,
    export_fp,
    freeze,
    load_packed,
    pack_codes,
    quantize,
    save_packed,
    to_int8,
)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param("vit", {}, id="vit"),
        pytest.param("vit", QKR | {"w_bits": 3}, id="vit_qkr_w3"),
        pytest.param("vit", WIDE | {"dtype": torch.bfloat16}, id="vit_w4a8_bfloat16"),
        pytest.param("swin", {}, id="swin"),
        pytest.param("beit", QKR | ONE_SCALE, id="beit_qkr_one_scale"),
        pytest.param("hf_vit", {}, id="hf_vit", marks=pytest.mark.smoke),
        pytest.param("hf_swin", QKR | {"dtype": torch.bfloat16}, id="hf_swin_qkr_bfloat16"),
    ],
)
def test_packed_model_comes_back_bit_for_bit(kind, options, tmp_path):
    model, x = quantized(kind, **options)
    save_packed(model, tmp_path / "one")
    loaded = load_packed(tmp_path / "one")
    assert not loaded.training
    assert distance(loaded, model, x) == 0
    before, after = freeze(model), freeze(loaded)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        assert (weight.bits, weight.method) == (after[name].bits, after[name].method)
        assert torch.equal(weight.codes, after[name].codes)
        assert torch.equal(weight.scale, after[name].scale)
    assert distance(to_int8(loaded), to_int8(model), x) == 0
    save_packed(loaded, tmp_path / "two")
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()


def test_packed_file_holds_the_bits_of_the_codes_and_no_latent_weight(tmp_path):
    model, _ = quantized(**QKR | {"w_bits": 3})
    save_packed(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    for name, weight in freeze(model).items():
        assert torch.equal(stored[f"{name}.codes"], pack_codes(weight.codes, weight.bits))
    assert not [name for name in stored if name.endswith(".weight") and "norm" not in name]
    half = load_packed(tmp_path).half()
    assert {module.step.dtype for module in half.modules() if hasattr(module, "step")} == {torch.float32}


@pytest.mark.parametrize("config", [{}, QKR], ids=["plain", "qkr"])
def test_odd_rows_and_widths_pass_all_ways(config, tmp_path):
    """Rows that are zero, constant, or so small that an LSQ scale would be clamped; 45 columns; a head of one row."""
    model, x = full("vit", embed_dim=45, num_classes=1)
    for layer in (model.blocks[0].attn.qkv, model.blocks[1].mlp.fc1):
        for row, value in ((95, 0.0), (96, 0.25), (97, 1e-8)):
            layer.weight.data[row] = value * layer.weight.data[row].sign() if value != 0.25 else value
    model = calibrate(quantize(model, OFQConfig(**config)), [x])
    for quantizer in activation_quantizers(model).values():
        quantizer.scale.data[0] = 1e-7
    frozen = freeze(model)["blocks.1.mlp.fc1"]
    assert frozen.scale[95] == 0
    assert frozen.dequantize()[95].count_nonzero() == 0
    assert len(frozen.codes[96].unique()) == 1
    assert 0 < frozen.dequantize()[97].abs().max() < 1e-7
    save_packed(model, tmp_path)
    assert distance(load_packed(tmp_path), model, x) == 0
    assert distance(to_int8(model), model, x) == 0


def test_packed_deit_tiny_is_small(tmp_path):
    model = quantize(timm.create_model("deit_tiny_patch16_224"), OFQConfig())
    for name, tensor in model.named_parameters():
        if name.endswith(("bias_in", "bias_out")):
            nn.init.normal_(tensor)
    save_packed(calibrate(model, [torch.randn(1, 3, 224, 224)]), tmp_path)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2.3 * 2**20


def test_a_model_changed_after_it_was_built_is_not_saved(tmp_path):
    """A ReLU has no tensor whose shape would tell."""
    model, x = full("vit")
    model.blocks[1].mlp.act = nn.ReLU()
    with pytest.raises(ValueError, match="computes something else"):
        save_packed(calibrate(quantize(model, OFQConfig()), [x]), tmp_path / "packed")
    assert not list(tmp_path.iterdir())


# --- processes without hf_ext

STOCK = """
import json, sys, torch
if not torch.version.cuda:  # torchvision is built for CUDA, and both hosts import it
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{{name}}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm, transformers
from safetensors.torch import load_file

def outcome(load, *arguments, **options):
    try:
        model = load(*arguments, **options)
    except Exception as error:
        return f"{{type(error).__name__}}: {{error}}"
    return {{name: tensor.double().sum().item() for name, tensor in model.state_dict().items()}}

def attempts(folder):
    return {{
        "timm": outcome(timm.create_model, f"local-dir:{{folder}}", pretrained=True),
        "auto": outcome(transformers.AutoModelForImageClassification.from_pretrained, folder),
    }}

assert "hf_ext" not in sys.modules
found = {{folder: attempts(folder) for folder in {folders!r}}}
for folder in {packed!r}:
    found[folder]["vit"] = outcome(transformers.ViTForImageClassification.from_pretrained, folder)
    found[folder]["file"] = outcome(timm.create_model, {arch!r}, checkpoint_path=f"{{folder}}/model.safetensors")
print(json.dumps(found))
"""


def test_hosts_refuse_a_packed_folder_and_load_an_exported_one(tmp_path):
    readers = ("auto", "vit") if local_dir.args[0] else ("timm", "auto", "vit")
    models = {kind: quantized(kind)[0] for kind in (("vit", "hf_vit") if "timm" in readers else ("hf_vit",))}
    packed, plain = ({kind: str(tmp_path / name / kind) for kind in models} for name in ("packed", "plain"))
    for kind, model in models.items():
        save_packed(model, packed[kind])
        export_fp(model, plain[kind])
    where = {"folders": [*packed.values(), *plain.values()], "packed": list(packed.values())}
    code = STOCK.format(**where, arch="vit_tiny_patch16_224")
    found = answer(run_python(code, env={"HF_EXT_AUTOLOAD": "0"}))
    for kind, model in models.items():
        errors = found[packed[kind]]
        assert all(isinstance(error, str) for error in errors.values()), errors
        assert all("ofq_packed" in errors[how] for how in readers), errors
        loaded = found[plain[kind]]["timm" if kind == "vit" else "auto"]
        state = model.state_dict()
        assert loaded == {name: state[name].double().sum().item() for name in loaded}
        assert {
            f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Linear)
        } < loaded.keys()
    assert "quantization_config" not in json.loads((tmp_path / "plain/hf_vit/config.json").read_text())


def test_folders_and_models_of_the_other_kind_are_refused(tmp_path):
    model, _ = quantized("hf_vit")
    save_packed(model, tmp_path / "packed")
    export_fp(model, tmp_path / "plain")
    with pytest.raises(ValueError, match="no latent weights"):
        export_fp(load_packed(tmp_path / "packed"), tmp_path / "again")
    with pytest.raises(ValueError, match="was not written by save_packed"):
        load_packed(tmp_path / "plain")
