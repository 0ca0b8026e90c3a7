"""Every family of timm: what conversion keeps, what it rounds, proved from outside, and what it refuses."""

import copy
from collections import Counter
from fnmatch import fnmatchcase
from inspect import signature
from typing import Any

import pytest
import timm
import torch
from ofq_models import FAMILIES, VIT, build, codes_of, images, linears, statsq_of
from ofq_oracle import assert_gradients, attention, boundary, linear, position_bias
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_ext.ofq_quantizer import OFQConfig, activation_quantizers, calibrate, full_precision, quantize

NO_PRODUCT = {"eva02": "rotary", "eva02_split": "rotary", "swinv2": "cosine"}
FORMS = [(family, False) for family in FAMILIES] + [(family, True) for family in FAMILIES if family not in NO_PRODUCT]
FORM_NAMES = [family + ("_qkr" if qkr else "") for family, qkr in FORMS]
each_form = pytest.mark.parametrize("family, qkr", FORMS, ids=FORM_NAMES)


def calibrated(model: nn.Module, **config: Any) -> nn.Module:
    return calibrate(quantize(model, OFQConfig(**config)), [images(model, 8, seed=1)])


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# --- what conversion keeps


@pytest.mark.smoke
@each_form
def test_every_tensor_keeps_its_name_and_value(family, qkr):
    stock = build(family)
    model = quantize(copy.deepcopy(stock), OFQConfig(qk_reparam=qkr))
    before, after = stock.state_dict(), model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    added = set(after) - set(before)
    assert added and all(name.endswith(("scale_norm", "bias_in", "bias_out", "initialized")) for name in added)
    assert {name for name, _ in stock.named_parameters()} < {name for name, _ in model.named_parameters()}
    assert not model.load_state_dict(before, strict=True).missing_keys
    back = stock.load_state_dict(after, strict=False)
    assert not back.missing_keys and set(back.unexpected_keys) == added


OPTIONS = {
    "no_qkv_bias": {"qkv_bias": False},
    "layer_scale": {"init_values": 0.1},
    "registers_and_average": {"reg_tokens": 2, "global_pool": "avg"},
    "no_class_token": {"class_token": False, "global_pool": "avg", "fc_norm": True},
    "no_proj_bias": {"proj_bias": False},
}
VARIANTS = [(family, qkr, {}) for family, qkr in FORMS]
VARIANTS += [("vit", qkr, options) for options in OPTIONS.values() for qkr in (False, True)]
VARIANTS += [("vit", False, {"qk_norm": True}), ("swin", True, {"qkv_bias": False})]
VARIANT_NAMES = [*FORM_NAMES, *(name + end for name in OPTIONS for end in ("", "_qkr")), "qk_norm", "swin_no_bias_qkr"]


@pytest.mark.smoke
@pytest.mark.parametrize("family, qkr, options", VARIANTS, ids=VARIANT_NAMES)
def test_without_rounding_it_is_the_stock_model(family, qkr, options):
    """Norms, biases and tables of positions are random, so that a term which is left out shows."""
    stock = build(family, **options)
    x = images(stock)
    model = calibrated(copy.deepcopy(stock), qk_reparam=qkr)
    expected = logits(stock, x)
    with full_precision(model):
        found = logits(model, x)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (logits(model, x) - expected).abs().max() > 0.05 * expected.abs().max()


def test_the_reference_drops_the_query_bias_under_qkr():
    stock = build("vit")
    with torch.no_grad():
        for block in stock.blocks:
            block.attn.qkv.bias[:48] = 0
    model = calibrated(build("vit"), qk_reparam=True, reference_compat=True)
    with full_precision(model):
        assert (logits(model, images(stock)) - logits(stock, images(stock))).abs().max() < 1e-4


# --- what is rounded: products of integers


