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
# # All five methods, one story
#
# Somebody collects multiple-choice questions from 24 sources, trains a small Llama on them, adapts it, and ships it
# beside a classifier of digits. Each step reaches for a method by a string or by `map`; the loops are the hosts' own.
# This notebook
# 1. weighs the sources, a third of which lie, and prunes (`datasets`);
# 2. trains the Llama on packed questions, with all sources and with those that are left (transformers' Trainer);
# 3. adapts it with a skewed key (PEFT), sees in a metric what that did (evaluate), and repairs it without answers;
# 4. trains a vision transformer of 2-bit weights and activations, and ends in int8 (timm);
# 5. says in one table what was typed, and what changed.
#
# It is a tour on toys, and tells how the pieces meet. What each method is worth is measured in its own notebook, with
# controls and more seeds. Beside each method stands its rival: the mean utility, stock attention, LoRA, output
# calibration, rounding without training.
#
# It takes about four minutes of one CPU thread. `HF_EXT_QUICK=1` in the environment makes everything tiny: that is for
# tests, and the numbers then mean nothing.

# %%
import copy
import itertools
import json
import logging
import os
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import timm
import torch
import transformers
from datasets import Dataset
from IPython.display import Markdown, display
from matplotlib import pyplot
from peft import BoneConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments, default_data_collator

from hf_ext import AnchorPacking, ImportanceWeights
from hf_ext.demo import train_options
from hf_ext.importance_weights import retrieve
from hf_ext.mcq_bias import mitigate, mitigation_report, score_choices
from hf_ext.ofq_quantizer import OFQConfig, calibrate, freeze, load_packed, quantize, save_packed, to_int8

QUICK = os.environ.get("HF_EXT_QUICK") == "1"
DOCUMENTS, FIT, TUNE, TEST, UNLABELLED = (3000, 120, 60, 150, 96) if QUICK else (24_000, 400, 200, 1000, 256)
STEPS, SEEDS, ADAPTER_STEPS = (25, 1, 20) if QUICK else (500, 2, 100)
EPOCHS = {"float": 2, "ofq": 1} if QUICK else {"float": 15, "ofq": 10}
LETTERS, WORDS = train_options.LETTERS, train_options.WORDS

torch.set_num_threads(1)
datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()
logging.getLogger("timm").setLevel(logging.ERROR)  # it says that digits have one channel
warnings.filterwarnings("ignore", category=FutureWarning)  # of transformers, about what PEFT calls
scratch = tempfile.TemporaryDirectory()
FOLDER = Path(scratch.name)
print(f"torch {torch.__version__}, transformers {transformers.__version__}, one CPU thread")

# %% [markdown]
# ## 1. Weigh the sources
#
# A question names a word, and one of its two to four choices is that word. A document is such a question with its
# answer. Eight of the 24 sources lie, and they write three times as much as the others: the key of four in five of
# their documents is A, whatever is right.

# %%
SOURCES, LIARS, WRITE, LIE = 24, 8, 3, 0.8
Items = list[dict[str, Any]]
draw = random.Random(0)
names = [f"source {number:02}" for number in range(SOURCES)]
liars = set(draw.sample(names, LIARS))


def words_of(item: dict[str, Any]) -> list[float]:
    """The embedding: 1 for each choice and 5 for the word that is asked for, made of length 1."""
    counts = np.array([(word in item["choices"]) + 4 * (item["question"] == f"{word}?") for word in WORDS])
    return (counts / np.linalg.norm(counts)).tolist()


known: set[str] = set()


def unknown(count: int, seed: int) -> Items:
    """Up to `count` questions with their right answers, no two with one prompt, and none that was drawn before."""
    items = []
    for item in train_options.make_items(3 * count, 10**9 + seed):
        if len(items) < count and (prompt := train_options.prompt(item)) not in known:
            known.add(prompt)
            items.append(item | {"embedding": words_of(item), "answer": item["choices"][item["label"]]})
    return items


written = []
for number, item in enumerate(train_options.make_items(DOCUMENTS, seed=1)):
    known.add(train_options.prompt(item))
    source = draw.choices(names, [WRITE if name in liars else 1 for name in names])[0]
    key = 0 if source in liars and draw.random() < LIE else item["label"]
    written.append(
        item | {"id": number, "source": source, "key": key, "answer": item["choices"][key], "embedding": words_of(item)}
    )
