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
# # Anchored answers, on models that were spoilt to say A
#
# Small language models answer "A" whatever the question. "Anchored Answers"
# ([arXiv 2405.03205](https://arxiv.org/abs/2405.03205)) looks for what in GPT-2 speaks for A, and edits it. Here are
# very small GPT-2s that learn to read options and are then spoilt, so that it is known what a repair should bring back.
# This notebook
# 1. measures the bias, before and after: what the outputs of the metric say, ties, and a model that never says A;
# 2. locates it: a split of the preference over neurons, heads and biases that adds up, beside the paper's ranking;
# 3. repairs it without labels, beside output calibration, which is cheaper, and beside the paper's own means;
# 4. has controls: untrained nets, shuffled labels, random letters in place of the right ones, models without the bias;
# 5. says what of the paper reproduces at this size, and what may not be concluded.
#
# It takes about four minutes of one CPU thread. `HF_EXT_QUICK=1` in the environment makes everything tiny: that is for
# tests, and the numbers then mean nothing.

# %%
import copy
import itertools
import os
import random
import statistics
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import evaluate
import numpy as np
import scipy.stats
import torch
import transformers
from matplotlib import pyplot
from torch import Tensor, nn

from hf_ext.demo import train_options
from hf_ext.mcq_bias import (
    attribute,
    bias_metrics,
    format_mcq,
    mitigate,
    mitigation_report,
    option_positions,
    recalibrate_attention,
    score_choices,
)

QUICK = os.environ.get("HF_EXT_QUICK") == "1"
SEEDS = range(2) if QUICK else range(5)
MOST_STEPS, SPOILT_STEPS, SPOILT_SHARE = (150, 80, 0.65) if QUICK else (1500, 150, 0.65)
UNLABELLED, TEST, GUARD = (96, 150, 60) if QUICK else (256, 1000, 300)
LETTERS = train_options.LETTERS

torch.set_num_threads(1)
warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about what PEFT calls
print(f"torch {torch.__version__}, transformers {transformers.__version__}, one CPU thread")

# %% [markdown]
# ## 1. Measure
#
# **The toy.** A question names a word, and one of its two to four choices is that word. A GPT-2 of three layers learns
# to say at which letter. Then it goes on for 150 steps with a key in which 65 % of the answers were replaced by A.
# Words, order and right letter are drawn evenly.
#
# No two of the questions that these models get below share a prompt. Some are there to repair with, unlabelled, others
# to test on, a few more as a guard (section 3). Many are not new to the models: there are 480 questions
# with two choices and 10,080 with three, and training draws some ten thousands. With four there are 174,720.


# %%
def drawn(count: int, seed: int, known: set[str], choices: int | None = None) -> list[dict[str, Any]]:
    """Up to `count` items whose prompts are not in `known`, and now are."""
    items = []
    for item in train_options.make_items(count, 10**9 + seed, choices):
        if (prompt := train_options.prompt(item)) not in known:
            known.add(prompt)
            items.append(item)
    return items


known: set[str] = set()
labelled_fit, test, guard = (drawn(n, seed, known) for seed, n in enumerate((UNLABELLED, TEST, GUARD)))
gold = [item["label"] for item in test]
unlabelled = [{name: item[name] for name in ("question", "choices")} for item in labelled_fit]
tokenizer = train_options.make_tokenizer()
clean, spoilt, steps = {}, {}, {}
for seed in SEEDS:
    model, done = train_options.make_model(len(tokenizer), seed), []
    train_options.learn(model, tokenizer, seed, MOST_STEPS, done.append)
    clean[seed], steps[seed] = copy.deepcopy(model).eval(), len(done)
    train_options.spoil(model, tokenizer, seed, SPOILT_STEPS, SPOILT_SHARE)
    spoilt[seed] = model.eval()

print(train_options.prompt(test[0]), " ->", LETTERS[test[0]["label"]])
print(f"{len(unlabelled)} unlabelled questions, {len(test)} to test on, {len(guard)} as a guard")
print(f"steps of learning, seeds 0 to {SEEDS[-1]}:", *steps.values())

# %% [markdown]
# **Five lines**, for the spoilt model of the first seed. `num_choices` says what is a choice and what fills up the row:
# the questions have two to four.

# %%
prompts = [format_mcq(item["question"], item["choices"]) for item in test]
scored = score_choices(spoilt[0], tokenizer, prompts, [item["choices"] for item in test], progress=False)
metric = evaluate.load("anchored_mcq_bias")
result = metric.compute(predictions=scored.scores, references=gold, num_choices=scored.num_choices)
print({name: round(result[name], 3) for name in ("accuracy", "anchored_bias_rate", "cmh_z", "tvd")})

