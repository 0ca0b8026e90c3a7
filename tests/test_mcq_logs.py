"""Bias from the logs of lm-eval and lighteval: what is read, what is refused, what `hf-ext mcq-report` prints."""

import json
import random
import re

import datasets
import pytest
from typer.testing import CliRunner

from hf_ext.cli import app
from hf_ext.mcq_bias import bias_metrics
from hf_ext.mcq_bias.logs import measure_logs, read_logs

DATE = "2026-01-31T09-30-00.123456"
LETTERS, NUMBERS = ["A", "B", "C", "D"], ["1", "2", "3", "4"]


def items(n=40, k=4, seed=0):
    """(scores, gold) of n items."""
    draw = random.Random(seed)
    return [[draw.uniform(-9, 0) for _ in range(k)] for _ in range(n)], [draw.randrange(k) for _ in range(n)]


def best(scores):
    return scores.index(max(scores))


def sample(doc_id, scores, gold, options, target, **more):
    """One line as lm-eval writes it: numbers as texts, requests by name."""
    pairs = [[str(score), "False"] for score in scores]
    return {
        "doc_id": doc_id,
        "doc": {"question": "?"},
        "target": str(target),
        "arguments": {f"gen_args_{i}": {"arg_0": "? Answer:", "arg_1": f" {text}"} for i, text in enumerate(options)},
        "resps": [[pair] for pair in pairs],
        "filtered_resps": pairs,
        "filter": "none",
        "metrics": ["acc"],
        "acc": float(best(scores) == gold),
    } | more


def samples(options=LETTERS, target=lambda gold: gold, seed=0, n=40, **more):
    rows = zip(*items(n=n, k=len(options), seed=seed), strict=True)
    return [sample(i, scores, gold, options, target(gold), **more) for i, (scores, gold) in enumerate(rows)]


def write(folder, task, lines, date=DATE):
    path = folder / f"samples_{task}_{date}.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def plain(found):
    """With None for NaN, which is unequal to itself."""
    return {name: None if x != x else x for name, x in found.items()}


def run(*arguments):
    return CliRunner().invoke(app, ["mcq-report", *map(str, arguments)])


# --- what is read


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("options", "target"),
    [
        (LETTERS, lambda gold: gold),
        (LETTERS, lambda gold: LETTERS[gold]),
        (["(A)", "(B)", "(C)", "(D)"], lambda gold: LETTERS[gold]),
        (["A.", "B.", "C.", "D."], lambda gold: f" {LETTERS[gold]}."),
        (NUMBERS, lambda gold: gold),
        (NUMBERS, lambda gold: NUMBERS[gold]),
    ],
    ids=["index", "letter", "letter of brackets", "letter with a point", "index of numbers", "number"],
)
def test_every_output_is_that_of_the_metric(tmp_path, options, target):
    path = write(tmp_path, "arc", samples(options, target))
    results, refused = measure_logs(path, n_resamples=50)
    assert (list(results), refused) == (["arc"], {})
    assert plain(results["arc"]) == plain(bias_metrics(*items(), n_resamples=50))


def test_an_index_that_could_be_a_number_is_settled_by_the_accuracies(tmp_path):
    """Targets 1 to 3 only, so that both readings are possible in every row."""
    scores, _ = items()
    gold = [1 + i % 3 for i in range(len(scores))]
    for name, shift in (("indices", 0), ("numbers", 1)):
        lines = [sample(i, row, g - shift, NUMBERS, g) for i, (row, g) in enumerate(zip(scores, gold, strict=True))]
        task = read_logs(write(tmp_path, name, lines))[0][name]
        assert task.gold == [g - shift for g in gold]


def test_an_index_that_could_be_a_number_is_not_guessed(tmp_path):
    lines = [line | {"target": "2"} for line in samples(NUMBERS)]
    for line in lines:
        del line["acc"]
    assert "no accuracy (acc) is logged" in read_logs(write(tmp_path, "numbers", lines))[1]["numbers"]


def test_older_logs_with_lists_of_numbers(tmp_path):
    scores, gold = items()
    lines = [
        sample(i, row, g, LETTERS, g)
        | {"arguments": [["?", f" {text}"] for text in LETTERS], "filtered_resps": [[score, False] for score in row]}
        for i, (row, g) in enumerate(zip(scores, gold, strict=True))
    ]
    task = read_logs(write(tmp_path, "old", lines))[0]["old"]
    assert (task.scores, task.gold) == (scores, gold)


def test_scores_without_the_question_are_left_out(tmp_path):
    """Mutual information has lm-eval score every option once more."""
    lines = []
    for i, (scores, gold) in enumerate(zip(*items(), strict=True)):
        line = sample(i, scores + [-1.0] * 4, gold, LETTERS * 2, gold, acc=float(best(scores) == gold))
        for call in range(4, 8):
            line["arguments"][f"gen_args_{call}"]["arg_0"] = ""
        lines.append(line | {"metrics": ["acc", "acc_mutual_info"]})
    assert read_logs(write(tmp_path, "mutual", lines))[0]["mutual"].scores == items()[0]