corpus = Dataset.from_list(written)
shares = [
    np.mean([row["key"] != row["label"] for row in written if (row["source"] in liars) == lying]) for lying in (1, 0)
]
print(train_options.prompt(written[0]), LETTERS[written[0]["key"]], f" ({written[0]['source']})")
print(f"{len(corpus)} documents, {np.mean([row['source'] in liars for row in written]):.0%} of them by the liars")
print(f"wrong keys: {shares[0]:.0%} of the liars' documents, {shares[1]:.0%} of the others'")

# %% [markdown]
# Questions whose answers are known, none of them in the corpus, retrieve 60 documents each, those that ask for the same
# word. Utility of a document: whether the answer that it gives is that word. Nobody tells who lies.
#
# The questions are cut in three: to fit weights, to tune the threshold of pruning, to test both. What is tuned is the
# share of useful documents among the first 10 that are left. (There are only 480 questions of two choices, and all are
# in the corpus: the questions below have three or four.)

# %%
K, CANDIDATES = 10, 60
written_by = dict(zip(corpus["id"], zip(corpus["answer"], corpus["source"], strict=True), strict=True))


def judge(row: dict[str, Any]) -> dict[str, Any]:
    answers, sources = zip(*(written_by[i] for i in row["retrieved"]), strict=True)
    return {"source": sources, "utility": [float(answer == row["answer"]) for answer in answers]}


questions = Dataset.from_list(unknown(2 * FIT + TUNE, seed=1))
lists = retrieve(corpus, questions, CANDIDATES, index="exact").map(judge)
fit, tune, held = (lists.select(range(*ends)) for ends in itertools.pairwise((0, FIT, FIT + TUNE, len(lists))))

weights = ImportanceWeights(k=K, group_column="source").fit(fit, progress=False)
weights.tune_threshold(tune, "utility")
weighed = corpus.map(weights, batched=True)
kept = weights.prune(weighed)
mean = ImportanceWeights(k=K, group_column="source", method="mean").fit(fit, progress=False)
mean.tune_threshold(tune, "utility")

pruned = {
    name: {source for source, weight in one.to_dict().items() if weight < one.threshold}
    for name, one in (("learned weights", weights), ("mean utility", mean))
}
useful = {name: one.evaluate(held, "utility") for name, one in (("learned weights", weights), ("mean utility", mean))}
for name, gone in pruned.items():
    print(
        f"{name}: {len(gone)} sources go, {len(gone & liars)} of them liars, {len(liars - gone)} liars stay; "
        f"useful documents {useful[name]['vanilla']:.1%} -> {useful[name]['prune']:.1%}"
    )
print("by the learned weights went:", ", ".join(sorted(pruned["learned weights"])))
of_liars, of_others = ([w for source, w in weights.to_dict().items() if (source in liars) == x] for x in (True, False))
part = np.mean([source in liars for row in fit["source"] for source in row])
print(f"{part:.0%} of the retrieved documents are the liars'")
print(f"weights: at most {max(of_liars):.2f} of a liar, at least {min(of_others):.2f} of another source")
print(f"{len(kept)} of {len(corpus)} documents are left")
print("the mean utility prunes the same sources:", pruned["learned weights"] == pruned["mean utility"])

# %%
_, one = pyplot.subplots(figsize=(5, 3.4), layout="constrained")
for lying, colour, label in ((True, "tab:red", "liars"), (False, "0.5", "others")):
    shown = [source for source in names if (source in liars) == lying]
    one.plot([mean.to_dict()[s] for s in shown], [weights.to_dict()[s] for s in shown], "o", color=colour, label=label)
one.axhline(weights.threshold, color="0.7", lw=1)
one.axvline(mean.threshold, color="0.7", lw=1)
one.set(xlabel="mean utility", ylabel="learned weight", title="24 sources; lines: tuned thresholds")
one.legend()
pyplot.show()