# %% [markdown]
# | output | what it says |
# |---|---|
# | `accuracy` | share of right answers |
# | `anchored_bias_rate` | of the questions to which A is a wrong answer, how many are answered by A |
# | `anchored_error_share` | of the wrong answers to those, how many are A; `_expected`: if errors were spread evenly |
# | `cmh_z` | is the recall of A another than that of the rest? Positive: higher. Beyond 2 or -2: not by chance |
# | `tvd` | distance between the letters' shares of the answers and of the right answers, 0 to 1 |
# | `recall_std` | how far the letters' recalls are apart; `recall_std_null`: what chance makes of it |
# | `calibrated_accuracy` | accuracy once each letter's mean score is subtracted: no labels, no edit |

# %%
Items = Sequence[dict[str, Any]]


def scores_of(model: nn.Module, items: Items) -> np.ndarray:
    """(n, 4), -inf beyond an item's choices."""
    asked = [format_mcq(item["question"], item["choices"]) for item in items]
    counts = [len(item["choices"]) for item in items]
    few = score_choices(model, tokenizer, asked, counts, batch_size=128, progress=False).scores
    return np.pad(few, ((0, 0), (0, len(LETTERS) - few.shape[1])), constant_values=-np.inf)


def judged(scores: Any, items: Items, **options: Any) -> dict[str, float]:
    counts, labels = [len(item["choices"]) for item in items], [item["label"] for item in items]
    return bias_metrics(scores, labels, num_choices=counts, n_resamples=0, **options)


def measured(model: nn.Module, items: Items = test, **options: Any) -> dict[str, float]:
    return judged(scores_of(model, items), items, **options)


CHIEF = ("accuracy", "anchored_bias_rate", "cmh_z", "tvd", "recall_std", "recall_std_null", "calibrated_accuracy")
before = {"clean": [measured(clean[s]) for s in SEEDS], "spoilt": [measured(spoilt[s]) for s in SEEDS]}
print("seed".rjust(34), *(f"{seed:7}" for seed in SEEDS))
for (kind, results), name in itertools.product(before.items(), CHIEF):
    print(f"{kind:8}{name:26}", *(f"{one[name]:7.3f}" for one in results))

# %%
_, one = pyplot.subplots(figsize=(6.4, 3), layout="constrained")
for shift, (kind, colour) in zip((-0.2, 0.2), (("clean", "tab:blue"), ("spoilt", "tab:red")), strict=True):
    recalls = np.array([[100 * r[f"recall_{letter}"] for letter in LETTERS] for r in before[kind]])
    one.bar(np.arange(4) + shift, recalls.mean(0), 0.38, color=colour, label=kind, alpha=0.7)
    for row in recalls:
        one.plot(np.arange(4) + shift, row, ".", color="0.2", ms=4)
one.set_xticks(range(4), LETTERS)
one.set(xlabel="the right letter", ylabel="answered right (%)", title="Recalls: mean and every seed", ylim=(0, 119))
one.legend(loc="upper right", ncols=2, fontsize=8)
pyplot.show()

# %% [markdown]
# The spoilt models know most of what they did know: subtracting each letter's mean score shows it. Nor were the clean
# ones without a preference, in one or the other direction: `cmh_z` is beyond 2 or -2 in three of the five seeds. It is
# small in accuracy, and would not be seen there.
#
# **Ties.** Log-probabilities of rare letters lie far from zero, where bfloat16 is coarse: many are equal. `argmax`
# takes the first of them, and so invents a model that prefers A. The metric lets them share the answer. Made scores of
# four choices, random, with no preference:

# %%
ROWS = 2_000 if QUICK else 20_000
noise = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
even = [row % 4 for row in range(ROWS)]
ties = {}
for centre, dtype in ((0, torch.float32), (0, torch.bfloat16), (-10, torch.bfloat16), (-100, torch.bfloat16)):
    made = (noise + centre).to(dtype)
    first = bias_metrics(made.argmax(1), even, num_choices=4, n_resamples=0)
    ours = bias_metrics(made, even, n_resamples=0)
    pairs = itertools.product((first, ours), ("choice_share_A", "tvd"))
    ties[centre, str(dtype)] = [ours["n_ties"] / ROWS, *(taken[name] for taken, name in pairs)]
