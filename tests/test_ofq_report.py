"""The report: every layer of the full-precision model has a row, and every number of it is that of an oracle."""

import json
import math

import pytest
import timm
import torch
from ofq_deployed import quantized
from safetensors.torch import load_file
from torch import nn

from hf_ext import compat
from hf_ext.ofq_quantizer import (
    OFQConfig,
    calibrate,
    full_precision,
    load_packed,
    quantize,
    report,
    save_packed,
    to_int8,
)

SIZE = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def converted(arch="vit_tiny_patch16_224", **options):
    torch.manual_seed(0)
    model = compat.create_timm_model(arch, False, **SIZE)
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    return quantize(model, OFQConfig(**options)), layers


@pytest.mark.parametrize("reparam", [False, True], ids=["plain", "qkr"])
def test_every_layer_of_the_full_precision_model_has_one_row(reparam):
    model, layers = converted(qk_reparam=reparam)
    names = [row.name for row in report(model).layers]
    products = {f"blocks.{block}.attn.qk" for block in range(2)} if reparam else set()
    assert len(names) == len(set(names))
    assert set(names) == layers | products


@pytest.mark.parametrize("reparam", [False, True], ids=["plain", "qkr"])
def test_packed_and_integer_models_have_the_rows_of_the_model_they_were_made_of(reparam, tmp_path):
    model, _ = converted(qk_reparam=reparam)
    calibrate(model, [torch.randn(2, 3, 32, 32)])
    save_packed(model, tmp_path / "packed")
    rows = {row.name: row for row in report(model).layers}
    for frozen in (load_packed(tmp_path / "packed"), to_int8(model)):
        found = report(frozen).layers
        assert [row.name for row in found].count("blocks.0.attn.qk") == reparam
        assert {row.name for row in found} == set(rows)
        for row in found:
            mine = rows[row.name]
            assert (row.w_bits, row.reason, row.packed_bytes) == (mine.w_bits, mine.reason, mine.packed_bytes), row.name
            assert (row.fp32_bytes, row.codes_used) == (mine.fp32_bytes, mine.codes_used), row.name


def test_a_forward_in_full_precision_executes_nothing():
    for model, _ in (converted(), converted(qk_reparam=True)):
        with full_precision(model):
            model(torch.randn(2, 3, 32, 32))
        assert not any(row.executed for row in report(model).layers)


def test_a_convolution_of_single_pixels_is_no_patch_embedding():
    model = quantize(timm.create_model("mobilevit_xxs", num_classes=10), OFQConfig(activation_scale="tensor"))
    rows = [row for row in report(model).layers if row.kind == "conv"]
    assert rows
    assert all("single pixels" in row.reason for row in rows)


def test_executed_turns_true_with_the_first_forward_and_not_before():
    model, _ = converted()
    assert not any(row.executed for row in report(model).layers)
    calibrate(model, [torch.randn(2, 3, 32, 32)])
    assert all(row.executed for row in report(model).layers)


def test_rows_say_what_each_layer_is_and_why_some_are_not_quantised():
    model, _ = converted("vit_base_patch16_siglip_224", w_bits=3, a_bits=4, skip_modules=["blocks.1.mlp.fc?"])
    rows = {row.name: row for row in report(model).layers}
    assert (rows["patch_embed.proj"].kind, rows["patch_embed.proj"].w_bits) == ("conv", 8)
    assert (rows["blocks.0.mlp.fc1"].w_bits, rows["blocks.0.mlp.fc1"].a_bits) == (3, 4)
    assert {rows[f"blocks.1.mlp.fc{i}"].status for i in (1, 2)} == {"skipped"}
    assert rows["attn_pool.kv"].status == "full_precision"
    assert "pooling" in rows["attn_pool.kv"].reason
    for row in rows.values():
        assert (row.status == "quantized") == (row.reason is None) == (row.w_bits is not None)


def test_codes_clipping_and_bytes_are_those_counted_by_hand():
    model, _ = converted()
    with torch.no_grad():
        weight = model.blocks[0].mlp.fc1.weight.normal_()
        weight[:, 7] = 30.0  # far beyond the scale of every row
    (row,) = (row for row in report(model).layers if row.name == "blocks.0.mlp.fc1")
    scale = 2 * weight.double().abs().mean(1, keepdim=True)
    assert row.clipped_share == pytest.approx((weight.double().abs() > scale).double().mean().item(), abs=1e-6)
    assert row.codes_used == 4
    assert row.packed_bytes == len(weight) * math.ceil(weight.shape[1] * 2 / 8)
    assert row.fp32_bytes == weight.numel() * 4


def test_it_prints_as_a_table_and_turns_into_json():
    summary = report(converted(skip_modules=["head"])[0])
    assert "blocks.1.attn.proj" in str(summary)
    assert "skipped: matches skip_modules" in str(summary)
    assert json.loads(json.dumps(summary.as_dict()))["total_bytes"] == summary.total_bytes


def test_a_model_that_is_not_quantised_is_refused():
    with pytest.raises(ValueError, match="not quantised"):
        report(timm.create_model("vit_tiny_patch16_224", **SIZE))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("reparam", [False, True], ids=["plain", "qkr"])
def test_rows_without_codes_are_shown(reparam, bad):
    model, _ = converted(qk_reparam=reparam)
    before = {row.name: row for row in report(model).layers}
    model.blocks[0].mlp.fc1.weight.data[3, 5] = bad
    model.head.weight.data[4, 1] = bad
    model.patch_embed.proj.weight_scale_norm.data[7:9] = bad
    model.blocks[1].attn.qkv.weight.data[97, 2] = bad  # of the values
    summary = report(model)
    rows = {row.name: row for row in summary.layers}
    product = "queries and keys as blocks.1.attn.qk; " if reparam else ""
    broken = {
        "patch_embed.proj": "NaN or inf in 2 of 48 rows",
        "blocks.0.mlp.fc1": "NaN or inf in 1 of 192 rows",
        "blocks.1.attn.qkv": product + f"NaN or inf in 1 of {48 if reparam else 144} rows",
        "head": "NaN or inf in 1 of 10 rows",
    }
    for name, reason in broken.items():
        row = rows.pop(name)
        assert (row.status, row.codes_used, row.clipped_share) == ("quantized", None, None), name
        assert row.reason.removesuffix(" of the values") == reason
        assert (row.packed_bytes, row.fp32_bytes) == (before[name].packed_bytes, before[name].fp32_bytes)
    assert rows == {name: row for name, row in before.items() if name not in broken}
    assert "NaN or inf in 1" in str(summary)
    json.loads(json.dumps(summary.as_dict(), allow_nan=False))


KINDS = [("vit", {}), ("vit", {"qk_reparam": True}), ("beit", {"qk_reparam": True}), ("hf_vit", {"qk_reparam": True})]
KINDS += [("vit", {"qk_reparam": True, "reference_compat": True}), ("swin", {"boundary_bits": None})]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[f"{kind}-{'-'.join(options)}" for kind, options in KINDS])
def test_total_bytes_are_those_of_the_packed_tensors(kind, options, tmp_path):
    model, _ = quantized(kind, **options)
    save_packed(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    assert report(model).total_bytes == sum(tensor.nbytes for tensor in stored)
    assert report(load_packed(tmp_path)).total_bytes == report(model).total_bytes
