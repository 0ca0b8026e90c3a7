# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # OFQ, on small digits
#
# OFQ ([arXiv 2302.02210](https://arxiv.org/abs/2302.02210)) trains vision transformers with 2-bit weights and
# activations. It has three ideas: StatsQ takes the scale of a weight row from its mean instead of learning it; QKR
# rounds the product W_q^T W_k instead of its factors; confidence-guided annealing (CGA) ends the training with a phase
# in which only weights close to a rounding threshold move. The paper's evidence is ImageNet. What of it appears again
# in a transformer of 150,000 weights on digits of 8 x 8 pixels? This notebook
# 1. sets up three ways to 2-bit weights, all in 2-bit activations: learned scales (LSQ), StatsQ, StatsQ with QKR;
# 2. tunes the learning rates of each, on images kept for that;
# 3. compares their accuracy, with seeds and errors;
# 4. goes on at a small constant rate, with and without CGA for equally many steps;
# 5. looks at the oscillation of weights: where they lie between two thresholds, and how often they go back and forth;
# 6. says what of the paper's findings reproduces here and what does not;
# 7. takes one model to a packed file and to int8.
#
# It takes about twenty minutes of one CPU thread. `HF_EXT_QUICK=1` in the environment makes everything tiny: that is
# for tests, and the numbers then mean nothing.

# %%
import copy
import itertools
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import scipy.stats
import timm
import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hf_ext.ofq_quantizer import (
    ConfidenceAnnealing,
    OFQConfig,
    OscillationTracker,
    calibrate,
    distillation_loss,
    freeze,
    load_packed,
    lsq,
    lsq_init,
    quantize,
    report,
    save_packed,
    statsq,
    to_int8,
)
from hf_ext.ofq_quantizer.layers import QuantLinear

QUICK = os.environ.get("HF_EXT_QUICK") == "1"
TRAINING, VALIDATION, TEST, BATCH = (128, 64, 100, 8) if QUICK else (1000, 300, 497, 32)
TEACHER_EPOCHS, EPOCHS, LAST_EPOCHS = (4, 1, 2) if QUICK else (30, 6, 5)
RATES, FACTORS = ((3e-3, 1e-2) if QUICK else (1e-3, 3e-3, 1e-2, 3e-2)), (1, 0.1)
TUNING_SEEDS, SEEDS = (range(100, 101), range(2)) if QUICK else (range(100, 102), range(8))
LAST_RATE, SLOWER = 0.003, 0.001  # in quantisation steps
BITS = 2
SIZE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "num_heads": 4, "num_classes": 10}
SIZE |= {"depth": 1 if QUICK else 3}

torch.set_num_threads(1)
print(f"torch {torch.__version__}, timm {timm.__version__}, one CPU thread")

# %% [markdown]
# ## 1. A task, and three ways to 2-bit weights
#
# The digits of scikit-learn, cut once into images for training, for choosing learning rates, and for testing. A vision
# transformer of timm learns them in full precision; it is the start of every 2-bit model of its seed, and its teacher:
# the loss is the paper's, labels and teacher half and half.

# %%
digits = load_digits()
images, labels = torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32), torch.tensor(digits.target)
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
training, validation, test = order[: TRAINING + VALIDATION + TEST].split([TRAINING, VALIDATION, TEST])


