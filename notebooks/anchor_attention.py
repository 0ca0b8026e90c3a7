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
# # AnchorAttention
#
# Rows packed from many documents are the usual diet of long-context training. AnchorAttention
# ([arXiv 2411.13476](https://arxiv.org/abs/2411.13476)) keeps the documents of a row apart, lets positions run on
# through the row, and gives all of them one common first token, the *anchor* (BOS) at position 0. In transformers you
# type `attn_implementation="anchor"`, on rows made by `AnchorPacking`.
#
# This notebook shows
# 1. what the method is, in a picture;
# 2. the measurement that led to it, how attention in bfloat16 changes when all positions shift: what of it appears
#    again in today's transformers, and what does not;
# 3. a small training under four kinds of attention, with seeds and errors;
# 4. what follows from this, and what does not.
#
# It runs on one CPU thread in about four minutes. `HF_EXT_QUICK=1` in the environment makes everything tiny: that is
# for tests, and the numbers then mean nothing.

# %%
import copy
import os
import random
import statistics
import tempfile
import time
from functools import cache
from typing import Any

import datasets
import scipy.stats
import torch
import transformers
from datasets import Dataset
from matplotlib import pyplot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_ext import AnchorPacking
from hf_ext.anchor_attention import check_rope_precision, rope_drift
from hf_ext.anchor_attention.reference import same_document, same_segment, visible_keys
from hf_ext.demo.text import documents

QUICK = os.environ.get("HF_EXT_QUICK") == "1"
ROW, STEPS, SEEDS, TEXTS, HELD_OUT = (512, 6, 2, 700, 8) if QUICK else (1024, 300, 3, 6000, 100)

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
print(f"torch {torch.__version__}, transformers {transformers.__version__}, one CPU thread")

# %% [markdown]
# ## 1. The method in a picture
#
# A row of three documents: `a a a`, `b b`, `c c c c`. `A` is the anchor token. A query (line) may see the coloured keys
# (columns); under each token stands its position.

# %%
tokens = "Aaaabbcccc"
document = torch.tensor([[0, 1, 1, 1, 2, 2, 3, 3, 3, 3]])
alone = torch.tensor([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3]])  # positions that restart with every document
running = torch.arange(10)[None]

PICTURES = {
    "full attention": (torch.ones(1, 10, 10, dtype=torch.bool), running),
    "intra-document": (same_segment(alone), running),
    "intra-document, positions reset": (same_segment(alone), alone),
    "AnchorAttention": (same_document(document), running),
}

figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.7), layout="constrained")
for (name, (together, positions)), one in zip(PICTURES.items(), axes, strict=True):
    visible = visible_keys(together)[0].float()
    visible[:, 0] *= 2 if name == "AnchorAttention" else 1
    one.imshow(visible, cmap="Blues", vmin=0, vmax=2.4)
    one.set_xticks(range(10), [f"{token}\n{p}" for token, p in zip(tokens, positions[0].tolist(), strict=True)])
    one.set_yticks(range(10), list(tokens))
    one.set_title(name, fontsize=10)
pyplot.show()

# %% [markdown]
# AnchorAttention differs from intra-document attention in one column: everybody sees the anchor. It is cheap for the
# same reason as any other document mask is, and costs one key a document more.
#
# `AnchorPacking` writes the same thing in another form: a copy of the anchor before each document, `AaaaAbbAcccc`, at
# position 0 each. A copy sees nothing but itself, so all copies have the same hidden state in every layer, and many
# copies are as good as one. And a zero among the positions then marks the start of a document: positions alone describe
# the mask, and no collator, Trainer or model has to change.
#
# Two checks on a small model: both forms give the same logits, and a change in the first document reaches the second
# under full attention only.


