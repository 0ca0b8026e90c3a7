"""First values of scales that must not be kept, and those of weights that hosts draw anew after the conversion."""

import copy
from typing import Any

import pytest
import torch
from ofq_deployed import quantized
from ofq_models import build, images
from torch import Tensor, nn
from torch.nn import functional as F

from hf_ext.ofq_quantizer import OFQConfig, activation_quantizers, calibrate, quantize, report, save_packed, to_int8

FORMS = pytest.mark.parametrize("qkr", [False, True], ids=["plain", "qkr"])


def converted(qkr: bool = False, **sizes: Any) -> nn.Module:
    return quantize(build("vit", **sizes), OFQConfig(qk_reparam=qkr))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def spoilt(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[0, 0, 0, 0] = value
    return x


def initialized(model: nn.Module) -> dict[str, bool]:
    return {role: bool(a.initialized) for role, a in activation_quantizers(model).items()}


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 10)


# --- batches with NaN or inf


@pytest.mark.smoke
@FORMS
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "recomputed"])
def test_a_broken_first_batch_keeps_nothing_and_the_next_one_starts(checkpointing, value, qkr):
    model, fresh = (converted(qkr).train() for _ in range(2))
    model.set_grad_checkpointing(checkpointing)
    x, before = images(model, 4), state(model)
    broken = loss(model, spoilt(x, value))
    broken.backward()
    assert not broken.isfinite(), "whoever scales losses has to see it"
    assert_same(state(model), before)
    model.zero_grad()
    for one in (model, fresh):
        loss(one, x).backward()
    assert_same(state(model), state(fresh))
    assert all(a.ready for a in activation_quantizers(model).values())
    for (name, one), other in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad), name


@FORMS
def test_what_lies_before_the_break_is_kept_and_probabilities_are_not_taken_for_values(qkr):
    model = converted(qkr).train()
    x, bias = images(model, 4), model.blocks[0].attn.qkv.bias
    with torch.no_grad():
        whole, bias[0] = bias[0].clone(), torch.nan  # of a query
    model(x)
    found = initialized(model)
    assert found["patch_embed.proj:input"] and found["blocks.0.attn:v"]
    assert not found["blocks.0.attn:probs"] and not found["blocks.0.mlp.fc1:input"]
    first = activation_quantizers(model)["blocks.0.attn:v"].scale.clone()
    with torch.no_grad():
        bias[0] = whole
    assert model(x * 2).isfinite().all()
    assert all(initialized(model).values())
    assert torch.equal(activation_quantizers(model)["blocks.0.attn:v"].scale, first)


