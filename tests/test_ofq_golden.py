"""Outputs and gradients of the published implementation of OFQ, and of a float64 one for the term which it drops.

Skipped where the reference data does not lie beside the checkout.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hf_ext.ofq_quantizer import ops, reference
from hf_ext.ofq_quantizer.attention_ops import quantized_attention
from hf_ext.ofq_quantizer.distillation import distillation_loss
from hf_ext.ofq_quantizer.ops import Activation, WeightQuantizer
from hf_ext.ofq_quantizer.oscillation import Oscillation
from hf_ext.ofq_quantizer.packing import pack_codes, unpack_codes

GOLDEN = Path(__file__).parents[2] / "shared" / "golden" / "ofq_quantizer"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="no reference data")

HEADS = 3
AXES = {"channel": -1, "row_weight": 0, "tensor": None}


@cache
def stored(name):
    return load_file(GOLDEN / f"{name}.safetensors") if GOLDEN.is_dir() else {}


def part(values, prefix):
    return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}


def leaves(values):
    """The inputs of a case, ready to be differentiated."""
    outputs = ("output", "grad", "anneal")
    return {name: value.clone().requires_grad_() for name, value in values.items() if not name.startswith(outputs)}


def assert_close(actual, expected, relative):
    assert (actual - expected).abs().max() <= relative * expected.abs().max()


def assert_gradients(inputs, expected, ignored=()):
    compared = {name for name in expected if name not in ignored}
    assert compared
    for name in compared:
        # A shift of all keys cancels in the softmax where none is clipped: the stored gradient is rounding itself.
        size = expected[name].abs().max().clamp(min=0.25)
        assert (inputs[name].grad - expected[name]).abs().max() <= 2e-5 * size, name


# --- quantisers


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_statsq(bits):
    case = part(stored("statsq"), f"b{bits}.")
    weight = case["weight"].requires_grad_()
    output = ops.statsq(weight, bits)
    output.backward(case["grad_output"])
    codes, scale = ops.statsq_codes(weight, bits)
    assert (output - case["output"]).abs().max() <= 5e-7
    assert torch.equal(weight.grad, case["grad_weight"])
    assert torch.equal(codes, case["codes"])
    assert_close(scale, case["scale"], 5e-7)


@pytest.mark.parametrize("case", sorted({name.rpartition(".")[0] for name in stored("lsq")}))
def test_lsq(case):
    values = part(stored("lsq"), f"{case}.")
    kind, _, bits = case.partition(".b")
    form = {"bits": int(bits), "positive": kind.startswith("unsigned"), "axis": AXES.get(kind.partition("_")[2], -2)}
    x, scale = values["x"].requires_grad_(), values["scale"].requires_grad_()
    output = ops.lsq(x, scale, **form)
    output.backward(values["grad_output"])
    assert (output - values["output"]).abs().max() <= 1e-6
    assert (x.grad - values["grad_x"]).abs().max() <= 1e-6
    assert_close(scale.grad, values["grad_scale"], 3e-5)
    assert_close(ops.lsq_init(x, **form), values["scale_init"], 1e-6)


# --- products: roles of the file as quantisers of the operations


def quantizer(inputs, role, bits, positive=False):
    return Activation(
        inputs[f"{role}.scale"][:, None], inputs.get(f"{role}.bias_in"), inputs.get(f"{role}.bias_out"), bits, positive
    )


def by_head(vector):
    """(h*d,) -> (h, 1, d)."""
    return vector.view(HEADS, 1, -1)


def in_heads(a, *, bias_out=True):
    return a._replace(bias_in=by_head(a.bias_in), bias_out=by_head(a.bias_out) if bias_out else None)


def heads(x):
    """(B, N, h*d) -> (B, h, N, d)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def values_quantizer(inputs, bits):
    a = in_heads(quantizer(inputs, "v", bits))
    return a._replace(scale=by_head(inputs["v.scale"]))


def probabilities_quantizer(inputs, bits):
    return Activation(inputs["probs.scale"][:, None], None, None, bits, True)


def project(inputs, x, bits, weights):
    return ops.quantized_linear(
        x, inputs["proj.weight"], inputs["proj.bias"], quantizer(inputs, "proj:input", bits), weights
    )


