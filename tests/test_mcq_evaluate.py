"""The metric through evaluate: by its bare name and by its path, in one process and in several, and what is undone."""

import doctest
import json
import math
import warnings
from functools import wraps
from multiprocessing import get_context
from pathlib import Path

import evaluate
import pytest
import torch
from evaluate import loading
from mcq_oracle import differences, draw_answers, draw_groups, draw_scores
from processes import run_python

import hf_ext
from hf_ext import compat
from hf_ext.mcq_bias import bias_metrics
from hf_ext.mcq_bias.metric import AnchoredMCQBias
from hf_ext.mcq_bias.register import add_to_evaluate, remove_from_evaluate

NAME = "anchored_mcq_bias"
FACTORY = "evaluation_module_factory"
SCRIPT = """
import evaluate
import datasets


class {name}(evaluate.Metric):
    def _info(self):
        number = datasets.Value("int64")
        features = datasets.Features({{"predictions": number, "references": number}})
        return evaluate.MetricInfo(description="", citation="", features=features)

    def _compute(self, predictions, references):
        return {{"local": len(predictions)}}
"""

ROWS = {
    "answers": draw_answers(30, invalid=0.1),
    "scores": draw_scores(30),
    "rotations": draw_groups(8),
    "permutations": draw_groups(8, explicit=True),
}


@pytest.fixture
def metric():
    return evaluate.load(NAME, n_resamples=300)


@pytest.fixture
def unregistered():
    """evaluate without us; registered again afterwards, whatever the test left there."""
    remove_from_evaluate()
    stock = getattr(loading, FACTORY)
    yield stock
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        remove_from_evaluate()
    setattr(loading, FACTORY, stock)
    add_to_evaluate()


def expected(rows, **options):
    return bias_metrics(**rows, **{"n_resamples": 300} | options)


def part(rows, first, last):
    return {name: column[first:last] for name, column in rows.items()}


# --- the name


@pytest.mark.smoke
def test_bare_name_without_network_or_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "init_dynamic_modules", lambda *_: pytest.fail("something is copied into the cache"))
    monkeypatch.setattr(loading, "cached_path", lambda *_, **__: pytest.fail("something is downloaded"))
    metric = evaluate.load(NAME, module_type="metric", cache_dir=str(tmp_path))
    assert type(metric) is AnchoredMCQBias
    assert metric.name == NAME
    assert len(metric._hash) == 64
    assert metric.compute(predictions=["A"], references=["A"], num_choices=2)["accuracy"] == 1.0


def test_another_kind_of_module_is_the_hosts_own_error():
    with pytest.raises(TypeError, match="comparison"):
        evaluate.load(NAME, module_type="comparison")


def test_load_from_the_module_that_nobody_touches_first():
    """`import evaluate` imports torch half-way, which arms our hooks; from then on nothing may look at `evaluate`."""
    code = f"from evaluate.loading import load\nprint(load({NAME!r}).name)"
    process = run_python(code)
    assert process.stdout.strip() == NAME, process.stderr


def test_metric_path_needs_no_registration(unregistered):
    with pytest.raises(FileNotFoundError):
        evaluate.load(NAME)
    path = hf_ext.metric_path(NAME)
    metric = evaluate.load(path, num_choices=3)
    assert isinstance(metric, AnchoredMCQBias)
    assert metric.compute(predictions=[0], references=[2])["n_choices_inferred"] == 0
    assert sorted(entry.name for entry in Path(path).iterdir() if entry.suffix) == ["README.md", f"{NAME}.py"]


def test_metric_path_of_an_unknown_name():
    with pytest.raises(ValueError, match=f"'anchored_mqc_bias'.*did you mean '{NAME}'"):
        hf_ext.metric_path("anchored_mqc_bias")


def load_by_combine(name):
    [metric] = evaluate.combine([name]).evaluation_modules
    return metric


@pytest.mark.parametrize("load", [evaluate.load, load_by_combine], ids=["load", "combine"])
def test_local_folder_wins(tmp_path, monkeypatch, load):
    folder = tmp_path / NAME
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert type(load(NAME)) is AnchoredMCQBias  # an empty folder is no metric
    (folder / f"{NAME}.py").write_text(SCRIPT.format(name="Local"))
    assert type(load(NAME)).__name__ == "Local"


@pytest.mark.parametrize("how", ["keyword", "position"])
def test_revision_is_refused(how):
    ask = {
        "keyword": lambda: evaluate.load(NAME, revision="main"),
        "position": lambda: loading.evaluation_module_factory(NAME, None, "main"),
    }[how]
    with pytest.raises(ValueError, match=r"revision='main'.*comes with hf_ext"):
        ask()


