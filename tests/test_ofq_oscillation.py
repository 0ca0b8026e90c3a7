"""Oscillation against a loop over single weights, and the tracker inside training."""

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch
from ofq_training import Classifier, images, labels, quantized_vit, small_vit, trainer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD

from hf_ext.ofq_quantizer import oscillation
from hf_ext.ofq_quantizer.annealing import ConfidenceAnnealing
from hf_ext.ofq_quantizer.oscillation import OscillationCallback, OscillationTracker


def written_out(history: Tensor, momentum: float) -> Tensor:
    """Frequencies of codes (steps, ...), one weight after the other."""
    found = []
    for codes in history.flatten(1).t().tolist():
        last = frequency = 0.0
        for before, now in pairwise(codes):
            direction = (now > before) - (now < before)
            turned = direction != 0 and direction == -last
            frequency = momentum * turned + (1 - momentum) * frequency
            last = direction or last
        found.append(frequency)
    return torch.tensor(found, dtype=torch.float64).view(history.shape[1:])


def codes(weight: Tensor) -> Tensor:
    """StatsQ at 2 bits, from its definition."""
    w = weight.detach().double()
    scale = 2 * w.abs().mean(1, keepdim=True)
    return ((w / scale).clamp(-1, 1 - 1e-6) * 2 - 0.5).round()


def weights(model: nn.Module, qk_reparam: bool) -> dict[str, Tensor]:
    """What StatsQ rounds, under the names of `freeze`."""
    block = model.blocks[0]
    found = {"mlp.fc1": block.mlp.fc1.weight, "mlp.fc2": block.mlp.fc2.weight, "attn.proj": block.attn.proj.weight}
    if qk_reparam:
        q, k, found["attn.v"] = block.attn.qkv.weight.chunk(3)
        found["attn.qk"] = torch.cat([q[i : i + 8].T @ k[i : i + 8] for i in (0, 8, 16)])
    else:
        found["attn.qkv"] = block.attn.qkv.weight
    return {f"blocks.0.{name}": weight.detach() for name, weight in found.items()}


def jitter(model: nn.Module, optimizer: Any) -> None:
    """A step with gradients that are noise."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


@pytest.mark.smoke
@pytest.mark.parametrize("qk_reparam", [False, True], ids=["plain", "qkr"])
def test_frequencies_are_those_of_the_codes_of_every_step(qk_reparam: bool):
    model = quantized_vit(qk_reparam=qk_reparam)
    optimizer = SGD(model.parameters(), lr=0.1)
    tracker = OscillationTracker(model, momentum=0.2).attach(optimizer)
    history = [{name: codes(weight) for name, weight in weights(model, qk_reparam).items()}]
    for _ in range(12):
        jitter(model, optimizer)
        history.append({name: codes(weight) for name, weight in weights(model, qk_reparam).items()})
    tracker.detach()
    jitter(model, optimizer)

    frequency = tracker.frequency()
    assert frequency.keys() == history[0].keys()
    wanted = {name: written_out(torch.stack([codes[name] for codes in history]), 0.2) for name in frequency}
    for name in frequency:
        differ = (frequency[name] - wanted[name]).abs() > 1e-6
        assert differ.sum() <= 1, name  # float32 may see a weight on the other side of a threshold
    everything = torch.cat([f.flatten() for f in wanted.values()])
    assert tracker.share(0.1) == pytest.approx(float((everything > 0.1).double().mean()), abs=1e-3)
    assert 0.1 < tracker.share(0.1) < 0.9


def test_state_goes_on_where_it_was_saved(tmp_path: Any):
    model = quantized_vit()
    optimizer = SGD(model.parameters(), lr=0.1)
    whole = OscillationTracker(model).attach(optimizer)
    for _ in range(3):
        jitter(model, optimizer)
    save_file(whole.state_dict(), tmp_path / "state.safetensors")
    resumed = OscillationTracker(model)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    resumed.attach(optimizer)
    for _ in range(3):
        jitter(model, optimizer)
    assert whole.share(0.0) > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.(qk|v|qkv)"):
        OscillationTracker(quantized_vit(qk_reparam=True)).load_state_dict(whole.state_dict())


def test_tracker_attached_before_annealing_sees_restored_weights():
    """Decay alone, every second step, would turn every weight around and back."""
    model = quantized_vit()
    optimizer = SGD(model.parameters(), lr=1.0, weight_decay=2.0)  # w -> -w
    tracker = OscillationTracker(model, momentum=1.0).attach(optimizer)
    ConfidenceAnnealing(model, 1e-9).attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for lr in (1.0, 0.0, 1.0):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    assert tracker.share() == 0.0


# --- the callback


@pytest.mark.smoke
def test_checkpoints_of_trainer_hold_the_state(tmp_path: Any, monkeypatch: Any):
    heard: list[str] = []
    monkeypatch.setattr(oscillation.logger, "warning", heard.append)
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images(24), labels(24), strict=True)]
    options = {"per_device_train_batch_size": 4, "optim": "sgd", "learning_rate": 0.1, "max_steps": 6}
    options |= {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": 0.0}

    def run(**more: Any) -> dict[str, Tensor]:
        callback = OscillationCallback()
        trainer(Classifier(quantized_vit()), tmp_path, rows, callbacks=[callback], **options).train(**more)
        assert callback.tracker.share(0.0) > 0
        return callback.tracker.state_dict()

    whole = run()
    resumed = run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not heard
    (tmp_path / "checkpoint-3" / OscillationCallback.FILE).unlink()
    run(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "from step 3 on" in heard[0]


# --- the picture, and misuse


def test_picture_names_every_layer():
    pytest.importorskip("matplotlib").use("Agg")
    model = quantized_vit()
    tracker = OscillationTracker(model)
    tracker.plot()  # of nothing yet
    optimizer = SGD(model.parameters(), lr=0.1)
    tracker.attach(optimizer)
    for _ in range(3):
        jitter(model, optimizer)
    layers, weights_at = tracker.plot().axes
    assert [label.get_text() for label in layers.get_yticklabels()] == list(tracker.frequency())
    moving = sum(int((f > 0).sum()) for f in tracker.frequency().values())
    assert sum(bar.get_height() for bar in weights_at.patches) == moving > 0


def test_picture_without_matplotlib_names_the_extra(monkeypatch: Any):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"hf-ext\[demo\]"):
        OscillationTracker(quantized_vit()).plot()


def test_misuse_is_named():
    with pytest.raises(ValueError, match="quantize"):
        OscillationTracker(small_vit())
    with pytest.raises(ValueError, match="momentum=0"):
        OscillationTracker(quantized_vit(), momentum=0)
    with pytest.raises(ValueError, match="momentum=5"):
        OscillationCallback(momentum=5)
    model = quantized_vit()
    tracker = OscillationTracker(model)
    with pytest.raises(TypeError, match="object"):
        tracker.attach(object())
    optimizer = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="detach"):
        tracker.attach(optimizer).attach(optimizer)