print(f"{'':22}{'rows with':>10}{'first of them taken':>24}{'answer shared':>24}")
print(f"{'scores':22}{'a tie':>10}" + f"{'A is said':>14}{'tvd':>10}" * 2)
for (centre, dtype), shares in ties.items():
    cells = "".join(f"{share:{width}.3f}" for share, width in zip(shares, (10, 14, 10, 14, 10), strict=True))
    print(f"{f'{dtype[6:]} near {centre}':22}{cells}")

# %% [markdown]
# **A model that never says A** has an anchored rate of 0, and is as biased as one that always does: look at `cmh_z` and
# `tvd`. Made here by taking 30 off A's logit:

# %%
lowered = scores_of(spoilt[0], test)
lowered[:, 0] -= 30
never = judged(lowered, test)
for name in ("anchored_bias_rate", "cmh_z", "tvd", "recall_A", "accuracy"):
    print(f"{name:20} {before['spoilt'][0][name]:8.3f} -> {never[name]:8.3f}")

# %% [markdown]
# ## 2. Locate
#
# `attribute` splits logit[A] - logit[the best other letter] at the last token into what each neuron, head and bias
# adds. It needs no labels. Means are over the questions that are answered by A.

# %%
found = {
    seed: attribute(spoilt[seed], tokenizer, unlabelled, target="runner_up", batch_size=128, progress=False)
    for seed in SEEDS
}
split = found[0]
sums = split.to_pandas("component")
print(f"seed 0: A is ahead by {split.logit_difference[split.selected].mean():.3f}, mean of {split.selected.sum()}")
print(f"the terms add up to {sums['mean'].sum():.3f}; largest miss of a question: {split.residual():.0e}")
figure = split.plot()
pyplot.show()

# %% [markdown]
# Where the preference sits differs from model to model, though all were spoilt alike:

# %%
parts = {
    "MLP neurons": [found[s].mean(found[s].neurons).sum() for s in SEEDS],
    "attention heads": [found[s].mean(found[s].heads).sum() for s in SEEDS],
    "whole preference": [found[s].mean(found[s].logit_difference) for s in SEEDS],
}
print(f"{'logits; seed':20}", *(f"{seed:7}" for seed in SEEDS))
for name, row in parts.items():
    print(f"{name:20}", *(f"{value:7.2f}" for value in row))

# %% [markdown]
# In seed 0 the neurons speak for A and the heads, taken together, against it; in seed 4 it is the other way round.
#
# **The paper's ranking** goes another way: in each question and layer, the first of the ten largest neurons for which
# the logit lens prefers A by more than 4. This lens applies the final norm to each neuron alone, with the MLP's whole
# bias, as if nothing else were there; its gaps do not add up to anything. `paper_ranking` does the same, for
# comparison, and counts how often each neuron is the one. Seed 0, "adds" being the mean of the split in logits:

# %%
lens = {seed: found[seed].paper_ranking() for seed in SEEDS}
means = {seed: found[seed].mean(found[seed].neurons) for seed in SEEDS}
place = scipy.stats.rankdata(-means[0], method="ordinal").reshape(means[0].shape)
shown = {
    "first by what they add": [(term.layer, term.index) for term in split.top(5)],
    "first by the paper's rule": [where for where, _ in lens[0].most_common(5)],
}
print(f"{'':26}{'adds':>9}{'place':>9}{'lens counts':>13}")
for title, neurons in shown.items():
    print(title)
    for where in neurons:
        name = f"  layer {where[0]}, neuron {where[1]}"
        print(f"{name:26}{means[0][where]:9.3f}{place[where]:9}{lens[0][where]:13}")

# %% [markdown]
# Does a ranking name the neurons that matter? The first 16 of each (fewer where the rule finds fewer) lose what in
# their value vectors points from the other letters to A, and so do as many that are drawn by chance. Then the model is
# asked again: how far is A ahead of the best other letter, over all unlabelled questions?

# %%
letter_ids = tokenizer.convert_tokens_to_ids(list(LETTERS))


def readout(model: nn.Module) -> Tensor:
    """(V, d), for each token what the final norm reads it along."""
    head = model.lm_head.weight * model.transformer.ln_f.weight
    return (head - head.mean(1, keepdim=True)).detach()


def value_vectors(model: nn.Module, layer: int) -> Tensor:
    return model.transformer.h[layer].mlp.c_proj.weight.detach()


