"""Annealing against a loop that masks and restores by hand, and inside the loops and optimizers of others."""

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from ofq_training import Classifier, images, labels, low_bit, near_threshold, quantized_vit, small_vit, trainer
from timm.optim import Lion, Lookahead
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ViTConfig, ViTForImageClassification

from hf_ext.ofq_quantizer import OFQConfig, calibrate, quantize
from hf_ext.ofq_quantizer.annealing import ConfidenceAnnealing, ConfidenceAnnealingCallback
from hf_ext.ofq_quantizer.attention import QuantAttention

BAND = 0.05
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0.5),
    "sgd": lambda parameters: SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "lion": lambda parameters: Lion(parameters, lr=1e-3, weight_decay=0.5),
}


def loss_of(model: nn.Module, seed: int = 0) -> Tensor:
    return F.cross_entropy(model(images(6, seed)), labels(6))


def step(model: nn.Module, optimizer: Any, seed: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(model, seed).backward()
    optimizer.step()


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, Tensor]) -> dict[str, Tensor]:
    """Which elements have other bits than before."""
    return {name: x.detach() != before[name] for name, x in model.named_parameters()}


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: near_threshold(x, BAND) for name, x in low_bit(model).items()}


# --- the step


@pytest.mark.smoke
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_are_those_of_a_loop_that_masks_and_restores_by_hand(name: str):
    """Bit for bit, and with momentum from before; a mask made once would differ from the second step on."""
    ours = quantized_vit()
    theirs = copy.deepcopy(ours)
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (ours, theirs)]
    for seed in range(2):
        step(ours, optimizers[0], seed)
        step(theirs, optimizers[1], seed)

    annealing = ConfidenceAnnealing(ours, BAND).attach(optimizers[0])
    seen = []
    for seed in range(2, 6):
        step(ours, optimizers[0], seed)

        before, learning = copied(theirs), masks(theirs)
        optimizers[1].zero_grad()
        loss_of(theirs, seed).backward()
        for weight, mask in learning.items():
            theirs.get_parameter(weight).grad[~mask] = 0
        optimizers[1].step()
        with torch.no_grad():
            for weight, mask in learning.items():
                theirs.get_parameter(weight)[~mask] = before[weight][~mask]
        seen.append(learning)

        for parameter, wanted in theirs.named_parameters():
            assert torch.equal(ours.get_parameter(parameter), wanted), (seed, parameter)
        counted = [mask.sum() for mask in learning.values()], [mask.numel() for mask in learning.values()]
        assert annealing.frozen_share == pytest.approx(1 - int(sum(counted[0])) / sum(counted[1]))
    assert any(not torch.equal(seen[0][weight], seen[-1][weight]) for weight in seen[0]), "a latched mask would pass"
    assert all(mask.any() for mask in seen[0].values())


@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "inf"])
def test_gradients_are_zero_before_they_are_clipped(overflow: bool):
    """And stay so while they accumulate; a mask that multiplies would make NaN of inf."""
    model = quantized_vit()
    ConfidenceAnnealing(model, BAND).attach(SGD(model.parameters(), lr=1e-3))
    learning = masks(model)
    for seed in range(2):
        (loss_of(model, seed) * (torch.inf if overflow else 1)).backward()
        for name, mask in learning.items():
            assert not model.get_parameter(name).grad[~mask].any(), name
            assert model.get_parameter(name).grad[mask].any(), name