def test_items_of_different_length_and_scores_that_are_none(tmp_path):
    lines = [
        sample(0, [-1.0, -2.0], 0, LETTERS[:2], 0),
        sample(1, [-1.0, -2.0, -0.5], 2, LETTERS[:3], 2),
        sample(2, [float("nan"), -2.0, -0.5], 1, LETTERS[:3], 1) | {"acc": 0.0},
        sample(3, [float("-inf"), -2.0, -2.0], 1, LETTERS[:3], 1) | {"acc": 0.0},
    ]
    found = measure_logs(write(tmp_path, "mixed", lines), n_resamples=0)[0]["mixed"]
    assert (found["n"], found["n_invalid"], found["n_ties"]) == (4, 1, 1)
    assert found["accuracy"] == 2.5 / 4


def test_a_folder_with_tasks_filters_and_runs(tmp_path):
    deep = tmp_path / "out" / "model"
    deep.mkdir(parents=True)
    first = write(deep, "task_one", samples())
    write(deep, "task_one", samples(seed=1), date="2026-02-01T09-30-00.123456")
    write(deep, "two", samples(filter="strict") + samples(filter="none", seed=1))
    write(deep, "prose", samples(["yes", "no"]))
    (deep / f"results_{DATE}.json").write_text("{}")
    tasks, refused = read_logs(tmp_path)
    second = "out/model/samples_task_one_2026-02-01T09-30-00.123456.jsonl"
    assert list(tasks) == ["task_one", f"task_one ({second})", "two, strict", "two, none"]
    assert list(refused) == ["prose"]
    results, _ = measure_logs(tmp_path, n_resamples=0)
    assert "all tasks" not in results
    assert plain(results["task_one"]) == plain(measure_logs(first, n_resamples=0)[0]["task_one"])


def test_all_tasks_are_their_items_together(tmp_path):
    write(tmp_path, "one", samples())
    write(tmp_path, "two", samples(NUMBERS, seed=1))
    parts = items(), items(seed=1)
    pooled = bias_metrics([s for part in parts for s in part[0]], [g for part in parts for g in part[1]], n_resamples=0)
    assert plain(measure_logs(tmp_path, n_resamples=0)[0]["all tasks"]) == plain(pooled)


def test_other_kinds_of_tasks_do_not_spoil_the_report(tmp_path):
    """As lm-eval logs generation and perplexity."""
    write(tmp_path, "mmlu", samples())
    text = sample(0, [-1.0, -2.0], 0, LETTERS[:2], "18") | {
        "arguments": {"gen_args_0": {"arg_0": "?", "arg_1": {"until": ["Question:"]}}},
        "filtered_resps": ["18"],
    }
    write(tmp_path, "gsm8k", [text])
    write(tmp_path, "wikitext", [text | {"arguments": {"gen_args_0": {"arg_0": "a page"}}, "filtered_resps": ["-9.5"]}])
    tasks, refused = read_logs(tmp_path)
    assert list(tasks) == ["mmlu"]
    assert list(refused) == ["gsm8k", "wikitext"]
    assert run(tmp_path).exit_code == 0


@pytest.mark.parametrize("wrap", [int, lambda gold: [gold]], ids=["index", "list of one"])
def test_lighteval_details(tmp_path, wrap):
    scores, gold = items()
    rows = [
        {
            "doc": {"query": "?", "choices": [f" {letter}" for letter in LETTERS], "gold_index": wrap(g)},
            "metric": {"acc": 0.0},
            "model_response": {"logprobs": row, "text": []},
        }
        for row, g in zip(scores, gold, strict=True)
    ]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"details_lighteval|mmlu:law|0_{DATE}.parquet")
    task = read_logs(tmp_path)[0]["lighteval|mmlu:law|0"]
    assert (task.scores, task.gold) == (scores, gold)


# --- what is refused


@pytest.mark.parametrize("name", ["results_2026.json", "samples_mmlu.jsonl.gz"])
def test_another_file_is_refused_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=re.escape(name)):
        read_logs(tmp_path / name)


@pytest.mark.parametrize("spoilt", [{"choices": [" A", None]}, {"logprobs": [-1.0, None]}], ids=["choice", "score"])
def test_details_without_a_text_or_a_score_are_refused(tmp_path, spoilt):
    whole = {"choices": [" A", " B"], "logprobs": [-1.0, -2.0]} | spoilt
    row = {"doc": {"choices": whole["choices"], "gold_index": 0}, "model_response": {"logprobs": whole["logprobs"]}}
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / f"details_mmlu_{DATE}.parquet")
    assert "without a text or a score" in read_logs(tmp_path)[1]["mmlu"]