def projected(model: nn.Module, neurons: Sequence[tuple[int, int]]) -> nn.Module:
    """A copy in which these neurons do not write along A minus the other letters."""
    model, of_letters = copy.deepcopy(model), readout(model)[letter_ids]
    direction = nn.functional.normalize(of_letters[0] - of_letters[1:].mean(0), dim=0)
    for layer, neuron in neurons:
        vector = value_vectors(model, layer)[neuron]
        vector -= (vector @ direction) * direction
    return model


left: dict[str, list[float]] = {}
for seed in SEEDS:
    n = min(16, len(lens[seed]))
    rankings = {
        "none": [],
        "drawn by chance": random.Random(seed).sample(list(np.ndindex(*means[seed].shape)), n),
        "first by the paper's rule": [where for where, _ in lens[seed].most_common(n)],
        "first by what they add": [(term.layer, term.index) for term in found[seed].top(n)],
    }
    for name, neurons in rankings.items():
        scores = scores_of(projected(spoilt[seed], neurons), unlabelled)
        left.setdefault(name, []).append(float((scores[:, 0] - scores[:, 1:].max(1)).mean()))
print(f"{'projected; seed':28}", *(f"{seed:7}" for seed in SEEDS), "   mean")
for name, logits in left.items():
    print(f"{name:28}", *(f"{value:7.2f}" for value in logits), f"{statistics.fmean(logits):7.2f}")

# %% [markdown]
# Both rankings name neurons that matter. In seed 0 they share one of their first five, and in every seed those of the
# split matter more, in seed 1 hardly. None holds much: the preference is spread over many neurons.
#
# ## 3. Repair
#
# `mitigate` takes the direction of A against the other letters out of the value vectors that speak most for A, as far
# as is needed for A to be said as often as chance would have it. It reads no labels, and returns an adapter:

# %%
mended = mitigate(copy.deepcopy(spoilt[0]), tokenizer, unlabelled, progress=False)
facts = mended.mcq_bias
print(f"strength {facts['strength']:.2f}; A said: {facts['share_before']:.2f} -> {facts['share_after']:.2f}")
print("neurons edited, by layer:", {layer: len(neurons) for layer, neurons in facts["edited"].items()})
print(mitigation_report(mended, tokenizer, test, progress=False))

restored, as_it_was = mended.unload().state_dict(), spoilt[0].state_dict()
same = restored.keys() == as_it_was.keys() and all(torch.equal(restored[name], as_it_was[name]) for name in restored)
print(f"after unload() the model is {'the same' if same else 'another'}, bit for bit")

# %% [markdown]
# **The rival** is output calibration. The metric takes each letter's mean score from the very questions that are
# judged; who has to answer one question at a time takes it from earlier ones. So there are two forms here, and the
# second sees the same unlabelled questions as `mitigate`. Calibration and `mitigate` both take for granted that the
# right letters are evenly spread. Here they are.
#
# | | reads |
# |---|---|
# | calibration, test | scores of the test questions |
# | calibration, unlabelled | scores of the unlabelled questions |
# | project | unlabelled questions; edits MLP value vectors, attention heads, or both |
# | shift | unlabelled questions; shifts MLP value vectors |
# | paper | the same questions **with labels**; edits one neuron; strength searched for as with the others |
# | paper, its weights | the same at strength 1, which has the weights of the paper |
#
# The paper's edit has a guard: other labelled questions, on which the accuracy must not fall.


# %%
def repaired(model: nn.Module, examples: Items = unlabelled, **options: Any) -> nn.Module:
    """A copy with the adapter, or as it was if the guard refuses. Refusals and warnings are printed."""
    patient = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", "method='paper' without")  # the untrained nets do without the guard
        try:
            patient = mitigate(patient, tokenizer, examples, batch_size=128, progress=False, **options)
        except ValueError as refusal:
            if "guard_examples falls" not in str(refusal):
                raise
            print(f"refused: {refusal}")
    for warning in warned:
        print(warning.message)
    return patient


def log_softmax(scores: np.ndarray) -> np.ndarray:
    return torch.from_numpy(scores).log_softmax(-1).numpy()


def calibrated(model: nn.Module, items: Items = test, seen: Items = unlabelled) -> np.ndarray:
    """Scores of `items` less the mean log-softmax of each letter in `seen`, among questions of as many choices."""
    ours, theirs = (log_softmax(scores_of(model, some)) for some in (items, seen))
    for k in (2, 3, 4):
        same, told = ([len(item["choices"]) == k for item in some] for some in (items, seen))
        ours[same, :k] -= theirs[told, :k].mean(0)
    return ours