def test_gradients_that_come_after_backward_are_masked_in_the_step():
    """As those of a loop that averages over processes by itself."""
    model = quantized_vit()
    optimizer = SGD(model.parameters(), lr=1e-3)
    ConfidenceAnnealing(model, BAND).attach(optimizer)
    learning = masks(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, mask in learning.items():
        assert torch.equal(model.get_parameter(name).grad, mask.float()), name


def test_detach_undoes_everything():
    model = quantized_vit(qk_reparam=True)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    annealing = ConfidenceAnnealing(model, BAND).attach(optimizer)
    assert model.blocks[0].attn.switches.boundary_range == BAND
    step(model, optimizer)
    annealing.detach()
    assert model.blocks[0].attn.switches.boundary_range is None
    before = copied(model)
    step(model, optimizer)
    changed = moved(model, before)
    assert all(changed[name].all() for name in low_bit(model))
    assert not any(parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    annealing.attach(optimizer)
    step(model, optimizer)
    assert annealing.frozen_share > 0.5


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copy_of_an_annealed_model_is_not_annealed(clone: Callable[[nn.Module], nn.Module]):
    """As of a teacher or an average that is made late; it trains as a copy from before, and can be annealed itself."""
    model = quantized_vit(qk_reparam=True)
    early = copy.deepcopy(model)
    optimizer = SGD(model.parameters(), lr=1e-4)
    ConfidenceAnnealing(model, BAND).attach(optimizer)
    late = clone(model)
    for one in (early, late):
        step(one, SGD(one.parameters(), lr=1e-4))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(early.parameters(), late.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(early.parameters(), late.parameters(), strict=True))
    step(model, optimizer)
    assert model.blocks[0].attn.switches.boundary_range == BAND, "the original goes on"
    assert not torch.equal(model.blocks[0].attn.qkv.weight, early.blocks[0].attn.qkv.weight)
    ConfidenceAnnealing(late, BAND).attach(SGD(late.parameters(), lr=1e-4))


def test_average_that_begins_during_annealing_outlives_it():
    model = quantized_vit(qk_reparam=True)
    optimizer = SGD(model.parameters(), lr=1e-4)
    annealing = ConfidenceAnnealing(model, BAND).attach(optimizer)
    average = ModelEmaV3(model, decay=0.5)
    step(model, optimizer)
    average.update(model, step=1)
    annealing.detach()
    ours = average.module.train().requires_grad_()
    optimizer = OPTIMIZERS["adamw"](ours.parameters())
    ConfidenceAnnealing(ours, BAND).attach(optimizer).detach()
    before = copied(ours)
    step(ours, optimizer)
    assert all(moved(ours, before)[name].all() for name in low_bit(ours))


# --- QKR


def attention_of(host: str, compatible: bool) -> tuple[nn.Module, QuantAttention, Callable[[int], Tensor]]:
    """(model, its attention, loss of a seed): W_q, W_k and W_v are one parameter of timm, or three of transformers."""
    if host == "timm":
        model = quantized_vit(qk_reparam=True, reference_compat=compatible)
        return model, model.blocks[0].attn, lambda seed: loss_of(model, seed)
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 48}
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **sizes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    quantize(model, OFQConfig(qk_reparam=True, reference_compat=compatible))
    calibrate(model, [images(8)]).train()
    [attention] = [module for module in model.modules() if isinstance(module, QuantAttention)]
    return model, attention, lambda seed: F.cross_entropy(model(images(6, seed)).logits, labels(6))


def learning_factors(attention: QuantAttention) -> Tensor:
    """(3 * 24, 24), rows of W_q, W_k, W_v: columns of a head that A = W_q^T W_k reads for an entry near a threshold."""
    q, k = (attention.factor(role)[0].detach().unflatten(0, (3, -1)) for role in (0, 1))
    band = near_threshold(torch.einsum("hdi,hdj->hij", q, k).flatten(0, 1), 0.005).unflatten(0, (3, -1))
    columns = [band.any(2).repeat_interleave(8, 0), band.any(1).repeat_interleave(8, 0)]
    return torch.cat([*columns, near_threshold(attention.value_weight, 0.005)])


@pytest.mark.parametrize("host", ["timm", "transformers"])
@pytest.mark.parametrize("compatible", [False, True], ids=["annealed", "reference_compat"])
def test_factors_stand_still_by_columns(compatible: bool, host: str):
    """A column of W_q is still when all entries of its row of A are, one of W_k when its column of A is."""
    model, attention, loss = attention_of(host, compatible)
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    for seed in range(3):  # momentum in every element
        optimizer.zero_grad()
        loss(seed).backward()
        optimizer.step()
    ConfidenceAnnealing(model, 0.005).attach(optimizer)
    layers = attention.projections
    for seed in range(3):
        learning, before = learning_factors(attention), torch.cat([layer.weight.detach() for layer in layers])
        assert 0.02 < learning[:48].float().mean() < 0.98, "all or nothing would tell little"
        if compatible:
            learning[:48] = True
        optimizer.zero_grad()
        loss(seed).backward()
        assert not torch.cat([layer.weight.grad for layer in layers])[~learning].any()
        optimizer.step()
        assert torch.equal(torch.cat([layer.weight.detach() for layer in layers]) != before, learning)


# --- other people's loops


@pytest.mark.smoke
def test_scaler_that_skips_a_step_changes_nothing():
    model = quantized_vit()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    ConfidenceAnnealing(model, BAND).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for overflow in (False, True, False):
        before, learning = copied(model), masks(model)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model) * (torch.inf if overflow else 1)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        changed = moved(model, before)
        for name, mask in learning.items():
            assert not changed[name][~mask].any(), name
            assert changed[name][mask].any() != overflow, name


