"""Integer weights, and models that multiply integers.

Oracles: StatsQ and LSQ in float64, and the fake-quantised model, bit for bit.
"""

import pytest
import torch
from ofq_deployed import ONE_SCALE, QKR, WIDE, distance, full, logits, quantized
from ofq_models import codes_of, images
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ext.ofq_quantizer import (
    OFQConfig,
    calibrate,
    freeze,
    full_precision,
    integer,
    integer_products,
    quantize,
    save_packed,
    to_int8,
)
from hf_ext.ofq_quantizer.freezing import frozen_copy
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer

# --- freeze


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_frozen_weights_are_codes_and_scales_of_the_equations(bits):
    model, _ = quantized(w_bits=bits)
    frozen = freeze(model)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert frozen.keys() == layers.keys()
    for name, weight in frozen.items():
        latent = layers[name].weight.detach().flatten(1)
        if weight.method == "statsq":
            codes, scale = codes_of(latent, bits)
            levels = (codes + 0.5) / 2 ** (bits - 1)
        else:
            scale = layers[name].weight_scale_norm.detach().double()[:, None]
            codes = levels = (latent / scale).clamp(-128, 127).round()
        assert weight.codes.dtype == torch.int8
        assert torch.equal(weight.codes.double(), codes.double()), name
        torch.testing.assert_close(weight.scale.double(), scale[:, 0])
        torch.testing.assert_close(weight.dequantize().double(), levels * scale)
    assert {name for name, weight in frozen.items() if weight.method == "lsq"} == {"patch_embed.proj", "head"}
    assert {weight.bits for weight in frozen.values()} == {bits, 8}


