"""`hf-ext demo`: the whole thing in small, and what it refuses."""

import copy
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from bone_native import ours_only
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file, save_file

from hf_ext.bone_adapter import convert_to_miss
from hf_ext.bone_adapter.layer import BoneLayer, BoneLinear
from hf_ext.demo import bone, importance, mcq, ofq, report, text
from hf_ext.ofq_quantizer import IntegerWeight, load_packed


def hf_ext(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = [str(Path(sys.executable).with_name("hf-ext")), *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return hf_ext("demo", "--quick", cwd=folder, COLUMNS="200"), folder / "demo_out"


def test_it_runs_and_every_check_holds(quick):
    done, out = quick
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((out / "results.json").read_text())
    assert all(method["passed"] for method in results.values())
    cd, *processes = (line for line in done.stdout.splitlines() if line.startswith("$ "))
    assert cd == "$ cd demo_out"
    assert len(processes) == 12  # no more: a process spends seconds on imports
    anchor = results["--attn_implementation anchor"]
    assert anchor["leak"] == 0.0 < anchor["stock_leak"]
    assert anchor["distance_from_dense"] < 1e-3


def test_the_table_has_a_row_a_method_and_the_four_columns(quick):
    done, _ = quick
    assert all(column in done.stdout for column in ("string typed", "baseline", "with hf_ext", "check"))
    assert "--attn_implementation anchor" in done.stdout
    assert '--adapter DIR ("peft_type": "BONE")' in done.stdout


def test_the_doctor_comes_first(quick):
    done, _ = quick
    assert "names reach scripts by: autoload" in done.stdout.splitlines()[0]


def test_without_autoload_it_says_so_before_any_training(tmp_path):
    done = hf_ext("demo", "--quick", cwd=tmp_path, HF_EXT_AUTOLOAD="0")
    assert done.returncode == 2
    assert "HF_EXT_AUTOLOAD=0" in done.stderr


def test_progress_bars_are_shown(quick):
    done, _ = quick
    assert "10/10 steps" in done.stderr


def test_artefacts_are_ordinary_checkpoints(quick):
    _, out = quick
    for name in ("sdpa", "anchor"):
        assert (out / "runs" / name / "model.safetensors").exists()
        assert "attn_implementation" not in json.loads((out / "runs" / name / "config.json").read_text())
    for name in ("lora", "bone"):
        assert (out / "runs" / name / "adapter_model.safetensors").exists()
        assert json.loads((out / "runs" / name / "adapter_config.json").read_text())["peft_type"] == name.upper()


def test_the_picture_is_wide_enough_for_a_readme(quick):
    pytest.importorskip("matplotlib")
    _, out = quick
    header = (out / "demo.png").read_bytes()[:24]
    assert header[1:4] == b"PNG"
    assert int.from_bytes(header[16:20], "big") >= 1500


@pytest.mark.parametrize(
    ("name", "flag", "proof"),
    [
        ("anchor", "--attn_implementation anchor", "hf_ext: using anchor (engine=sdpa"),
        pytest.param(
            *("bone", "--adapter adapters/bone", "hf_ext: using BONE (forms=tile"),
            marks=ours_only("which does not announce itself"),
        ),
        ("learned", "group_update=sum", "hf_ext: using importance_weights (k=10, method=multilinear"),
    ],
    ids=["anchor", "bone", "importance"],
)
def test_the_printed_commands_can_be_typed_again(quick, tmp_path, name, flag, proof):
    done, out = quick
    commands = [line[2:] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert commands[0].startswith("cd ")
    command = next(command for command in commands if flag in command)
    again = command.replace(f"runs/{name}", str(tmp_path / "again"))
    typed = subprocess.run(f"{commands[0]} && {again}", shell=True, cwd=out.parent, capture_output=True, text=True)
    assert typed.returncode == 0, typed.stderr
    assert proof in typed.stderr
    folders = (out / "runs" / name, tmp_path / "again")
    first, second = (json.loads((folder / "results.json").read_text()) for folder in folders)
    measured = "losses" if "losses" in first else "accuracy"
    assert first[measured] == second[measured]  # deterministic by seed


def test_the_script_needs_autoload(quick, tmp_path):
    _, out = quick
    command = [sys.executable, "train.py", "--dataset", "packed", "--config_name", "model"]
    command += ["--attn_implementation", "anchor", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=out, env=os.environ | {"HF_EXT_AUTOLOAD": "0"}, capture_output=True, text=True)
    assert done.returncode != 0
    assert "torchvision::nms" in done.stderr or 'attn_implementation="anchor"' in done.stderr


def test_a_used_folder_is_refused_unless_overwritten(tmp_path):
    out = tmp_path / "demo_out"
    (out / "runs").mkdir(parents=True)
    (out / "train.py").write_text("")
    (out / "mine.txt").write_text("kept")
    done = hf_ext("demo", "--quick", cwd=tmp_path)
    assert done.returncode == 2
    assert "demo_out is not empty, and not of an earlier demo" in done.stderr
    with pytest.raises(report.DemoError, match="not of an earlier demo"):
        report._make_folder(out, overwrite=True)
    assert (out / "train.py").exists()
    (out / report.MARK).touch()
    with pytest.raises(report.DemoError, match="--overwrite"):
        report._make_folder(out, overwrite=False)
    report._make_folder(out, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"mine.txt", report.MARK}


def test_a_file_as_output_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(report.DemoError, match="is a file"):
        report.run_demo(tmp_path / "file")


def test_an_unwritable_output_folder_is_refused(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(report.DemoError, match="cannot be written to: Permission denied"):
        report.run_demo(tmp_path / "out")


def test_a_failed_process_shows_its_last_lines(tmp_path):
    run = report.Run("broken", ["-c", "raise SystemExit('the cause')"], steps=1)
    with pytest.raises(report.DemoError, match=r"broken: exit status 1[\s\S]*the cause"):
        report._run_all([run], tmp_path)


def test_a_process_that_did_not_execute_the_name_is_an_error(tmp_path):
    run = report.Run("silent", ["-c", "pass"], steps=1, proof="anchor")
    with pytest.raises(report.DemoError, match="should have executed anchor, and executed none"):
        report._run_all([run], tmp_path)


def test_a_run_waits_for_the_one_it_starts_from(tmp_path):
    """Even if it is named first, and there is a free place."""
    then = report.Run("then", ["-c", "open('weights').close()"], steps=1, after="first")
    slowly = "import time; time.sleep(1); open('weights', 'w').close()"
    report._run_all([then, report.Run("first", ["-c", slowly], steps=1)], tmp_path)


def test_a_run_is_not_started_if_the_one_it_starts_from_failed(tmp_path):
    first = report.Run("first", ["-c", "raise SystemExit('the cause')"], steps=1)
    then = report.Run("then", ["-c", "open('started', 'w')"], steps=1, after="first")
    with pytest.raises(report.DemoError, match=r"first: exit status 1[\s\S]*the cause"):
        report._run_all([first, then], tmp_path)
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("model", [[], ["--config_name", "a", "--model_name_or_path", "b"]], ids=["neither", "both"])
def test_the_script_starts_from_a_config_or_from_weights(model, monkeypatch, capsys):
    script = runpy.run_path(str(Path(report.__file__).with_name("train.py")))
    monkeypatch.setattr(sys, "argv", ["train.py", "--dataset", "x", "--output_dir", "y", *model])
    with pytest.raises(SystemExit):
        script["parse_arguments"]()
    assert "--model_name_or_path" in capsys.readouterr().err


def test_bone_and_lora_learn_from_the_same_start_with_as_many_parameters(quick):
    _, out = quick
    row = json.loads((out / "results.json").read_text())['--adapter DIR ("peft_type": "BONE")']
    lora, ours = row["results"]["lora"], row["results"]["bone"]
    assert lora["trained_parameters"] == ours["trained_parameters"]
    assert max(lora["eval_loss"], ours["eval_loss"]) < row["loss_before"]
    assert lora["losses"] != ours["losses"]


def says_miss(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert_to_miss(runs / "bone", runs / "miss")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(runs / "miss" / file, runs / "bone" / file)


def saved_something_else(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = runs / "bone" / "adapter_model.safetensors"
    save_file({name: 1.1 * block for name, block in load_file(file).items()}, file)


def merges_badly(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = BoneLinear.merged_weight
    monkeypatch.setattr(BoneLinear, "merged_weight", lambda *arguments: 1.001 * right(*arguments))


def unmerges_by_arithmetic(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BoneLayer, "keep_base_on_merge", False)


def has_more_parameters(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = json.loads((runs / "bone" / "results.json").read_text())
    (runs / "bone" / "results.json").write_text(json.dumps(results | {"trained_parameters": 11_777}))


FAULTS = {
    says_miss: "the saved file says MISS",
    saved_something_else: r"off by [1-9]e-0[1-4];",
    merges_badly: r"merging moves logits by [1-9]e-0[1-3]",
    unmerges_by_arithmetic: "unmerging changes the base's bytes",
    has_more_parameters: "",
}


def _bone_faults() -> Iterator[Any]:
    for fault, said in FAULTS.items():
        ours = ours_only("which merges and unmerges in its own way")
        inside = fault in (merges_badly, unmerges_by_arithmetic)
        yield pytest.param(fault, said, id=fault.__name__, marks=ours if inside else ())


@pytest.mark.parametrize(("fault", "said"), list(_bone_faults()))
@pytest.mark.filterwarnings("ignore:Unmerging without the kept base weight")
def test_the_check_of_bone_fails_if_it(quick, tmp_path, monkeypatch, fault, said):
    _, out = quick
    for folder in ("runs", "modules"):
        shutil.copytree(out / folder, tmp_path / folder)
    assert bone.judge(tmp_path).passed
    fault(tmp_path / "runs", monkeypatch)
    outcome = bone.judge(tmp_path)
    assert not outcome.passed
    assert re.search(said, outcome.check)


def has_three_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of three bits under the name of two."""
    codes = torch.arange(-4, 4, dtype=torch.int8).repeat(4, 8)
    weight = IntegerWeight(codes, torch.ones(4), 2, "statsq")
    monkeypatch.setattr(ofq, "freeze", lambda model: {"layer": weight})


def reads_back_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ofq, "load_packed", lambda folder: _shifted(load_packed(folder)))


def rounds_otherwise_in_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ofq, "to_int8", lambda model: _shifted(copy.deepcopy(model)))


def _shifted(model: torch.nn.Module) -> torch.nn.Module:
    model.head.bias.data += 0.01
    return model


OFQ_FAULTS = {
    has_three_bits: "at most 8 levels",
    reads_back_wrongly: "read back, the logits are off by 1e-02",
    rounds_otherwise_in_integers: "in int8 arithmetic by 1e-02",
}


@pytest.mark.parametrize(("fault", "said"), OFQ_FAULTS.items(), ids=[fault.__name__ for fault in OFQ_FAULTS])
def test_the_check_of_ofq_fails_if_it(quick, tmp_path, monkeypatch, fault, said):
    _, out = quick
    for folder in ("runs", "digits"):
        shutil.copytree(out / folder, tmp_path / folder)
    fault(monkeypatch)
    outcome = ofq.judge(tmp_path)
    assert not outcome.passed
    assert re.search(said, outcome.check)


def is_not_exposed(out: Path) -> None:
    _change(out, "judged", cmh_z=1.0)


def is_not_repaired(out: Path) -> None:
    shutil.copy(out / "runs" / "judged" / "results.json", out / "runs" / "repaired" / "results.json")


def answers_worse(out: Path) -> None:
    _change(out, "repaired", accuracy=0.1)


def depends_on_the_order(out: Path) -> None:
    _change(out, "repaired", permutation_consistency=0.0)


def saved_another_adapter(out: Path) -> None:
    file = out / "runs" / "repaired" / "adapter_model.safetensors"
    save_file({name: 0 * tensor for name, tensor in load_file(file).items()}, file)


def _change(out: Path, run: str, **numbers: float) -> None:
    file = out / "runs" / run / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | numbers))


MCQ_FAULTS = {
    is_not_exposed: "gives the same answers",
    is_not_repaired: "gives other answers",
    answers_worse: "gives other answers",
    depends_on_the_order: "before, 0% after; .* gives the same answers",
    saved_another_adapter: "gives other answers",
}


@pytest.mark.parametrize(("fault", "said"), MCQ_FAULTS.items(), ids=[fault.__name__ for fault in MCQ_FAULTS])
def test_the_check_of_multiple_choice_fails_if_it(quick, tmp_path, fault, said):
    _, out = quick
    for folder in ("runs", "reader"):
        shutil.copytree(out / folder, tmp_path / folder)
    shutil.copy(out / "questions.json", tmp_path)
    fault(tmp_path)
    outcome = mcq.judge(tmp_path)
    assert not outcome.passed
    assert re.search(said, outcome.check)


def test_questions_are_asked_in_every_rotation_and_none_was_fitted(quick):
    _, out = quick
    questions = json.loads((out / "questions.json").read_text())
    assert not [item for item in questions["unlabelled"] if "label" in item]
    assert not {item["prompt"] for item in questions["unlabelled"]} & {item["prompt"] for item in questions["test"]}
    groups = {}
    for item in questions["test"]:
        asked, *choices = re.split(r" Answer Choices: A: | [B-D]: | Answer:$", item["prompt"])[:-1]
        assert asked == f"Question: {choices[item['label']]}?"
        groups.setdefault(item["group"], []).append((item["label"], tuple(choices)))
    for orders in groups.values():
        assert [label for label, _ in orders] == list(range(len(orders)))
        turned = {choices[label:] + choices[:label] for label, choices in orders}
        assert len(turned) == 1


def weighs_otherwise(out: Path) -> None:
    """What was saved is not what pruned the documents."""
    for file in ("config.json", "importance.safetensors", "keys.arrow", "history.json"):
        shutil.copy(out / "runs" / "mean" / file, out / "runs" / "learned" / file)


def prunes_too_much(out: Path) -> None:
    _keep(out, lambda number: number == 0)


def prunes_too_little(out: Path) -> None:
    planted = json.loads((out / "planted.json").read_text())
    _keep(out, lambda number: f"source {number:02}" not in planted[2:])


def _keep(out: Path, kept: Callable[[int], bool]) -> None:
    rows = load_from_disk(str(out / "documents"))["corpus"]
    shutil.rmtree(out / "runs" / "learned" / "corpus")
    rows.filter(lambda row: kept(int(row["source"].split()[1]))).save_to_disk(out / "runs" / "learned" / "corpus")


def answers_no_better(out: Path) -> None:
    results = out / "runs" / "learned" / "results.json"
    found = json.loads(results.read_text())
    results.write_text(json.dumps(found | {"accuracy": found["accuracy_of_all"]}))


IMPORTANCE_FAULTS = {
    weighs_otherwise: "precision 100% and recall 100%.* read back, the weights keep other documents",
    prunes_too_much: "precision 41% and recall 100%",
    prunes_too_little: "precision 100% and recall 88%",
    answers_no_better: "precision 100% and recall 100%.* keep the same documents",
}


@pytest.mark.parametrize(
    ("fault", "said"), IMPORTANCE_FAULTS.items(), ids=[fault.__name__ for fault in IMPORTANCE_FAULTS]
)
def test_the_check_of_importance_fails_if_it(quick, tmp_path, fault, said):
    _, out = quick
    for folder in ("runs", "documents"):
        shutil.copytree(out / folder, tmp_path / folder)
    shutil.copy(out / "planted.json", tmp_path)
    assert importance.judge(tmp_path).passed
    fault(tmp_path)
    outcome = importance.judge(tmp_path)
    assert not outcome.passed
    assert re.search(said, outcome.check)


def test_the_accuracies_are_those_of_votes_by_hand(quick):
    """Retrieval, vote and pruning once more, from the folders alone."""
    _, out = quick
    data = load_from_disk(str(out / "documents")).with_format("numpy")
    questions, wanted = data["test"]["embedding"][:], data["test"]["answer"][:]

    def share_right(corpus):
        rows, right = corpus.with_format("numpy")[:], 0
        for question, answer in zip(questions.astype(float), wanted, strict=True):
            scores = rows["embedding"].astype(float) @ question
            nearest = sorted(range(len(scores)), key=lambda row: (-scores[row], row))[:10]
            right += Counter(rows["answer"][nearest].tolist()).most_common(1)[0][0] == answer
        return pytest.approx(right / len(wanted))

    of_all = share_right(data["corpus"])
    for name in importance.RUNS:
        kept = load_from_disk(str(out / "runs" / name / "corpus"))
        results = json.loads((out / "runs" / name / "results.json").read_text())
        assert results == {"accuracy_of_all": of_all, "accuracy": share_right(kept), "documents": len(kept)}


def test_planted_sources_and_no_others_lie(quick):
    """Each document with its picture's true label, found again among the digits."""
    _, out = quick
    labels = [label for split in ("train", "test") for label in load_from_disk(str(out / "digits"))[split]["labels"]]
    corpus = load_from_disk(str(out / "documents"))["corpus"]
    planted = json.loads((out / "planted.json").read_text())
    wrong = {source: [] for source in corpus["source"]}
    for source, answer, label in zip(corpus["source"], corpus["answer"], labels, strict=False):
        assert answer in (label, (label + 1) % 10)
        wrong[source].append(answer != label)
    assert sorted(source for source, lies in wrong.items() if any(lies)) == planted
    assert len(planted) == 16
    assert len(wrong) == 40
    assert 0.75 < sum(sum(wrong[source]) for source in planted) / sum(len(wrong[source]) for source in planted) < 0.85


def test_every_panel_has_its_baseline_in_grey(quick):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    _, out = quick
    for name, (string, numbers) in zip(
        report.METHODS, json.loads((out / "results.json").read_text()).items(), strict=True
    ):
        figure, axes = pyplot.subplots()
        import_module(f"hf_ext.demo.{name}").panel(axes, report.Outcome(string, "", "", "", True, numbers))
        assert [line.get_color() for line in axes.lines[:2]] == ["0.6", "tab:blue"]
        assert {line.get_color() for line in axes.lines} == {"0.6", "tab:blue"}
        pyplot.close(figure)


def test_modules_are_not_those_that_gave_docstrings(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "_places", lambda: [("here", tmp_path)])
    for i in range(10):
        (tmp_path / f"m{i}.py").write_text(f'"""A docstring of the module number {i}."""\n')
    (tmp_path / "old.py").write_bytes(b"# \xe9\n")
    taken = text.documents(5, seed=0)
    found = text.modules(5 * 40, seed=0)
    assert len(found) == 5
    assert not [module for module in found if any(docstring in module for docstring in taken)]
    with pytest.raises(text.NoTextError, match=r"characters of Python, and 1000 are needed"):
        text.modules(1000, seed=0)


def test_without_library_sources_the_installed_packages_serve(tmp_path, monkeypatch):
    packages = text._places()[1]
    monkeypatch.setattr(text, "_places", lambda: [("the standard library", tmp_path), packages])
    said: list[str] = []
    assert len(text.documents(50, seed=0, log=said.append)) == 50
    assert str(tmp_path) in said[0]
    assert "standard library" in said[0]


def test_without_any_sources_the_demo_says_what_it_looked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(text, "_places", lambda: [("the standard library", tmp_path / "nowhere")])
    monkeypatch.setattr(report, "_see_the_doctor", lambda console: None)
    with pytest.raises(report.DemoError, match="found only 0 docstrings"):
        report.run_demo(tmp_path / "out", quick=True)
    assert str(tmp_path / "nowhere") in capsys.readouterr().out


def test_tokenizer_gives_the_text_back():
    texts = text.documents(100, seed=0)
    tokenizer = text.train_tokenizer(texts, vocab_size=400)
    assert tokenizer.decode(tokenizer(texts[0])["input_ids"]) == texts[0]
    assert tokenizer.bos_token_id == 0


def test_without_matplotlib_there_is_a_table_and_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    report._draw([], [], tmp_path / "demo.png", report.Console(markup=False))
    assert "hf-ext[demo]" in capsys.readouterr().out
    assert not (tmp_path / "demo.png").exists()


def test_an_interrupt_ends_the_trainings(tmp_path):
    """Ctrl-C sent to the demo alone, as an IDE does, must not wait for what nobody wants any more."""
    code = f"""
        import os, pathlib, signal, threading
        from hf_ext.demo import report
        signal.signal(signal.SIGINT, signal.default_int_handler)  # where a shell in the background has it ignored
        threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
        run = report.Run("endless", ["-c", "import time; time.sleep(900)"], steps=1)
        report._run_all([run], pathlib.Path({str(tmp_path)!r}))
        """
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600)
    assert "KeyboardInterrupt" in done.stderr
    assert time.monotonic() - started < 500


def test_readme_packs_what_the_script_trains_on(quick, tmp_path, monkeypatch):
    """README's own Python block, then its own command, on a model folder and tokenizer of the demo."""
    _, out = quick
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1].replace("4096", "64")
    command = re.search(r"^python hf_ext/demo/(train.py .*)$", readme, re.MULTILINE)[1]
    tokenizer = text.train_tokenizer(texts := text.documents(60, seed=0), vocab_size=1024)
    documents = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})
    monkeypatch.chdir(tmp_path)
    exec(block, {"documents": documents, "tokenizer": tokenizer})
    script = shlex.split(command.replace("MODEL_FOLDER", shlex.quote(str(out / "model"))))
    script[0] = str(Path(report.__file__).with_name("train.py"))
    done = subprocess.run([sys.executable, *script, "--max_steps", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