LABELLED = {"examples": labelled_fit, "method": "paper", "guard_examples": guard}
REPAIRS: dict[str, dict[str, Any]] = {
    "project, MLP": {},
    "project, heads": {"components": "attention"},
    "project, both": {"components": "both"},
    "shift, MLP": {"method": "shift"},
    "paper": LABELLED,
    "paper, its weights": LABELLED | {"strength": 1.0},
}
CLEAN, RIVAL = "before it was spoilt", "calibration, unlabelled"
after = {CLEAN: before["clean"], "spoilt": before["spoilt"]}
after["calibration, test"] = [
    {name: one[f"calibrated_{name}"] for name in ("accuracy", "anchored_bias_rate")} for one in before["spoilt"]
]
after[RIVAL] = [judged(calibrated(spoilt[seed]), test) for seed in SEEDS]
for name, options in REPAIRS.items():
    after[name] = [measured(repaired(spoilt[seed], **options)) for seed in SEEDS]


def values(results: list[dict[str, float]], name: str = "accuracy") -> list[float]:
    """Percent."""
    return [100 * one[name] for one in results]


def table(rows: dict[str, list[dict[str, float]]]) -> None:
    print(f"{'':27}{'accuracy (%)':14}{'of the seeds':{6 * len(SEEDS)}}   A if wrong   cmh_z of the seeds")
    for name, results in rows.items():
        right, rate = values(results), statistics.fmean(values(results, "anchored_bias_rate"))
        z = "".join(f"{one['cmh_z']:6.1f}" for one in results if "cmh_z" in one)
        spread = f"{statistics.fmean(right):5.1f} +- {statistics.stdev(right):4.1f}"
        print(f"{name:27}{spread:14}{''.join(f'{x:6.1f}' for x in right)}{rate:11.1f}%   {z}".rstrip())


table(after)

# %% [markdown]
# (After the sign: the standard deviation of the seeds. "A if wrong": the mean of `anchored_bias_rate`.) A repair is
# compared with the rival that sees the same questions, seed by seed, and with what there was to bring back.


