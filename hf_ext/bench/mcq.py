"""Anchored answers: the metric on a million rows, attribution beside a forward, and a repair without answers.

On the CPU with one thread, by CPU time.
"""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import evaluate
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_ext.bench.harness import Row, compare, cpu_seconds
from hf_ext.demo import train_options
from hf_ext.mcq_bias import attribute, bias_metrics, mitigate, mitigation_report, reference, score_choices

CHOICES = 4


def rows(quick: bool = False) -> Iterator[Row]:
    """`quick`: fewer rows, a smaller model and less training, to see that it runs; its numbers mean little."""
    torch.set_num_threads(1)
    repeats = 2 if quick else 7
    yield from metric_rows(20_000 if quick else 1_000_000, repeats)
    yield loops_row(1_000 if quick else 20_000, repeats)
    yield attribution_row(2 if quick else 12, repeats)
    yield from repair_rows(100 if quick else 1500)


# --- the metric


def answered(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (n, 4) float32 of a model that is right half of the time and likes A, and the gold indices (n,)."""
    draw = np.random.default_rng(0)
    gold = draw.integers(0, CHOICES, n)
    scores = draw.normal(size=(n, CHOICES)).astype(np.float32)
    scores[np.arange(n), gold] += 1
    scores[:, 0] += 0.3
    return scores, gold


def metric_rows(n: int, repeats: int) -> Iterator[Row]:
    """Every output, by the metric that `evaluate.load` returns."""
    scores, gold = answered(n)
    metric = evaluate.load("anchored_mcq_bias", num_choices=CHOICES)
    for what, predictions in (("indices", scores.argmax(1)), ("float32 scores", scores)):
        ours = _median(partial(metric.compute, predictions=predictions, references=gold), repeats)
        yield Row(
            f"metric, {n:,} rows of {CHOICES} choices, {what}, 10,000 resamples",
            "",
            ours,
            target="<= 1 s",
            met=ours <= 1,
            tags={"kind": "metric", "input": what, "rows": f"the metric, {n:,} rows"},
        )


def loops_row(n: int, repeats: int) -> Row:
    scores, gold = answered(n)
    table = [reference.Row(CHOICES, int(g), row.tolist()) for g, row in zip(gold, scores, strict=True)]
    return compare(
        f"metric, {n:,} rows, float32 scores, no resamples",
        partial(bias_metrics, scores, gold, n_resamples=0),
        partial(by_loops, table),
        peer_name="loops of reference.py",
        repeats=min(repeats, 3),
        at_least=50.0,
    )


def by_loops(table: list[reference.Row]) -> None:
    """The outputs of scores without groups."""
    hits = sum(row.c for row in table)
    reference.wilson(hits, len(table), 0.95)
    reference.anchored_errors(table, 0)
    reference.cochran_mantel_haenszel(table, 0)
    reference.recall_std(table)
    reference.recall_std_null(table)
    reference.calibrated(table)


# --- attribution


def attribution_row(layers: int, repeats: int) -> Row:
    """Neurons and heads of a random model with GPT-2's shape, against the scores alone; one batch of 12 prompts."""
    words = [f"word{i}" for i in range(50_000)]
    tokenizer = train_options.make_tokenizer(words)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=layers, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=None)
    ).eval()
    examples = list(_long_examples(words))
    prompts = [example["prompt"] for example in examples]
    common = {"batch_size": len(prompts), "progress": False}
    return compare(
        f"GPT-2 with {layers} layers, {len(prompts)} prompts of about 65 tokens: neurons and heads attributed",
        partial(attribute, model, tokenizer, examples, target="runner_up", **common),
        partial(score_choices, model, tokenizer, prompts, CHOICES, **common),
        peer_name="scores of the choices alone",
        repeats=repeats,
        at_most=1.05,
    )


def _long_examples(words: list[str]) -> Iterator[dict[str, Any]]:
    draw = np.random.default_rng(0)
    for _ in range(12):
        texts = [" ".join(draw.choice(words, size)) for size in (int(draw.integers(24, 31)), 5, 5, 5, 5)]
        item = {"question": f"{texts[0]}?", "choices": texts[1:]}
        yield {"prompt": train_options.prompt(item), "num_choices": CHOICES}


# --- repair


def repair_rows(most_steps: int) -> Iterator[Row]:
    """A model that was spoilt to say A, repaired with 256 questions without answers, judged by 1,000 others."""
    tokenizer = train_options.make_tokenizer()
    model = train_options.make_model(len(tokenizer), seed=0)
    train_options.learn(model, tokenizer, 0, most_steps, lambda step: None)
    train_options.spoil(model, tokenizer, 0, 150, 0.65)
    unlabelled, test = (
        [item | {"prompt": train_options.prompt(item)} for item in train_options.make_items(count, seed)]
        for count, seed in ((256, 10**9), (1000, 10**9 + 1))
    )
    seen = {item["prompt"] for item in unlabelled}
    test = [item for item in test if item["prompt"] not in seen]
    reports = []

    def repair() -> None:
        adapted = mitigate(model, tokenizer, unlabelled, progress=False)
        reports.append(mitigation_report(adapted, tokenizer, test, progress=False))

    seconds = cpu_seconds(repair)
    what = f"GPT-2 of 3 layers spoilt to say A, repaired without answers, {len(test):,} questions"
    yield Row(f"{what}: fit and evaluation", "", seconds, target="<= 120 s", met=seconds <= 120)
    before, after = ({k: 100 * x for k, x in found.items()} for found in (reports[0].before, reports[0].after))
    drop = before["anchored_bias_rate"] - after["anchored_bias_rate"]
    yield Row(
        f"{what}: anchored bias rate",
        "before",
        after["anchored_bias_rate"],
        before["anchored_bias_rate"],
        unit="%",
        target="80 points less",
        met=drop >= 80,
    )
    gain = after["accuracy"] - before["accuracy"]
    yield Row(
        f"{what}: accuracy",
        "before",
        after["accuracy"],
        before["accuracy"],
        unit="%",
        target="40 points more",
        met=gain >= 40,
        tags={"kind": "accuracy"},
    )
    yield Row(
        f"{what}: accuracy",
        "output calibration",
        after["accuracy"],
        before["calibrated_accuracy"],
        unit="%",
        tags={"kind": "accuracy"},
    )


def draw(rows: list[Row], axes: Any) -> None:
    """Accuracy before and after, beside output calibration; seconds of the metric."""
    left, right = axes
    repaired, rival = (row for row in rows if row.tags.get("kind") == "accuracy")
    bars = {"before": repaired.peer, "output\ncalibration": rival.peer, "repaired": repaired.ours}
    colours = ["0.7", "0.7", "tab:blue"]
    left.bar_label(left.bar(list(bars), list(bars.values()), color=colours), fmt="%.0f")
    left.set(title="a model spoilt to say A, repaired without answers", ylabel="accuracy (%)", ylim=(0, 110))
    timed = [row for row in rows if row.tags.get("kind") == "metric"]
    names = [row.tags["input"] for row in timed]
    right.bar_label(right.bar(names, [row.ours for row in timed], color="tab:blue"), fmt="%.2f")
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(title=timed[0].tags["rows"], ylabel="seconds")


def _median(function: Callable[[], object], repeats: int) -> float:
    function()
    return statistics.median(cpu_seconds(function) for _ in range(repeats))