def test_other_calls_pass_through_as_they_came(unregistered, monkeypatch):
    seen = []
    monkeypatch.setattr(loading, FACTORY, lambda *args, **kwargs: seen.append((args, kwargs)))
    add_to_evaluate()
    calls = [
        (("accuracy",), {}),
        (("accuracy", "metric", "v1"), {"force_local_path": "x"}),
        ((), {"path": f"./{NAME}", "revision": "main"}),
        ((f"someone/{NAME}",), {"revision": None}),
        ((Path(NAME),), {}),
    ]
    for args, kwargs in calls:
        loading.evaluation_module_factory(*args, **kwargs)
    assert seen == calls
    assert loading.evaluation_module_factory(path=NAME).module_path.endswith(NAME)
    assert len(seen) == len(calls)


# --- the undo


@pytest.mark.smoke
def test_unregister_puts_the_very_function_back(unregistered):
    add_to_evaluate()
    ours = getattr(loading, FACTORY)
    add_to_evaluate()
    assert getattr(loading, FACTORY) is ours is not unregistered
    assert (ours.__wrapped__, ours.__module__) == (unregistered, "evaluate.loading")
    assert hf_ext.status()["evaluate"]["state"] == "registered"
    remove_from_evaluate()
    remove_from_evaluate()
    assert getattr(loading, FACTORY) is unregistered


def wrapped_by_somebody(calls):
    theirs = getattr(loading, FACTORY)

    @wraps(theirs)
    def somebody(*args, **kwargs):
        calls.append(args)
        return theirs(*args, **kwargs)

    setattr(loading, FACTORY, somebody)
    return theirs, somebody


def test_somebody_elses_wrapper_stays_and_ours_passes_on(unregistered):
    add_to_evaluate()
    calls = []
    ours, somebody = wrapped_by_somebody(calls)
    add_to_evaluate()  # around theirs, since ours is not the one that is called
    assert type(evaluate.load(NAME)) is AnchoredMCQBias
    remove_from_evaluate()
    assert getattr(loading, FACTORY) is somebody
    with pytest.raises(FileNotFoundError):
        evaluate.load(NAME)
    assert calls
    setattr(loading, FACTORY, ours)  # they take theirs off: what they put back does nothing
    with pytest.raises(FileNotFoundError):
        evaluate.load(NAME)
    add_to_evaluate()
    assert getattr(loading, FACTORY).__wrapped__ is unregistered


def test_unregister_says_that_somebody_wrapped_ours(unregistered):
    add_to_evaluate()
    _, somebody = wrapped_by_somebody([])
    with pytest.warns(RuntimeWarning, match=r"evaluation_module_factory was replaced by .*test_mcq_evaluate.py"):
        remove_from_evaluate()
    assert getattr(loading, FACTORY) is somebody
    with pytest.raises(FileNotFoundError):
        evaluate.load(NAME)


def test_every_host_is_served_after_unregister_and_register():
    stock = getattr(loading, FACTORY).__wrapped__
    hf_ext.unregister()
    try:
        assert getattr(loading, FACTORY) is stock
    finally:
        hf_ext.register()
    assert type(evaluate.load(NAME)) is AnchoredMCQBias


# --- one result, in whatever parts the rows come


@pytest.mark.smoke
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("way", ["compute", "add", "add_batch", "add_batch_and_compute", "in_memory"])
def test_compute_add_and_add_batch_are_alike(case, way):
    metric = evaluate.load(NAME, n_resamples=300, keep_in_memory=way == "in_memory")
    rows, n = ROWS[case], len(ROWS[case]["references"])
    last = {}
    if way == "compute":
        last = rows
    elif way == "add":
        singular = {"predictions": "prediction", "references": "reference"}
        for i in range(n):
            metric.add(**{singular.get(name, name): column[i] for name, column in rows.items()})
    else:
        for first in range(0, n, 7):
            metric.add_batch(**part(rows, first, first + 7))
        metric.add_batch(predictions=[], references=[])
        if way == "add_batch_and_compute":
            last = part(rows, 0, 5)
            rows = {name: column + last[name] for name, column in rows.items()}
    found = metric.compute(**last)
    assert differences(found, expected(rows)) == {}
    assert list(found) == list(expected(rows))
    again = metric.compute(**part(rows, 0, 9))  # nothing is left of the rows before
    assert differences(again, expected(part(rows, 0, 9))) == {}