# %%
def small_model(implementation: str) -> Any:
    config = LlamaConfig(
        vocab_size=257,  # bytes, and the anchor
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        initializer_range=0.1,
        tie_word_embeddings=True,
        bos_token_id=256,
        eos_token_id=256,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


ANCHOR = 256
a, b = list(b"first document"), list(b"second")
copies = torch.tensor([[ANCHOR, *a, ANCHOR, *b]])
positions = torch.tensor([[0, *range(1, 15), 0, *range(15, 21)]])
shared = torch.tensor([[ANCHOR, *a, *b]])
owner = torch.tensor([[0, *[1] * 14, *[2] * 6]])
changed = copies.clone()
changed[0, 3] = ord("X")

torch.manual_seed(0)
model = small_model("anchor").eval()
with torch.no_grad():
    packed = model(input_ids=copies, position_ids=positions).logits
    one_anchor = model(input_ids=shared, position_ids=torch.arange(21)[None], anchor_doc_ids=owner).logits
    after = model(input_ids=changed, position_ids=positions).logits
    model.set_attn_implementation("sdpa")
    full, full_after = model(input_ids=copies).logits, model(input_ids=changed).logits

layouts_differ = (packed[:, [*range(15), *range(16, 22)]] - one_anchor).abs().max().item()
leak = (packed - after)[:, 15:].abs().max().item()
full_leak = (full - full_after)[:, 15:].abs().max().item()
print(f"copies of the anchor against one anchor: logits differ by at most {layouts_differ:.0e}")
print(f"another byte in document 1 moves logits of document 2 by {leak:g}; with full attention, by {full_leak:.2g}")

# %% [markdown]
# ## 2. Shifted positions in bfloat16
#
# Rotary embeddings turn query and key by angles (*phases*) proportional to their positions, so that a product depends
# on the distance alone: shift all positions by 16, and attention should stay as it is. With rounded numbers it does
# not. The paper (section 3) measures by how much; $P$ are attention weights, at positions shifted by $a$ and by $b$:
#
# $$D = \sum_j \frac{1}{L-j+1} \sum_i |P_{ij}(a) - P_{ij}(b)| \qquad
#   D_{logit} = \frac1L \sum_i |A_{i1}(a) - A_{i1}(b)|$$
#
# (Eqs. 4 and 5; $A$ are the logits of the first key.) It finds, in a pretrained 7B model in bfloat16, a $D$ that grows
# with the length of the row and comes above all from the first token. Hence the anchor: at position 0 the rotation is
# the identity, which has no rounding error. `rope_drift` is this measurement for your own model.
#
# We need a model that has learned something, and text: documentation strings of Python's own standard library, as
# bytes, packed into rows. All four kinds of attention of section 3 use these same rows.

# %%
texts = [text for text in dict.fromkeys(documents(TEXTS, seed=0)) if 100 <= len(text) <= 400]
random.Random(0).shuffle(texts)
bytes_of = [list(text.encode()) for text in texts]
held_out, training = bytes_of[:HELD_OUT], Dataset.from_dict({"input_ids": bytes_of[HELD_OUT:]})

packing = AnchorPacking(max_length=ROW, anchor_token_id=ANCHOR)
packed_rows = training.map(packing, batched=True, batch_size=len(training), remove_columns=training.column_names)
rows = {name: torch.tensor(packed_rows[name][:-1]) for name in packed_rows.column_names}  # the last one is padded

average = statistics.fmean(map(len, bytes_of[HELD_OUT:]))
pairs = visible_keys(same_segment(rows["position_ids"][:20])).sum((1, 2)).float().mean() / (ROW * (ROW + 1) / 2)
print(f"{len(training)} documents of {average:.0f} bytes on average, in {len(rows['labels'])} rows of {ROW}")
print(f"document masks leave {pairs:.0%} of the pairs of query and key that full attention has")


# %%
FULL, INTRA, RESET, ANCHORED = "full attention", "intra-document", "intra-document, reset", "AnchorAttention"
IMPLEMENTATION = {FULL: "sdpa", INTRA: "sdpa", RESET: "anchor", ANCHORED: "anchor"}


def arguments(regime: str, row: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the model is given: the same tokens and labels always, and what makes the regime."""
    inputs = {"input_ids": row["input_ids"], "labels": row["labels"]}
    if regime == INTRA:  # the host's own attention has no other way than a mask written out
        inputs["attention_mask"] = visible_keys(same_segment(row["position_ids"]))[:, None]
    if regime == RESET:
        column = torch.arange(ROW).expand_as(row["position_ids"])
        start = column.where(row["position_ids"] == 0, 0).cummax(-1).values
        inputs["position_ids"] = column - start
    if regime == ANCHORED:
        inputs["position_ids"] = row["position_ids"]
    return inputs


@cache
def train(regime: str, seed: int) -> tuple[Any, float]:
    """A model trained on one row a step, and the median seconds of a step. A seed fixes the start and the rows."""
    torch.manual_seed(seed)
    model = small_model(IMPLEMENTATION[regime])
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS, pct_start=0.1)
    seconds = []
    for index in torch.randint(len(rows["labels"]), (STEPS, 1)):
        started = time.perf_counter()
        model(**arguments(regime, {name: x[index] for name, x in rows.items()}), use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds.append(time.perf_counter() - started)
    return model.eval(), statistics.median(seconds)


trained, _ = train(FULL, 0)

# %% [markdown]
# "In bfloat16" can mean different things, and they matter. Five modes of the same weights:
#
# | mode | weights and activations | `inv_freq` | positions | phases (their product) | cos, sin |
# |---|---|---|---|---|---|
# | float32 | float32 | float32 | integer | float32 | float32 |
# | bf16 | bfloat16 | float32 | integer | float32 | rounded once |
# | bf16, cast | bfloat16 | bfloat16 | integer | float32, of rounded `inv_freq` | rounded once |
# | bf16 positions | bfloat16 | float32 | bfloat16 | float32, of rounded positions | rounded once |
# | bf16 phases | bfloat16 | bfloat16 | bfloat16 | bfloat16 | bfloat16 |
#
# *bf16* is what transformers does today after `from_pretrained(dtype=torch.bfloat16)`; *bf16, cast* is what
# `model.to(torch.bfloat16)` makes of it. The last two are not in today's transformers' Llama: we put them in.


# %%
class Bfloat16Positions(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotary(x, position_ids.bfloat16())


class Bfloat16Phases(nn.Module):
    def __init__(self, rotary: nn.Module) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary.inv_freq.bfloat16())

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        phases = position_ids.bfloat16()[..., None] * self.inv_freq
        both = torch.cat([phases, phases], -1)
        return both.cos(), both.sin()


def five_modes(model: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    positions, phases = copy.deepcopy(loaded), copy.deepcopy(loaded)
    positions.model.rotary_emb = Bfloat16Positions(positions.model.rotary_emb)
    phases.model.rotary_emb = Bfloat16Phases(phases.model.rotary_emb)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    return {"float32": model, "bf16": loaded, "bf16, cast": cast, "bf16 positions": positions, "bf16 phases": phases}


def lines(drift: dict[str, dict[int, float]], label: str, title: str) -> None:
    _, one = pyplot.subplots(figsize=(7, 3.8), layout="constrained")
    for (mode, values), style in zip(drift.items(), ("-o", "-s", "--^", "-v", "-d"), strict=True):
        one.loglog(list(values), list(values.values()), style, base=2, label=mode)
    one.set_yscale("log")
    one.set_xticks(list(values), [f"{x:,}" for x in values])
    one.minorticks_off()
    one.set(xlabel=label, ylabel="D (Eq. 4)", title=title)
    one.legend(fontsize=8, loc=(0.77, 0.33))
    pyplot.show()


modes = five_modes(trained)
sample = rows["input_ids"][: 4 * 3072 // ROW].view(4, 3072)

# %%
shifts = [16, 64, 256, 1024, 4096]
by_shift = {mode: {s: rope_drift(model, sample[:, :192], 0, s).d for s in shifts} for mode, model in modes.items()}
lines(by_shift, "all positions shifted by", "192 tokens: a shift does little, unless positions are rounded")

# %% [markdown]
# - In float32 attention hardly changes; what change there is grows with the shift, as the rounding of the phases does.
# - In bf16 as hosts do it, it changes by hundreds to thousands of times as much, whatever the shift: that is the
#   rounding of cosines, queries, keys and products. Nothing removes it from bfloat16; this package does not either.
# - With positions or phases in bfloat16 it changes by far more again, and the shift matters. bfloat16 has 8 significant
#   bits: it can count to 256, and so rounded positions do no harm before.
#
# The paper looks at one shift, 0 against 16, at growing length. (Rows longer than 1,024 tokens are longer than any this
# model was trained on. The lengths keep away from powers of two, where bfloat16 changes its step; Eq. 4 gives the last
# keys of a row a large weight, and a change of step exactly there would look like growth.)

# %%
lengths = [48, 96, 192, 384, *([] if QUICK else [768, 1536, 3072])]
measured = {
    mode: {n: rope_drift(model, sample[: 4 if n < 1024 else 1, :n], 0, 16) for n in lengths}
    for mode, model in modes.items()
}
by_length = {mode: {n: drift.d for n, drift in drifts.items()} for mode, drifts in measured.items()}
lines(by_length, "tokens in the row", "Shifted by 16: length matters, if positions are rounded")

first, last = lengths[0], lengths[-1]
even = sum(1 / query for query in range(1, last + 1)) / last  # of the first key, if queries spread attention evenly
even /= sum(sum(1 / i for i in range(j, last + 1)) / (last - j + 1) for j in range(1, last + 1))
print(f"{'':15} D at {first:5}  at {last:5}   growth  D_logit growth  share of the first key")
for mode, drifts in measured.items():
    d, logit = (getattr(drifts[last], x) / getattr(drifts[first], x) for x in ("d", "d_logit"))
    near, far = drifts[first].d, drifts[last].d
    print(f"{mode:15} {near:10.1e} {far:9.1e} {d:7.1f}x {logit:14.1f}x {drifts[last].first_key_share:18.2%}")
print(f"share of the first key if attention were even: {even:.2%}")

# %% [markdown]
# What of the paper's finding appears here, and what does not:
#
# - **Appears:** bfloat16 breaks the promise of rotary embeddings, by hundreds to thousands of times as
#   much as float32.
# - **Appears only with positions or phases in bfloat16:** strong growth with length; with positions in jumps, where
#   their rounding changes. As transformers computes today, with positions and phases exact or in float32, $D$ grows
#   less than twofold in bfloat16. (Float32 grows too, from nothing to next to nothing.)
# - **Does not appear:** that the first token stands out. Large pretrained models put much of their attention on it,
#   this one does not. The paper's finding is about a pretrained 7B model; a model of two layers neither confirms nor
#   refutes it. Run `rope_drift` on yours.
#
# `bf16, cast` looks harmless here. It is not, and this is what `check_rope_precision` is for. Wrong frequencies still
# turn query and key by angles that depend on the distance alone, so no shift can tell; but every distance is wrong:

# %%
reports = {mode: check_rope_precision(model) for mode, model in modes.items()}
healed = copy.deepcopy(modes["bf16, cast"]).float()
reports["bf16, cast, .float()"] = check_rope_precision(healed)
reports["bf16, given bf16 position_ids"] = check_rope_precision(modes["bf16"], torch.arange(ROW).bfloat16()[None])
for mode, report in reports.items():
    print(f"{mode}: {'ok' if report.ok else 'not ok'}", *(f"  {finding}" for finding in report.findings), sep="\n")

# %% [markdown]
# The same bfloat16 weights, both computed in float32, once with the right and once with the rounded frequencies. How
# far are the predictions of the next byte apart (total variation: half the sum of the differences of probabilities)?

# %%
right = copy.deepcopy(modes["bf16"]).float()
d_right, d_rounded = (rope_drift(model, sample[:, :256], 0, 16).d for model in (right, healed))
with torch.no_grad():
    p, q = (model(input_ids=sample[:, :ROW]).logits.softmax(-1) for model in (right, healed))
variation = (p - q).abs().sum(-1).mean(0) / 2
quarter = ROW // 4
distances = [variation[i : i + quarter].mean().item() for i in range(0, ROW, quarter)]
print(f"D under a shift of 16: {d_right:.1e} with the right frequencies, {d_rounded:.1e} with rounded ones")
print("distance of the predictions, by quarter of the row:", ", ".join(f"{x:.1e}" for x in distances))

# %% [markdown]
# The cure is to load with `from_pretrained(..., dtype=torch.bfloat16)` and not to cast a whole model. AnchorAttention
# repairs none of this: it puts the one key that all documents share where its rotation is exact, cosine 1 and sine 0.
#
# ## 3. Four kinds of attention in a small training
#
# The same start, rows, labels and learning rate; only what a query may see, and the positions, differ:
#
# | | sees | positions | typed |
# |---|---|---|---|
# | full attention | the whole row | run on | `"sdpa"` |
# | intra-document | its document | run on | `"sdpa"` and a 4-D mask |
# | intra-document, reset | its document | restart | `"anchor"`, `position_ids` that restart |
# | AnchorAttention | its document, with the anchor at 0 | run on | `"anchor"`, rows from `AnchorPacking` |
#
# The two intra-document regimes are the same function: to rotary embeddings only distances count, and those are equal.
# In exact arithmetic their trainings would be one and the same; what separates them here can only be rounding.
# AnchorAttention differs from both in one respect: how far from a document its anchor seems to be.
#
# Measured is the loss on held-out documents, each alone behind its anchor, positions from 0, through stock sdpa: the
# same yardstick for all. A seed means another start and other rows, the same for all four.


# %%
@torch.no_grad()
def loss_of_documents(model: Any) -> float:
    """Nats a byte, mean over held-out documents."""
    model.set_attn_implementation("sdpa")
    losses = []
    for content in held_out:
        logits = model(input_ids=torch.tensor([[ANCHOR, *content]])).logits[0, :-1]
        losses.append(cross_entropy(logits, torch.tensor(content)).item())
    return statistics.fmean(losses)


loss: dict[str, list[float]] = {regime: [] for regime in IMPLEMENTATION}
step: dict[str, list[float]] = {regime: [] for regime in IMPLEMENTATION}
for seed in range(SEEDS):
    for regime in IMPLEMENTATION:
        model, seconds = train(regime, seed)
        loss[regime].append(loss_of_documents(model))
        step[regime].append(seconds)


def error(values: list[float]) -> float:
    return statistics.stdev(values) / len(values) ** 0.5


_, one = pyplot.subplots(figsize=(7, 3), layout="constrained")
for line, values in enumerate(loss.values()):
    one.scatter(values, [line] * SEEDS, s=14, color="0.5", zorder=3)
    one.errorbar(statistics.fmean(values), line, xerr=error(values), fmt="|", ms=14, color="tab:blue", capsize=4)
one.set_yticks(range(len(loss)), list(loss))
one.invert_yaxis()
one.set(xlabel="held-out loss (nats a byte)", title="Loss: every seed, mean and standard error")
pyplot.show()

print(f"{'':24} {'held-out loss':>17}   step")
for regime, values in loss.items():
    milliseconds = 1e3 * statistics.fmean(step[regime])
    print(f"{regime:24} {statistics.fmean(values):8.4f} +- {error(values):.4f}   {milliseconds:.0f} ms")

# %% [markdown]
# All four share start and rows within a seed, so the differences within a seed are what counts. With so few seeds their
# interval of 95 % (Student's t) is wide, and with three comparisons one may miss zero by chance sooner than it says.
#
# Full attention is at a disadvantage here: it learns from rows in which other documents come first, and is asked about
# documents alone. In a short training of a small model, foreign text is mostly noise to it. A difference from it says
# that isolation suits this task, not that the anchor does: compare with the other two.

# %%
print(f"loss of AnchorAttention minus loss of ..., {SEEDS} seeds")
verdicts = {}
for regime in (FULL, INTRA, RESET):
    difference = [x - y for x, y in zip(loss[ANCHORED], loss[regime], strict=True)]
    mean, half = statistics.fmean(difference), scipy.stats.t.ppf(0.975, SEEDS - 1) * error(difference)
    verdicts[regime] = "no difference shown" if abs(mean) <= half else "better" if mean < 0 else "worse"
    interval = f"{mean - half:+.4f} to {mean + half:+.4f}"
    print(f"{regime:24} {mean:+.4f} +- {error(difference):.4f}, 95 %: {interval}: {verdicts[regime]}")

# %% [markdown]
# ## 4. What this shows, and what it does not
#
# It shows that the string does what it says: documents that cannot see each other, one anchor for all, stock rows and a
# plain loop; that bfloat16 breaks the shift invariance of rotary embeddings, and that rounded positions, phases or
# frequencies are worth looking for, which takes one call.
#
# It does not show that AnchorAttention trains better models. That is the paper's finding, for 1.8B to 8B models on rows
# of 64K and 128K tokens, in single runs without seeds: LLaMA-2-7B on RULER at 64K, 73.25, against 66.40 with full
# attention, 69.97 with intra-document attention and 70.03 with reset positions (its table 5). Nor is the anchor cheaper
# than another document mask: it costs the same, and how much that saves depends on how large a part of a step attention
# is. On short rows it is small.
#
# Where to go next:
# - your loop: the recipes in the [README](../README.md). In short, `attn_implementation="anchor"` for the model, and
#   for a data set of tokenised documents, `dataset.map(packing, batched=True, remove_columns=...)`;
# - your checkpoint: `rope_drift(model, input_ids)` and `check_rope_precision(model)` as above;
# - your machine: `hf-ext bench anchor` for speed, `hf-ext doctor` for what is registered, `hf-ext demo` for a training
#   script with the stock Trainer.
