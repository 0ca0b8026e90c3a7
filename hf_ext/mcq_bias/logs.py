"""Bias from what other harnesses have logged: lm-eval's samples (`--log_samples`) and lighteval's details."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_ext.mcq_bias.bias import bias_metrics
from hf_ext.mcq_bias.letters import LETTERS

LM_EVAL, LIGHTEVAL = "samples_*.jsonl", "details_*.parquet"
_DATE = re.compile(r"_\d{4}-\d{2}-\d{2}T[\d.-]+$")
_LABEL = re.compile(r"\(?([A-Z]|\d+)[).:]?")


Sample = dict[str, Any]
Samples = list[tuple[str, Sample]]  # each with the place where it is logged


class RefusedTaskError(ValueError):
    """A task is logged whose options are not positions with one score each."""


@dataclass(frozen=True)
class TaskLog:
    """The items of one task: `scores`, n rows of one log-likelihood an option, and `gold`, n indices."""

    task: str
    scores: list[list[float]]
    gold: list[int]


@dataclass(frozen=True)
class _Item:
    """What one line of a log says; `target` as it stands there, `accuracy` None where it was not logged."""

    options: list[str]
    scores: list[float]
    target: Any
    accuracy: float | None


ItemOf = Callable[[Sample, str], _Item]


def measure_logs(path: str | Path, **options: Any) -> tuple[dict[str, dict[str, int | float]], dict[str, str]]:
    """`bias_metrics(..., **options)` of every task of `read_logs` and, under "all tasks", of all their items together.

    Returns the results by task, and the refused tasks with the reason. Where a task was logged more than once, there is
    no "all tasks": items that are counted twice make any difference look surer than it is.

    Raises:
        OSError: a log may not be read.
        ValueError: there is no such log, a line of one is damaged, or an option is wrong.
    """
    tasks, refused = read_logs(path)
    if len(tasks) > 1 and len({log.task for log in tasks.values()}) == len(tasks):
        logs = list(tasks.values())
        scores, gold = ([row for log in logs for row in getattr(log, part)] for part in ("scores", "gold"))
        tasks["all tasks"] = TaskLog("all tasks", scores, gold)
    return {name: bias_metrics(task.scores, task.gold, **options) for name, task in tasks.items()}, refused


def read_logs(path: str | Path) -> tuple[dict[str, TaskLog], dict[str, str]]:
    """All tasks that are logged in a file or, at any depth, in a folder.

    Returns the tasks by name, and the names of those that were refused with the reason. A task that was logged twice
    has its file in its name.

    Raises:
        OSError: a log may not be read.
        ValueError: there is no such log, or a line of one is damaged.
    """
    path = Path(path)
    if path.is_file() and path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"{path} is neither {LM_EVAL} of lm-eval (unpacked) nor {LIGHTEVAL} of lighteval")
    files = [path] if path.is_file() else sorted(file for kind in (LM_EVAL, LIGHTEVAL) for file in path.rglob(kind))
    if not files:
        what = "has no such file" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; give the {LM_EVAL} of lm-eval, the {LIGHTEVAL} of lighteval, or their folder")
    if folder := next((file for file in files if file.is_dir()), None):
        raise ValueError(f"{folder} is a folder under the name of a log; give the log itself, or rename the folder")
    tasks, refused = {}, {}
    for file in files:
        for task, part, item, samples in _parts(file):
            name = f"{task}{part}"
            if name in tasks or name in refused:
                name += f" ({file.relative_to(path) if path.is_dir() else file})"
            try:
                tasks[name] = _task(task, [item(sample, where) for where, sample in samples])
            except RefusedTaskError as error:
                refused[name] = str(error)
    return tasks, refused


def _parts(file: Path) -> Iterator[tuple[str, str, ItemOf, Samples]]:
    """Task, filter, how its items are read, and its samples; with several filters every item is logged for each."""
    kind, read, item = (
        (LIGHTEVAL, _rows, _lighteval_item) if file.suffix == ".parquet" else (LM_EVAL, _by_filter, _lm_eval_item)
    )
    task, parts = _DATE.sub("", file.stem.removeprefix(kind.partition("*")[0])), read(file)
    for name, samples in parts.items():
        yield task, "" if len(parts) == 1 else f", {name}", item, samples


def _task(task: str, items: list[_Item]) -> TaskLog:
    for item in items:
        _require_positions(item.options, item.scores)
    return TaskLog(task, [item.scores for item in items], _gold(items))


def _require_positions(options: list[str], scores: list[float]) -> None:
    if len(options) != len(scores):
        raise RefusedTaskError(f"it has {len(scores)} scores for {len(options)} options")
    if not 2 <= len(options) <= len(LETTERS):
        raise RefusedTaskError(f"it has an item of {len(options)} options; a position needs 2 to {len(LETTERS)}")
    labels = _labels(options)
    numbers = [str(i + 1) for i in range(len(options))]
    if labels != numbers and labels != list(LETTERS[: len(options)]):
        raise RefusedTaskError(
            f"its options {_short(options)} are no positions: the answers have to be A, B, C, ... or 1, 2, 3, ..."
        )


def _labels(options: list[str]) -> list[str | None]:
    return [found[1] if (found := _LABEL.fullmatch(option.strip())) else None for option in options]


def _short(options: list[str]) -> str:
    return ", ".join(repr(option if len(option) < 20 else option[:17] + "...") for option in options[:4])


# --- the right answer


def _gold(items: list[_Item]) -> list[int]:
    """Index of the right option: what is logged may be the index or the option's text.

    Where both could be meant ("2" of 1, 2, 3), the logged accuracies say which it is.
    """
    readable = [gold for read in (_as_index, _as_text) if None not in (gold := [read(item) for item in items])]
    agreeing = [gold for gold in readable if all(map(_agrees, items, gold))]
    if len(agreeing) == 2 and agreeing[0] != agreeing[1]:
        raise RefusedTaskError("its targets may be indices or options, and no accuracy (acc) is logged that would tell")
    if agreeing:
        return agreeing[0]
    if readable:
        raise RefusedTaskError("its logged accuracies are not those of its highest score against its targets")
    target = next(item.target for item in items if _as_index(item) is None and _as_text(item) is None)
    raise RefusedTaskError(f"its target {target!r} is not one of its options, nor the index of one")


def _as_index(item: _Item) -> int | None:
    target = str(item.target).strip()
    return int(target) if target.isdecimal() and int(target) < len(item.options) else None


def _as_text(item: _Item) -> int | None:
    texts, target = [option.strip() for option in item.options], str(item.target).strip()
    for choices in (texts, _labels(item.options)):
        if target in choices:
            return choices.index(target)
    return None


def _agrees(item: _Item, gold: int) -> bool:
    if item.accuracy is None or np.isnan(item.scores).any():
        return True
    best = max(item.scores)
    if item.scores.count(best) > 1:  # which of them the harness took is not ours to say
        return True
    return (item.scores[gold] == best) == bool(item.accuracy)


# --- lm-eval


def _by_filter(file: Path) -> dict[str, Samples]:
    parts: dict[str, dict[str, tuple[str, Sample]]] = {}
    for number, sample in _lines(file):
        where = f"{file}, line {number}"
        documents = parts.setdefault(str(sample.get("filter", "none")), {})
        document = str(_entry(sample, "doc_id", where))
        if document in documents:
            raise ValueError(f"{where}: document {document} is logged twice; keep the samples of one run in a file")
        documents[document] = where, sample
    if not parts:
        raise ValueError(f"{file} has no samples")
    return {name: list(documents.values()) for name, documents in parts.items()}


def _lines(file: Path) -> Iterator[tuple[int, Sample]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                sample = json.loads(line)
            except ValueError as error:  # also of bytes that are not UTF-8
                raise ValueError(f"{file}, line {number} is no JSON ({error}); was the log cut off?") from None
            if not isinstance(sample, dict):
                raise ValueError(f"{file}, line {number} is no sample of lm-eval, but a {type(sample).__name__}")
            yield number, sample


def _entry(sample: Sample, key: str, where: str) -> Any:
    if key not in sample:
        raise ValueError(f"{where} is no sample of lm-eval: it has no {key!r}, only {', '.join(sample) or 'nothing'}")
    return sample[key]


def _lm_eval_item(sample: Sample, where: str) -> _Item:
    calls, responses = _entry(sample, "arguments", where), _entry(sample, "filtered_resps", where)
    if isinstance(calls, dict):
        calls = [list(call.values()) if isinstance(call, dict) else call for call in calls.values()]
    metrics = sample.get("metrics", [])
    _require_lists(where, arguments=calls, filtered_resps=responses, metrics=metrics)
    scores = [_log_likelihood(response) for response in responses]
    if not all(isinstance(call, list) and len(call) >= 2 and isinstance(call[1], str) for call in calls):
        raise RefusedTaskError("its requests are no pairs of a question and an option")
    if "acc_mutual_info" in metrics:  # each option once more, without the question
        calls, scores = calls[: len(calls) // 2], scores[: len(scores) // 2]
    if len({str(call[0]) for call in calls}) > 1:
        raise RefusedTaskError("its options come with different questions")
    return _Item([call[1] for call in calls], scores, _entry(sample, "target", where), sample.get("acc"))


def _require_lists(where: str, **entries: Any) -> None:
    for what, entry in entries.items():
        if not isinstance(entry, list):
            raise ValueError(f"{where}: its {what!r} is {str(entry)[:40]!r}, and a list is expected")


def _log_likelihood(response: Any) -> float:
    try:
        score, _ = response
        return float(score)
    except (TypeError, ValueError, OverflowError):
        raise RefusedTaskError(f"it was answered by {str(response)[:30]!r}, not by one score an option") from None


# --- lighteval


def _rows(file: Path) -> dict[str, Samples]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    try:
        rows = read_table(file).to_pylist()
    except (ArrowException, OSError, ValueError) as error:  # all three may come of damage
        raise ValueError(f"{file} cannot be read as parquet: {error}") from None
    if not rows:
        raise ValueError(f"{file} has no rows")
    return {"none": [(f"{file}, row {number}", row) for number, row in enumerate(rows)]}


def _lighteval_item(row: Sample, where: str) -> _Item:
    try:
        document = row["doc"]
        options, gold, scores = document["choices"], document["gold_index"], row["model_response"]["logprobs"]
    except (KeyError, TypeError):
        raise ValueError(
            f"{where} lacks doc.choices, doc.gold_index or model_response.logprobs, as lighteval logs them from 0.11 on"
        ) from None
    gold = gold if isinstance(gold, list) else [gold]
    if len(gold) != 1:
        raise RefusedTaskError(f"it has an item with {len(gold)} right answers")
    options, scores = ([] if entry is None else entry for entry in (options, scores))
    _require_lists(where, choices=options, logprobs=scores)
    if not all(isinstance(option, str) for option in options) or not all(isinstance(x, int | float) for x in scores):
        raise RefusedTaskError("it has an item without a text or a score for each option")
    return _Item(options, scores, gold[0], None)