def adamw(model: nn.Module, rate: float, factor: float = 1) -> torch.optim.Optimizer:
    """Decays matrices and embeddings only; factor: the rate of learned scales, as a part of that of all the rest."""
    named = list(model.named_parameters())
    scales = [x for name, x in named if name.endswith("scale_norm")]
    rest = [x for name, x in named if not name.endswith("scale_norm")]
    groups = [
        {"params": [x for x in rest if x.ndim > 1], "weight_decay": 0.05},
        {"params": [x for x in rest if x.ndim <= 1]},
        {"params": scales, "lr": rate * factor},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, weight_decay=0)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    seed: int,
    taught: Tensor | None = None,
    one_cycle: bool = True,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """One cycle of the learning rate, or a constant one. The seed fixes the order; taught: the teacher's logits."""
    generator = torch.Generator().manual_seed(seed)
    steps, rates = epochs * -(-len(training) // BATCH), [group["lr"] for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.1) if one_cycle else None
    model.train()
    for _ in range(epochs):
        for rows in training[torch.randperm(len(training), generator=generator)].split(BATCH):
            logits = model(images[rows])
            if taught is None:
                loss = cross_entropy(logits, labels[rows])
            else:
                loss = distillation_loss(logits, labels[rows], taught[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            after_step()
            if schedule:
                schedule.step()
    model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, rows: Tensor) -> Tensor:
    return model.eval()(images[rows])


def loss_on(model: nn.Module, rows: Tensor) -> float:
    return cross_entropy(logits_of(model, rows), labels[rows]).item()


def accuracy(model: nn.Module, rows: Tensor) -> float:
    """Percent."""
    return 100 * (logits_of(model, rows).argmax(-1) == labels[rows]).float().mean().item()


def full_precision(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **SIZE)
    train(model, adamw(model, 3e-3), TEACHER_EPOCHS, seed)
    return model


teachers = {seed: full_precision(seed) for seed in (*TUNING_SEEDS, *SEEDS)}
taught = {seed: logits_of(teacher, torch.arange(len(images))) for seed, teacher in teachers.items()}
print(f"{len(training)} images to learn from, {len(validation)} to tune on, {len(test)} to test on")

# %% [markdown]
# | | weights of the blocks, 2 bits |
# |---|---|
# | LSQ | a learned scale a row; levels at -2, -1, 0 and 1 steps; a weight beyond them gets no gradient |
# | StatsQ | scale: twice the mean of the row; levels at -1.5, -0.5, 0.5 and 1.5 steps; every weight gets a gradient |
# | StatsQ + QKR | the same, and one quantiser for W_q^T W_k of each head, in place of those for W_q and W_k |
#
# Everything else is equal: 2-bit activations with learned scales, first and last layer in 8 bits.
#
# The package has no option for LSQ in the blocks. It has LSQ for the 8-bit layers, though, and a layer that is given a
# scale to learn takes that way. So the comparison partner is built here, in one line a layer. It differs from StatsQ in
# scale, levels and gradient at once, as the two methods do.


# %%
def with_learned_scales(model: nn.Module) -> nn.Module:
    """LSQ in place of StatsQ."""
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and layer.weight_scale_norm is None:
            layer.weight_scale_norm = nn.Parameter(lsq_init(layer.weight, BITS, axis=0))
    return model


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "LSQ": lambda model: with_learned_scales(quantize(model, OFQConfig())),
    "StatsQ": lambda model: quantize(model, OFQConfig()),
    "StatsQ + QKR": lambda model: quantize(model, OFQConfig(qk_reparam=True)),
}
COLOURS = {"full precision": "0.5", "LSQ": "tab:orange", "StatsQ": "tab:blue", "StatsQ + QKR": "tab:green"}


def student(method: str, seed: int) -> nn.Module:
    """The teacher of this seed, quantised, before it learns."""
    return calibrate(METHODS[method](copy.deepcopy(teachers[seed])), [images[training[:256]]])


def learn(method: str, rate: float, factor: float, seed: int) -> nn.Module:
    model = student(method, seed)
    train(model, adamw(model, rate, factor), EPOCHS, seed, taught[seed])
    return model


# %% [markdown]
# Both, on one row of a trained model, before it learns on. The thin lines are the thresholds between two levels: where
# weights oscillate, it is across one of these.

# %%
row = teachers[SEEDS[0]].blocks[0].mlp.fc1.weight.detach()[:1].sort().values
step = {"LSQ": lsq_init(row, BITS, axis=0), "StatsQ": row.abs().mean(1)}
rounded = {"LSQ": lsq(row, step["LSQ"], BITS, axis=0), "StatsQ": statsq(row, BITS)}
THRESHOLDS = {"LSQ": torch.tensor([-1.5, -0.5, 0.5]), "StatsQ": torch.tensor([-1.0, 0.0, 1.0])}  # in steps

_, both = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharex=True, sharey=True)
for one, (method, values) in zip(both, rounded.items(), strict=True):
    for threshold in THRESHOLDS[method] * step[method]:
        one.axvline(threshold, color="0.8", lw=1)
    one.plot(row[0], values[0], ".", color=COLOURS[method])
    one.set(xlabel="weight", title=method)
