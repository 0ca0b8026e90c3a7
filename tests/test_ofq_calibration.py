"""The first values of the scales, and what training, evaluation, copies, casts and checkpoints do with them."""

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from ofq_models import build, codes_of, images, initial_scale, lsq_of
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ext.ofq_quantizer import OFQConfig, activation_quantizers, calibrate, full_precision, quantize


def converted(family: str = "vit", sizes: dict[str, Any] | None = None, **config: Any) -> nn.Module:
    """In eval mode, not calibrated."""
    return quantize(build(family, **sizes or {}), OFQConfig(**config))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {role: a.scale.detach().clone() for role, a in activation_quantizers(model).items()}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def calibrated_by(model: nn.Module, *seeds: int) -> dict[str, Tensor]:
    return scales(calibrate(model, [images(model, 4, seed) for seed in seeds]))


# --- first values


@pytest.mark.parametrize("activation_scale", ["token", "tensor"])
def test_first_scales_of_a_block_are_those_of_lsq(activation_scale):
    """In float64, from the input of the block's modules; each quantiser sees what those before it let through."""
    model = converted(activation_scale=activation_scale, a_bits=3)
    seen = {}
    for name in ("attn", "mlp.fc1", "mlp.fc2"):
        module = model.blocks[0].get_submodule(name)
        module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
    x = images(model, 4)
    calibrate(model, [x])
    found, kept = scales(model), -2 if activation_scale == "token" else None
    expected = {"patch_embed.proj:input": initial_scale(x, 8, False, None)}
    for name, role, positive in (("attn", "attn.qkv", False), ("mlp.fc1",) * 2 + (False,), ("mlp.fc2",) * 2 + (True,)):
        expected[f"blocks.0.{role}:input"] = initial_scale(seen[name], 3, positive, kept)
    qkv = model.blocks[0].attn.qkv
    inner = found["blocks.0.attn.qkv:input"].double()
    codes, scale = codes_of(qkv.weight)
    y = lsq_of(seen["attn"], inner[:, None] if kept else inner, 3) @ ((codes + 0.5) / 2 * scale).T + qkv.bias
    q, k, v = y.chunk(3, -1)
    heads = [part.unflatten(-1, (3, 16)).transpose(1, 2) for part in (q, k)]
    expected["blocks.0.attn:q"] = initial_scale(heads[0], 3, False, kept)
    expected["blocks.0.attn:k"] = initial_scale(heads[1], 3, False, kept)
    expected["blocks.0.attn:v"] = initial_scale(v, 3, False, -1)
    bound = [found[f"blocks.0.attn:{role}"].double() for role in "qk"]
    q, k = (lsq_of(part, s[:, None] if kept else s, 3) for part, s in zip(heads, bound, strict=True))
    expected["blocks.0.attn:probs"] = initial_scale((q @ k.mT / 4).softmax(-1), 3, True, kept)
    for role, value in expected.items():
        torch.testing.assert_close(found[role].double(), value.detach(), rtol=2e-6, atol=0, msg=role)


def test_first_scales_of_qkr_are_token_major():
    model = converted(qk_reparam=True, a_bits=4, w_bits=3)
    seen = []
    model.blocks[0].attn.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    calibrate(model, [images(model, 4)])
    found = scales(model)
    x = lsq_of(seen[0], found["blocks.0.attn:input"].double()[:, None], 4)
    q, k, _ = model.blocks[0].attn.qkv.weight.detach().double().chunk(3)
    for head in range(3):
        rows = slice(16 * head, 16 * head + 16)
        codes, scale = codes_of(q[rows].T @ k[rows], 3)
        expected = initial_scale(x @ ((codes + 0.5) / 4 * scale).T, 4, False, 1)
        torch.testing.assert_close(found["blocks.0.attn:qkx"][head::3].double(), expected, rtol=2e-6, atol=0)


@pytest.mark.smoke
@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_training_forward_does_what_a_calibration_does(family, qkr):
    one, other = (converted(family, qk_reparam=qkr) for _ in range(2))
    x = images(one, 4)
    assert not any(a.initialized or a.ready for a in activation_quantizers(one).values())
    calibrate(one, [x])
    first = other.train()(x)
    assert all(a.initialized and a.ready for a in activation_quantizers(other).values())
    kept = scales(other)
    for role, value in scales(one).items():
        torch.testing.assert_close(kept[role], value, rtol=1e-4, atol=0, msg=role)
    assert torch.equal(first, logits(other.eval(), x)), "initialised before it acts"
    other.train()(images(one, 4, seed=1))
    assert_same(scales(other), kept)


@pytest.mark.smoke
def test_several_batches_give_the_mean_of_their_scales():
    model = converted()
    alone = [calibrated_by(converted(), seed) for seed in range(3)]
    mean = calibrated_by(model, 0, 1, 2)
    for role, value in mean.items():
        torch.testing.assert_close(value, sum(part[role] for part in alone) / 3)
        # Probabilities have the mean 1 / tokens in every batch.
        assert torch.allclose(value, alone[2][role]) == role.endswith("probs")