def test_frozen_products_of_qkr():
    model, _ = quantized(**QKR)
    weight = model.blocks[1].attn.qkv.weight.detach().double()
    q, k, v = (part.unflatten(0, (3, -1)) for part in weight.chunk(3))
    product = torch.einsum("hdi,hdj->hij", q, k).flatten(0, 1)
    frozen = freeze(model)
    assert "blocks.1.attn.qkv" not in frozen
    for name, latent in (("qk", product), ("v", v.flatten(0, 1))):
        codes, scale = codes_of(latent)
        assert (frozen[f"blocks.1.attn.{name}"].codes == codes).double().mean() > 0.9999  # A is rounded to float32
        torch.testing.assert_close(frozen[f"blocks.1.attn.{name}"].scale.double(), scale[:, 0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("config", [{}, QKR], ids=["plain", "qkr"])
@pytest.mark.parametrize("layer", ["patch_embed.proj", "blocks.1.attn.qkv", "blocks.0.mlp.fc2"])
def test_a_weight_without_codes_is_named(layer, config, bad, tmp_path):
    model, _ = quantized(**config)
    model.get_submodule(layer).weight.data[5].view(-1)[3] = bad
    for deploy in (freeze, to_int8, lambda broken: save_packed(broken, tmp_path / "packed")):
        with pytest.raises(ValueError, match=rf"^{layer}: row 5 "):
            deploy(model)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", ["blocks.0.mlp.fc1", "head"])
def test_a_scale_without_value_is_named(layer):
    """Magnitudes whose sum is beyond float32, or a learnable scale that training lost."""
    model, _ = quantized()
    if layer == "head":
        model.head.weight_scale_norm.data[5] = float("nan")
    else:
        model.get_submodule(layer).weight.data[5] = 3e38
    with pytest.raises(ValueError, match=rf"^{layer}: row 5 "):
        freeze(model)


def test_deployment_asks_for_calibration(tmp_path):
    model = quantize(full("vit")[0], OFQConfig())
    for deploy in (to_int8, lambda raw: save_packed(raw, tmp_path / "packed")):
        with pytest.raises(ValueError, match="calibrate"):
            deploy(model)
    assert not list(tmp_path.iterdir())


# --- models that multiply integers

FLOAT_PARTS = {"boundary_bits": None, "skip_modules": ["blocks.0.mlp", "blocks.1.attn.qkv"]}
CASES = {
    "vit": ("vit", {}),
    "vit_w4a8": ("vit", WIDE),
    "vit_qkr_w3a4": ("vit", QKR | {"w_bits": 3, "a_bits": 4}),
    "vit_qkr_w4a8_one_scale": ("vit", QKR | WIDE | ONE_SCALE),
    "vit_float_parts": (
        "vit",
        FLOAT_PARTS,
    ),
    "deit_distilled": ("deit_distilled", {}),
    "deit3": ("deit3", {"a_bits": 3}),
    "dinov2_swiglu": ("dinov2_swiglu", {}),
    "siglip": ("siglip", {}),
    "swin_w3a8": ("swin", {"w_bits": 3, "a_bits": 8}),
    "swin_qkr": ("swin", QKR),
    "swinv2": ("swinv2", {}),
    "beit_qkr": ("beit", QKR),
    "eva02": ("eva02", {}),
    "eva02_split_w4a8": ("eva02_split", WIDE),
    "hf_vit_w4a8": ("hf_vit", WIDE),
    "hf_vit_qkr": ("hf_vit", QKR),
    "hf_swin": ("hf_swin", {}),
}


@pytest.mark.parametrize(("kind", "config"), CASES.values(), ids=CASES)
def test_integer_products_change_no_bit(kind, config):
    model, x = quantized(kind, **config)
    result = to_int8(model)
    assert logits(result, x).std() > 0.1
    assert distance(result, model, x) == 0
    if kind not in ("swin", "swinv2", "hf_swin"):  # whose hosts take no empty batch
        assert logits(result, x[:0]).shape == (0, *logits(model, x).shape[1:])


class Products(TorchDispatchMode):
    """Counts matrix products: of integers, and of floats."""

    def __init__(self):
        super().__init__()
        self.integer, self.float = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.integer += name == "_int_mm"
        self.float += name in ("mm", "addmm", "bmm", "baddbmm", "mv", "convolution", "linear", "einsum")
        return func(*args, **kwargs or {})


def test_every_low_bit_product_is_one_of_integers():
    model, x = quantized()
    result = to_int8(model)
    with Products() as products:
        logits(result, x)
    layers, attention = 2 * 4 + 2, 2 * (2 * len(x) * 3)  # two products a block, image and head
    assert (products.integer, products.float) == (layers + attention, 0)


def test_integer_model_holds_no_latent_weights_and_leaves_the_other_alone():
    model, x = quantized(**QKR)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model, x)
    result = to_int8(model)
    held = list(result.state_dict().values())
    largest = max(tensor.numel() for tensor in held if tensor.is_floating_point())
    assert largest <= model.pos_embed.numel()
    assert sum(tensor.numel() for tensor in held if tensor.dtype == torch.int8) > 48 * 48 * 20
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(logits(model, x), expected)


def test_full_precision_of_an_integer_model_rounds_weights_only():
    model, x = quantized(**WIDE)
    result = to_int8(model)
    frozen = freeze(model)
    with full_precision(model), full_precision(result), torch.no_grad():
        for name, weight in frozen.items():
            layer = model.get_submodule(name)
            layer.weight.data = weight.dequantize().view(layer.weight.shape)
        torch.testing.assert_close(logits(result, x), logits(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", [{"a_bits": 4}, WIDE | ONE_SCALE, QKR | WIDE], ids=["w2a4", "one_scale", "qkr"])
def test_logits_are_those_of_the_documented_order_of_operations(config):
    """Most differences of one unit in the last place would be rounded away before they show in an output."""
    model, _ = quantized(sizes={"num_heads": 4, "embed_dim": 64}, **config)
    attention = to_int8(model).blocks[0].attn
    left, right = (
        (attention.input_quantizer, attention.qkx_quantizer)
        if attention.reparametrized
        else (attention.q_quantizer, attention.k_quantizer)
    )
    width, generator = 64 if attention.reparametrized else 16, torch.Generator().manual_seed(2)
    q, k = (
        left.codes(torch.randn(3, 1 if attention.reparametrized else 4, 17, width, generator=generator)),
        right.codes(torch.randn(3, 4, 17, width, generator=generator)),
    )
    bias = torch.randn(4, 1, 17, generator=generator)
    s_q, s_k = (
        quantizer.scale.view(-1, 4 if quantizer.per_head and quantizer.scale.numel() > 1 else 1).t()[..., None].detach()
        for quantizer in (left, right)
    )
    shift = left.bias_out.view(-1, 1, width).detach()
    c = (k.float() * shift).double().sum(-1).float()[:, :, None]
    expected = ((q.long() @ k.long().transpose(2, 3)).float() * s_q + c) * (s_k * 0.3).transpose(1, 2) + bias
    assert torch.equal(integer._logits(q, k, left, right, 0.3, bias), expected)


@pytest.mark.parametrize("positive", [False, True], ids=["signed", "unsigned"])
@pytest.mark.parametrize("axis", [-2, -1, None])
def test_codes_of_ties_and_extremes_are_those_of_torch(axis, positive):
    size = {-2: 5, -1: 9, None: 1}[axis]
    quantizer = ActivationQuantizer(3, axis=axis, size=size, positive=positive, switches=None, like=torch.zeros(0))
    quantizer.scale.data = 2.0 ** torch.arange(size)
    quantizer.__class__ = integer.Int8Quantizer
    ratios = torch.tensor([-1e30, -4.5, -1.5, -0.5, -0.0, 0.5, 1.5, 2.5, 1e30])
    x = (ratios * (quantizer.scale[:, None] if axis == -2 else quantizer.scale)).expand(2, 3, 5, 9)
    low, high = (0, 7) if positive else (-4, 3)
    assert torch.equal(quantizer.codes(x).float(), ratios.round().clamp(low, high).expand(x.shape))
    assert (quantizer.codes(x * torch.nan) == low).all()


def test_sums_that_saturate_are_taken_in_two_parts(monkeypatch):
    """As on processors that add pairs of products in 16 bits."""
    monkeypatch.setattr(integer_products, "_products_saturate", lambda: True)
    left = torch.tensor([-128, 127]).repeat(40)[torch.randint(80, (33, 64))].to(torch.int8)
    right = torch.randint(-128, 128, (64, 17)).to(torch.int8)
    calls = []
    multiply, out = torch._int_mm, torch.empty(33, 17, dtype=torch.int32)
    monkeypatch.setattr(torch, "_int_mm", lambda one, other, **out: calls.append(other) or multiply(one, other, **out))
    integer_products.multiply(left, right, 8, out)
    assert torch.equal(out.long(), left.long() @ right.long())
    assert all(part.abs().max() <= 16 for part in calls)


@pytest.mark.parametrize("case", ["bfloat16", "large_sums"])
def test_it_says_where_it_is_close_only(case, caplog):
    options = {"dtype": torch.bfloat16} if case == "bfloat16" else {"sizes": {"embed_dim": 1056, "depth": 1}}
    model, x = quantized(**options, **WIDE)
    result = to_int8(model)
    exact = to_int8(quantized()[0])
    said = "not equal bit for bit"
    assert said not in caplog.text
    logits(exact, images(exact))
    assert said not in caplog.text
    assert distance(result, model, x) <= (0.5 if case == "bfloat16" else 1e-5) * logits(model, x).std()
    assert said in caplog.text


def test_integer_model_refuses_what_it_cannot_do():
    model, _ = quantized()
    result = to_int8(model)
    with pytest.raises(ValueError, match="9 tokens, and the quantiser has scales for 17"):
        result.blocks[0].mlp.fc1(torch.randn(2, 9, 48))
    with pytest.raises(ValueError, match="made by to_int8"):
        to_int8(result)
    with pytest.raises(ValueError, match=r"CPU.* is on meta"):
        to_int8(model.to("meta"))


def other_scales(**config):
    """Of the same weights, calibrated on other images, with other shifts and biases."""
    model, x = quantized(**config)
    calibrate(model, [3 * x])
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "bias_in", "bias_out")):
            parameter.data += 0.2
    return model, x


@pytest.mark.parametrize("ran", [False, True], ids=["", "after a forward"])
@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
@pytest.mark.parametrize("config", [{}, QKR, WIDE | ONE_SCALE], ids=["plain", "qkr", "w4a8_one_scale"])
def test_integer_model_follows_what_is_loaded(config, assign, ran):
    (source, x), target = other_scales(**config), to_int8(quantized(**config)[0])
    if ran:
        assert distance(target, source, x) > 0.1
    target.load_state_dict(to_int8(source).state_dict(), assign=assign)
    assert distance(target, source, x) == 0


@pytest.mark.parametrize("first", ["quantisers", "biases"])
def test_integer_model_follows_the_load_of_parts(first):
    """Shifts of the input lie in the sums of a layer's biases; in transformers one quantiser serves three layers."""
    (source, x), target = other_scales(kind="hf_vit"), to_int8(quantized("hf_vit")[0])
    loaded = to_int8(source)
    biases = {name: tensor for name, tensor in loaded.state_dict().items() if name.endswith(".bias")}
    logits(target, x)
    for part in (first, "biases" if first == "quantisers" else "quantisers"):
        if part == "biases":
            target.load_state_dict(biases, strict=False)
            continue
        for name, module in target.named_modules():
            if isinstance(module, ActivationQuantizer):
                module.load_state_dict(loaded.get_submodule(name).state_dict())
    assert distance(target, source, x) == 0


def test_integer_model_follows_a_cast():
    model, x = quantized()
    before = frozen_copy(model).to(torch.bfloat16)  # latent weights of bfloat16 have other codes
    assert distance(to_int8(model).to(torch.bfloat16), to_int8(before), x.bfloat16()) == 0


def test_integer_model_is_not_calibrated_anew():
    model, x = quantized()
    with pytest.raises(ValueError, match="made by to_int8"):
        calibrate(to_int8(model), [x])


def test_integer_model_is_not_exported():
    model, x = quantized(sizes={"depth": 1})
    with pytest.raises(ValueError, match="cannot be exported; export the model it was made from"):
        torch.export.export(to_int8(model), (x,))


# Each attention, and each way to hold codes; a graph takes seconds.
GRAPHS = (
    *("vit", "vit_qkr_w4a8_one_scale", "vit_float_parts", "dinov2_swiglu", "swin_w3a8", "swinv2"),
    *("beit_qkr", "eva02_split_w4a8", "hf_vit_w4a8", "hf_swin"),
)


@pytest.mark.parametrize(("kind", "config"), [CASES[name] for name in GRAPHS], ids=GRAPHS)
def test_one_graph_of_an_integer_model_changes_no_bit(kind, config):
    model, x = quantized(kind, **config)
    torch._dynamo.reset()
    graphs = []

    def keep(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(str(module.graph))
        return module

    result = torch.compile(to_int8(model), fullgraph=True, backend=keep)
    assert distance(result, model, x) == 0
    (graph,) = graphs
    if config != FLOAT_PARTS:
        assert "hf_ext.ofq_int8_product" in graph
        assert "matmul" not in graph
        assert " @ " not in graph


def test_one_graph_counts_nan_as_the_lowest_code_and_takes_an_empty_batch():
    model, x = quantized(sizes={"depth": 1})
    x[0, :, :9] = torch.nan
    torch._dynamo.reset()
    result = to_int8(model)
    expected = logits(result, x)
    assert expected.isfinite().all()
    graph = torch.compile(result, fullgraph=True, backend="aot_eager")
    assert torch.equal(logits(graph, x), expected)
    assert logits(graph, x[:0]).shape == (0, *expected.shape[1:])


def test_one_graph_follows_what_is_loaded():
    (source, x), target = other_scales(**WIDE), to_int8(quantized(**WIDE)[0])
    torch._dynamo.reset()
    graph = torch.compile(target, fullgraph=True, backend="aot_eager")
    assert distance(graph, source, x) > 0.1
    target.load_state_dict(to_int8(source).state_dict())
    assert distance(graph, source, x) == 0


def test_an_integer_model_compiled_by_inductor_is_the_compiled_quantised_model():
    """The compiler's softmax, GELU and sums are the same in both."""
    model, x = quantized(sizes={"depth": 1}, **WIDE)
    torch._dynamo.reset()
    one, other = (torch.compile(part, fullgraph=True) for part in (to_int8(model), model))
    assert distance(one, other, x) <= 1e-4 * logits(model, x).std()
