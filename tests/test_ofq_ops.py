"""The tensor functions of OFQ: against the equations in float64, and against each other bit for bit.

There are three ways through an operation: tensor functions (any device, compiled graphs), and on a CPU kernels with
products of float32 or of int8. Whatever is rounded must not depend on the way.
"""

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ext.ofq_quantizer import attention_kernels, kernels, ops, reference
from hf_ext.ofq_quantizer.attention_ops import quantized_attention
from hf_ext.ofq_quantizer.ops import Activation, WeightQuantizer, quantized_linear

WAYS = {"functions": None, "float kernels": False, "int8 kernels": True}
STATSQ = WeightQuantizer(2, 2.0, None)


@pytest.fixture
def take(monkeypatch):
    """`take(way)`: have the operations go that way."""
    accept = kernels.accept

    def take(way):
        monkeypatch.setattr(kernels, "accept", accept if way != "functions" else lambda *tensors: False)
        monkeypatch.setattr(kernels, "multiplies_int8", lambda: WAYS[way])
        monkeypatch.setattr(attention_kernels, "_WORTH_INT8", 0)

    return take


def randn(*shape, scale=1.0):
    return (torch.randn(*shape) * scale).requires_grad_()


def scales(*shape):
    return (torch.rand(*shape) * 0.4 + 0.4).requires_grad_()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def run(function, inputs, g):
    """The output of function(*inputs), or of function(inputs) of named ones, and the gradients that they get."""
    if isinstance(inputs, dict):
        names = list(inputs)
        return run(lambda *values: function(dict(zip(names, values, strict=True))), inputs.values(), g)
    leaves = [x.detach().clone().requires_grad_() if x.requires_grad else x for x in inputs]
    output = function(*leaves)
    output.backward(g.to(output.dtype))
    return output.detach(), [x.grad for x in leaves if x.requires_grad]


def assert_near(actual, expected, relative=2e-5):
    for mine, its in zip(actual, expected, strict=True):
        assert mine.shape == its.shape
        assert (mine - its).abs().max() <= relative * its.abs().max().clamp(min=0.1)


def double(tensors):
    return {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in tensors.items()}


# --- StatsQ


@pytest.mark.smoke
@pytest.mark.parametrize("way", ["functions", "int8 kernels"])
@pytest.mark.parametrize(("bits", "coefficient"), [(2, 2.0), (3, 2.95), (4, 2.0)])
def test_statsq_is_the_equation(take, way, bits, coefficient):
    take(way)
    weight, g = randn(24, 100), torch.randn(24, 100)
    output, (gradient,) = run(lambda w: ops.statsq(w, bits, coefficient), [weight], g)
    assert_near([output], [reference.statsq(weight.detach().double(), bits, coefficient)], 1e-6)
    assert torch.equal(gradient, g)  # where it is clipped, too


@pytest.mark.parametrize("w", [STATSQ, WeightQuantizer(4, 2.5, None), WeightQuantizer(8, 2.0, scales(24) / 30)])
def test_integers_times_steps_are_the_weight(w):
    weight = randn(24, 100)
    values, step = ops.weight_integers(weight, w)
    assert torch.equal(values * step[:, None], ops.quantized_weight(weight, w))
    if w.scale is None:
        codes, scale = ops.statsq_codes(weight, w.bits, w.coefficient)
        n = 2 ** (w.bits - 1)
        assert codes.dtype == torch.int8
        assert torch.equal(codes * 2.0 + 1, values)
        assert torch.equal((codes + 0.5) / n * scale[:, None], ops.quantized_weight(weight, w))