both[0].set(ylabel="quantised weight")
pyplot.show()

# %% [markdown]
# ## 2. The learning rates of each
#
# A step of AdamW is about as long as the learning rate, whatever the gradient. A learned scale is a small number, and
# at a rate that suits the weights a few steps can carry it through zero. Below 1e-5 a quantiser takes 1e-5 for it, and
# its row or its token is then as good as switched off. So two rates are tuned: that of all parameters, and that of the
# scales as a part of it, 1 or a tenth.
#
# Every method takes every pair, with seeds that are not used again. The best of a method is the one with the lowest
# mean loss on the validation images; its rate may not lie at an end of the grid.


# %%
def switched_off(model: nn.Module) -> float:
    """Percent of all learned scales."""
    scales = torch.cat([x.detach() for name, x in model.named_parameters() if name.endswith("scale_norm")])
    return 100 * (scales <= 1e-5).float().mean().item()


tuning, off = ({method: {} for method in METHODS} for _ in range(2))
for method in METHODS:
    for pair in itertools.product(RATES, FACTORS):
        models = [learn(method, *pair, seed) for seed in TUNING_SEEDS]
        tuning[method][pair] = [loss_on(model, validation) for model in models]
        off[method][pair] = statistics.fmean(map(switched_off, models))
best = {method: min(losses, key=lambda pair: statistics.fmean(losses[pair])) for method, losses in tuning.items()}
assert QUICK or not {RATES[0], RATES[-1]} & {rate for rate, _ in best.values()}, f"widen the grid: {best}"

for factor in FACTORS:
    print(f"scales at {factor:g} of the rate; validation loss (and % of scales switched off)")
    print(f"{'rate':13}" + "".join(f"{rate:17.2g}" for rate in RATES))
    for method, losses in tuning.items():
        means = [(statistics.fmean(losses[rate, factor]), off[method][rate, factor]) for rate in RATES]
        print(f"{method:13}" + "".join(f"{loss:10.3f} ({share:4.1f})" for loss, share in means))
print("best:", ", ".join(f"{method} {rate:g}, scales {factor:g}" for method, (rate, factor) in best.items()))

# %% [markdown]
# With so few seeds and images the choice among neighbours is rough. It is made the same way for all three.
#
# ## 3. Accuracy
#
# Each method at its own rates, on the test images. A seed fixes the teacher and the order of the images, the same for
# all methods, so differences within a seed are what counts. Errors are standard errors over the seeds. They say nothing
# about other images.


# %%
def error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


class Difference(NamedTuple):
    """Mean of the differences within a seed, its standard error, half its interval of 95 % by Student's t."""

    mean: float
    error: float
    half: float

    @classmethod
    def of(cls, values: list[float], others: list[float]) -> "Difference":
        differences = [x - y for x, y in zip(values, others, strict=True)]
        factor = scipy.stats.t.ppf(0.975, len(differences) - 1).item()
        return cls(statistics.fmean(differences), error(differences), factor * error(differences))

    @property
    def verdict(self) -> str:
        """Of a paired t-test at 5 %, which is the same as whether the interval holds zero."""
        return "no difference shown" if abs(self.mean) <= self.half else "higher" if self.mean > 0 else "lower"

    def __str__(self) -> str:
        return f"{self.mean:+.2f} +- {self.error:.2f}: {self.verdict}"