def attend(inputs, bits):
    weights = WeightQuantizer(bits, 2.0, None)
    shared = quantizer(inputs, "qkv:input", bits)
    qkv = ops.quantized_linear(inputs["x"], inputs["qkv.weight"], inputs["qkv.bias"], shared, weights)
    q, k, v = map(heads, qkv.chunk(3, -1))
    aq = in_heads(quantizer(inputs, "q", bits))
    ak = in_heads(quantizer(inputs, "k", bits), bias_out=False)
    av, ap = values_quantizer(inputs, bits), probabilities_quantizer(inputs, bits)
    return project(inputs, quantized_attention(q, k, v, aq, ak, av, ap, q.shape[-1] ** -0.5), bits, weights)


def attend_reparametrised(inputs, bits, *, with_u, anneal=None):
    weights = WeightQuantizer(bits, 2.0, None)
    x, shared = inputs["x"], quantizer(inputs, "input", bits)
    (wq, wk, wv), (bq, _, bv) = inputs["qkv.weight"].chunk(3), inputs["qkv.bias"].chunk(3)
    wq, wk = (w.unflatten(0, (HEADS, -1)) for w in (wq, wk))
    product = (wq.transpose(1, 2) @ wk).flatten(0, 1)
    if anneal:
        product = ops.mask_gradient(product, ops.low_confidence(product, bits, anneal))
        wk = wk.detach()
    t = ops.quantized_linear(x, product, None, shared, weights).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    ak = Activation(inputs["qkx.scale"].view(-1, HEADS).T[..., None], by_head(inputs["qkx.bias_in"]), None, bits, False)
    av, ap = values_quantizer(inputs, bits), probabilities_quantizer(inputs, bits)
    v = heads(ops.quantized_linear(x, wv, bv, shared, weights))
    scaling = v.shape[-1] ** -0.5
    u = (bq.unflatten(0, (HEADS, 1, -1)) @ wk)[:, 0]
    bias = (ops.quantize_activation(x, shared) @ u.T).transpose(1, 2)[:, :, None] * scaling if with_u else None
    out = quantized_attention(x[:, None], t, v, shared, ak, av, ap, scaling, bias)
    return project(inputs, out, bits, weights)


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_linear(kind):
    case = part(stored("linear"), f"{kind}.")
    inputs = leaves(case)
    a = quantizer(inputs, "input", 2, positive=kind == "unsigned")
    output = ops.quantized_linear(inputs["x"], inputs["weight"], inputs["bias"], a, WeightQuantizer(2, 2.0, None))
    output.backward(case["grad_output"])
    assert (output - case["output"]).abs().max() <= 5e-6
    assert_gradients(inputs, part(case, "grad."))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_attention(bits):
    case = stored(f"attention_w{bits}a{bits}")
    inputs = leaves(case)
    output = attend(inputs, bits)
    output.backward(case["grad_output"])
    assert (output - case["output"]).abs().max() <= 2e-5
    assert_gradients(inputs, part(case, "grad."), ignored=["k.bias_out"])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_reparametrised_attention_without_the_term_of_the_query_bias(bits):
    case = stored(f"attention_qkr_w{bits}a{bits}")
    inputs = leaves(case)
    output = attend_reparametrised(inputs, bits, with_u=False)
    output.backward(case["grad_output"])
    assert (output - case["output"]).abs().max() <= 2e-5
    assert_gradients(inputs, part(case, "grad."))


@pytest.mark.parametrize("anneal", [None, 0.05], ids=["free", "annealed"])
@pytest.mark.parametrize("bits", [2, 4])
def test_reparametrised_attention(bits, anneal):
    case = stored(f"attention_qkr_qbias_w{bits}a{bits}")
    inputs = leaves(case)
    output = attend_reparametrised(inputs, bits, with_u=True, anneal=anneal)
    output.backward(case["grad_output"])
    assert (output - case["output"]).abs().max() <= 2e-5
    assert_gradients(inputs, part(case, f"anneal_{anneal}.grad." if anneal else "grad."))


# --- the same of the equations


def activated(inputs, x, role, bits, *, positive=False, view=lambda vector: vector):
    scale, shifts = inputs[f"{role}.scale"], (inputs[f"{role}.bias_in"], inputs[f"{role}.bias_out"])
    scale = view(scale) if role == "v" else scale[:, None]
    return reference.activation(x, scale, bits, positive, *map(view, shifts))


