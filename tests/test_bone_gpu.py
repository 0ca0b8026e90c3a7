"""Bone on a CUDA device, against float64 on the CPU."""

import pytest
import torch
from bone_native import OURS
from peft import BoneConfig, get_peft_model
from torch import nn

from hf_ext.bone_adapter import reference

pytestmark = [
    pytest.mark.gpu,
    OURS,
]

FORMS = {"tile": True, "bat": "bat", "bat_row": "bat_row"}
per_form = pytest.mark.parametrize("form", FORMS)
IN, OUT, R = 96, 128, 16


def adapted(form, dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(IN, OUT, dtype=dtype, device="cuda"))
    model = get_peft_model(net, BoneConfig(r=R, init_weights=FORMS[form], target_modules=["0"]))
    layer = model.base_model.model[0]
    nn.init.normal_(layer.bone_block["default"], std=0.05)
    return model, layer


def exact(layer, form, x, gradient):
    """y, dx and db in float64, through the weight."""
    base = layer.get_base_layer()
    block = layer.bone_block["default"].detach().cpu().double().requires_grad_()
    x = x.detach().cpu().double().requires_grad_()
    weight = reference.FORMS[form](base.weight.detach().cpu().double(), block)
    y = x @ weight.T + base.bias.detach().cpu().double()
    y.backward(gradient.cpu().double())
    return y.detach(), x.grad, block.grad


def distance(actual, expected):
    return ((actual.detach().cpu().double() - expected).norm() / expected.norm()).item()


@per_form
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 8e-3)], ids=str
)
@pytest.mark.parametrize("tokens", [1, 4, 300])
def test_values_and_gradients(form, dtype, tolerance, tokens):
    model, layer = adapted(form, dtype)
    x = torch.randn(tokens, IN, dtype=dtype, device="cuda", requires_grad=True)
    gradient = torch.randn(tokens, OUT, dtype=dtype, device="cuda")
    y = model(x)
    y.backward(gradient)
    expected = exact(layer, form, x, gradient)
    for actual, wanted in zip((y, x.grad, layer.bone_block["default"].grad), expected, strict=True):
        assert distance(actual, wanted) < tolerance
    with torch.no_grad():
        assert distance(model(x), expected[0]) < tolerance


@per_form
def test_merging_keeps_the_base_in_host_memory_and_restores_it(form):
    model, layer = adapted(form, torch.bfloat16)
    before = layer.get_base_layer().weight.detach().clone()
    model.merge_adapter(safe_merge=True)
    assert layer._kept.device.type == "cpu"
    assert not torch.equal(layer.get_base_layer().weight, before)
    model.unmerge_adapter()
    assert torch.equal(layer.get_base_layer().weight, before)


@per_form
def test_one_graph_on_the_device(form):
    model, _ = adapted(form, torch.bfloat16)
    x = torch.randn(64, IN, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    torch.compile(model, fullgraph=True)(x).sum().backward()
    assert x.grad.isfinite().all()


@per_form
def test_autocast(form):
    model, layer = adapted(form, torch.float32)
    x = torch.randn(64, IN, device="cuda", requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    gradient = torch.randn_like(y)
    y.backward(gradient)
    for actual, wanted in zip(
        (y, x.grad, layer.bone_block["default"].grad), exact(layer, form, x, gradient), strict=True
    ):
        assert distance(actual, wanted) < 1.5e-2