learned = {method: [learn(method, *best[method], seed) for seed in SEEDS] for method in METHODS}
right = {"full precision": [accuracy(teachers[seed], test) for seed in SEEDS]}
right |= {method: [accuracy(model, test) for model in models] for method, models in learned.items()}
unlearned = {method: [accuracy(student(method, seed), test) for seed in SEEDS] for method in METHODS}

_, one = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
for place, (method, values) in enumerate(right.items()):
    one.scatter(values, [place] * len(values), s=14, color="0.6", zorder=3)
    one.errorbar(statistics.fmean(values), place, xerr=error(values), fmt="|", ms=14, color=COLOURS[method], capsize=4)
one.set_yticks(range(len(right)), list(right))
one.invert_yaxis()
one.set(xlabel="test accuracy (%)", title="W2A2 at the best rates: every seed, mean and standard error")
pyplot.show()

print(f"{'':14} accuracy (%)   rounded, not trained   scales switched off (%)")
for method, values in right.items():
    line = f"{method:14} {statistics.fmean(values):5.2f} +- {error(values):.2f}"
    if method in learned:
        gone = statistics.fmean(map(switched_off, learned[method]))
        line += f" {statistics.fmean(unlearned[method]):22.1f} {gone:25.2f}"
    print(line)

# %%
gaps = {
    (method, other): Difference.of(right[method], right[other])
    for method, other in [
        ("LSQ", "full precision"),
        ("StatsQ", "full precision"),
        ("StatsQ + QKR", "full precision"),
        ("StatsQ", "LSQ"),
        ("StatsQ + QKR", "LSQ"),
        ("StatsQ + QKR", "StatsQ"),
    ]
}
print(f"points of test accuracy, {len(SEEDS)} seeds")
for (method, other), gap in gaps.items():
    print(f"{method:12} minus {other:14} {gap}")

# %% [markdown]
# ## 4. The last phase: annealing
#
# Now every model goes on for some epochs at a small constant rate, and StatsQ and QKR twice: as before, and under CGA.
# The two see the same images in the same order at the same rate. Under CGA a weight moves only while it lies within
# 0.005 quantisation steps of a threshold, as published.
#
# What a rate does to codes depends on the distance between two levels, the quantisation step, which differs between the
# methods. So the rate is given in such steps (the median over the rows of a model): at 0.003, one step of AdamW moves a
# weight by about 0.003 of that distance. LSQ runs a second time at StatsQ's absolute rate, and StatsQ with and without
# CGA at a third of the rate. (The paper takes 1e-5, after 300 epochs.)
#
# A weight oscillates if its code turns back: if it changes against the direction of its last change. `frequency` is the
# running mean of such turns a step, with momentum 0.01, and above 0.005 a weight counts as oscillating
# ([Nagel et al.](https://arxiv.org/abs/2203.11086)); here that is one turn in the last 69 steps, or more before.
# `OscillationTracker` follows the weights that StatsQ rounds. For LSQ's the same statistic is written out below; on a
# StatsQ model both must agree, and do.


