"""Quantised models under torch.compile and torch.export."""

import copy

import ofq_hosts
import pytest
import torch
from ofq_models import build, images
from torch import Tensor, nn

from hf_ext.ofq_quantizer import ConfidenceAnnealing, OFQConfig, activation_quantizers, calibrate, quantize

KINDS = {
    "plain": (lambda: build("vit", depth=1), {}),
    "qkr": (lambda: build("vit", depth=1), {"qk_reparam": True}),
    "swin": (lambda: build("swin", depths=(2,), num_heads=(2,)), {"qk_reparam": True}),
    "transformers": (lambda: ofq_hosts.stock("vit", num_hidden_layers=1), {"qk_reparam": True}),
}


def batch(model: nn.Module, count: int = 4, seed: int = 0) -> Tensor:
    size = model.config.image_size if hasattr(model, "config") else model.patch_embed.img_size[0]
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y)


def compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_steps_equal_eager_ones(kind):
    """The first one initialises, the second one finds scales."""
    create, options = KINDS[kind]
    eager = quantize(create(), OFQConfig(**options)).train()
    copied = copy.deepcopy(eager)
    step = compiled(copied)
    for seed in range(2):
        x = batch(eager, seed=seed)
        torch.testing.assert_close(outputs(step, x), outputs(eager, x), rtol=1e-4, atol=1e-5)
        outputs(step, x).square().sum().backward()
        outputs(eager, x).square().sum().backward()
    assert all(a.initialized and a.ready for a in activation_quantizers(copied).values())
    for (name, one), other in zip(eager.named_parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6, msg=name)
        assert (other.grad - one.grad).abs().max() <= 1e-3 * one.grad.abs().max() + 1e-6, name


def test_compiled_steps_anneal():
    """Also where they were compiled before annealing began."""
    eager = quantize(build("vit", depth=1), OFQConfig(qk_reparam=True))
    calibrate(eager, [batch(eager)]).train()
    copied = copy.deepcopy(eager)
    step, before = compiled(copied), eager.blocks[0].attn.qkv.weight.detach().clone()
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-4) for model in (eager, copied)]
    step(batch(eager)).sum().backward()
    copied.zero_grad()
    for model, optimizer in zip((eager, copied), optimizers, strict=True):
        ConfidenceAnnealing(model, 0.05).attach(optimizer)
    for seed in range(2):
        for model, optimizer in zip((eager, step), optimizers, strict=True):
            model(batch(eager, seed=seed)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), other in zip(eager.named_parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6, msg=name)
    still = (copied.blocks[0].attn.qkv.weight == before).float().mean()
    assert 0.02 < still < 0.98
    assert torch.equal(copied.blocks[0].attn.qkv.weight == before, eager.blocks[0].attn.qkv.weight == before)


@pytest.mark.parametrize("family, options", [("vit", {}), ("swin", {}), ("swin", {"qk_reparam": True})])
def test_export_with_a_dynamic_batch(family, options):
    model = build(family)
    model = calibrate(quantize(model, OFQConfig(**options)), [images(model, 8, seed=1)])
    size = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(model, (images(model, 3),), dynamic_shapes=({0: size},)).module()
    for count in (2, 5):
        x = images(model, count, seed=3)
        with torch.no_grad():
            assert torch.equal(program(x), model(x))