def test_a_number_that_no_float_holds_is_refused(tmp_path):
    line = samples()[0] | {"filtered_resps": [[10**400, False]] * 4}
    assert "not by one score" in read_logs(write(tmp_path, "mmlu", [line]))[1]["mmlu"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"options": ["yes", "no", "may", "be"]}, "are no positions"),
        ({"options": ["B", "A", "C", "D"]}, "are no positions"),
        ({"options": ["A", "B", "C", "a long answer of many words"]}, "' a long answer of...' are no positions"),
        ({"target": lambda gold: 4 + gold}, "target '[4-7]' is not one of its options"),
        ({"target": lambda gold: [0, 1]}, r"target '\[0, 1\]' is not one of its options"),
        ({"target": lambda gold: (gold + 1) % 4}, "logged accuracies are not those"),
        ({"filtered_resps": ["A"]}, "answered by 'A'"),
        ({"arguments": [["?"]] * 4}, "no pairs of a question and an option"),
        ({"filtered_resps": [["-1.0", "False"]] * 3}, "3 scores for 4 options"),
    ],
    ids=["words", "order", "long", "beyond", "several", "accuracy", "text", "requests", "scores"],
)
def test_a_task_that_is_not_about_positions_is_refused_by_name(tmp_path, change, reason):
    tasks, refused = read_logs(write(tmp_path, "boolq", samples(**change)))
    assert not tasks
    assert list(refused) == ["boolq"]
    assert re.search(reason, refused["boolq"])
    process = run(tmp_path)
    assert process.exit_code == 2
    assert "left out: boolq" in process.output


def test_options_behind_different_questions_are_refused(tmp_path):
    lines = samples()
    lines[3]["arguments"]["gen_args_2"]["arg_0"] = "another?"
    assert "different questions" in read_logs(write(tmp_path, "winogrande", lines))[1]["winogrande"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text[: len(text) // 2], "is no JSON .* was the log cut off"),
        (lambda text: text + "[1, 2]\n", "line 41 is no sample of lm-eval, but a list"),
        (lambda text: text + text.splitlines()[0] + "\n", "line 41: document 0 is logged twice"),
        (
            lambda text: text.replace('"filtered_resps"', '"resps_"'),
            "line 1 is no sample of lm-eval: it has no 'filtered",
        ),
        (lambda text: text.replace('"doc_id"', '"id"'), "it has no 'doc_id'"),
        (lambda text: text.replace('{"gen_args_0"', '7, "x": {"gen_args_0"'), "line 1: its 'arguments' is '7'"),
        (
            lambda text: text.replace('"filtered_resps": [', '"filtered_resps": 5, "x": ['),
            "line 1: its 'filtered_resps' is",
        ),
        (lambda text: "", "has no samples"),
    ],
    ids=["cut off", "no sample", "twice", "no answers", "no document", "arguments", "answers", "empty"],
)
def test_a_damaged_log_names_its_line(tmp_path, spoil, message):
    path = write(tmp_path, "arc", samples())
    path.write_text(spoil(path.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_logs(path)


def test_damaged_details_of_lighteval(tmp_path):
    path = tmp_path / f"details_mmlu_{DATE}.parquet"
    path.write_bytes(b"PAR1 no more")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_logs(path)
    datasets.Dataset.from_list([{"predictions": [1]}]).to_parquet(path)
    with pytest.raises(ValueError, match=r"row 0 lacks doc\.choices"):
        read_logs(path)


@pytest.mark.parametrize("name", ["nowhere", ""], ids=["no such folder", "empty folder"])
def test_no_log_at_all(tmp_path, name):
    with pytest.raises(ValueError, match=r"has no such file|does not exist"):
        read_logs(tmp_path / name)


# --- the command


def test_json_has_every_output_of_every_task(tmp_path):
    write(tmp_path, "one", samples())
    write(tmp_path, "two", samples(seed=1))
    write(tmp_path, "prose", samples(["yes", "no"]))
    printed = json.loads(run(tmp_path, "--json", "--anchor", "b", "--confidence", "0.9").stdout)
    assert list(printed["tasks"]) == ["one", "two", "all tasks"]
    assert printed["tasks"]["one"] == plain(bias_metrics(*items(), anchor="B", confidence=0.9))
    assert list(printed["refused"]) == ["prose"]


def test_one_task_is_printed_whole_and_several_in_a_line_each(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    write(tmp_path, "one", samples())
    output = run(tmp_path).output
    for name in bias_metrics(*items(), n_resamples=0):
        assert name in output
    write(tmp_path, "two", samples(seed=1))
    process = run(tmp_path)
    assert process.exit_code == 0
    assert "all tasks" in process.output
    assert "pride_accuracy" not in process.output


def test_bytes_that_are_no_text_name_their_line(tmp_path):
    path = write(tmp_path, "arc", samples())
    path.write_bytes(path.read_bytes().replace(b'"doc_id": 1,', b'"doc_id": \xff,', 1))
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        read_logs(path)


def test_the_anchor_may_be_an_index(tmp_path):
    write(tmp_path, "one", samples())
    assert run(tmp_path, "--anchor", "1", "--json").stdout == run(tmp_path, "--anchor", "B", "--json").stdout


@pytest.mark.parametrize("option", [("--anchor", "AB"), ("--confidence", "1.5")], ids=["anchor", "confidence"])
def test_a_wrong_option_is_refused(tmp_path, option):
    write(tmp_path, "one", samples())
    process = run(tmp_path, *option)
    assert process.exit_code == 2
    assert option[1] in process.output