def test_a_compiled_attention_starts_with_the_first_good_batch():
    """Without a break of the graph; the graph with scales is kept from then on."""
    attention = converted(depth=1).blocks[0].attn.train()
    eager, graphs = copy.deepcopy(attention), []
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    before, x = state(attention), torch.randn(4, 17, 48)
    broken = x.clone()
    broken[0, 0, 0] = torch.nan
    assert not compiled(broken).isfinite().any()
    assert_same(state(attention), before)
    torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    assert all(initialized(attention).values())
    for factor in (1, 2):
        torch.testing.assert_close(compiled(factor * x), eager(factor * x), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 3, "two tries, and one with scales"
    assert all(a.ready for a in activation_quantizers(attention).values())


def test_a_scaler_skips_the_broken_batch_and_training_goes_on():
    """With enough bits that the loss follows its gradient: at 2 a single step goes up or down by luck."""
    model = quantize(build("vit"), OFQConfig(w_bits=4, a_bits=8)).train()
    x, before = images(model, 4), state(model)
    optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.amp.GradScaler("cpu")
    losses = []
    for batch in (spoilt(x, float("inf")), x, x):
        losses.append(loss(model, batch))
        optimizer.zero_grad()
        scaler.scale(losses[-1]).backward()
        scaler.step(optimizer)
        scaler.update()
        if len(losses) == 1:
            assert_same(state(model), before)
    assert [bool(one.isfinite()) for one in losses] == [False, True, True]
    assert losses[2] < losses[1]
    assert to_int8(model.eval())(x).isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_calibration_refuses_what_is_not_finite_and_changes_nothing(value):
    model = converted()
    nn.init.normal_(model.head.weight)  # whose scale a calibration would take again
    before, x = state(model), images(model, 4)
    with pytest.raises(ValueError, match=r"NaN or inf, the first is patch_embed\.proj:input"):
        calibrate(model, [x, spoilt(x, value)])
    assert_same(state(model), before)
    model.blocks[1].attn.proj.bias.data[3] = value
    with pytest.raises(ValueError, match=r"the first is blocks\.1\.mlp\.fc1:input"):
        calibrate(model, [x])


@pytest.mark.parametrize("part", ["scale_norm", "bias_in", "bias_out"])
def test_deployment_names_the_quantiser_that_is_not_finite(part, tmp_path):
    model, _ = quantized()
    getattr(model.blocks[1].mlp.fc1.input_quantizer, part).data[3] = float("nan")
    for deploy in (to_int8, lambda broken: save_packed(broken, tmp_path / "packed")):
        with pytest.raises(ValueError, match=r"of 1 quantisers are NaN or inf, the first is blocks\.1\.mlp\.fc1:input"):
            deploy(model)
    assert not list(tmp_path.iterdir())


# --- 8-bit weights that were drawn anew


def first_scale(layer: nn.Module) -> Tensor:
    return 2 * layer.weight.detach().double().flatten(1).abs().mean(1) / 127**0.5


def in_training(model: nn.Module, x: Tensor) -> None:
    model.train()(x)


def in_compiled_training(model: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    torch.compile(model.train(), fullgraph=True, backend="eager")(x)


STARTS = [lambda model, x: calibrate(model, [x]), in_training, in_compiled_training]


@pytest.mark.parametrize("start", STARTS, ids=["calibrated", "trained", "compiled"])
def test_ends_drawn_anew_get_scales_of_their_own(start):
    """As scripts for MAE and BEiT do with the head, after the model was built."""
    model = converted(depth=1)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.normal_(model.patch_embed.proj.weight, std=3.0)
    x = images(model, 4)
    start(model, x)
    rows = {row.name: row for row in report(model).layers}
    for name in ("head", "patch_embed.proj"):
        layer = model.get_submodule(name)
        torch.testing.assert_close(layer.weight_scale_norm.double(), first_scale(layer), rtol=1e-5, atol=0)
        fewest = 10 if name == "head" else 40  # no step is below 1e-5, half of that std
        assert rows[name].codes_used > fewest and rows[name].clipped_share == 0
    kept = model.head.weight_scale_norm.clone()
    nn.init.normal_(model.head.weight)
    start(model, x)
    assert torch.equal(model.head.weight_scale_norm, kept), "only the first time: later ones are learnt"


def test_scales_that_a_checkpoint_brings_stay():
    source, model = converted(), converted()
    source.head.weight_scale_norm.data.mul_(1.5)
    model.load_state_dict(source.state_dict())
    calibrate(model, [images(model, 4)])
    assert torch.equal(model.head.weight_scale_norm, source.head.weight_scale_norm)
    stock = build("vit", seed=1)
    model.load_state_dict(stock.state_dict())
    model.head.weight.data.mul_(2)
    for a in activation_quantizers(model).values():
        a.reset()
    calibrate(model, [images(model, 4)])
    torch.testing.assert_close(model.head.weight_scale_norm.double(), first_scale(model.head), rtol=1e-5, atol=0)


def test_a_row_with_nan_keeps_its_scale():
    model = converted().train()
    kept = model.head.weight_scale_norm.detach().clone()
    model.head.weight.data[3, 5] = float("nan")
    model.head.weight.data[4] *= 2
    assert model(images(model, 4)).isnan().nonzero()[:, 1].unique().tolist() == [3]
    assert torch.equal(model.head.weight_scale_norm[3], kept[3])
    assert model.head.weight_scale_norm[4] > 1.9 * kept[4]