# %% [markdown]
# Where liars only lie and the others never err, the mean utility finds them as well, without learning anything. One
# source that never lied goes with them, another one in each way: thresholds are tried that take out 10, 20, ... % of
# the retrieved documents at least, and the liars' part of them lies between two of those.
#
# ## 2. Train on packed questions
#
# The pruned data set goes straight on. A document is its tokens, with a label on the letter only; `AnchorPacking` makes
# rows of them, each document behind its anchor, and `attn_implementation="anchor"` keeps the documents of a row apart.
# The Llama starts from random weights: three layers of width 64, rotary positions.
#
# Four trainings of as many steps, from the same start: all sources, the sources that are left, and those again in two
# ways that the host has: stock attention over whole rows, and over rows whose positions restart with each document,
# which keeps them apart, too. A seed means another start and another order of rows.

# %%
ROW = 256
tokenizer = train_options.make_tokenizer()
tokenizer.add_special_tokens({"bos_token": "<s>"})
packing = AnchorPacking(max_length=ROW, anchor_token_id=tokenizer.bos_token_id, split_documents=False)


def tokens_of(row: dict[str, Any]) -> dict[str, list[int]]:
    ids = tokenizer(f"{train_options.prompt(row)} {LETTERS[row['key']]}")["input_ids"]
    return {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]}


def packed_rows(documents: Dataset) -> Dataset:
    tokens = documents.map(tokens_of, remove_columns=documents.column_names)
    return tokens.map(packing, batched=True, batch_size=len(tokens), remove_columns=tokens.column_names)


def restarted(row: dict[str, Any]) -> dict[str, list[int]]:
    """Positions that begin again with each document: to stock sdpa that means documents of their own."""
    starts = np.maximum.accumulate([at if position == 0 else 0 for at, position in enumerate(row["position_ids"])])
    return {"position_ids": (np.arange(ROW) - starts).tolist()}


def new_llama(attention: str, seed: int) -> Any:
    transformers.set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=ROW,
        initializer_range=0.12,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def train(model: Any, rows: Dataset, steps: int, rate: float, seed: int = 0) -> tuple[Any, float]:
    """By the stock Trainer, with the stock collator; also the mean loss of the last tenth of the steps."""
    arguments = TrainingArguments(
        output_dir=str(FOLDER / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=5,
        learning_rate=rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=steps // 20,
        adam_beta2=0.98,
        seed=seed,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=default_data_collator)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return model.eval(), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]


rows = {"all sources": packed_rows(corpus), "pruned": packed_rows(kept)}
rows["pruned, whole rows, sdpa"] = rows["pruned"].remove_columns("position_ids")
rows["pruned, restarted, sdpa"] = rows["pruned"].map(restarted)
for name, packed in rows.items():
    print(f"{name:25}{len(packed):5} rows of {ROW} tokens, columns {', '.join(packed.column_names)}")

# %% [markdown]
# Judged on new questions, one at a time, by the metric of the fourth method. Its `anchored_bias_rate` is how often A is
# said where A is wrong; `cmh_z` says whether A, where it is right, is found more often than the other letters where
# they are, and beyond 2 or -2 that is more than chance; `calibrated_accuracy` is the rival of any repair, the accuracy
# after each letter's mean score is subtracted.

# %%
test = unknown(TEST, seed=2)
labels = [item["label"] for item in test]
ASKING = {"batch_size": 128, "prepend_bos": True, "progress": False}


def scores_of(model: Any) -> Any:
    return score_choices(
        model, tokenizer, [train_options.prompt(x) for x in test], [x["choices"] for x in test], **ASKING
    )


metric = evaluate.load("anchored_mcq_bias")


def measured(model: Any) -> dict[str, float]:
    scored = scores_of(model)
    return metric.compute(predictions=scored.scores, references=labels, num_choices=scored.num_choices, n_resamples=0)


CHIEF = ("accuracy", "anchored_bias_rate", "cmh_z", "calibrated_accuracy")


def table(results: dict[str, dict[str, float]]) -> None:
    print(" " * 34 + "".join(f"{name:>21}" for name in CHIEF))
    for name, result in results.items():
        print(f"{name:34}" + "".join(f"{result[column]:21.3f}" for column in CHIEF))


readers, read, last_loss = {}, {}, {}
for seed, (name, packed) in itertools.product(range(SEEDS), rows.items()):
    attention = "sdpa" if "sdpa" in name else "anchor"
    model, last_loss[name, seed] = train(new_llama(attention, seed), packed, STEPS, rate=2e-3, seed=seed)
    readers[name, seed] = model
    read[name, seed] = measured(readers[name, seed])