def projected(inputs, x, bits):
    return x @ reference.statsq(inputs["proj.weight"], bits).T + inputs["proj.bias"]


@pytest.mark.parametrize("kind", ["signed", "unsigned"])
def test_linear_of_the_reference(kind):
    case = part(stored("linear"), f"{kind}.")
    inputs = leaves(case)
    x = activated(inputs, inputs["x"], "input", 2, positive=kind == "unsigned")
    output = x @ reference.statsq(inputs["weight"], 2).T + inputs["bias"]
    output.backward(case["grad_output"])
    assert (output - case["output"]).abs().max() <= 5e-6
    assert_gradients(inputs, part(case, "grad."))


@pytest.mark.parametrize("bits", [2, 4])
def test_attention_of_the_reference(bits):
    case = stored(f"attention_w{bits}a{bits}")
    inputs = leaves(case)
    x = activated(inputs, inputs["x"], "qkv:input", bits)
    qkv = x @ reference.statsq(inputs["qkv.weight"], bits).T + inputs["qkv.bias"]
    factors = zip("qkv", map(heads, qkv.chunk(3, -1)), strict=True)
    q, k, v = (activated(inputs, x, role, bits, view=by_head) for role, x in factors)
    out = reference.attend(reference.logits(q, k), v, inputs["probs.scale"][:, None], bits)
    output = projected(inputs, activated(inputs, out, "proj:input", bits), bits)
    output.backward(case["grad_output"])
    assert (output - case["output"]).abs().max() <= 2e-5
    assert_gradients(inputs, part(case, "grad."))


@pytest.mark.parametrize("bits", [2, 4])
def test_reparametrised_attention_of_the_reference(bits):
    case = stored(f"attention_qkr_qbias_w{bits}a{bits}")
    inputs = leaves(case)
    (wq, wk, wv), (bq, _, bv) = inputs["qkv.weight"].chunk(3), inputs["qkv.bias"].chunk(3)
    wq, wk, bq = (w.unflatten(0, (HEADS, -1)) for w in (wq, wk, bq))
    x = activated(inputs, inputs["x"], "input", bits)
    v = activated(inputs, heads(x @ reference.statsq(wv, bits).T + bv), "v", bits, view=by_head)
    qkx = inputs["qkx.scale"], inputs["qkx.bias_in"]
    logits = reference.reparametrised_logits(x, wq, wk, bq, *qkx, bits, bits)
    out = reference.attend(logits, v, inputs["probs.scale"][:, None], bits)
    output = projected(inputs, activated(inputs, out, "proj:input", bits), bits)
    output.backward(case["grad_output"])
    assert (output - case["output"]).abs().max() <= 2e-5
    assert_gradients(inputs, part(case, "grad."))


# --- the rest


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_low_confidence(bits):
    """Exact, but for weights within 1e-6 of the band's edge."""
    values = part(stored("cga_mask"), f"b{bits}.")
    weight, n = values["weight"], 2 ** (bits - 1)
    position = (weight / (2 * weight.abs().mean(1, keepdim=True))).clamp(-1, 1 - 1e-6).double() * n - 0.5
    distance = (position - (position.floor().clamp(-n, n - 2) + 0.5)).abs()
    for width in (0.005, 0.01, 0.1):
        differs = ops.low_confidence(weight, bits, width) != values[f"trainable.{width}"]
        assert ((distance[differs] - width).abs() < 1e-6).all()


def test_oscillation():
    values = stored("oscillation")
    state = Oscillation.start(values["codes"][0])
    for codes, expected in zip(values["codes"][1:], values["frequency"], strict=True):
        state = state.then(codes, 0.01)
        assert torch.allclose(state.frequency, expected.float(), atol=1e-6)


def test_distillation():
    values = stored("distillation")
    student = values["student"].clone().requires_grad_()
    loss = distillation_loss(student, values["labels"], values["teacher"])
    loss.backward()
    assert torch.allclose(loss, values["loss"], atol=1e-5)
    assert torch.allclose(student.grad, values["grad_student"], atol=1e-5)


@pytest.mark.parametrize("columns", [16, 13])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_packing(bits, columns):
    values = part(stored("packing"), f"b{bits}.k{columns}.")
    assert torch.equal(pack_codes(values["codes"], bits), values["packed"])
    assert torch.equal(unpack_codes(values["packed"], bits, columns), values["codes"])
