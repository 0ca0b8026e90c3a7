"""`hf-ext demo`: the whole thing in small, and what it refuses."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from datasets import Dataset

from hf_ext.demo import report, text


def hf_ext(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from hf_ext.cli import main; main()", *arguments]
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
    anchor = results["--attn_implementation anchor"]
    assert anchor["leak"] == 0.0 < anchor["stock_leak"]
    assert anchor["distance_from_dense"] < 1e-3


def test_the_table_has_a_row_a_method_and_the_four_columns(quick):
    done, _ = quick
    assert all(column in done.stdout for column in ("string typed", "baseline", "with hf_ext", "check"))
    assert "--attn_implementation anchor" in done.stdout


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


def test_the_picture_is_wide_enough_for_a_readme(quick):
    pytest.importorskip("matplotlib")
    _, out = quick
    header = (out / "demo.png").read_bytes()[:24]
    assert header[1:4] == b"PNG"
    assert int.from_bytes(header[16:20], "big") >= 1500


def test_the_printed_commands_can_be_typed_again(quick, tmp_path):
    done, out = quick
    commands = [line[2:] for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert commands[0].startswith("cd ")
    anchor = next(command for command in commands if "--attn_implementation anchor" in command)
    again = anchor.replace("runs/anchor", str(tmp_path / "again"))
    typed = subprocess.run(f"{commands[0]} && {again}", shell=True, cwd=out.parent, capture_output=True, text=True)
    assert typed.returncode == 0, typed.stderr
    assert "hf_ext: using anchor (engine=sdpa" in typed.stderr
    folders = (out / "runs" / "anchor", tmp_path / "again")
    first, second = (json.loads((folder / "results.json").read_text())["losses"] for folder in folders)
    assert first == second  # deterministic by seed


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
    assert "demo_out is not empty" in done.stderr
    assert "--overwrite" in done.stderr
    report._make_folder(out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


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
        threading.Timer(1, os.kill, [os.getpid(), signal.SIGINT]).start()
        run = report.Run("endless", ["-c", "import time; time.sleep(60)"], steps=1)
        report._run_all([run], pathlib.Path({str(tmp_path)!r}))
        """
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=50)
    assert "KeyboardInterrupt" in done.stderr
    assert time.monotonic() - started < 40


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