def test_options_of_load_are_the_defaults_of_compute():
    rows = {name: ROWS["answers"][name] for name in ("predictions", "references")}
    options = {"num_choices": 5, "anchor": "B", "confidence": 0.8, "n_resamples": 0}
    metric = evaluate.load(NAME, **options)
    assert differences(metric.compute(**rows), expected(rows, **options)) == {}
    metric.add_batch(**rows)
    changed = {"anchor": "C", "n_resamples": 50, "seed": 3}
    assert differences(metric.compute(**changed), expected(rows, **options | changed)) == {}
    assert metric.compute(**rows, num_choices=6)["gold_share_F"] == 0.0


def test_seed_of_load_is_the_hosts():
    rows = ROWS["answers"]
    assert differences(evaluate.load(NAME, seed=7, n_resamples=300).compute(**rows), expected(rows)) == {}


def test_names_of_an_empty_result_are_those_of_num_choices():
    metric = evaluate.load(NAME, num_choices=3, n_resamples=0)
    metric.add_batch(predictions=[], references=[])
    assert list(metric.compute()) == list(metric.compute(predictions=[], references=[]))
    assert list(metric.compute(predictions=[], references=[])) == list(metric.compute(predictions=[0], references=[0]))


def test_add_without_a_prediction_is_an_invalid_answer(metric):
    metric.add(prediction=None, reference="B", num_choices=3)
    metric.add(prediction="B", reference="B", num_choices=3)
    found = metric.compute()
    assert (found["n_invalid"], found["accuracy"]) == (1, 0.5)


def test_result_is_json_and_docstrings_are_there(metric):
    found = metric.compute(**ROWS["scores"])
    assert json.loads(json.dumps(found)).keys() == found.keys()
    for method in (metric.compute, metric.add, metric.add_batch):
        assert "Raises:" in method.__doc__
        assert "permutation: lists" in method.__doc__


def test_what_is_executed_is_announced(monkeypatch, capsys, metric):
    monkeypatch.setenv("HF_EXT_DEBUG", "1")
    monkeypatch.setattr(compat, "_ANNOUNCED", set())
    assert NAME not in capsys.readouterr().err
    metric.compute(**ROWS["answers"])
    assert f"hf_ext: using {NAME} (rows=30," in capsys.readouterr().err


# --- combine, evaluators


def accuracy(folder):
    """A stand-in for the hub's accuracy, found in the working directory as any metric."""
    (folder / "accuracy").mkdir()
    (folder / "accuracy" / "accuracy.py").write_text(SCRIPT.format(name="Accuracy"))


def test_combine_beside_another_metric(tmp_path, monkeypatch):
    accuracy(tmp_path)
    monkeypatch.chdir(tmp_path)
    both = evaluate.combine(["accuracy", evaluate.load(NAME, num_choices=4, n_resamples=0)])
    found = both.compute(predictions=[0, 1, 3], references=[0, 2, 3])
    assert (found["local"], found["accuracy"], found["n_choices_inferred"]) == (3, 2 / 3, 0)


def test_combine_by_name_with_add_and_add_batch():
    combined = evaluate.combine([NAME, NAME])
    rows = ROWS["permutations"]
    combined.add_batch(**part(rows, 0, 10), num_choices=None)
    columns = zip(*(rows[name][10:] for name in ("predictions", "references", "group", "permutation")), strict=True)
    for prediction, reference, group, permutation in columns:
        combined.add(prediction, reference, group=group, permutation=permutation, num_choices=None)
    found = combined.compute()
    wanted = bias_metrics(**rows)
    assert len(found) == 2 * len(wanted)
    assert differences(found, {f"{NAME}_{i}_{name}": x for i in (0, 1) for name, x in wanted.items()}) == {}


def test_combine_add_batch_needs_all_names():
    with pytest.raises(KeyError, match="num_choices"):
        evaluate.combine([NAME]).add_batch(predictions=[0], references=[1])


@pytest.fixture(scope="module")
def classifier():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return BertForSequenceClassification(BertConfig(vocab_size=64, num_labels=4, **size)).eval()