@pytest.mark.smoke
def test_accelerate_accumulates_clips_and_steps_what_learns():
    """Attached to accelerate's wrapper after `prepare`; the norm is that of the masked gradients of both batches."""
    ours = quantized_vit()
    theirs, learning = copy.deepcopy(ours), masks(ours)
    ((loss_of(theirs, 0) + loss_of(theirs, 1)) / 2).backward()
    for name, mask in learning.items():
        theirs.get_parameter(name).grad[~mask] = 0
    norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.1)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(ours, OPTIMIZERS["adamw"](ours.parameters()))
    ConfidenceAnnealing(model, BAND).attach(optimizer)
    before = copied(ours)
    for seed in range(2):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, seed))
            if accelerator.sync_gradients:
                torch.testing.assert_close(accelerator.clip_grad_norm_(model.parameters(), 0.1), norm)
            optimizer.step()
            optimizer.zero_grad()
        changed = moved(ours, before)
        for name, mask in learning.items():
            assert not changed[name][~mask].any(), name
            assert changed[name][mask].any() == seed, name


def anneal_on_rank(rank: int, as_view: bool) -> tuple[list[Tensor], list[bool]]:
    model = quantized_vit(qk_reparam=True)
    parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=as_view)
    optimizer = OPTIMIZERS["adamw"](parallel.parameters())
    ConfidenceAnnealing(parallel, BAND).attach(optimizer)
    held = []
    for seed in range(3):
        before = copied(model)
        optimizer.zero_grad()
        value = near_threshold(model.blocks[0].attn.value_weight, BAND)
        loss_of(parallel, 10 * rank + seed).backward()
        weight = model.blocks[0].attn.qkv.weight
        held.append(not weight.grad.chunk(3)[2][~value].any() and bool(weight.grad.chunk(3)[2][value].any()))
        optimizer.step()
        held.append(torch.equal(moved(model, before)["blocks.0.attn.qkv.weight"].chunk(3)[2], value))
    return [x.detach() for x in model.parameters()], held


@pytest.mark.parametrize("as_view", [False, True], ids=["copied buckets", "gradients are views"])
def test_two_processes_stay_equal(as_view: bool, both: Callable[..., list[Any]]):
    (first, held), (second, also) = both(anneal_on_rank, as_view)
    assert all(held)
    assert all(also)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Waits(TorchDispatchMode):
    """Counts reads of a tensor's value, for which a GPU would have to be waited."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(function) or "nonzero" in str(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("qk_reparam", [False, True], ids=["plain", "qkr"])
def test_no_step_waits_for_the_device(qk_reparam: bool):
    model = quantized_vit(qk_reparam=qk_reparam)
    optimizer = SGD(model.parameters(), lr=1e-5)
    annealing = ConfidenceAnnealing(model).attach(optimizer)
    with Waits() as waits:
        step(model, optimizer)
    assert waits.count == 0
    with waits:
        assert annealing.frozen_share > 0.5
    assert waits.count > 0, "the counter counts nothing"


# --- the callback


def rows(count: int) -> list[dict[str, Tensor]]:
    return [{"pixel_values": x, "labels": y} for x, y in zip(images(count), labels(count), strict=True)]


class Spy(ConfidenceAnnealingCallback):
    """Notes which steps are annealed."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.annealed: list[int] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.annealing.attached:
            self.annealed.append(state.global_step)


