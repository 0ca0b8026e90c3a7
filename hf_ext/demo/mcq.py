"""Demo of anchored answers: a metric exposes a model that was spoilt to say A, and it is repaired without answers."""

import json
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_ext.demo import train_options
from hf_ext.demo.report import Outcome, Run
from hf_ext.mcq_bias import bias_metrics, score_choices

METRIC, REPAIR = "anchored_mcq_bias", "hf_ext.mcq_bias:mitigate"
RUNS = {"judged": "multiple choice, judged", "repaired": "multiple choice, repaired"}
UNLABELLED, TEST = 256, 250


def prepare(out: Path, quick: bool) -> list[Run]:
    """Write the questions and the scripts beside them; return the commands to run."""
    for script in ("train_options.py", "ask.py"):
        shutil.copy(Path(__file__).with_name(script), out / script)
    questions = write_questions(out / "questions.json")
    steps = 300 if quick else 1500
    train = ["train_options.py", "--output_dir", "reader", "--max_steps", str(steps)]
    ask = ["ask.py", "--model", "reader", "--questions", "questions.json", "--output_dir"]
    learn = Run("reader of questions", train, steps)
    judge = [*ask, "runs/judged", "--metric", METRIC]
    repair = [*ask, "runs/repaired", "--metric", METRIC, "--repair", REPAIR]
    return [
        learn,
        Run(RUNS["judged"], judge, questions, proof=METRIC, after=learn.name),
        Run(RUNS["repaired"], repair, questions, proof=METRIC, after=learn.name),
    ]


def write_questions(path: Path) -> int:
    """Questions without answers to repair with, and others, in every rotation of their choices, to judge by."""
    unlabelled = [_asked(item) for item in train_options.make_items(UNLABELLED, seed=10**9)]
    for item in unlabelled:
        del item["label"]
    seen, test = {item["prompt"] for item in unlabelled}, []
    for number, item in enumerate(train_options.make_items(TEST, seed=10**9 + 1)):
        orders = [_asked(_rotated(item, label)) for label in range(len(item["choices"]))]
        if not seen & {order["prompt"] for order in orders}:
            test += [order | {"group": f"question {number}"} for order in orders]
    path.write_text(json.dumps({"unlabelled": unlabelled, "test": test}) + "\n")
    return len(test)


def _rotated(item: dict[str, Any], label: int) -> dict[str, Any]:
    """The same question with its right choice at `label`."""
    shift = item["label"] - label
    return item | {"choices": item["choices"][shift:] + item["choices"][:shift], "label": label}


def _asked(item: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": train_options.prompt(item),
        "num_choices": len(item["choices"]),
        "label": item["label"],
    }


def judge(out: Path) -> Outcome:
    """Compare the metric's outputs before and after, and those of the adapter read back."""
    found = {name: json.loads((out / "runs" / name / "results.json").read_text()) for name in RUNS}
    before, after = found["judged"], found["repaired"]
    again = _reread(out)
    same = all(abs(again[name] - after[name]) < 1e-9 for name in ("accuracy", "anchored_bias_rate"))
    return Outcome(
        string=f"--metric {METRIC} --repair {REPAIR}",
        baseline=f"plain accuracy: {before['accuracy']:.1%}; less the mean score of each letter: "
        f"{before['calibrated_accuracy']:.1%}",
        ours=f"exposed: {before['anchored_bias_rate']:.0%} of the wrong chances to say A are taken "
        f"(z = {before['cmh_z']:.0f}); repaired without answers: {after['anchored_bias_rate']:.0%}, accuracy "
        f"{after['accuracy']:.1%}",
        check=f"the same option in another order: agrees in {before['permutation_consistency']:.0%} of pairs before, "
        f"{after['permutation_consistency']:.0%} after; the adapter read back gives "
        f"{'the same' if same else 'other'} answers",
        passed=before["cmh_z"] > 4
        and after["anchored_bias_rate"] < before["anchored_bias_rate"] / 2
        and after["accuracy"] > before["accuracy"]
        and after["permutation_consistency"] > before["permutation_consistency"]
        and same,
        numbers={"results": found, "same_after_reload": same},
    )


def _reread(out: Path) -> dict[str, float]:
    """The outputs of the saved adapter, on the model from the disk."""
    tokenizer = AutoTokenizer.from_pretrained(out / "reader")
    model = AutoModelForCausalLM.from_pretrained(out / "reader")
    adapted = PeftModel.from_pretrained(model, out / "runs" / "repaired")
    test = json.loads((out / "questions.json").read_text())["test"]
    prompts, counts, labels = ([item[key] for item in test] for key in ("prompt", "num_choices", "label"))
    scored = score_choices(adapted, tokenizer, prompts, counts, batch_size=64, progress=False)
    return bias_metrics(scored.scores, labels, num_choices=counts, n_resamples=0)


def panel(axes: Any, outcome: Outcome) -> None:
    results, letters = outcome.numbers["results"], train_options.LETTERS
    said = {"judged": "as it is", "repaired": "repaired without answers"}
    for (name, label), colour in zip(said.items(), ("0.6", "tab:blue"), strict=True):
        recalls = [100 * results[name][f"recall_{letter}"] for letter in letters]
        axes.plot(range(len(letters)), recalls, "o-", color=colour, label=f"{label}: {results[name]['accuracy']:.0%}")
    calibrated = 100 * results["judged"]["calibrated_accuracy"]
    axes.axhline(calibrated, color="0.6", linestyle=":", label=f"output calibration: {calibrated:.0f}%")
    axes.set_xticks(range(len(letters)), letters)
    axes.set_title("Anchored answers: a model that was spoilt to say A")
    axes.set_xlabel("position of the right choice")
    axes.set_ylabel("answered right (%)")
    axes.set_ylim(-5, 150)
    axes.legend(loc="upper right", title="right in all")