@pytest.mark.parametrize("way", ["functions", "int8 kernels"])
def test_odd_rows_concern_themselves_only(take, way):
    take(way)
    weight = torch.randn(6, 50)
    whole = ops.statsq(weight, 2)
    weight[0], weight[1, 7], weight[2, 7], weight[3] = 0, torch.nan, torch.inf, weight[3].sign() * 0.3
    output, (gradient,) = run(lambda w: ops.statsq(w, 2), [weight.requires_grad_()], torch.ones(6, 50))
    assert torch.equal(output[0], torch.zeros(50))
    assert output[1:3].isnan().all()
    assert len(output[3].unique()) == 2
    assert torch.equal(output[4:], whole[4:])
    assert torch.equal(gradient, torch.ones(6, 50))
    assert ops.statsq_codes(weight, 2)[1][1:3].isnan().all()
    assert not ops.low_confidence(weight, 2, 0.5)[:3].any()


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "autocast", "compiled"])
def test_a_row_has_four_levels_of_two_bits(kind):
    weight = torch.randn(8, 200) * 3
    weight = weight.to(getattr(torch, kind)) if kind.startswith(("float", "bfloat")) else weight
    quantize = torch.compile(ops.statsq, fullgraph=True) if kind == "compiled" else ops.statsq
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        output = quantize(weight, 2)
    assert output.dtype == weight.dtype
    for row, source in zip(output.float(), weight.float(), strict=True):
        step = source.double().abs().mean() / 2
        assert torch.allclose(row.unique().double(), torch.tensor([-3, -1, 1, 3]) * step, rtol=5e-3)


@pytest.mark.parametrize("way", ["functions", "compiled"])
def test_statsq_gives_the_same_bits_every_way(take, way):
    weight = torch.randn(256, 1000)
    expected, mask = ops.statsq(weight, 2), ops.low_confidence(weight, 2)
    if way == "compiled":
        assert torch.equal(torch.compile(ops.statsq, fullgraph=True)(weight, 2), expected)
    else:
        take(way)
        assert torch.equal(ops.statsq(weight, 2), expected)
        assert torch.equal(ops.low_confidence(weight, 2), mask)


@pytest.mark.parametrize("way", ["functions", "int8 kernels"])
@pytest.mark.parametrize("bits", [2, 4])
def test_low_confidence_is_near_a_threshold(take, way, bits):
    take(way)
    weight, n, width = torch.randn(16, 300), 2 ** (bits - 1), 0.03
    position = (weight.double() / (2 * weight.double().abs().mean(1, keepdim=True))) * n - 0.5
    distance = (position[..., None] - torch.arange(-n, n - 1) - 0.5).abs().amin(-1)
    mask = ops.low_confidence(weight, bits, width)
    assert mask.any()
    assert ((distance <= width) == mask)[(distance - width).abs() > 1e-5].all()


def test_a_masked_gradient_is_zero_where_it_is_infinite():
    weight, mask = randn(2, 2), torch.tensor([[True, False], [False, True]])
    output, (gradient,) = run(lambda w: ops.mask_gradient(w, mask), [weight], torch.full((2, 2), torch.inf))
    assert torch.equal(output, weight)
    assert torch.equal(gradient, torch.where(mask, torch.inf, 0))


# --- LSQ: where the scale and the shifts of a tensor may be

H, N, C = 3, 7, 10
D, BITS = 6, 3  # of the attention


def activation(t, prefix, bits, positive=False):
    """Of named tensors, those with a prefix."""
    return Activation(*(t.get(prefix + part) for part in ("scale", "bias_in", "bias_out")), bits, positive)


def activated(t, name, prefix, bits, positive=False):
    """x^ by the equation."""
    shifts = (t.get(prefix + part, 0.0) for part in ("bias_in", "bias_out"))
    return reference.activation(t[name], t[prefix + "scale"], bits, positive, *shifts)


PLACES = {
    "token": ((4, N, C), (N, 1), (C,)),
    "one": ((4, N, C), (1,), (C,)),
    "one of two axes": ((4, C), (1,), None),
    "channel": ((4, N, C), (C,), None),
    "row of a weight": ((N, C), (N, 1), None),
    "token of heads": ((4, H, N, C), (N, 1), (H, 1, C)),
    "head and token": ((4, H, N, C), (H, N, 1), (H, 1, C)),
    "channel of heads": ((4, H, N, C), (H, 1, C), (H, 1, C)),
    "token of images": ((2, 2, H, N, C), (N, 1), (C,)),
}