# %%
class TurnCounter:
    """What OscillationTracker computes, of all weights of 2 bits, whichever quantiser rounds them."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.codes = model, None

    def update(self) -> None:
        codes = torch.cat([weight.codes.flatten() for weight in freeze(self.model).values() if weight.bits == BITS])
        if self.codes is None:
            self.turns, self.direction = torch.zeros(len(codes)), torch.zeros_like(codes)
        else:
            change = (codes - self.codes).sign()
            turned = (change != 0) & (change == -self.direction)
            self.turns = self.turns.lerp(turned.float(), 0.01)
            self.direction = change.where(change != 0, self.direction)
        self.codes = codes

    def frequency(self) -> dict[str, Tensor]:
        return {"all": self.turns}


class Last(NamedTuple):
    """The model after a last phase, the frequency of every weight, and the share that stood still in the last step."""

    model: nn.Module
    frequency: Tensor
    frozen: float

    @property
    def oscillating(self) -> float:
        """Percent."""
        return 100 * (self.frequency > 0.005).float().mean().item()


class Phase(NamedTuple):
    """How a last phase is run: rate in quantisation steps of the same method, or of `steps_of`."""

    method: str
    rate: float
    anneal: bool = False
    steps_of: str | None = None


RUNS = {
    "LSQ": Phase("LSQ", LAST_RATE),
    "LSQ, StatsQ's rate": Phase("LSQ", LAST_RATE, steps_of="StatsQ"),
    "StatsQ": Phase("StatsQ", LAST_RATE),
    "StatsQ + CGA": Phase("StatsQ", LAST_RATE, anneal=True),
    "StatsQ + QKR": Phase("StatsQ + QKR", LAST_RATE),
    "StatsQ + QKR + CGA": Phase("StatsQ + QKR", LAST_RATE, anneal=True),
    "StatsQ, slower": Phase("StatsQ", SLOWER),
    "StatsQ + CGA, slower": Phase("StatsQ", SLOWER, anneal=True),
}


def quantisation_step(model: nn.Module) -> float:
    """Distance between two levels, the median over all rows of 2-bit weights; without those of W_q^T W_k."""
    low_bit = [x for name, x in freeze(model).items() if x.bits == BITS and not name.endswith(".qk")]
    return torch.cat([x.scale / (1 if x.method == "lsq" else BITS) for x in low_bit]).median().item()


def rate_of(phase: Phase, seed: int) -> float:
    return phase.rate * quantisation_step(learned[phase.steps_of or phase.method][SEEDS.index(seed)])


def finish(phase: Phase, seed: int, tracker: type | None = None) -> Last:
    model = copy.deepcopy(learned[phase.method][SEEDS.index(seed)])
    optimizer = adamw(model, rate_of(phase, seed), best[phase.method][1])
    annealing = ConfidenceAnnealing(model, boundary_range=0.005).attach(optimizer) if phase.anneal else None
    follow = (tracker or (TurnCounter if phase.method == "LSQ" else OscillationTracker))(model)
    follow.update()
    train(model, optimizer, LAST_EPOCHS, seed, taught[seed], one_cycle=False, after_step=follow.update)
    frozen = 0.0
    if annealing:
        frozen = 100 * annealing.frozen_share
        annealing.detach()
    return Last(model, torch.cat([turns.flatten() for turns in follow.frequency().values()]), frozen)


counted, tracked = (finish(RUNS["StatsQ"], SEEDS[0], x).frequency for x in (TurnCounter, OscillationTracker))
assert torch.equal(counted, tracked)

last = {name: [finish(phase, seed) for seed in SEEDS] for name, phase in RUNS.items()}

# %%
after = {name: [accuracy(run.model, test) for run in runs] for name, runs in last.items()}
oscillating = {name: [run.oscillating for run in runs] for name, runs in last.items()}

_, both = pyplot.subplots(1, 2, figsize=(11, 3.4), layout="constrained", sharey=True)
for one, results in zip(both, (after, oscillating), strict=True):
    for place, (name, values) in enumerate(results.items()):
        mark, colour = ("s" if RUNS[name].anneal else "o"), COLOURS[RUNS[name].method]
        one.scatter(values, [place] * len(values), s=14, color="0.6", zorder=3)
        one.errorbar(statistics.fmean(values), place, xerr=error(values), fmt=mark, color=colour, capsize=4)
both[0].set_yticks(range(len(after)), list(after))
both[0].invert_yaxis()
both[0].set(xlabel="test accuracy (%)", title="Accuracy")
both[1].set(xlabel="weights that oscillate (%)", title="Oscillation", xlim=(0, None))
pyplot.show()

columns = f"{'accuracy (%)':>14} {'its change':>15} {'oscillating (%)':>18} {'frozen (%)':>11}"
print(f"{'':20} {'rate':7} {columns}")
for name, phase in RUNS.items():
    change = Difference.of(after[name], right[phase.method])
    rate = statistics.fmean(rate_of(phase, seed) for seed in SEEDS)
    frozen = statistics.fmean(run.frozen for run in last[name])
    line = f"{name:20} {rate:.1e} {statistics.fmean(after[name]):6.2f} +- {error(after[name]):.2f}"
    line += f" {change.mean:+7.2f} +- {change.error:.2f}"
    print(f"{line} {statistics.fmean(oscillating[name]):9.3f} +- {error(oscillating[name]):.3f} {frozen:11.2f}")

# %% [markdown]
# Accuracy and oscillation with CGA minus those of the same phase without it:

# %%
ANNEALED = {
    "StatsQ + CGA": "StatsQ",
    "StatsQ + QKR + CGA": "StatsQ + QKR",
    "StatsQ + CGA, slower": "StatsQ, slower",
}
by_annealing = {
    what: {name: Difference.of(values[name], values[control]) for name, control in ANNEALED.items()}
    for what, values in (("accuracy", after), ("oscillating", oscillating))
}
times_fewer = {
    name: statistics.fmean(oscillating[control]) / max(statistics.fmean(oscillating[name]), 1e-9)
    for name, control in ANNEALED.items()
}
for name in ANNEALED:
    print(f"{name:21} accuracy {by_annealing['accuracy'][name]}")
    print(f"{'':21} oscillating {by_annealing['oscillating'][name]}, {times_fewer[name]:.1f} times fewer")

# %% [markdown]
# How the cut comes about is in the last column of the table above. A weight that leaves its band of 0.005 steps stands
# still from then on, and at these rates a few steps of AdamW carry it out. Soon nearly all weights are frozen, and a
# weight that does not move does not oscillate. What CGA has to be judged by is the accuracy.
#
# ## 5. Where weights lie, and how often they turn
#
# First the distance from the nearest threshold, in quantisation steps. Where oscillation gathers weights at thresholds,
# they pile up at the left end. `crowding` is the number of weights within 0.005 steps, in proportion to that within
# 0.05: 1 means as many as an even spread would have. (Nagel et al. show peaks there, in networks trained much longer.)
# QKR rounds another matrix than the other two, and is left out.


# %%
def distances(model: nn.Module) -> Tensor:
    """Of every weight of 2 bits, in the order of the layers."""
    found = []
    for name, integers in freeze(model).items():
        if integers.bits == BITS:
            method, levels = ("LSQ", 1) if integers.method == "lsq" else ("StatsQ", BITS)
            weight = model.get_submodule(name).weight.detach()
            ratio = weight / (integers.scale[:, None] / levels)  # in quantisation steps
            found.append((ratio[..., None] - THRESHOLDS[method]).abs().amin(-1).flatten())
    return torch.cat(found)


distance = {f"{method}, not trained": [distances(student(method, seed)) for seed in SEEDS] for method in THRESHOLDS}
distance |= {f"{method}, main phase": [distances(model) for model in learned[method]] for method in THRESHOLDS}
distance |= {name: [distances(run.model) for run in last[name]] for name in ("LSQ", "StatsQ", "StatsQ + CGA")}


def histogram(one: pyplot.Axes, values: list[Tensor], bins: Tensor, style: str, colour: str, label: str) -> None:
    """Percent of all weights of all seeds in each bin."""
    together = torch.cat(values)
    shares = 100 * torch.histogram(together, bins).hist / len(together)
    one.stairs(shares, bins, baseline=None, ls=style, color=colour, label=label, lw=1.4)


_, (wide, near) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for one, bins, shown in (
    (wide, torch.linspace(0, 0.5, 26), [name for name in distance if name != "StatsQ + CGA"]),
    (near, torch.linspace(0, 0.02, 21), ["StatsQ, not trained", "StatsQ", "StatsQ + CGA"]),
):
    for name in shown:
        style = ":" if "not" in name else "--" if "main" in name else "-"
        colour = "tab:red" if "CGA" in name else COLOURS[name.partition(",")[0]]
        label = name if "," in name else f"{name}, last phase"
        histogram(one, distance[name], bins, style, colour, label)
    one.set(xlabel="distance from the nearest threshold (steps)", ylabel=f"weights in {bins[1]:.3f} steps (%)")
    one.set(ylim=(0, None), xlim=(0, bins[-1]))
    one.legend(fontsize=8)
near.axvline(0.005, color="0.6", lw=1)
near.set_xticks([0, 0.005, 0.01, 0.015, 0.02])
wide.set(title="All weights")
near.set(title="Close to a threshold; the line is the band of CGA")
pyplot.show()

within = {
    name: {reach: [100 * (x <= reach).float().mean().item() for x in values] for reach in (0.005, 0.05)}
    for name, values in distance.items()
}
crowding = {
    name: [10 * x / y for x, y in zip(shares[0.005], shares[0.05], strict=True)] for name, shares in within.items()
}
print(f"{'weights (%) within':20}" + "".join(f"{what:>17}" for what in ("0.005 steps", "0.05 steps", "crowding")))
for name, shares in within.items():
    columns = (*shares.values(), crowding[name])
    print(f"{name:20}" + "".join(f"{statistics.fmean(x):9.2f} +- {error(x):.2f}" for x in columns))

# %%
piled = {method: Difference.of(crowding[method], crowding[f"{method}, not trained"]) for method in THRESHOLDS}
for method, difference in piled.items():
    print(f"{method}: crowding after the last phase minus before training {difference}")
    print(f"{'':{len(method)}}  in the last phase {statistics.fmean(crowding[method]) - 1:+.1%} against an even spread")

# %% [markdown]
# Then the frequency of turns in the last phase, of those weights that turned at all. The line is where they count as
# oscillating.

# %%
figure, both = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
bins = torch.arange(0, 0.1, 0.005)
panels = (["LSQ", "StatsQ", "StatsQ + CGA"], ["StatsQ + QKR", "StatsQ + QKR + CGA"])
for one, names in zip(both, panels, strict=True):
    for name in names:
        colour = "tab:red" if RUNS[name].anneal else COLOURS[RUNS[name].method]
        moved = [run.frequency.where(run.frequency > 0, -1) for run in last[name]]
        histogram(one, moved, bins, "-", colour, name)
    one.axvline(0.005, color="0.6", lw=1)
    one.set(xlabel="frequency (turns a step)", yscale="log")
    one.legend(fontsize=8)
both[0].set(ylabel="weights (%)", title="LSQ and StatsQ")
both[1].set(title="QKR: of weights and of W_q^T W_k")
pyplot.show()

# %% [markdown]
# ## 6. What of the paper reproduces here
#
# Each line is a claim of the paper (the one on thresholds is Nagel et al.'s), with the difference that it speaks of, in
# percent of test images or of weights or in crowding, and its standard error over the seeds. The verdict is that of a
# paired t-test at 5 %. *Reproduces*: a difference in the direction of the claim. *Contrary*: one in the other. *Not
# shown*: neither, which is no proof that there is none. Of this many tests one may come out by chance.

# %%
turning = {name: Difference.of(oscillating["StatsQ"], oscillating[name]) for name in ("LSQ", "LSQ, StatsQ's rate")}
CLAIMS = {
    "2-bit models trained with StatsQ are more accurate than with LSQ": (gaps["StatsQ", "LSQ"], "higher"),
    "QKR makes StatsQ more accurate": (gaps["StatsQ + QKR", "StatsQ"], "higher"),
    "StatsQ has fewer oscillating weights than LSQ": (turning["LSQ"], "lower"),
    "StatsQ has fewer oscillating weights than LSQ at its rate": (turning["LSQ, StatsQ's rate"], "lower"),
    "training with LSQ gathers weights at thresholds": (piled["LSQ"], "higher"),
    "CGA has fewer oscillating weights (StatsQ)": (by_annealing["oscillating"]["StatsQ + CGA"], "lower"),
    "CGA has fewer oscillating weights (QKR)": (by_annealing["oscillating"]["StatsQ + QKR + CGA"], "lower"),
    "CGA makes StatsQ more accurate": (by_annealing["accuracy"]["StatsQ + CGA"], "higher"),
    "CGA makes QKR more accurate": (by_annealing["accuracy"]["StatsQ + QKR + CGA"], "higher"),
}


def finding(difference: Difference, expected: str) -> str:
    if difference.verdict == "no difference shown":
        return "not shown"
    return "reproduces" if difference.verdict == expected else "contrary"


findings = {claim: finding(*evidence) for claim, evidence in CLAIMS.items()}
for claim, (difference, _) in CLAIMS.items():
    print(f"{findings[claim]:10}  {claim}: {difference.mean:+.2f} +- {difference.error:.2f}")

# %% [markdown]
# Not tested here is that the weights of queries and keys drive each other's oscillation, for which the paper has QKR:
# under QKR other numbers are rounded, more of them, and their share of oscillating ones is no measure of it.
#
# ## 7. The end of the road
#
# One of the models above, StatsQ with CGA. What was quantised, layer by layer:

# %%
model = last["StatsQ + CGA"][0].model
summary = report(model)
print(f"{'':19} kind   bits: weight, input  levels  clipped  executed  bytes: packed, float32")
for layer in summary.layers:
    bits = f"{layer.w_bits:12} {layer.a_bits:6} {layer.codes_used:8} {layer.clipped_share:8.1%}"
    print(f"{layer.name:19} {layer.kind:7}{bits} {layer.executed!s:>9} {layer.packed_bytes:14,} {layer.fp32_bytes:8,}")

# %% [markdown]
# (`print(report(model))` shows the same as a table.) Its packed file, and the model that multiplies integers: both give
# the same logits for all test images, bit for bit.

# %%
with tempfile.TemporaryDirectory() as folder:
    save_packed(model, folder, SIZE)  # timm before 1.0.31 does not record what create_model was given
    packed_bytes = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    packed = load_packed(folder)
float_bytes = sum(tensor.nbytes for tensor in teachers[SEEDS[0]].state_dict().values())
logits = {
    "as trained": logits_of(model, test),
    "packed": logits_of(packed, test),
    "int8": logits_of(to_int8(packed), test),
    "teacher": logits_of(teachers[SEEDS[0]], test),
}
apart = {name: (values - logits["as trained"]).abs().max().item() for name, values in logits.items()}
code_bytes = sum(layer.packed_bytes for layer in summary.layers if layer.w_bits == BITS)
print(f"{float_bytes:,} bytes of tensors in float32; packed {packed_bytes}, of which {code_bytes:,} are 2-bit codes")
print("largest difference of a logit from the trained model:", apart)

# %% [markdown]
# The 2-bit codes are the smaller part of that file. The rest does not shrink with the bits: the scales of rows and
# tokens, the shifts of activations, norms, biases, and the names of all these.
#
# ## 8. What this shows, and what it does not
#
# It shows that the three methods run in a plain loop from one string or one call, side by side, and that what was
# trained is what is deployed. The verdicts of section 6 are those of this model and this task.
#
# They say little about ImageNet, in either direction. The published 2-bit figures (the authors' repository, not ours)
# are 64.33 for DeiT-T, from 72.02 in full precision, and 75.72 for DeiT-S, from 79.9; the paper puts them 9.8 and 7.7
# points ahead of earlier 2-bit models. A part of what it finds for QKR need not be due to QKR: the released code
# replaces pretrained weights by random ones, of proj always and of qkv without QKR. Here all three methods start from
# all pretrained weights.
#
# Nor is oscillation bad in itself: it has been found to help robustness
# ([arXiv 2502.00490](https://arxiv.org/abs/2502.00490)). CGA is an option for the end of a training, to be compared
# with the same number of steps without it.
#
# Where to go next:
# - your model: the recipes in the [README of OFQ](../hf_ext/ofq_quantizer/README.md), for timm and transformers;
# - your training: `OscillationTracker(model).attach(optimizer)` and its `.plot()`, or `OscillationCallback` in Trainer;
# - your machine: `hf-ext bench ofq` for speed, memory and file sizes, `hf-ext demo` for a training script.