def test_a_calibration_replaces_the_one_before():
    model = converted()
    calibrated_by(model, 0)
    assert_same(calibrated_by(model, 1), calibrated_by(converted(), 1))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: [x], lambda x: {"x": x}])
def test_forms_of_batches(wrap):
    model = converted()
    found = scales(calibrate(model, iter([wrap(images(model, 4, seed=2))])))
    assert_same(found, calibrated_by(converted(), 2))


def test_modes_and_gradients_are_as_before():
    model = converted().train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    assert calibrate(model, [images(model, 4)]) is model
    assert [module.training for module in model.modules()] == modes
    assert all(x.requires_grad and x.grad is None for x in model.parameters())
    with pytest.raises((RuntimeError, ValueError)):
        calibrate(model, [torch.zeros(1, 7)])
    assert [module.training for module in model.modules()] == modes


def test_dropout_and_stochastic_depth_do_not_touch_a_calibration():
    noisy = converted(sizes={"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "pos_drop_rate": 0.5}).train()
    assert_same(calibrated_by(noisy, 0), calibrated_by(converted(), 0))
    assert activation_quantizers(noisy)["blocks.0.mlp.fc2:input"].positive


@pytest.mark.parametrize(
    "batches, message",
    [
        ([], "at least one batch"),
        ([images(build(), 0)], "without images"),
        ([images(build()), images(build(), 0)], "without images"),
    ],
    ids=["none", "empty", "one of two empty"],
)
def test_calibrations_that_are_refused_change_nothing(batches, message):
    model = converted()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        calibrate(model, batches)
    assert_same(state(model), before)
    assert not any(a.initialized or a.ready for a in activation_quantizers(model).values())
    assert_same(calibrated_by(model, 0), calibrated_by(converted(), 0))


def test_a_model_that_is_not_quantised_is_refused():
    for function in (lambda model: calibrate(model, [images(model)]), activation_quantizers):
        with pytest.raises(ValueError, match="not quantised"):
            function(build())
    with pytest.raises(ValueError, match="not quantised"), full_precision(build()):
        pass


# --- before the first value


@pytest.mark.smoke
@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
def test_evaluation_before_calibration_uses_the_batch_keeps_nothing_and_warns_once(qkr, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("hf_ext"), "propagate", True)
    model = converted(qk_reparam=qkr)
    before = state(model)
    with caplog.at_level("WARNING"):
        for seed in (0, 1):
            x = images(model, 4, seed)
            fresh = calibrate(converted(qk_reparam=qkr), [x])
            torch.testing.assert_close(logits(model, x), logits(fresh, x))
    assert_same(state(model), before)
    assert not any(a.initialized or a.ready for a in activation_quantizers(model).values())
    assert ["calibrate(model, batches)" in record.message for record in caplog.records] == [True]


def test_batches_without_images():
    model = converted()
    with pytest.raises(ValueError, match="without images"):
        model.train()(images(model, 0))
    assert not any(a.initialized for a in activation_quantizers(model).values())
    calibrate(model.eval(), [images(model, 4)])
    assert logits(model, images(model, 0)).shape == (0, 10)
    model.train()(images(model, 0)).sum().backward()
    assert all(x.grad.isfinite().all() for x in model.parameters() if x.grad is not None)


@pytest.mark.parametrize("module", ["blocks.0.attn", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"])
@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
@pytest.mark.parametrize("ready", [False, True], ids=["lazy", "calibrated"])
def test_another_number_of_tokens(module, qkr, ready):
    part = converted(qk_reparam=qkr, sizes={"mlp_ratio": 1}).get_submodule(module)
    if ready:
        part.train()(torch.randn(2, 17, 48))
    with pytest.raises(ValueError, match=r'9 tokens.*17.*activation_scale="tensor"'):
        part(torch.randn(2, 9, 48))
    loose = converted(qk_reparam=qkr, activation_scale="tensor", sizes={"mlp_ratio": 1}).get_submodule(module).train()
    assert loose(torch.randn(2, 17, 48)).shape == (2, 17, 48)
    assert loose(torch.randn(2, 9, 48)).shape == (2, 9, 48)


# --- one arithmetic


@pytest.mark.smoke
@pytest.mark.parametrize(
    "family, qkr",
    [(family, qkr) for family in ("vit", "swin", "dinov2_swiglu", "siglip") for qkr in (False, True)]
    + [("eva02", False)],
)
def test_an_image_has_the_same_logits_in_every_batch_and_in_training(family, qkr):
    model = calibrate(converted(family, qk_reparam=qkr), [images(build(family), 4)])
    x = images(model, 7, seed=3)
    together = logits(model, x)
    assert torch.equal(together, torch.cat([logits(model, one) for one in x.split(1)]))
    assert torch.equal(together, torch.cat([logits(model, part) for part in x.split([2, 5])]))
    assert torch.equal(together, model.train()(x))


def test_dropout_of_probabilities_comes_after_their_rounding():
    """Values of 1 leave the sums of the probabilities: with half of them dropped, twice a whole number of steps."""
    model = calibrate(converted(sizes={"attn_drop_rate": 0.5}), [images(build(), 4)])
    plain = calibrate(converted(), [images(build(), 4)])
    x = images(model, 4)
    assert torch.equal(logits(model, x), logits(plain, x))
    attn, seen = model.blocks[0].attn, []
    with torch.no_grad():
        attn.qkv.weight[96:] = 0
        attn.qkv.bias[96:] = 1
        attn.v_quantizer.scale_norm.fill_(1)
    attn.proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(0)
    first, second = model.train()(x), model(x)
    assert not torch.equal(first, second)
    steps = seen[0] / attn.probs_quantizer.scale[:, None] / 2
    assert (steps - steps.round()).abs().max() < 1e-4 and steps.max() > 2


# --- casts and copies


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double", "to"])
@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
def test_scales_stay_in_float32(cast, qkr):
    model = calibrate(converted(qk_reparam=qkr), [images(build(), 4)])
    before = scales(model)
    ends = model.head.weight_scale_norm.detach().clone()
    x = images(model)
    expected = logits(model, x)
    if cast == "to":
        model.to(torch.bfloat16)
    else:
        getattr(model, cast)()
    assert_same(scales(model), before)
    assert torch.equal(model.head.weight_scale_norm, ends) and model.head.weight_scale_norm.dtype == torch.float32
    assert all(a.ready for a in activation_quantizers(model).values())
    dtype = model.head.weight.dtype
    found = logits(model, x.to(dtype))
    assert found.dtype == dtype
    assert found.isfinite().all()
    if cast == "double":
        torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)
    model.train()(x.to(dtype)).sum().backward()
    quantizers = activation_quantizers(model).values()
    assert all(a.scale_norm.grad.dtype == torch.float32 and a.scale_norm.grad.isfinite().all() for a in quantizers)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_independent(clone):
    model = calibrate(converted(), [images(build(), 4)])
    other = clone(model)
    x = images(model)
    expected = logits(model, x)
    assert torch.equal(logits(other, x), expected)
    with full_precision(other):
        assert torch.equal(logits(model, x), expected)
        assert not torch.equal(logits(other, x), expected)
    calibrate(other, [images(model, 4, seed=1)])
    assert torch.equal(logits(model, x), expected)
    assert not any(a.ready for a in activation_quantizers(clone(converted())).values())


# --- state dicts


@pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])
@pytest.mark.parametrize("family", ["vit", "swin"])
def test_a_full_precision_checkpoint_makes_the_model_that_its_conversion_makes(family, qkr):
    """Weights of another seed into a model which was converted before, so that nothing of its own may stay."""
    source = build(family, seed=1)
    model = converted(family, qk_reparam=qkr)
    model.load_state_dict(source.state_dict(), strict=True)
    expected = quantize(copy.deepcopy(source), OFQConfig(qk_reparam=qkr))
    assert_same(state(model), state(expected))
    x = images(model, 4)
    assert torch.equal(model.train()(x), expected.train()(x))
    assert not source.load_state_dict(model.state_dict(), strict=False).missing_keys


def test_a_checkpoint_carries_scales_shifts_and_whether_they_have_values():
    model = converted()
    empty = state(model)
    calibrate(model, [images(model, 4)])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x = images(model, 4)
    F.cross_entropy(model.train()(x), torch.arange(4)).backward()
    optimizer.step()
    other = converted()
    other.load_state_dict(model.state_dict())
    assert all(a.ready for a in activation_quantizers(other).values())
    assert_same(state(other), state(model))
    assert torch.equal(logits(other, x), logits(model.eval(), x))
    other.load_state_dict(empty)
    assert not any(a.ready or a.initialized for a in activation_quantizers(other).values())
    moved = converted()
    moved.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(logits(moved, x), logits(model, x))


def test_a_checkpoint_of_other_sizes_or_bits_of_qkr_is_refused():
    plain, product = converted(), converted(qk_reparam=True)
    with pytest.raises(RuntimeError, match=r"qkx_quantizer|q_quantizer"):
        product.load_state_dict(calibrate(plain, [images(plain, 4)]).state_dict())


def test_full_precision_is_left_after_an_error():
    model = calibrate(converted(), [images(build(), 4)])
    expected = logits(model, images(model))
    with pytest.raises(KeyError), full_precision(model) as same:
        assert same is model
        with full_precision(model):
            pass
        assert not torch.equal(logits(model, images(model)), expected)
        raise KeyError
    assert torch.equal(logits(model, images(model)), expected)