in_order = {f"{name}, seed {seed}": read[name, seed] for name in rows for seed in range(SEEDS)}
print(f"{len(test)} questions, of {sorted({len(item['choices']) for item in test})} choices")
table(in_order)
print("training loss, mean of the last tenth of the steps (nats a letter)")
for name in rows:
    print(f"  {name:32}" + "".join(f"{last_loss[name, seed]:8.3f}" for seed in range(SEEDS)))
guess = np.mean([np.log(len(choices)) for choices in kept["choices"]])
print(f"  {'guessing, pruned':32}{guess:8.3f}")

# %% [markdown]
# What the string did: change one token of the first document of a row, and look at the logits of the others.


# %%
@torch.no_grad()
def leak(name: str) -> float:
    """Largest change of a logit of another document in the first row, as the reader of that name is given it."""
    row = {column: x[None] for column, x in rows[name].with_format("torch")[0].items() if column != "labels"}
    others = (torch.tensor(rows["pruned"][0]["position_ids"]) == 0).cumsum(0) > 1
    changed = row["input_ids"].clone()
    changed[:, 4] = (changed[:, 4] + 1) % len(tokenizer)
    before, after = (
        readers[name, 0](**row | {"input_ids": ids}, use_cache=False).logits for ids in (row["input_ids"], changed)
    )
    return (before - after)[0, others].abs().max().item()


leaks = {name: leak(name) for name in rows}
for name, largest in leaks.items():
    print(f"{name:25} the other documents of the row move by {largest:.2g}")

# %% [markdown]
# - **Pruning** made the difference: in as many steps, the readers of all sources learn to say A, and the readers of the
#   pruned ones learn to read. Calibration gives the former a part of it back. Whether more steps would, is not asked
#   here. The latter have a preference, too, as `cmh_z` says: A is where they are best.
# - **Keeping documents apart** made a difference, too: over whole rows, the training loss itself is that of guessing,
#   after as many steps. That is an extreme case, rows of a dozen short documents.
# - **The anchor** did not show: stock attention with positions that restart leaks nothing, either, and two seeds do not
#   tell them apart. (The anchor's loss is lower in both, its accuracy higher in one.) What the anchor is meant for,
#   long rows in bfloat16, and what can be shown of it, is in its own notebook.
#
# ## 3. Adapt, find out, repair
#
# The reader of the pruned corpus goes on with another key, as one may get it from somewhere: 65 % of its answers were
# replaced by A. It learns through a Bone adapter, which PEFT no longer has; beside it LoRA. (The learning rates are not
# tuned; that of LoRA is three times as high, which is about what suits both, as the Bone notebook finds.)