@pytest.mark.parametrize("way", ["functions", "int8 kernels"])
@pytest.mark.parametrize("positive", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("place", PLACES)
def test_activation_is_the_equation(take, way, place, positive):
    take(way)
    shape, of_scale, of_shift = PLACES[place]
    bits, g = 3, torch.randn(shape)
    inputs = {"x": randn(*shape), "scale": scales(*of_scale)}
    if of_shift is not None:
        inputs |= {"bias_in": randn(*of_shift), "bias_out": randn(*of_shift)}

    def mine(t):
        return ops.quantize_activation(t["x"], activation(t, "", bits, positive))

    output, gradients = run(mine, inputs, g)
    expected, its_gradients = run(lambda t: activated(t, "x", "", bits, positive), double(inputs), g)
    assert_near([output, *gradients], [expected, *its_gradients])


@pytest.mark.parametrize("layout", ["contiguous", "heads in tokens", "every second", "expanded"])
def test_kernels_round_as_the_functions_do_however_x_lies(take, layout):
    x = {
        "contiguous": torch.randn(4, H, N, C),
        "heads in tokens": torch.randn(4, N, 3, H, C).permute(2, 0, 3, 1, 4)[1],
        "every second": torch.randn(4, H, N, 2 * C)[..., ::2],
        "expanded": torch.randn(4, 1, N, C).expand(4, H, N, C),
    }[layout]
    for scale in (scales(N, 1), scales(H, 1, C)):
        a = Activation(scale, randn(H, 1, C), randn(H, 1, C), 4, False)
        results = []
        for way in ("functions", "float kernels"):
            take(way)
            results.append(ops.quantize_activation(x, a))
        assert torch.equal(*results)


@pytest.mark.parametrize("way", ["functions", "int8 kernels"])
@pytest.mark.parametrize("axis", [-2, -1, 0, None])
def test_lsq_has_a_scale_for_each_index_of_its_axis(take, way, axis):
    take(way)
    x, bits = randn(4, 5, 6), 4
    size = 1 if axis is None else x.shape[axis]
    scale, view = scales(size), [1] * 3
    view[-1 if axis is None else axis] = size
    inputs, g = {"x": x, "scale": scale}, torch.ones(4, 5, 6)
    expected, its = run(lambda t: reference.lsq(t["x"], t["scale"].view(view), bits), double(inputs), g)
    output, gradients = run(lambda t: ops.lsq(t["x"], t["scale"], bits, axis=axis), inputs, g)
    assert_near([output, *gradients], [expected, *its])
    others = [dim for dim in range(3) if axis is None or dim != axis % 3]
    assert_near([ops.lsq_init(x, bits, True, axis)], [4 * x.detach().abs().mean(others).reshape(-1) / 15**0.5], 1e-6)


@pytest.mark.parametrize("way", ["functions", "int8 kernels"])
def test_a_scale_below_the_smallest_learns(take, way):
    take(way)
    scale = torch.tensor([-1.0]).requires_grad_()
    output, (gradient,) = run(lambda s: ops.lsq(torch.full((1, 2), 0.3), s, 2), [scale], torch.ones(1, 2))
    assert torch.allclose(output, torch.full((1, 2), 1e-5))
    assert torch.allclose(gradient, torch.tensor([2 / 2**0.5]))  # both are clipped at Qp = 1; g = (Qp 2)^-0.5


@pytest.mark.parametrize("way", ["functions", "int8 kernels"])
def test_a_value_on_the_edge_of_the_range_is_not_clipped(take, way):
    take(way)
    x = torch.tensor([[-1.01, -1.0, 0.5, 0.51]]).requires_grad_()  # Qn s = -1, Qp s = 0.5
    _, (gradient,) = run(lambda x: ops.lsq(x, torch.tensor([0.5]), 2), [x], torch.ones(1, 4))
    assert torch.equal(gradient, torch.tensor([[0.0, 1, 1, 0]]))


def test_the_gradient_of_a_scale_depends_on_the_batch_size():
    x, scale = torch.randn(1, 5, 8), scales(5)
    (once,), (twice,) = (
        run(lambda s, n=n: ops.lsq(x.expand(n, 5, 8), s, 4), [scale], torch.ones(n, 5, 8))[1] for n in (1, 2)
    )
    assert torch.allclose(twice, once * 2 / 2**0.5)


# --- the linear layer

IN, OUT = 12, 9
LINEAR = {  # bits of the input, unsigned, the weight's quantiser and the scales, what is left out
    "signed": (2, False, STATSQ, (N, 1), ()),
    "unsigned": (3, True, STATSQ, (N, 1), ()),
    "one scale, no shifts, no bias": (4, False, WeightQuantizer(4, 2.5, None), (1,), ("bias", "bias_in", "bias_out")),
    "shift without bias": (2, False, WeightQuantizer(3, 2.0, None), (N, 1), ("bias", "bias_in")),
    "boundary": (4, False, WeightQuantizer(4, 2.0, torch.ones(OUT)), (1,), ()),
}


def linear_of(case):
    """Tensors, the operation and the equation of them."""
    bits, positive, w, of_scale, left_out = LINEAR[case]
    shapes = {"x": (4, N, IN), "weight": (OUT, IN), "bias": (OUT,), "bias_in": (IN,), "bias_out": (IN,)}
    tensors = {name: randn(*shape) for name, shape in shapes.items() if name not in left_out}
    tensors["scale"] = scales(*of_scale)
    if w.scale is not None:
        tensors["weight_scale"] = scales(OUT)

    def operation(t):
        weights = w._replace(scale=t.get("weight_scale"))
        return quantized_linear(t["x"], t["weight"], t.get("bias"), activation(t, "", bits, positive), weights)

    def equation(t):
        if w.scale is None:
            weight = reference.statsq(t["weight"], w.bits, w.coefficient)
        else:
            weight = reference.lsq(t["weight"], t["weight_scale"][:, None], w.bits)
        return activated(t, "x", "", bits, positive) @ weight.T + t.get("bias", 0.0)

    return tensors, operation, equation


@pytest.mark.smoke
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", LINEAR)
def test_linear_is_the_equation(take, way, case):
    take(way)
    tensors, operation, equation = linear_of(case)
    g = torch.randn(4, N, OUT)
    output, gradients = run(operation, tensors, g)
    expected, its_gradients = run(equation, double(tensors), g)
    assert_near([output, *gradients], [expected, *its_gradients])


@pytest.mark.smoke
@pytest.mark.parametrize("case", LINEAR)
def test_linear_gives_the_same_bits_every_way(take, case):
    tensors, operation, _ = linear_of(case)
    assert_same_bits(take, operation, tensors)


def assert_same_bits(take, operation, tensors):
    """Whatever the way, with gradients and without, and alone as in a batch."""
    batch = [name for name, x in tensors.items() if len(x) == 4]
    outputs = []
    for way in WAYS:
        take(way)
        outputs.append(operation(tensors))
        with torch.no_grad():
            outputs.append(operation(tensors))
            alone = operation(tensors | {name: tensors[name][:1] for name in batch})
        assert torch.equal(alone, outputs[0][:1])
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.skipif(not kernels.multiplies_int8(), reason="products of 8 bits may saturate")
def test_eight_bits_of_attention_go_through_int8(take):
    tensors, operation, _ = attention_of("plain", bits=8)
    tensors |= {f"{name}_scale": tensors[f"{name}_scale"].detach() / 40 for name in "qkvp"}
    assert_same_bits(take, operation, tensors)


@pytest.mark.skipif(not kernels.multiplies_int8(), reason="products of 8 bits may saturate")
def test_eight_bits_unsigned_and_signed_go_through_int8(take):
    x, weight, bias = torch.randn(2, N, 100), torch.randn(OUT, 100), torch.randn(OUT)
    a = Activation(scales(N, 1) / 50, None, torch.randn(100), 8, True)
    outputs = []
    for way in WAYS:
        take(way)
        outputs.append(quantized_linear(x, weight, bias, a, WeightQuantizer(8, 2.0, torch.full((OUT,), 0.02))))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("kind", ["linear", "attention"])
def test_two_threads_change_nothing(kind):
    tensors, operation, _ = linear_of("signed") if kind == "linear" else attention_of("plain")
    g = torch.randn(operation(tensors).shape)
    output, gradients = run(operation, tensors, g)
    torch.set_num_threads(2)
    try:
        its_output, its_gradients = run(operation, tensors, g)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(output, its_output)
    assert_near(gradients, its_gradients, 1e-6)


@pytest.mark.parametrize("kind", ["linear", "attention"])
@pytest.mark.parametrize("way", ["functions", "float kernels"])
def test_a_backward_under_autocast_multiplies_as_its_forward_did(take, way, kind):
    take(way)
    tensors, operation, _ = linear_of("signed") if kind == "linear" else attention_of("plain")
    output = operation(tensors)
    g, leaves = torch.randn(output.shape), list(tensors.values())
    expected = torch.autograd.grad(output, leaves, g, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(output, leaves, g)
    assert_near(actual, expected, 1e-6)


TOKENS = Activation(torch.full((N, 1), 0.6), torch.full((IN,), 0.1), torch.full((IN,), -0.2), 2, False)


def test_an_int8_weight_is_the_weight():
    """As a frozen layer holds it."""
    x, weight, bias, a = torch.randn(2, N, IN), torch.randn(OUT, IN), torch.randn(OUT), TOKENS
    values, step = ops.weight_integers(weight, STATSQ)
    frozen, w = values.to(torch.int8), STATSQ._replace(scale=step)
    assert torch.equal(quantized_linear(x, frozen, bias, a, w), quantized_linear(x, weight, bias, a, STATSQ))
    x, bias = x.bfloat16(), bias.bfloat16()
    assert torch.equal(quantized_linear(x, frozen, bias, a, w), quantized_linear(x, weight, bias, a, STATSQ))


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "autocast", "large sums"])
def test_linear_multiplies_floats_where_sums_would_not_be_exact(kind):
    columns = 9000 if kind == "large sums" else IN
    dtype = {"large sums": torch.float32, "autocast": torch.bfloat16}.get(kind) or getattr(torch, kind)
    cast = torch.float32 if kind == "autocast" else dtype
    x, weight, bias = (torch.randn(shape, dtype=cast) for shape in ((2, N, columns), (OUT, columns), (OUT,)))
    a, w = Activation(scales(N, 1) / 9, None, torch.randn(columns), 8, False), WeightQuantizer(4, 2.0, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        output = quantized_linear(x.requires_grad_(), weight.requires_grad_(), bias, a, w)
    expected = F.linear(
        ops.quantize_activation(x.float(), a).to(dtype), ops.statsq(weight.float(), 4).to(dtype), bias.to(dtype)
    )
    assert output.dtype == dtype
    assert torch.equal(output, expected)
    output.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == cast


def test_sums_fit_up_to_two_to_the_24():
    assert ops.integer_sums_fit(2**14, 128, 8)
    assert not ops.integer_sums_fit(2**14 + 1, 128, 8)


@pytest.mark.parametrize("way", WAYS)
def test_nan_stays_in_its_row_and_its_token(take, way):
    take(way)
    tensors, operation, _ = linear_of("signed")
    tensors = {name: x.detach() for name, x in tensors.items()}
    expected = operation(tensors)
    expected[1, 2], expected[..., 4] = torch.nan, torch.nan
    tensors["x"][1, 2, 3], tensors["weight"][4, 5] = torch.nan, torch.nan
    assert torch.equal(operation(tensors).nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("kind", ["linear", "attention"])
@pytest.mark.parametrize("way", WAYS)
def test_an_empty_batch_gives_an_empty_output_and_gradients_of_zero(take, way, kind):
    take(way)
    tensors, operation, _ = linear_of("signed") if kind == "linear" else attention_of("plain")
    tensors = {name: x.detach()[:0].requires_grad_() if len(x) == 4 else x for name, x in tensors.items()}
    output, gradients = run(operation, tensors, torch.zeros(operation(tensors).shape))
    assert output.shape[:2] == (0, N)
    assert all((gradient == 0).all() for gradient in gradients)


def saved_bytes(function):
    """Of the storages that autograd keeps for function(), each once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sum(storages.values())


def test_linear_keeps_little_more_than_nn_linear():
    x, layer = randn(16, 197, 192), nn.Linear(192, 768)
    a = Activation(scales(197, 1), randn(192), randn(192), 2, False)
    ours = saved_bytes(lambda: quantized_linear(x, layer.weight, layer.bias, a, STATSQ))
    assert ours <= 1.05 * saved_bytes(lambda: layer(x))


def test_linear_refuses_a_scale_a_channel():
    with pytest.raises(ValueError, match=r"\(12,\) is one a channel"):
        quantized_linear(
            torch.randn(2, N, IN), torch.randn(OUT, IN), None, Activation(scales(IN), None, None, 2, False), STATSQ
        )


# --- attention

ATTENTION = {  # heads of the queries; scales of the queries, keys and probabilities; the logits' bias
    "plain": (H, (N, 1), (N, 1), (N, 1), None),
    "shared queries": (1, (N, 1), (H, N, 1), (N, 1), (4, H, 1, N)),
    "one scale": (H, (1,), (1,), (1,), None),
    "bias of positions": (H, (N, 1), (N, 1), (N, 1), (H, N, N)),
    "bias of windows": (H, (N, 1), (N, 1), (N, 1), (4, H, N, N)),
    "bias of queries": (H, (N, 1), (N, 1), (N, 1), (1, H, N, 1)),
}


def attention_of(case, bits=BITS):
    """Tensors, the operation and the equation of them."""
    left, of_q, of_k, of_p, of_bias = ATTENTION[case]
    tensors = {name: (torch.randn(4, N, n, D) * 2).transpose(1, 2) for name, n in zip("qkv", (left, H, H), strict=True)}
    tensors |= {"q_scale": scales(*of_q), "k_scale": scales(*of_k), "v_scale": scales(H, 1, D)}
    tensors |= {"p_scale": scales(*of_p).detach() / 8, "q_bias_in": randn(left, 1, D), "q_bias_out": randn(left, 1, D)}
    tensors |= {name: randn(H, 1, D) for name in ("k_bias_in", "v_bias_in", "v_bias_out")}
    if of_bias is not None:
        tensors["bias"] = randn(*of_bias)
    tensors = {name: x.detach().requires_grad_() for name, x in tensors.items()}

    def operation(t):
        how = (activation(t, f"{name}_", bits, name == "p") for name in "qkvp")
        return quantized_attention(t["q"], t["k"], t["v"], *how, D**-0.5, t.get("bias"))

    def equation(t):
        q, k, v = (activated(t, name, f"{name}_", bits) for name in "qkv")
        return reference.attend(reference.logits(q, k, t.get("bias", 0.0)), v, t["p_scale"], bits)

    return tensors, operation, equation


@pytest.mark.smoke
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_is_the_equation(take, monkeypatch, way, case):
    take(way)
    monkeypatch.setattr(attention_kernels, "_CHUNK", 3 * H * N * N)  # three images, then one
    tensors, operation, equation = attention_of(case)
    g = torch.randn(4, N, H * D)
    output, gradients = run(operation, tensors, g)
    expected, its_gradients = run(equation, double(tensors), g)
    assert_near([output, *gradients], [expected, *its_gradients], 5e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_gives_the_same_bits_every_way(take, case):
    tensors, operation, _ = attention_of(case)
    assert_same_bits(take, operation, tensors)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_spreads_in_attention_alike_every_way(take, name):
    tensors, operation, _ = attention_of("plain")
    tensors = {name: x.detach() for name, x in tensors.items()}
    tensors[name][1, 2, 3, 4] = torch.nan
    outputs = []
    for way in WAYS:
        take(way)
        outputs.append(operation(tensors))
    assert outputs[0].isnan().sum() == {"q": D, "k": N * D, "v": N}[name]
    assert all(torch.equal(output.nan_to_num(1e9), outputs[0].nan_to_num(1e9)) for output in outputs)


@pytest.mark.parametrize("kind", ["bfloat16", "autocast", "large sums"])
def test_attention_multiplies_floats_where_sums_would_not_be_exact(monkeypatch, kind):
    tensors, operation, _ = attention_of("plain")
    tensors = {name: x.detach() for name, x in tensors.items()}
    dtype, sums = torch.float32 if kind == "large sums" else torch.bfloat16, set()
    if kind == "bfloat16":
        tensors |= {name: tensors[name].bfloat16() for name in "qkv"}
    if kind == "large sums":
        monkeypatch.setattr("hf_ext.ofq_quantizer.attention_ops.integer_sums_fit", lambda *size: sums.add(size))
    q, k, v = (ops.quantize_activation(tensors[n].float(), activation(tensors, f"{n}_", BITS)).to(dtype) for n in "qkv")
    probs = (q @ k.transpose(-2, -1)).float().mul(D**-0.5).softmax(-1)
    probs = ops.quantize_activation(probs, activation(tensors, "p_", BITS, True)).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        output = operation(tensors)
    assert output.dtype == dtype
    assert torch.equal(output, (probs @ v).transpose(1, 2).flatten(2))
    if kind == "large sums":
        assert sums == {(D, 4, 4), (N, 7, 4)}


def test_attention_keeps_its_inputs_only():
    tensors, operation, _ = attention_of("bias of windows")
    assert saved_bytes(lambda: operation(tensors)) <= sum(x.numel() * x.element_size() for x in tensors.values())


@pytest.mark.parametrize(
    ("name", "scale", "message"),
    [
        ("q_scale", (H, 1, D), "q takes one scale, or one a token"),
        ("k_scale", (H, 1, D), "k takes one scale, or one a token"),
        ("p_scale", (N,), "the probabilities takes? one scale, or one a token"),
        ("v_scale", (N, 1), "v takes one scale, or one a channel"),
        ("k_bias_out", (H, 1, D), "k takes no bias_out"),
    ],
)
def test_attention_refuses_a_scale_that_does_not_leave_the_sum(name, scale, message):
    tensors, operation, _ = attention_of("plain")
    with pytest.raises(ValueError, match=message):
        operation(tensors | {name: scales(*scale)})


# --- graphs


class Block(nn.Module):
    """A linear layer, the attention of its output, and a product with a weight quantised by itself."""

    def __init__(self):
        super().__init__()
        tensors, *_ = attention_of("plain")
        self.rest = nn.ParameterDict({name: x.detach() for name, x in tensors.items() if name not in ("q", "k", "v")})
        self.linear, self.last = nn.Linear(IN, 3 * H * D), nn.Linear(H * D, H * D)
        self.scale, self.bias_in, self.bias_out = (nn.Parameter(x.clone()) for x in TOKENS[:3])

    def forward(self, x: Tensor) -> Tensor:
        a = Activation(self.scale, self.bias_in, self.bias_out, 2, False)
        qkv = quantized_linear(x, self.linear.weight, self.linear.bias, a, STATSQ)
        q, k, v = qkv.unflatten(-1, (3, H, D)).permute(2, 0, 3, 1, 4)
        how = (activation(self.rest, f"{name}_", BITS, name == "p") for name in "qkvp")
        return F.linear(quantized_attention(q, k, v, *how, D**-0.5), ops.statsq(self.last.weight, 2))


def test_a_compiled_graph_is_whole_and_has_the_gradients():
    block, x = Block(), torch.randn(4, N, IN)
    compiled = torch.compile(block, fullgraph=True)
    for images in (x, torch.randn(6, N, IN)):  # the second is compiled for any number
        gradients = []
        for module in (block, compiled):
            block.zero_grad()
            output = module(images)
            output.sum().backward()
            gradients.append([output.detach(), *(p.grad for p in block.parameters() if p is not block.last.bias)])
        assert_near(*gradients, 1e-4)


def test_an_exported_graph_takes_any_number_of_images():
    block, x = Block().requires_grad_(False), torch.randn(4, N, IN)
    exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("images")},))
    assert not [node for node in exported.graph.nodes if "hf_ext" in str(node.target)]
    images = torch.randn(9, N, IN)
    assert torch.allclose(exported.module()(images), block(images), atol=1e-5)


def test_the_operator_of_compiled_graphs_keeps_the_rules_of_operators():
    for weight in (torch.randn(6, 50), torch.randn(50, 6).T):
        torch.library.opcheck(kernels.compiled_statsq, (weight, 2, 2.0))
    assert torch.Tag.pt2_compliant_tag in torch.ops.hf_ext.ofq_statsq.default.tags
    with pytest.raises(RuntimeError, match="no autograd formula"):
        kernels.compiled_statsq(torch.randn(6, 50, requires_grad=True), 2, 2.0).sum().backward()


def test_the_operator_can_be_registered_again():
    """Test tools purge `sys.modules`, and an import may be interrupted."""
    code = "import sys; import hf_ext.ofq_quantizer.kernels as kernels; del sys.modules[kernels.__name__]; "
    code += "import hf_ext.ofq_quantizer.kernels as again; assert again is not kernels"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