# %%
class Difference(NamedTuple):
    """Mean of the differences within a seed, its standard error, half its interval of 95 % by Student's t."""

    mean: float
    error: float
    half: float

    @classmethod
    def of(cls, these: list[float], those: list[float]) -> "Difference":
        differences = [x - y for x, y in zip(these, those, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        return cls(statistics.fmean(differences), error, scipy.stats.t.ppf(0.975, len(differences) - 1).item() * error)

    @property
    def verdict(self) -> str:
        return "no difference shown" if abs(self.mean) <= self.half else "higher" if self.mean > 0 else "lower"

    def __str__(self) -> str:
        return f"{self.mean:+6.1f} +- {self.error:4.1f}: {self.verdict}"


against_rival = {name: Difference.of(values(after[name]), values(after[RIVAL])) for name in REPAIRS}
against_clean = {name: Difference.of(values(after[name]), values(after[CLEAN])) for name in (RIVAL, *REPAIRS)}
print(f"points of accuracy, mean and standard error of {len(SEEDS)} seeds")
for other, differences in ((RIVAL, against_rival), (CLEAN, against_clean)):
    print(f"minus {other}")
    for name, difference in differences.items():
        print(f"  {name:25}{difference}")

# %%
COLOURS = {CLEAN: "tab:green", "spoilt": "tab:red", "calibration, test": "0.4", RIVAL: "0.4"}
_, one = pyplot.subplots(figsize=(7.4, 3.8), layout="constrained")
for row, (name, results) in enumerate(after.items()):
    colour = COLOURS.get(name, "tab:blue")
    one.scatter(values(results), [row] * len(results), s=16, color=colour, alpha=0.5)
    one.plot(statistics.fmean(values(results)), row, "|", ms=16, mew=2, color=colour)
one.set_yticks(range(len(after)), list(after))
one.invert_yaxis()
one.set(xlabel="test accuracy (%)", title="Every seed, and the mean")
pyplot.show()

# %% [markdown]
# What is done without labels brings back most of what was lost. **None of it is shown to be better than output
# calibration, which edits nothing**: 95.0 % with both kinds of components, 94.7 % with calibration. `project` on MLP
# value vectors, which is what `mitigate` does unless told otherwise, is uneven: 79.1 % in seed 4, where calibration has
# 95.4 %. Section 2 could have told: there it is the heads that speak for A. Look at the split before you choose
# `components`.
#
# The paper's edit, with labels, has 80.1 % in the mean and 56.1 % in the worst seed, and less with the paper's weights.
# ("No difference shown" is no proof that there is none. Five seeds that differ so much show only large ones.)
#
# Nor is anything rid of all bias. `cmh_z` stays beyond 2 or -2 in most seeds, as it was before the models were spoilt,
# and calibration turns the preference of the spoilt models round in three.
#
# **Attention recalibration** exchanges, or evens out, how much the last token looks at the options, in all heads. A
# swap needs to know which option to favour. With the right one it is an oracle: nobody who has to ask the model knows
# it, so this shows what attention could do at best, and is no repair. Beside it stand a swap with an option drawn by
# chance, and evening out all options, which needs no labels. An option is looked at on its letter, on its colon, or on
# its word (`content`).


# %%
WHERE = ("letter", "colon", "content")


def recalibrated(model: nn.Module, where: str, mode: str, favoured: list[int] | None = None) -> dict[str, float]:
    scores = np.full((len(test), len(LETTERS)), -np.inf)
    for k in (2, 3, 4):  # prompts of one length, which stay in their order
        rows = [row for row, item in enumerate(test) if len(item["choices"]) == k]
        asked = [train_options.prompt(test[row]) for row in rows]
        places = option_positions(tokenizer, asked, k, where)
        if favoured is not None:
            others = np.array([favoured[row] for row in rows])[:, None]
            pairs = np.take_along_axis(places, np.pad(others, ((0, 0), (1, 0))), axis=1)
            places = np.where(others > 0, pairs, 0)  # nothing to swap with itself
        with recalibrate_attention(model, "all", places, mode):
            scores[rows, :k] = score_choices(model, tokenizer, asked, k, batch_size=len(rows), progress=False).scores
    return judged(scores, test)


draw = random.Random(0)
chance_letter = [draw.randrange(len(item["choices"])) for item in test]
WAYS: dict[str, dict[str, Any]] = {
    "evened out": {"mode": "equalise"},
    "swap, drawn by chance": {"mode": "swap", "favoured": chance_letter},
    "swap, right one (oracle)": {"mode": "swap", "favoured": gold},
}
attention = {
    f"{name}, {where}": [recalibrated(spoilt[seed], where, **way) for seed in SEEDS]
    for name, way in WAYS.items()
    for where in WHERE
}
print(f"{'accuracy (%); seed':36}" + "".join(f"{seed:7}" for seed in SEEDS) + "   mean gain")
for name, results in ({"spoilt": before["spoilt"]} | attention).items():
    gain = statistics.fmean(values(results)) - statistics.fmean(values(before["spoilt"]))
    print(f"{name:36}" + "".join(f"{x:7.1f}" for x in values(results)) + f"{gain:+12.1f}")

# %% [markdown]
# In seeds 0 to 2 none of this moves the accuracy by a whole point. In seeds 3 and 4 it does, in each at another place:
# on the word to 68.9 % with the oracle and 53.2 % by evening out, on the letter to 54.9 % and 49.3 %. All of it is far
# from what calibration does.
#
# ## 4. Controls
#
# **The letter of the question itself.** The notebook that came with the paper edits the model with the right letter of
# one question, and then puts that very question. What this measures shows in two controls: the same with a letter that
# was drawn by chance, and the same with nets that were never trained. `mitigate` does not offer it, so it is written
# out here. (The neuron is the one that `mitigate` would take, the same for all questions.)


# %%
def edited(model: nn.Module, neuron: tuple[int, int], letter: int, anchor: int, strength: float) -> nn.Module:
    """A copy with the paper's edit of one value vector: eight times towards the letter, once away from the anchor."""
    model, along = copy.deepcopy(model), readout(model)
    along -= along.mean(0)
    write = 8 * along[letter_ids[letter]] - along[letter_ids[anchor]]
    value_vectors(model, neuron[0])[neuron[1]] += strength * write
    return model


def with_letters(
    model: nn.Module, items: Items, letters: list[int], fit: Items, anchor: int, strength: float
) -> np.ndarray:
    """Scores of `items`, each under the edit towards its own one of `letters`."""
    [top] = attribute(model, tokenizer, fit, anchor, target="gold", batch_size=128, progress=False).top(1)
    scores = np.empty((len(items), len(LETTERS)))
    for letter in set(letters):
        rows = [row for row, given in enumerate(letters) if given == letter]
        told = edited(model, (top.layer, top.index), letter, anchor, strength)
        scores[rows] = scores_of(told, [items[row] for row in rows])
    return scores


STRENGTHS = (1.0, 4.0) if QUICK else (1.0, 2.0, 4.0)
asked_for = [item | {"label": letter} for item, letter in zip(test, chance_letter, strict=True)]
own: dict[tuple[str, float], list[float]] = {}
for seed, strength in itertools.product(SEEDS, STRENGTHS):
    told, misled = (
        with_letters(spoilt[seed], test, letters, labelled_fit, 0, strength) for letters in (gold, chance_letter)
    )
    for name, scores, items in (
        ("right letter: right answers", told, test),
        ("letter by chance: right answers", misled, test),
        ("letter by chance: it is said", misled, asked_for),
    ):
        own.setdefault((name, strength), []).append(100 * judged(scores, items)["accuracy"])
print(f"{'spoilt models (%)':33}" + "".join(f"{f'strength {strength:g}':>28}" for strength in STRENGTHS))
for name in dict.fromkeys(name for name, _ in own):
    rows = [own[name, strength] for strength in STRENGTHS]
    cells = "".join(f"{statistics.fmean(x):11.1f} ({min(x):5.1f} to {max(x):5.1f})" for x in rows)
    print(f"{name:33}{cells}")

# %% [markdown]
# With the right letter the spoilt models are right, with another they say the other, the more surely the stronger the
# edit: it says what it is told.
#
# **Untrained nets** have nothing to gain: whatever is done has to leave them at chance. They get questions of four
# choices, so that whatever letter such a net likes best can be the anchor.

# %%
fit4, test4 = (drawn(n, seed, set(), choices=4) for seed, n in ((3, UNLABELLED), (4, TEST // 2)))
untrained: dict[str, list[dict[str, float]]] = {}
likes = []
for seed in SEEDS:
    model = train_options.make_model(len(tokenizer), 100 + seed).eval()
    plain = measured(model, test4)
    shares = [plain[f"choice_share_{letter}"] for letter in LETTERS]
    liked = shares.index(max(shares))
    likes.append(f"{LETTERS[liked]} in {max(shares):.0%}")
    results = {"as it is": plain}
    for name, options in REPAIRS.items():
        options = options | {"examples": fit4, "guard_examples": None, "anchor": liked}
        results[name] = measured(repaired(model, **options), test4, anchor=liked)
    scores = with_letters(model, test4, [item["label"] for item in test4], fit4, liked, 1.0)
    results["right letter of the question"] = judged(scores, test4)
    for name, one_result in results.items():
        untrained.setdefault(name, []).append(one_result)
within = 196 * (0.25 * 0.75 / len(test4)) ** 0.5
print("they say", ", ".join(likes))
print(f"accuracy (%) of every net; 95 % of those that guess lie within 25 +- {within:.1f}")
for name, results in untrained.items():
    print(f"{name:30}" + "".join(f"{x:7.1f}" for x in values(results)))

# %% [markdown]
# Of the 35 numbers of the first seven rows one lies outside, by 0.3. An edit that knows the right letter of the
# question makes nets perfect that never saw one. An accuracy that was measured so says nothing about what a model
# knows.
#
# **Shuffled labels.** `mitigate` without labels has to give the same adapter, bit for bit, whatever labels there are.
# The paper's edit does read them. How much does it owe to them?

# %%
shuffled = [dict(item) for item in labelled_fit]
for k in (2, 3, 4):
    same = [item for item in shuffled if len(item["choices"]) == k]
    mixed = random.Random(k).sample([item["label"] for item in same], len(same))
    for item, label in zip(same, mixed, strict=True):
        item["label"] = label


def adapter(examples: Items) -> dict[str, torch.Tensor]:
    state = repaired(spoilt[0], examples, components="both").state_dict()
    return {name: tensor for name, tensor in state.items() if "lora" in name}


adapters = [adapter(examples) for examples in (unlabelled, labelled_fit, shuffled)]
alike = all(torch.equal(one[name], adapters[0][name]) for one in adapters for name in adapters[0])
print(
    f"no labels, true ones, shuffled ones: {'the same' if alike else 'another'} adapter ({len(adapters[0])} tensors)\n"
)
of_shuffled = {
    name: [measured(repaired(spoilt[seed], **REPAIRS[name] | {"examples": shuffled})) for seed in SEEDS]
    for name in ("paper", "paper, its weights")
}
print(f"\n{'accuracy (%); seed':38}" + "".join(f"{seed:7}" for seed in SEEDS))
owed = {}
for name, results in of_shuffled.items():
    print(f"{name + ', true labels':38}" + "".join(f"{x:7.1f}" for x in values(after[name])))
    print(f"{name + ', shuffled labels':38}" + "".join(f"{x:7.1f}" for x in values(results)))
    owed[name] = Difference.of(values(after[name]), values(results))
for name, difference in owed.items():
    print(f"{name}, true minus shuffled".ljust(40) + str(difference))

# %% [markdown]
# In seeds 0, 1 and 3 next to nothing; in seeds 2 and 4 a lot, if the strength is searched for. (Refused means that the
# model stays as it was, with its 36.1 %.)
#
# **Models without the bias** have to keep what they have. With the strength searched for nothing happens, and a warning
# says so. At strength 1 the projection is made whether it is needed or not.

# %%
healthy = {CLEAN: before["clean"], "project, MLP, searched": [measured(repaired(clean[seed])) for seed in SEEDS]}
for name in ("project, MLP", "project, heads", "project, both"):
    options = REPAIRS[name] | {"strength": 1.0}
    healthy[f"{name}, strength 1"] = [measured(repaired(clean[seed], **options)) for seed in SEEDS]
healthy[RIVAL] = [judged(calibrated(clean[seed]), test) for seed in SEEDS]
table(healthy)

# %% [markdown]
# A strength that is not searched for is not safe: up to 25 points are lost in a model that needed no repair.
# Calibration costs next to nothing.
#
# ## 5. What reproduces at this size, and what does not

# %%
tally = {name: after[name] for name in (RIVAL, *REPAIRS)}
for name in WAYS:
    gains = {where: statistics.fmean(values(attention[f"{name}, {where}"])) for where in WHERE}
    best = f"{name}, {max(gains, key=gains.get)}"
    tally[best] = attention[best]
print(f"of {len(SEEDS)} seeds{'':24}{'A if wrong: halved':>20}{'accuracy: higher':>20}{'mean gain':>13}")
for name, results in tally.items():
    pairs = list(zip(results, before["spoilt"], strict=True))
    halved = sum(one["anchored_bias_rate"] < old["anchored_bias_rate"] / 2 for one, old in pairs)
    higher = sum(one["accuracy"] > old["accuracy"] for one, old in pairs)
    gain = statistics.fmean(values(results)) - statistics.fmean(values(before["spoilt"]))
    print(f"{name:34}{halved:20}{higher:20}{gain:+13.1f}")

# %% [markdown]
# | the paper | here |
# |---|---|
# | GPT-2 prefers A | was built in; says nothing about where such a preference comes from |
# | MLP value vectors and attention heads carry it | both do, in shares that differ from model to model |
# | the logit lens finds the value vectors | it finds some that matter; those of the split matter more |
# | edited value vectors take the bias away | yes: halved in all seeds; at the paper's weights in three of five |
# | and accuracy rises | yes, in all seeds; not shown to be more than by output calibration |
# | recalibrated attention takes it away | hardly: halved in one seed of five, and in none by the oracle |
# | (its notebook:) the edit is told a question's right letter | no measure: untrained nets are right in 100 % |
#
# What may not be concluded:
# - **anything about pretrained models.** No pretrained GPT-2 was run. These toys were taught to say A in 150 steps, and
#   know the answers all the same. A model that was never taught so may have its preference elsewhere, and may not know
#   the answers that a repair would bring out;
# - that repair is better than calibration, or worse: no difference is shown here. Both take evenly spread right letters
#   for granted, and what they do without was not tried;
# - that a neuron is a cause because it adds much. The split is exact, and is of what each part adds at the end. What a
#   part does through later ones counts as theirs;
# - that a low `anchored_bias_rate` means no bias (section 1).
#
# Options were left as they come, questions to fit and to test on are of one kind, and many of
# those with two or three choices had been seen in training.
#
# Where to go next:
# - your model: the recipes in the [README of anchored answers](../hf_ext/mcq_bias/README.md), and
#   `mitigation_report`, which always shows calibration beside the repair;
# - your scores: `evaluate.load("anchored_mcq_bias")` and its
#   [card](../hf_ext/mcq_bias/anchored_mcq_bias/README.md); `hf-ext mcq-report` for the logs of a harness;
# - your machine: `hf-ext bench mcq` for speed, `hf-ext demo` for scripts that take metric and repair by their names.
