"""Demo of importance weights: digits answer questions by vote, and some of their sources lie."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, load_from_disk

from hf_ext import ImportanceWeights
from hf_ext.demo.report import Outcome, Run

SCORE = "hf_ext.importance_weights:ImportanceWeights"
OPTIONS = {
    "mean": ["k=10", "group_column=source", "method=mean"],
    "learned": ["k=10", "group_column=source", "group_update=sum"],
}
RUNS = {"mean": "mean utility", "learned": "learned weights"}
DOCUMENTS, FIT, TUNE = 800, 400, 200
# A planted source answers one digit too high four times in five: all liars tell the same lie, and can win a vote.
SOURCES, PLANTED, WRONG = 40, 16, 0.8


def prepare(out: Path, quick: bool) -> list[Run]:
    """Write the digits as documents and questions, and the script beside them; return the commands to run.

    The digits are those that the demo of OFQ wrote. It takes seconds as it is: `quick` changes nothing.
    """
    questions, planted = write_documents(out / "digits", out / "documents")
    (out / "planted.json").write_text(json.dumps(planted) + "\n")  # which the script does not read
    shutil.copy(Path(__file__).with_name("answer.py"), out / "answer.py")
    runs = []
    for name, label in RUNS.items():
        command = ["answer.py", "--dataset", "documents", "--output_dir", f"runs/{name}"]
        command += ["--score", SCORE, "--score_kwargs", *OPTIONS[name]]
        runs.append(Run(label, command, questions, proof="importance_weights"))
    return runs


def write_documents(digits: Path, folder: Path) -> tuple[int, list[str]]:
    """Some digits as documents with sources, the others as questions; returns how many test, and the planted sources.

    An embedding is the picture less the mean document, of length 1.
    """
    draw = np.random.default_rng(0)
    splits = load_from_disk(str(digits))
    everything = concatenate_datasets([splits["train"], splits["test"]]).with_format("numpy")
    pixels, labels = everything["pixel_values"][:].reshape(len(everything), -1), everything["labels"][:]
    places = np.split(np.arange(len(labels)), np.cumsum([DOCUMENTS, FIT, TUNE]))
    pixels = pixels - pixels[places[0]].mean(0)
    pixels /= np.linalg.norm(pixels, axis=1, keepdims=True)

    source = draw.permutation(np.arange(DOCUMENTS) % SOURCES)
    planted = np.sort(draw.choice(SOURCES, PLANTED, replace=False))
    answers = labels.copy()
    answers[:DOCUMENTS] += np.isin(source, planted) & (draw.random(DOCUMENTS) < WRONG)
    tables = [{"embedding": pixels[rows].tolist(), "answer": (answers[rows] % 10).tolist()} for rows in places]
    names = [f"source {number:02}" for number in source]
    tables[0] |= {"id": [f"digit {number:03}" for number in range(DOCUMENTS)], "source": names}
    DatasetDict(
        {name: Dataset.from_dict(table) for name, table in zip(("corpus", "fit", "tune", "test"), tables, strict=True)}
    ).save_to_disk(folder)
    return len(places[-1]), [f"source {number:02}" for number in planted]


def judge(out: Path) -> Outcome:
    """Compare the accuracies, and the sources that pruning took out with those that were planted."""
    results = {name: json.loads((out / "runs" / name / "results.json").read_text()) for name in RUNS}
    planted = set(json.loads((out / "planted.json").read_text()))
    corpus = load_from_disk(str(out / "documents"))["corpus"]
    weights = {name: ImportanceWeights.from_pretrained(out / "runs" / name) for name in OPTIONS}
    kept = {name: load_from_disk(str(out / "runs" / name / "corpus")) for name in OPTIONS}
    found = {name: set(corpus["source"]) - set(rows["source"]) for name, rows in kept.items()}
    precision = {name: len(sources & planted) / max(len(sources), 1) for name, sources in found.items()}
    recall = {name: len(sources & planted) / len(planted) for name, sources in found.items()}
    ordered = {name: in_order(one.to_dict(), planted) for name, one in weights.items()}
    again = weights["learned"].prune(corpus.map(weights["learned"], batched=True))
    same = again.to_dict() == kept["learned"].to_dict()
    right = {name: f"{result['accuracy']:.1%} right" for name, result in results.items()}
    all_right = results["learned"]["accuracy_of_all"]
    return Outcome(
        string=f"--score {SCORE} --score_kwargs {' '.join(OPTIONS['learned'])}",
        baseline=f"vote of all documents: {all_right:.1%} right; without {RUNS['mean']}'s {len(found['mean'])} worst "
        f"sources: {right['mean']}",
        ours=f"without the {len(found['learned'])} sources of smallest learned weight: {right['learned']}",
        check=f"of {len(planted)} planted sources, precision {precision['learned']:.0%} and recall "
        f"{recall['learned']:.0%} ({RUNS['mean']}: {precision['mean']:.0%} and {recall['mean']:.0%}); below any other "
        f"source in {ordered['learned']:.0%} of pairs ({ordered['mean']:.0%}); read back, the weights keep "
        f"{'the same' if same else 'other'} documents",
        passed=min(precision["learned"], recall["learned"]) >= 0.9
        and results["learned"]["accuracy"] > all_right
        and same,
        numbers={
            "results": results,
            "planted": sorted(planted),
            "found": {name: sorted(sources) for name, sources in found.items()},
            "precision": precision,
            "recall": recall,
            "in_order": ordered,
            "same_after_reload": same,
            "weights": {name: one.to_dict() for name, one in weights.items()},
        },
    )


def in_order(weights: dict[str, float], planted: set[str]) -> float:
    """Share of the pairs of a planted and another source of which the planted one weighs less."""
    pairs = [weights[bad] < weights[good] for bad in planted for good in weights if good not in planted]
    return sum(pairs) / len(pairs)


def panel(axes: Any, outcome: Outcome) -> None:
    numbers = outcome.numbers
    planted, results = numbers["planted"], numbers["results"]
    all_right = results["learned"]["accuracy_of_all"]
    order = sorted(numbers["weights"]["learned"], key=lambda source: (source not in planted, source))
    axes.axvspan(0.5, len(planted) + 0.5, color="0.93")
    for (name, weights), colour in zip(numbers["weights"].items(), ("0.6", "tab:blue"), strict=True):
        label = f"{RUNS[name]}, without the worst: {results[name]['accuracy']:.1%} right"
        axes.plot(range(1, len(order) + 1), [weights[source] for source in order], "o", color=colour, label=label)
    axes.plot([], [], " ", color="0.6", label=f"all documents: {all_right:.1%} right")
    axes.set_title(f"Importance weights: {len(planted)} of {len(order)} sources lie (shaded)")
    axes.set_xlabel("source")
    axes.set_ylabel("weight, mean utility")
    axes.set_ylim(-0.05, 1.4)
    axes.legend(loc="upper right")