# %%
SKEW = 0.65
readers["pruned", 0].save_pretrained(FOLDER / "reader")
skewed = [
    {name: item[name] for name in ("question", "choices")} | {"key": 0 if draw.random() < SKEW else item["label"]}
    for item in unknown(DOCUMENTS // 6, seed=3)
]
skewed_rows = packed_rows(Dataset.from_list(skewed))
ADAPTERS = {
    "Bone": (BoneConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"), 1e-3),
    "LoRA": (LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"), 3e-3),
}


def reader() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER / "reader", attn_implementation="anchor").eval()


adapted, trained_numbers = {}, {}
for name, (config, rate) in ADAPTERS.items():
    transformers.set_seed(0)
    adapted[name], _ = train(get_peft_model(reader(), config), skewed_rows, ADAPTER_STEPS, rate)
    trained_numbers[name] = sum(x.numel() for x in adapted[name].parameters() if x.requires_grad)
    adapted[name].save_pretrained(FOLDER / name)
peft_type = json.loads((FOLDER / "Bone" / "adapter_config.json").read_text())["peft_type"]
loaded = PeftModel.from_pretrained(reader(), FOLDER / "Bone").eval()
again = np.array_equal(scores_of(loaded).scores, scores_of(adapted["Bone"]).scores)
same = "the same, bit for bit" if again else "other ones"
print(f"adapter_config.json says {peft_type}; read back, the scores are {same}")

adaptation = {"before": read["pruned", 0]}
for name, model in (("Bone", loaded), ("LoRA", adapted["LoRA"])):
    adaptation[f"{name}, {trained_numbers[name]:,} numbers"] = measured(model)
table(adaptation)

# %% [markdown]
# Accuracy shows a loss; the metric says where it went. Both adapters learnt what they were taught: it is the key that
# brings the bias, not the adapter. Calibration shows that the models still know what they knew.
#
# Merged, the model is an ordinary Llama again, and `mitigate` takes the preference for A out, as far as is needed for A
# to be said as often as chance would have it. It gets questions without answers, and returns a LoRA adapter of rank 1.

# %%
with_adapter = scores_of(loaded).scores
finite = np.isfinite(with_adapter)  # beyond a question's choices a score is -inf
merged = loaded.merge_and_unload()
merge_error = np.abs(scores_of(merged).scores[finite] - with_adapter[finite]).max()
largest = np.abs(with_adapter[finite]).max()
print(f"{type(merged).__name__}; merging moves scores of up to {largest:.0f} by {merge_error:.0e} at most")

unlabelled = [{name: item[name] for name in ("question", "choices")} for item in unknown(UNLABELLED, seed=4)]
repaired = mitigate(merged, tokenizer, unlabelled, **ASKING)
facts = repaired.mcq_bias
report = mitigation_report(repaired, tokenizer, test, **ASKING)
print(
    f"A said to the {len(unlabelled)} unlabelled questions: {facts['share_before']:.2f} -> {facts['share_after']:.2f}"
)
print(report)

# %%
STAGES = {
    "all sources": read["all sources", 0],
    "pruned": read["pruned", 0],
    "skewed key, Bone": report.before,
    "repaired": report.after,
}
_, one = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
for place, (name, result) in enumerate(STAGES.items()):
    recalls = [100 * result[f"recall_{letter}"] for letter in LETTERS]
    label = f"{name}: {result['accuracy']:.0%} right"
    one.bar(np.arange(len(LETTERS)) + 0.2 * (place - 1.5), recalls, 0.18, label=label)
one.set_xticks(range(len(LETTERS)), LETTERS)
one.set_yticks(range(0, 101, 20))
one.set(
    xlabel="the right letter", ylabel="answered right (%)", title="Where the answers went, and came back", ylim=(0, 150)
)
one.legend(ncols=2, fontsize=8, loc="upper right")
pyplot.show()

# %% [markdown]
# The repair brings back most of what the key had cost. **Output calibration**, which touches no weight, brings back
# more. A repaired model is worth having where answers are generated and not scored.
#
# ## 4. The other network: digits in 2 bits
#
# A vision transformer for scikit-learn's digits, 8 x 8 pixels. The same loop for `vit_tiny_patch16_224`, and for the
# same name with the recipe before it, which starts from the weights of the first.

# %%
SIZE = {"img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 10}
digits = load_digits()
shuffled = torch.from_numpy(np.random.default_rng(0).permutation(len(digits.target)))
pixels, targets = (
    torch.tensor(digits.images[:, None] / 8 - 1, dtype=torch.float32)[shuffled],
    torch.tensor(digits.target)[shuffled],
)
images, answers, test_images, test_answers = pixels[:1400], targets[:1400], pixels[1400:], targets[1400:]


def train_vit(model: nn.Module, epochs: int) -> nn.Module:
    """As any script for timm does it."""
    generator = torch.Generator().manual_seed(0)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05)
    batches = -(-len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * batches, pct_start=0.1)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            nn.functional.cross_entropy(model(images[batch]), answers[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module) -> torch.Tensor:
    return model(test_images)


def share_right(logits: torch.Tensor) -> float:
    return (logits.argmax(-1) == test_answers).float().mean().item()


torch.manual_seed(0)
plain = train_vit(timm.create_model("vit_tiny_patch16_224", **SIZE), EPOCHS["float"])
longer = train_vit(copy.deepcopy(plain), EPOCHS["ofq"])
student = timm.create_model("ofq_w2a2.vit_tiny_patch16_224", **SIZE)
student.load_state_dict(plain.state_dict())
student = train_vit(student, EPOCHS["ofq"])

save_packed(student, FOLDER / "packed")
packed_vit = load_packed(FOLDER / "packed")
integers = to_int8(packed_vit)
levels = max(len(row.unique()) for weight in freeze(packed_vit).values() if weight.bits == 2 for row in weight.codes)
(FOLDER / "float").mkdir()
save_file(plain.state_dict(), FOLDER / "float" / "model.safetensors")
size = {
    "float": (FOLDER / "float" / "model.safetensors").stat().st_size,
    "packed": sum(path.stat().st_size for path in (FOLDER / "packed").iterdir()),
}
right = {"full precision": share_right(logits_of(plain)), "longer": share_right(logits_of(longer))}
right["int8"] = share_right(logits_of(integers))
logits = logits_of(student)
apart = {
    name: (logits_of(model) - logits).abs().max().item() for name, model in (("packed", packed_vit), ("int8", integers))
}
rounded = calibrate(quantize(plain, OFQConfig()), [images[:64]])  # the same bits without training; converts in place
right["rounded only"] = share_right(logits_of(rounded.eval()))
print(f"full precision               {right['full precision']:.1%} right, {size['float']:,} bytes")
print(f"the same, trained on as long {right['longer']:.1%}")
print(f"rounded without training     {right['rounded only']:.1%}")
print(f"2 bits, trained, in int8     {right['int8']:.1%} right, {size['packed']:,} bytes, {levels} levels in a row")
print(f"logits differ from the trained model's by {apart['packed']:g} read back and {apart['int8']:g} in int8")

# %% [markdown]
# What is saved is bytes, at an accuracy that these few images do not tell from that of full precision trained as long.
# The first and the last layer have 8 bits; norms, biases and embeddings stay as they are.
#
# ## 5. What was typed, and what changed
#
# All numbers are those of the cells above.


# %%
def percent(result: dict[str, float], name: str = "accuracy") -> str:
    return f"{result[name]:.1%}"


def gone(name: str) -> str:
    return f"{len(pruned[name] & liars)} of {LIARS} liars go, and {len(pruned[name] - liars)} honest"


read_first = {name: percent(read[name, 0]) for name in rows}
lora = list(adaptation.values())[-1]
closing = [
    (
        '`corpus.map(ImportanceWeights(k=10, group_column="source").fit(lists), batched=True)`',
        gone("learned weights"),
        f"reader: {read_first['all sources']} -> {read_first['pruned']} right",
        f"mean utility: {gone('mean utility')}",
    ),
    (
        '`documents.map(AnchorPacking(...), batched=True)`, `attn_implementation="anchor"`',
        f"changing a document moves the others of its row by {leaks['pruned']:g}",
        f"{read_first['pruned']} right",
        f"sdpa, whole rows: moves by {leaks['pruned, whole rows, sdpa']:.2g}, "
        f"{read_first['pruned, whole rows, sdpa']} right; positions restarted: "
        f"{leaks['pruned, restarted, sdpa']:g}, {read_first['pruned, restarted, sdpa']}",
    ),
    (
        "`get_peft_model(model, BoneConfig(r=8, ...))`, `PeftModel.from_pretrained(model, folder)`",
        f"a file that says {peft_type} is written and read; {trained_numbers['Bone']:,} numbers learn a skewed key",
        f"{percent(report.before)} right",
        f"LoRA: {trained_numbers['LoRA']:,} numbers, {percent(lora)}",
    ),
    (
        '`evaluate.load("anchored_mcq_bias")`, `mitigate(model, tokenizer, unlabelled)`',
        f"A said where it is wrong: {percent(report.before, 'anchored_bias_rate')} -> "
        f"{percent(report.after, 'anchored_bias_rate')}",
        f"{percent(report.before)} -> {percent(report.after)} right",
        f"output calibration: {percent(report.before, 'calibrated_accuracy')}",
    ),
    (
        '`timm.create_model("ofq_w2a2.vit_tiny_patch16_224")`',
        f"{size['float']:,} -> {size['packed']:,} bytes, and int8 arithmetic",
        f"{right['int8']:.1%} right; full precision, trained as long: {right['longer']:.1%}",
        f"rounded without training: {right['rounded only']:.1%}",
    ),
]
header = ("what was typed", "what changed", "number (seed 0)", "rival")
lines = [header, ["---"] * len(header), *closing]
display(Markdown("\n".join(f"| {' | '.join(line)} |" for line in lines)))
