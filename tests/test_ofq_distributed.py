"""Two processes under gloo: the same scales in both, and the gradients of the whole batch."""

from typing import Any

import ofq_hosts
import pytest
import torch
from ofq_models import build, images, initial_scale
from ranks import RANKS
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_ext.ofq_quantizer import OFQConfig, activation_quantizers, calibrate, quantize


def converted(qkr: bool = False, family: str = "vit") -> nn.Module:
    return quantize(build(family), OFQConfig(qk_reparam=qkr))


def batch(rank: int, step: int = 0) -> Tensor:
    return (1 + rank) * images(build(), 4, seed=10 * step + rank)


def scales(model: nn.Module) -> dict[str, Tensor]:
    return {role: a.scale.detach().clone() for role, a in activation_quantizers(model).items()}


def loss(model: Any, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.arange(len(x)) % 10)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


def calibrated(rank: int, wrapped: bool) -> dict[str, Tensor]:
    model = converted()
    calibrate(DistributedDataParallel(model) if wrapped else model, [batch(rank)])
    return scales(model)


@pytest.mark.parametrize("wrapped", [False, True], ids=["before wrapping", "after wrapping"])
def test_calibration_takes_the_mean_over_the_processes(both, wrapped):
    """What one process finds that sees the batches of both."""
    one, other = both(calibrated, wrapped)
    assert_same(one, other)
    expected = scales(calibrate(converted(), [batch(rank) for rank in range(RANKS)]))
    for role, value in expected.items():
        torch.testing.assert_close(one[role], value)


def trained(rank: int, qkr: bool, family: str, lazy: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = converted(qkr, family)
    if not lazy:
        calibrate(model, [batch(rank)])
    first, parallel = None, DistributedDataParallel(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(3):
        loss(parallel, batch(rank, step)).backward()
        first = first or scales(model)
        optimizer.step()
        optimizer.zero_grad()
    return first, model.state_dict()


@pytest.mark.parametrize("lazy", [True, False], ids=["lazy", "calibrated"])
@pytest.mark.parametrize("family, qkr", [("vit", False), ("vit", True), ("swin", False)], ids=["vit", "qkr", "swin"])
def test_processes_stay_bit_identical(both, family, qkr, lazy):
    (first, state), (other_first, other_state) = both(trained, qkr, family, lazy)
    assert_same(first, other_first)
    assert_same(state, other_state)
    assert all(value for name, value in state.items() if name.endswith("initialized"))
    if lazy:
        own = [initial_scale(batch(rank), 8, False, None) for rank in range(RANKS)]
        torch.testing.assert_close(first["patch_embed.proj:input"].double(), sum(own) / RANKS, rtol=1e-6, atol=0)
        assert own[1] > 1.5 * own[0]


def trained_host(rank: int, options: dict[str, bool]) -> dict[str, Tensor]:
    model = quantize(ofq_hosts.stock("vit", num_hidden_layers=1), OFQConfig(qk_reparam=True, **options)).train()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    x = (1 + rank) * ofq_hosts.images(model, 4)
    for _ in range(2):
        F.cross_entropy(parallel(x).logits, torch.arange(4) % 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize("options", [{}, {"reference_compat": True}], ids=["qkr", "reference_compat"])
def test_model_of_transformers_takes_a_second_step_under_qkr(both, options):
    """The wrapper refuses one while a parameter waits for its gradient, as a bias that no logit depends on would."""
    one, other = both(trained_host, options)
    assert_same(one, other)
    before = ofq_hosts.stock("vit", num_hidden_layers=1).state_dict()
    assert not [name for name in before if name.endswith("weight") and torch.equal(one[name], before[name])]


def gradients(rank: int, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Only the first process loads the checkpoint; wrapping sends it to the other one."""
    model = converted()
    if rank == 0:
        model.load_state_dict(state)
    parallel = DistributedDataParallel(model).train()
    loss(parallel, batch(rank)).backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def test_gradients_are_those_of_the_whole_batch(both):
    """Those of the scales are sqrt(2) times as large: LSQ's gradient scale counts the images of one process."""
    model = calibrate(converted(), [batch(0)]).train()
    one, other = both(gradients, model.state_dict())
    assert_same(one, other)
    x, labels = torch.cat([batch(0), batch(1)]), torch.arange(4).repeat(2)
    F.cross_entropy(model(x), labels).backward()
    expected = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    assert one.keys() == expected.keys()
    for name, value in expected.items():
        factor = 2**0.5 if name.endswith("quantizer.scale_norm") else 1
        assert (one[name] - factor * value).abs().max() <= 1e-4 * value.abs().max() + 1e-7, name


def alone(rank: int) -> bool:
    return rank == 1 or converted().eval()(batch(rank)).isfinite().all().item()


def test_evaluation_before_calibration_waits_for_nobody(both):
    assert all(both(alone))


def after_a_broken_batch(rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor], bool]:
    """NaN in one process only; weights of the ends drawn anew before."""
    model = converted()
    for layer in (model.head, model.patch_embed.proj):
        nn.init.normal_(layer.weight, std=0.5 + rank)  # wrapping sends those of the first process
    parallel = DistributedDataParallel(model).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    broken = batch(rank)
    if rank == 1:
        broken[0, 0, 0, 0] = torch.nan
    parallel(broken)
    nothing = all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if "norm" not in name)
    nothing = nothing and not any(a.initialized for a in activation_quantizers(model).values())
    parallel(batch(rank))
    return scales(model), model.state_dict(), nothing


def test_a_broken_batch_of_one_process_is_kept_by_none(both):
    (one, state, nothing), (other, other_state, nothing_either) = both(after_a_broken_batch)
    assert nothing and nothing_either
    assert_same(one, other)
    assert_same(state, other_state)
    assert all(value for name, value in state.items() if name.endswith("initialized"))
    rows = state["head.weight"].double().abs().mean(1)
    torch.testing.assert_close(state["head.weight_scale_norm"].double(), 2 * rows / 127**0.5, rtol=1e-5, atol=0)


def refused(rank: int) -> tuple[str, bool]:
    model, broken = converted(), batch(rank)
    if rank == 1:
        broken[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or inf") as caught:
        calibrate(model, [broken])
    return str(caught.value), any(a.initialized for a in activation_quantizers(model).values())


def test_a_calibration_that_one_process_spoils_is_refused_in_all(both):
    one, other = both(refused)
    assert one == other
    assert "patch_embed.proj:input" in one[0] and not one[1]