@pytest.mark.parametrize(
    ("start", "steps", "annealed"),
    [
        ({"start_step": 0}, 3, [0, 1, 2]),
        ({"start_step": 2}, 3, [2]),
        ({"start_step": 5}, 3, []),
        ({"start_ratio": 0.0}, 2, [0, 1]),
        ({"start_ratio": 0.5}, 5, [3, 4]),
        ({"start_ratio": 1.0}, 3, []),
    ],
    ids=str,
)
def test_callback_begins_when_that_much_is_done(start: dict[str, Any], steps: int, annealed: list[int], tmp_path: Any):
    model = Classifier(quantized_vit())
    spy = Spy(**start)
    trainer(model, tmp_path, rows(8), callbacks=[spy], max_steps=steps, per_device_train_batch_size=2).train()
    assert spy.annealed == annealed
    assert not spy.annealing.attached


def test_share_of_the_steps_is_not_rounded_up():
    """0.07 * 100 is 7.000000000000001 in floating point."""
    callback = ConfidenceAnnealingCallback(start_ratio=0.07)
    due = [step for step in range(100) if callback._is_due(SimpleNamespace(global_step=step, max_steps=100))]
    assert due == list(range(7, 100))


@pytest.mark.smoke
def test_run_that_is_stopped_and_resumed_equals_one_that_is_not(tmp_path: Any):
    """Annealing from step 2 on; resumed at step 4. Nothing of it is in the checkpoint."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
    options |= {"weight_decay": 0.1, "save_strategy": "steps", "save_steps": 4, "seed": 3}

    def run(folder: str, **more: Any) -> dict[str, Tensor]:
        model = Classifier(quantized_vit(qk_reparam=True))
        callback = ConfidenceAnnealingCallback(start_step=2, boundary_range=BAND)
        made = trainer(model, tmp_path / folder, rows(24), callbacks=[callback], max_steps=6, **options)
        made.train(**more)
        assert callback.annealing.frozen_share > 0.1
        return copied(model)

    whole = run("whole")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- misuse


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "one of start_step and start_ratio"),
        ({"start_step": 1, "start_ratio": 0.5}, "one of start_step and start_ratio"),
        ({"start_step": -1}, "-1"),
        ({"start_step": 0.5}, "start_ratio"),
        ({"start_ratio": 1.5}, r"1\.5"),
        ({"start_ratio": float("nan")}, "nan"),
        ({"start_step": 1, "boundary_range": 0}, "boundary_range=0"),
        ({"start_step": 1, "boundary_range": 0.6}, r"0\.6"),
        ({"start_step": 1, "boundary_range": float("nan")}, "nan"),
    ],
    ids=str,
)
def test_callback_names_what_is_wrong(options: dict[str, Any], named: str):
    with pytest.raises(ValueError, match=named):
        ConfidenceAnnealingCallback(**options)


def test_models_that_cannot_be_annealed_are_refused():
    with pytest.raises(ValueError, match="quantize"):
        ConfidenceAnnealing(small_vit())
    with pytest.raises(ValueError, match="requires gradients"):
        ConfidenceAnnealing(quantized_vit().requires_grad_(False))
    with pytest.raises(ValueError, match=r"0\.7"):
        ConfidenceAnnealing(quantized_vit(), 0.7)


class HookLess:
    """An optimizer that is none of torch's."""

    def step(self) -> None: ...


def test_optimizers_that_cannot_be_annealed_are_refused():
    model = quantized_vit()
    optimizer = SGD(model.parameters(), lr=1e-5)
    for wrong in (HookLess(), Lookahead(optimizer)):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            ConfidenceAnnealing(model).attach(wrong)
    with pytest.raises(ValueError, match="holds all of them"):
        ConfidenceAnnealing(model).attach(SGD(quantized_vit().parameters(), lr=1e-5))
    annealing = ConfidenceAnnealing(model).attach(optimizer)
    for again in (annealing, ConfidenceAnnealing(model)):
        with pytest.raises(ValueError, match="detach"):
            again.attach(optimizer)


def test_steps_longer_than_the_band_are_warned_of_once(monkeypatch: Any):
    from hf_ext.ofq_quantizer import annealing

    heard: list[str] = []
    monkeypatch.setattr(annealing.logger, "warning", heard.append)
    for lr in (1e-5, 1e-2):
        model = quantized_vit()
        optimizer = AdamW(model.parameters(), lr=0.0)
        ConfidenceAnnealing(model).attach(optimizer)
        optimizer.param_groups[0]["lr"] = lr  # a scheduler's doing
        for _ in range(2):
            step(model, optimizer)
    assert len(heard) == 1
    assert "lr=0.01" in heard[0]
