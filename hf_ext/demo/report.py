"""`hf-ext demo`: runs an ordinary training script with and without our names, and shows what changed.

A method's module offers `prepare(out, quick) -> [Run]`, `judge(out) -> Outcome` and `panel(axes, outcome)`. A further
method adds one such file and its line in METHODS.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from types import ModuleType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from hf_ext import doctor

# In this order: bone goes on from the text, tokenizer and model that anchor writes, importance from ofq's digits.
METHODS = ("anchor", "bone", "ofq", "mcq", "importance")

# One thread a process and two processes at a time: tiny models only lose by sharing their cores.
AT_ONCE = 2
ENVIRONMENT = {"HF_EXT_DEBUG": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {elapsed}"

MARK = ".hf_ext_demo"  # of a folder that a demo has made
# What the demo writes, and so what --overwrite may delete.
FILES = (
    *("train.py", "tokenizer", "packed", "model", "docstrings", "modules", "adapters"),
    *("train_images.py", "digits", "packed_ofq"),
    *("answer.py", "documents", "planted.json"),
    *("train_options.py", "ask.py", "questions.json", "reader"),
    *("runs", "results.json", "demo.png"),
)


class DemoError(Exception):
    """Something the user has to put right first."""


@dataclass(frozen=True)
class Run:
    """One process: `command` after the interpreter, run in the output folder, showing a progress bar of `steps` steps.

    proof: the name of ours that the process must say it executed (HF_EXT_DEBUG), or None if it must not use any.
    after: the name of the run whose results this one starts from, if any.
    """

    name: str
    command: list[str]
    steps: int
    proof: str | None = None
    after: str | None = None


@dataclass(frozen=True)
class Outcome:
    """One row of the table; `passed` says whether `check` held, `numbers` go to results.json."""

    string: str
    baseline: str
    ours: str
    check: str
    passed: bool
    numbers: dict[str, Any] = field(default_factory=dict)


def run_demo(out: Path, *, quick: bool = False, overwrite: bool = False) -> bool:
    """Run every method's demo in the folder `out`; returns whether every check held.

    Raises:
        DemoError: the folder cannot be used, the doctor found a problem, there is no text, or a process failed.
    """
    console = Console(markup=False, highlight=False)
    _make_folder(out, overwrite)
    _see_the_doctor(console)
    shutil.copy(Path(__file__).with_name("train.py"), out / "train.py")
    methods = [import_module(f"hf_ext.demo.{name}") for name in METHODS]
    console.print(f"Writing text, tokenizer, packed rows and model configuration to {out} ...")
    try:
        runs = [run for method in methods for run in method.prepare(out, quick)]
    except LookupError as error:
        raise DemoError(str(error)) from error
    _run_all(runs, out)
    outcomes = [method.judge(out) for method in methods]
    _show(outcomes, console)
    results = {outcome.string: outcome.numbers | {"passed": outcome.passed} for outcome in outcomes}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    _draw(methods, outcomes, out / "demo.png", console)
    return all(outcome.passed for outcome in outcomes)


def _see_the_doctor(console: Console) -> None:
    report = doctor.examine()
    console.print(doctor.summary(report))
    if report["channel"] == "off" and report["ok"]:
        raise DemoError("HF_EXT_AUTOLOAD=0 keeps the names from the script that this is about; unset it")
    if not report["ok"]:
        raise DemoError("first mend what `hf-ext doctor` finds:\n" + "\n".join(report["problems"]))


def _make_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out {out} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        occupied, ours = any(out.iterdir()), (out / MARK).is_file()
        if occupied and not ours:
            raise DemoError(f"--out {out} is not empty, and not of an earlier demo; name another folder")
        if occupied and not overwrite:
            raise DemoError(f"--out {out} is not empty; name another folder, or replace it with --overwrite")
        (out / MARK).write_text("`hf-ext demo --overwrite` may replace what it wrote into this folder.\n")
        for path in (out / name for name in FILES):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        raise DemoError(f"--out {out} cannot be written to: {error.strerror}") from error


# --- processes


def _run_all(runs: list[Run], out: Path) -> None:
    # Whoever waits comes last: it then occupies one of the two places only when there is nothing else to do.
    runs = sorted(runs, key=lambda run: run.after is not None)
    print(f"$ cd {shlex.quote(str(out))}")
    for run in runs:
        switches = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        print("$", *switches, shlex.join([sys.executable, *run.command]), flush=True)
    bars = [
        tqdm(desc=run.name, total=run.steps, position=i, mininterval=1, bar_format=BAR) for i, run in enumerate(runs)
    ]
    started: list[subprocess.Popen] = []
    unwanted = Event()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            ended: dict[str, Future[tuple[int, str]]] = {}
            for run, bar in zip(runs, bars, strict=True):
                first = ended[run.after] if run.after else None
                ended[run.name] = pool.submit(_run, run, out, bar, started, unwanted, first)
            logs = [future.result() for future in ended.values()]
        except BaseException:  # Ctrl-C, above all: the pool would wait for trainings that nobody wants any more
            unwanted.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()
            raise
    for bar in bars:
        bar.close()
    for run, (status, log) in zip(runs, logs, strict=True):
        if status:
            raise DemoError(f"{run.name}: exit status {status}. Its last lines:\n{log[-3000:]}")
        used = set(re.findall(r"hf_ext: using (\S+) \(", log))
        if used != {run.proof} - {None}:
            raise DemoError(
                f"{run.name} should have executed {run.proof or 'no name of ours'}, and executed {used or 'none'}"
            )


def _run(
    run: Run,
    out: Path,
    bar: tqdm,
    started: list[subprocess.Popen],
    unwanted: Event,
    first: Future[tuple[int, str]] | None,
) -> tuple[int, str]:
    """Run to the end, moving `bar` along with the script's own progress bar; returns exit status and output.

    first: the run to wait for. If it failed, so has this one, which is then not started.
    """
    if first is not None and first.result()[0]:
        return first.result()
    with subprocess.Popen(
        [sys.executable, *run.command],
        cwd=out,
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        started.append(process)
        if unwanted.is_set():  # since before it was in the list
            process.terminate()
        log = b""
        while chunk := process.stdout.read1():
            log += chunk
            for done, total in re.findall(rb"(\d+)/(\d+) \[", chunk):
                if int(total) == run.steps:
                    bar.update(int(done) - bar.n)
    return process.returncode, log.decode(errors="replace").replace("\r", "\n")


# --- table and picture


def _show(outcomes: list[Outcome], console: Console) -> None:
    table = Table(show_lines=True)
    for column in ("string typed", "baseline", "with hf_ext", "check"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        verdict = Text("ok: " if outcome.passed else "FAIL: ", style="green" if outcome.passed else "bold red")
        table.add_row(outcome.string, outcome.baseline, outcome.ours, verdict.append(outcome.check, style="default"))
    console.print(table)


def _draw(methods: list[ModuleType], outcomes: list[Outcome], path: Path, console: Console) -> None:
    if find_spec("matplotlib") is None:
        console.print("No picture: matplotlib is missing. `pip install 'hf-ext[demo]'` brings it.")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(len(methods), 3)
    lines = -(-len(methods) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(15, 5 * lines), dpi=110, squeeze=False, layout="constrained"
    )
    for method, outcome, one in zip(methods, outcomes, axes.flat, strict=False):
        method.panel(one, outcome)
        one.title.set_fontsize("medium")  # three beside each other would run into one another
    for unused in axes.flat[len(methods) :]:
        unused.set_axis_off()
    figure.savefig(path)
    pyplot.close(figure)
    console.print(f"Picture: {path}")