class Products(TorchDispatchMode):
    """How many distinct values the operands of every product of matrices have, if all of them are integers."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"mm", "bmm", "addmm", "baddbmm", "convolution", "_int_mm"}:
            operands = [x for x in tree_leaves(args) if isinstance(x, Tensor) and x.ndim > 1][-2:]
            if all(torch.equal(x, x.round()) and x.any() for x in operands):
                self.seen.append(tuple(sorted(len(x.unique()) for x in operands)))
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("w_bits, a_bits", [(2, 2), (3, 4)])
@each_form
def test_every_product_multiplies_integers_of_few_bits(family, qkr, w_bits, a_bits):
    model = calibrated(build(family), w_bits=w_bits, a_bits=a_bits, qk_reparam=qkr)
    x = images(model, 4)
    heads = 2 if family == "deit_distilled" else 1
    attentions = sum(name.endswith("attn.proj") for name in linears(model))
    with Products() as inside:
        logits(model, x)
    low = [pair for pair in inside.seen if max(pair) <= 2 ** max(w_bits, a_bits)]
    wide = [pair for pair in inside.seen if max(pair) > 2 ** max(w_bits, a_bits)]
    # Logits and values beside the linear layers; with QKR the product of queries and keys has a layer of its own.
    assert len(low) == len(linears(model)) + (3 if qkr else 2) * attentions
    assert all(few <= 2 ** min(w_bits, a_bits) or w_bits < a_bits for few, _ in low)
    assert len(wide) == 1 + heads and all(many <= 256 for _, many in wide)
    with full_precision(model), Products() as inside:
        logits(model, x)
    assert not inside.seen


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_exchanging_weights_of_equal_code_changes_nothing_and_negating_them_does(family):
    model = build(family)
    with torch.no_grad():
        for layer in linears(model).values():  # sums of multiples of 2**-10 are exact: scales do not move
            layer.weight.copy_((layer.weight * 1024).round() / 1024)
    calibrated(model)
    x = images(model)
    expected, layers = logits(model, x), linears(model)
    assert len(layers) >= 8
    for name, layer in layers.items():
        weight = layer.weight.detach().clone()
        mirrored = weight.clone()
        for row, codes in zip(mirrored, codes_of(weight)[0], strict=True):
            for code in codes.unique():
                row[codes == code] = row[codes == code].flip(0)
        assert (mirrored != weight).float().mean() > 0.7
        with torch.no_grad():
            layer.weight.copy_(mirrored)
            assert torch.equal(logits(model, x), expected), name
            layer.weight.copy_(-weight)
            assert not torch.equal(logits(model, x), expected), name
            layer.weight.copy_(weight)
    assert torch.equal(logits(model, x), expected)


def test_exchanging_columns_of_keys_of_equal_code_changes_nothing_under_qkr():
    """Two columns of W_k, one 1.25 times the other and both small: entries of the product with the same code."""
    model = build("vit", qkv_bias=False)
    with torch.no_grad():
        for block in model.blocks:
            weight = block.attn.qkv.weight
            weight.copy_((weight * 32).round() / 32)
            weight[48:96, 5] = weight[48:96, 4] / 64
            weight[48:96, 6] = weight[48:96, 5] * 1.25
    calibrated(model, qk_reparam=True)
    x = images(model)
    expected = logits(model, x)
    for block in model.blocks:
        weight = block.attn.qkv.weight
        with torch.no_grad():
            weight[48:96, 5:7] = weight[48:96, 5:7].flip(1)
            assert torch.equal(logits(model, x), expected)
            with full_precision(model):
                plain = logits(model, x)
            weight[48:96, 5:7] = weight[48:96, 5:7].flip(1)
            with full_precision(model):
                assert not torch.equal(logits(model, x), plain)
            for part in (slice(0, 48), slice(48, 96), slice(96, 144)):
                weight[part] *= -1
                assert not torch.equal(logits(model, x), expected)
                weight[part] *= -1


ENDS = {"vit": ["patch_embed.proj", "head"], "deit_distilled": ["patch_embed.proj", "head", "head_dist"]}
ENDS |= {"swin": ["patch_embed.proj", "head.fc"], "siglip": ["patch_embed.proj", "head"]}


@pytest.mark.parametrize("family", ENDS)
def test_first_and_last_layer_have_eight_bits(family):
    model = calibrated(build(family))
    x = images(model)
    expected = logits(model, x)
    for name in ENDS[family]:
        layer = model.get_submodule(name)
        rows = layer.weight.detach().flatten(1)
        scale = layer.weight_scale_norm.detach()
        torch.testing.assert_close(scale, 2 * rows.abs().mean(1) / 127**0.5)
        codes = (rows / scale[:, None]).clamp(-128, 127).round()
        assert len(codes.unique()) > 30
        with torch.no_grad():
            layer.weight.copy_(((codes + 0.3) * scale[:, None]).view_as(layer.weight))
            assert torch.equal(logits(model, x), expected), name
            layer.weight.neg_()
            assert not torch.equal(logits(model, x), expected), name
            layer.weight.neg_()


# --- the equations


@pytest.mark.parametrize("bits", [(2, 2), (4, 3)], ids=["w2a2", "w4a3"])
@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
@pytest.mark.parametrize("family, options", [("vit", {}), ("vit", {"qkv_bias": False}), ("swin", {})])
def test_every_module_computes_the_equations(family, options, qkr, bits):
    """And their gradients, each from the input that it got, with shifts at random; two images."""
    model = calibrated(build(family, **options), qk_reparam=qkr, w_bits=bits[0], a_bits=bits[1])
    generator = torch.Generator().manual_seed(5)
    seen: dict[str, tuple[tuple, Tensor]] = {}
    with torch.no_grad():
        for quantizer in activation_quantizers(model).values():
            for shift in (quantizer.bias_in, quantizer.bias_out):
                if shift is not None:
                    shift.add_(0.2 * torch.randn(shift.shape, generator=generator))
            quantizer.scale_norm.mul_(1 + 0.2 * torch.rand(quantizer.scale_norm.shape, generator=generator))
    ends = ENDS[family]
    names = [*ends, *(n for n, m in model.named_modules() if n.endswith((".attn", "fc1", "fc2", "reduction")))]
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, out, name=name: seen.update({name: ((*args, *kwargs.values()), out)}),
            with_kwargs=True,
        )
    logits(model, images(model))
    kinds = Counter()
    for name, ((x, *others), _) in seen.items():
        module, x = model.get_submodule(name), x.clone().requires_grad_()
        if name in ends:
            expected = boundary(model, name, x)
        elif name.endswith(".attn"):
            mask = next((y for y in others if isinstance(y, Tensor)), None)
            expected = attention(model, name, x, position_bias(module, mask), *bits)
            kinds["masked"] += mask is not None
        else:
            expected = linear(model, name, x.flatten(1, -2), *bits).view(*x.shape[:-1], -1)
        found = module(x, *others)
        assert (found - expected).abs().max() < 2e-5 * expected.abs().max(), name
        assert_gradients(module, x, found, expected, torch.randn(expected.shape, generator=generator))
        kinds[name.rpartition(".")[2]] += 1
    blocks = 4 if family == "swin" else 2
    assert kinds["attn"] == kinds["fc1"] == kinds["fc2"] == blocks and len(seen) == len(names)
    assert kinds["masked"] == (1 if family == "swin" else 0)


def test_roles_are_those_of_the_paper():
    plain = {f"blocks.0.attn{end}" for end in (".qkv:input", ":q", ":k", ":v", ":probs", ".proj:input")}
    product = {f"blocks.0.attn{end}" for end in (":input", ":qkx", ":v", ":probs", ".proj:input")}
    mlp = {"blocks.0.mlp.fc1:input", "blocks.0.mlp.fc2:input"}
    for qkr, attn in ((False, plain), (True, product)):
        roles = activation_quantizers(quantize(build("vit"), OFQConfig(qk_reparam=qkr, a_bits=3)))
        ends = {"patch_embed.proj:input", "head:input"}
        assert {role for role in roles if "blocks.1" not in role} == attn | mlp | ends
        unsigned = {role for role, a in roles.items() if a.positive}
        assert unsigned == {f"blocks.{i}.{end}" for i in (0, 1) for end in ("attn:probs", "mlp.fc2:input")}
        assert {role for role, a in roles.items() if a.bits == 8} == ends
        assert all(a.bits == 3 for role, a in roles.items() if role not in ends)
        assert all(a.scale.ndim == 1 and a.scale.dtype == torch.float32 for a in roles.values())
    sizes = {role.removeprefix("blocks.0."): len(a.scale) for role, a in roles.items()}
    assert (sizes["attn:qkx"], sizes["attn:v"], sizes["attn:probs"], sizes["mlp.fc2:input"]) == (17 * 3, 48, 17, 17)
    assert sizes["head:input"] == sizes["patch_embed.proj:input"] == 1


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(
            ("vit", {"scale_mlp_norm": True}),
            marks=pytest.mark.skipif(
                "scale_mlp_norm" not in signature(timm.models.VisionTransformer).parameters,
                reason="this timm has no norm inside the MLP",
            ),
            id="normed",
        ),
        pytest.param(("dinov2_swiglu", {}), id="gated"),
    ],
)
def test_what_an_mlp_norms_or_gates_has_either_sign(model):
    family, sizes = model
    roles = activation_quantizers(quantize(build(family, **sizes), OFQConfig()))
    assert not any(a.positive for role, a in roles.items() if ".mlp." in role)


# --- levels


FORWARDS = ["float32", "bfloat16", "float16", "autocast"]


def effective_weight(layer: nn.Linear, tokens: int, form: str) -> Tensor:
    """Column by column, from the answers to unit vectors; scale 1 and no shifts let those pass as they are."""
    layer = copy.deepcopy(layer)
    with torch.no_grad():
        layer.input_quantizer.scale_norm.fill_(1)
        layer.input_quantizer.bias_in.zero_()
        layer.input_quantizer.bias_out.zero_()
        layer.bias.zero_()
    count = -(-layer.in_features // tokens)
    x = torch.eye(count * tokens, layer.in_features).view(count, tokens, -1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast"):
        dtype = torch.float32 if form == "autocast" else getattr(torch, form)
        y = layer.to(dtype)(x.to(dtype))
    return y.flatten(0, 1)[: layer.in_features].T.float()


@pytest.mark.parametrize("form", FORWARDS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_row_has_as_many_levels_as_the_bits_allow(bits, form):
    layer = calibrated(build("vit"), w_bits=bits).blocks[0].mlp.fc1
    found = effective_weight(layer, 17, form)
    assert max(len(row.unique()) for row in found) == 2**bits
    assert found.all(), "no level is zero"
    tolerance = 1e-6 if form == "float32" else 1e-2
    weight = layer.weight if form in ("float32", "autocast") else layer.weight.to(getattr(torch, form))
    expected = statsq_of(weight.float(), bits)
    agree = ((found - expected).abs() <= tolerance * expected.abs().max(1, keepdim=True).values).double()
    assert agree.mean() == 1


@pytest.mark.parametrize("form", FORWARDS)
def test_rows_of_zeros_of_one_number_and_with_a_nan(form):
    layer = calibrated(build("vit")).blocks[0].mlp.fc1
    plain = effective_weight(layer, 17, form)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1] = 0.7
        layer.weight[2] = -0.7
        layer.weight[3, 5] = float("nan")
        layer.weight[4, 7] = float("-inf")
    found = effective_weight(layer, 17, form)
    assert not found[0].any()
    assert all(len(found[row].unique()) == 1 for row in (1, 2))
    assert found[1, 0] > 0 > found[2, 0]
    assert found[3:5].isnan().all()
    assert torch.equal(found[5:], plain[5:])


@pytest.mark.parametrize("qkr", [False, True])
def test_a_head_of_zeros_and_its_gradients(qkr):
    model = build("vit")
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[:16] = 0
        model.blocks[1].mlp.fc1.weight.zero_()
    calibrated(model, qk_reparam=qkr).train()
    model(images(model)).square().sum().backward()
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)
    assert model.blocks[0].attn.qkv.weight.grad[:16].any()


@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
def test_gradients_of_a_part_are_those_of_the_whole(qkr):
    """Frozen scales, weights or biases, and the gradient of the images."""
    model = calibrated(build("vit"), qk_reparam=qkr).train()
    x = images(model).requires_grad_()
    model(x).square().sum().backward()
    whole = {name: value.grad for name, value in model.named_parameters()}
    for part in ("scale_norm", "bias_in", "bias_out", "weight", "qkv.weight", "head.weight", "bias"):
        again = x.detach().clone().requires_grad_(part == "weight")
        for name, value in model.named_parameters():
            value.grad = None
            value.requires_grad_(name.endswith(part))
        model(again).square().sum().backward()
        for name, value in model.named_parameters():
            assert (value.grad is None) == (not name.endswith(part)), name
            assert value.grad is None or torch.equal(value.grad, whole[name]), name
        assert again.grad is None or torch.equal(again.grad, x.grad)


# --- what is left out, and what is refused


def test_ends_and_chosen_layers_stay_as_they_are():
    model = quantize(build("vit"), OFQConfig(boundary_bits=None, skip_modules=["blocks.0.*", "*.fc1"]))
    stock = build("vit")
    left = {name for name, layer in model.named_modules() if type(layer) in (nn.Linear, nn.Conv2d)}
    first = {f"blocks.0.{end}" for end in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert left == first | {"patch_embed.proj", "head", "blocks.1.mlp.fc1"}
    x = images(model)
    assert torch.equal(model.patch_embed(x), stock.patch_embed(x))
    assert set(activation_quantizers(model)) == {
        f"blocks.1.{end}"
        for end in ("attn.qkv:input", "attn:q", "attn:k", "attn:v", "attn:probs", "attn.proj:input", "mlp.fc2:input")
    }


LEFT_OUT = [("vit", "*.qkv"), ("beit", "*.attn.*"), ("swinv2", "*.qkv"), ("eva02_split", "*.v_proj")]
LEFT_OUT += [("eva02_split", "*.attn.*"), ("eva02", "blocks.0"), ("swin", "layers.1"), ("dinov2_swiglu", "*.mlp")]


@pytest.mark.parametrize("family, pattern", LEFT_OUT)
def test_layers_that_a_pattern_leaves_out_are_the_hosts(family, pattern):
    """A pattern that matches a module takes out all that is in it."""
    stock = build(family)
    model = calibrated(copy.deepcopy(stock), skip_modules=[pattern])
    out = [name for name in stock.state_dict() if fnmatchcase(name, f"{pattern}.*")]
    assert out and all(quantizer.ready for quantizer in activation_quantizers(model).values())
    assert not [role for role in activation_quantizers(model) if fnmatchcase(role, f"{pattern}[.:]*")]
    for name, module in stock.named_modules():
        if isinstance(module, nn.Linear) and any(key.startswith(f"{name}.") for key in out):
            assert type(model.get_submodule(name)) is type(module), name
    x = images(stock)
    with full_precision(model):
        torch.testing.assert_close(logits(model, x), logits(stock, x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(logits(model, x), logits(stock, x))


def fingerprint(model: nn.Module) -> tuple[list, dict]:
    return [(name, type(module)) for name, module in model.named_modules()], model.state_dict()


REFUSED = {
    "cait": (lambda: timm.create_model("cait_xxs24_224", **VIT), {}, "TalkingHeadAttn|ClassAttn"),
    "xcit": (lambda: timm.create_model("xcit_nano_12_p16_224", img_size=32, depth=1), {}, "ClassAttn|XCA"),
    "resnet": (lambda: timm.create_model("resnet10t", num_classes=3), {}, "ResNet.*attention"),
    "a linear layer": (lambda: nn.Linear(3, 3), {}, "Linear.*attention"),
    "twice": (lambda: quantize(build("vit"), OFQConfig()), {}, "already"),
    "pattern": (lambda: build("vit"), {"skip_modules": ["blocks.7.*"]}, r"blocks\.7\.\*"),
    "one pattern of two": (lambda: build("vit"), {"skip_modules": ["head", "tail"]}, "tail"),
    "images of any size": (lambda: build("vit", dynamic_img_size=True), {}, 'activation_scale="tensor"'),
    "patch dropout": (lambda: build("vit", patch_drop_rate=0.25), {}, 'activation_scale="tensor"'),
    "qk_norm": (lambda: build("vit", qk_norm=True), {"qk_reparam": True}, "Attention.*norm"),
    **{
        f"{family} qkr": (lambda family=family: build(family), {"qk_reparam": True}, f"Attention.*{reason}")
        for family, reason in NO_PRODUCT.items()
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_changed(case):
    create, options, message = REFUSED[case]
    model = create()
    modules, state = fingerprint(model)
    state = {name: value.clone() for name, value in state.items()}
    with pytest.raises(ValueError, match=message):
        quantize(model, OFQConfig(**options))
    after, values = fingerprint(model)
    assert after == modules
    assert values.keys() == state.keys() and all(torch.equal(values[name], state[name]) for name in state)


@pytest.mark.parametrize("option", [{"dynamic_img_size": True}, {"patch_drop_rate": 0.25}], ids=["size", "patch drop"])
@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
def test_any_number_of_tokens_with_one_scale_a_tensor(option, qkr):
    model = quantize(build("vit", **option), OFQConfig(activation_scale="tensor", qk_reparam=qkr)).train()
    model(images(model)).sum().backward()
    sizes = {role.partition(":")[2]: len(a.scale) for role, a in activation_quantizers(model).items()}
    assert {role: size for role, size in sizes.items() if size > 1} == {"v": 48}
    if "dynamic_img_size" in option:
        assert logits(model.eval(), torch.randn(2, 3, 48, 40)).isfinite().all()
