"""The attention of timm and of transformers: its roles, gradients of all that it holds, annealing, autocast."""

from re import search
from typing import Any

import ofq_hosts
import pytest
import torch
from ofq_models import FAMILIES, build, images
from ofq_oracle import attention, position_bias
from ofq_training import near_threshold
from torch import Tensor, nn

from hf_ext.ofq_quantizer import ConfidenceAnnealing, OFQConfig, activation_quantizers, calibrate, freeze, quantize
from hf_ext.ofq_quantizer import attention as attention_module

NO_PRODUCT = {"eva02", "eva02_split", "swinv2"}
PLAIN, QKR = {}, {"qk_reparam": True}
REFERENCE = QKR | {"reference_compat": True}
RECIPES = {"plain": PLAIN, "qkr": QKR, "reference": REFERENCE}
HOSTS = [*FAMILIES, *(f"transformers {kind}" for kind in ofq_hosts.MODELS)]
FORMS = [(host, recipe) for host in HOSTS for recipe in RECIPES if recipe == "plain" or host not in NO_PRODUCT]


def built(host: str) -> tuple[nn.Module, Tensor]:
    """A model of full precision, and images for it."""
    library, _, kind = host.partition(" ")
    if not kind:
        model = build(library)
        return model, images(model, 4)
    model = ofq_hosts.stock(kind)
    return model, ofq_hosts.images(model, 4)


def loss(model: nn.Module, x: Tensor) -> Tensor:
    outputs = model(x)
    outputs = outputs if isinstance(outputs, tuple) else (getattr(outputs, "logits", outputs),)
    return sum(y.square().sum() for y in outputs)


# --- roles and gradients


@pytest.mark.parametrize("recipe", ["plain", "qkr"])
@pytest.mark.parametrize("kind", ["vit", "deit", "swin"])
def test_roles_in_transformers_are_those_of_the_paper(kind, recipe):
    """What comes out of GELU is unsigned."""
    model = quantize(ofq_hosts.stock(kind), OFQConfig(a_bits=3, **RECIPES[recipe]))
    roles = activation_quantizers(model)
    attentions = {role.removesuffix(":probs") for role in roles if role.endswith(":probs")}
    expected = {"plain": {"input", "q", "k", "v", "probs"}, "qkr": {"input", "qkx", "v", "probs"}}[recipe]
    for name in attentions:
        assert {role.rpartition(":")[2] for role in roles if role.startswith(f"{name}:")} == expected, name
    second = {f"{name}:input" for name, _ in model.named_modules() if search(r"(fc2|\d\.output\.dense)$", name)}
    assert len(second) == len(attentions) == (3 if kind == "swin" else 2)
    assert {role for role, a in roles.items() if a.positive} == second | {f"{name}:probs" for name in attentions}
    wide = {role for role, a in roles.items() if a.bits == 8}
    assert len(wide) == (3 if kind == "deit" else 2)
    assert all(roles[role].bits == 3 for role in roles.keys() - wide)


@pytest.mark.smoke
@pytest.mark.parametrize("host, recipe", FORMS, ids=[f"{host} {recipe}" for host, recipe in FORMS])
def test_every_parameter_has_a_gradient(host, recipe):
    """DistributedDataParallel waits for all of them; the key's bias cancels in the softmax, and has zeros."""
    model, x = built(host)
    model = quantize(model, OFQConfig(**RECIPES[recipe])).train()
    loss(model, x).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    if recipe != "plain" and host.startswith("transformers") and "timm" not in host:
        biases = {name: x for name, x in model.named_parameters() if search(r"(k_proj|key)\.bias$", name)}
        assert biases
        assert not any(bias.grad.any() for bias in biases.values())


# --- annealing


BAND = 0.05


@pytest.mark.parametrize("options", [{}, {"qkv_bias": False}], ids=["bias", "no bias"])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_annealing_masks_the_product_element_by_element(family, options):
    """And the term of the query's bias is none of W_k's; against the equations in float64."""
    model = quantize(build(family, **options), OFQConfig(qk_reparam=True))
    calibrate(model, [images(model, 8, seed=1)]).train()
    ConfidenceAnnealing(model, BAND).attach(torch.optim.SGD(model.parameters(), lr=1e-5))
    seen: dict[str, tuple[Any, ...]] = {}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args}))
        for name, module in model.named_modules()
        if name.endswith(".attn")
    ]
    with torch.no_grad():
        model(images(model))
    for handle in handles:
        handle.remove()
    generator = torch.Generator().manual_seed(5)
    for name, (x, *mask) in seen.items():
        module, x = model.get_submodule(name), x.detach()
        weight = module.qkv.weight
        y = module(x, *mask)
        g = torch.randn(y.shape, generator=generator)
        weight.grad = None
        y.backward(g)
        expected = attention(model, name, x, position_bias(module, *mask), 2, 2, BAND)
        [wanted] = torch.autograd.grad(expected, weight, g.double())
        wanted[-len(wanted) // 3 :] *= near_threshold(weight.chunk(3)[2], BAND)
        for role, ours, theirs in zip("qkv", weight.grad.chunk(3), wanted.chunk(3), strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max(), (name, role)
            assert theirs.any()
    assert len(seen) == (4 if family == "swin" else 2)


# --- autocast


@pytest.mark.parametrize("host", ["vit", "transformers vit"])
def test_autocast_changes_neither_the_product_nor_the_term_of_the_query_bias(host, monkeypatch):
    """A factor in bfloat16 would give other codes, and logits that are off by as much."""
    model, x = built(host)
    model = calibrate(quantize(model, OFQConfig(qk_reparam=True)), [x])
    terms = []
    inside = attention_module.quantized_attention
    monkeypatch.setattr(
        attention_module, "quantized_attention", lambda *args: terms.append(args[-1].clone()) or inside(*args)
    )
    modules = [module for module in model.modules() if isinstance(module, attention_module.QuantAttention)]
    tokens, width = modules[0].probs_quantizer.scale.numel(), modules[0].query_weight.shape[1]
    x = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(0))
    codes = []
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            for module in modules:
                module(x)
            codes.append([weight.codes for name, weight in freeze(model).items() if name.endswith(".qk")])
    assert len(codes[0]) == len(modules) == len(terms) / 2 == 2
    assert all(map(torch.equal, *codes))
    assert all(map(torch.equal, terms[:2], terms[2:]))
    assert all(term.abs().max() > 0.1 for term in terms)