@pytest.mark.filterwarnings("ignore")  # scipy's, about intervals of what does not vary
@pytest.mark.parametrize("strategy", ["simple", "bootstrap"])
def test_evaluator(strategy, classifier, tokenizer):
    from datasets import Dataset

    texts = [f"w{i % 60} w{i * 7 % 60} w{i * i % 60}" for i in range(24)]
    data = Dataset.from_dict({"text": texts, "label": [i % 4 for i in range(24)]})
    metric = NAME if strategy == "simple" else evaluate.load(NAME, num_choices=4, n_resamples=0)
    labels = {f"LABEL_{i}": i for i in range(4)}
    found = evaluate.evaluator("text-classification").compute(
        classifier, data, metric=metric, tokenizer=tokenizer, label_mapping=labels, strategy=strategy, n_resamples=3
    )
    with torch.no_grad():
        rows = [classifier(tokenizer(text, return_tensors="pt").input_ids).logits.argmax().item() for text in texts]
    wanted = bias_metrics(rows, data["label"], **({} if strategy == "simple" else {"num_choices": 4, "n_resamples": 0}))
    if strategy == "bootstrap":
        assert all(len(found[name]["confidence_interval"]) == 2 for name in wanted)
        found = {name: found[name]["score"] for name in wanted}
    assert differences(found, wanted) == {}


# --- several processes


def one_of(rank, world, folder, rows, pipe):
    """Adds its share in batches; a rank whose share is empty adds nothing at all."""
    metric = evaluate.load(
        NAME, num_process=world, process_id=rank, experiment_id="x", cache_dir=folder, n_resamples=300
    )
    n = len(rows["references"])
    busy = max(1, world - 1)  # the last of several has no rows
    if rank < busy:
        first, last = n * rank // busy, n * (rank + 1) // busy
        metric.add_batch(**part(rows, first, last - 3))
        pipe.send(metric.compute(**part(rows, last - 3, last), seed=0 if rank == 0 else 5))
    else:
        pipe.send(metric.compute())


@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("world", [1, 2, 3], ids=lambda world: f"{world}_processes")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_processes_of_which_one_has_no_rows(world, case, tmp_path):
    context = get_context("fork")
    pipes = [context.Pipe() for _ in range(world)]
    jobs = [
        context.Process(target=one_of, args=(rank, world, str(tmp_path), ROWS[case], ours))
        for rank, (_, ours) in enumerate(pipes)
    ]
    for job in jobs:
        job.start()
    found = [theirs.recv() if theirs.poll(30) else "no answer" for theirs, _ in pipes]
    for job in jobs:
        job.join(5)
        job.kill()
    assert found[1:] == [None] * (world - 1)
    assert differences(found[0], expected(ROWS[case])) == {}
    assert not list(tmp_path.rglob("*.arrow"))


def gathered(rank, rows):
    """Ragged score rows of two processes, the last batch of which is uneven, as an evaluation loop gathers them."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    items = [
        (torch.tensor(scores), gold, len(scores))
        for scores, gold in zip(rows["predictions"], rows["references"], strict=True)
    ]

    def collate(batch):
        scores, gold, k = zip(*batch, strict=True)
        padded = torch.nn.utils.rnn.pad_sequence(scores, batch_first=True, padding_value=-math.inf)
        return padded, torch.tensor(gold), torch.tensor(k)

    loader = accelerator.prepare(torch.utils.data.DataLoader(items, batch_size=4, collate_fn=collate))
    metric = evaluate.load(NAME, experiment_id=f"gathered_{rank}")
    for scores, gold, k in loader:
        scores = accelerator.pad_across_processes(scores, dim=1, pad_index=-math.inf)
        scores, gold, k = accelerator.gather_for_metrics((scores, gold, k))
        metric.add_batch(predictions=scores, references=gold, num_choices=k)
    return metric.compute(n_resamples=300)


def test_gather_of_accelerate(both):
    rows = part(ROWS["scores"], 0, 29)
    for found in both(gathered, rows):
        assert differences(found, expected(rows)) == {}


# --- the metric card


def test_examples_of_the_card_are_executed(tmp_path, monkeypatch):
    text = (Path(hf_ext.metric_path(NAME)) / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestParser().get_doctest(text, {}, "card", None, 0)
    assert len(examples.examples) > 10
    failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE).run(examples)
    assert failed == 0


def test_example_of_the_docstring_is_executed(metric):
    example = doctest.DocTestParser().get_doctest(metric.inputs_description, {}, "docstring", None, 0)
    assert doctest.DocTestRunner().run(example).failed == 0


def test_card_names_every_output(metric):
    text = (Path(hf_ext.metric_path(NAME)) / "README.md").read_text()
    names = {name.replace("_A", "_X") for name in expected({"predictions": [0], "references": [0], "num_choices": 2})}
    names = {name for name in names if not name.endswith("_B")}
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []
