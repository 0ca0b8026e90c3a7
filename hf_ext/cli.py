"""hf-ext doctor | demo | bench | mcq-report"""

import json
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer

from hf_ext.checks import listed

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BENCHMARKS = ("anchor", "bone", "importance", "mcq", "ofq", "startup")


def _print_version(wanted: bool) -> None:
    if wanted:
        from hf_ext import __version__

        print(f"hf_ext {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Published methods behind the names HuggingFace users already type."""


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
    model: Annotated[Path | None, typer.Option(help="A model folder: which of our strings it carries.")] = None,
) -> None:
    """Tell whether a script that never imports hf_ext gets its names here. Exit status 1 if something is wrong."""
    from hf_ext.doctor import examine

    try:
        report = examine(model)
    except ValueError as error:
        _refuse(str(error))
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)
    raise typer.Exit(0 if report["ok"] else 1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything the demo writes.")] = Path("demo_out"),
    quick: Annotated[bool, typer.Option("--quick", help="A few steps only: to see that everything runs.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an output folder of an earlier demo.")
    ] = False,
) -> None:
    """Train on real text, once with what the hosts offer and once with each of our names; one table, one picture."""
    from hf_ext.demo.report import DemoError, run_demo

    try:
        passed = run_demo(out, quick=quick, overwrite=overwrite)
    except DemoError as error:
        _refuse(str(error))
    raise typer.Exit(0 if passed else 1)


@app.command()
def bench(
    methods: Annotated[
        list[str] | None, typer.Argument(help=f"Any of: {', '.join(BENCHMARKS)}; or all, the default.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for NAME.json, NAME.md and NAME.png; of several, all.json and all.md too."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Small sizes: to see that it runs; the numbers mean little.")
    ] = False,
    require_cuda: Annotated[
        bool, typer.Option("--require-cuda", help="Exit 1 if a CUDA row has to be skipped.")
    ] = False,
) -> None:
    """Measure our methods beside their peers in one run. Exit status 1 if a target was missed (not with --quick)."""
    from hf_ext.bench import measure_all

    names = BENCHMARKS if not methods or methods == ["all"] else methods
    for name in names:
        if name not in BENCHMARKS:
            _refuse(f"there is no benchmark {name!r}; there are {listed(name, [*BENCHMARKS, 'all'])}")
    if out is not None:
        _require_writable(out)
    good = measure_all(names, out, quick=quick, require_cuda=require_cuda)
    raise typer.Exit(0 if good else 1)


@app.command("mcq-report")
def mcq_report(
    path: Annotated[
        Path, typer.Argument(help="lm-eval's samples_*.jsonl (--log_samples), lighteval's details, or their folder.")
    ],
    anchor: Annotated[str, typer.Option(help="The letter, or its index, that the model is suspected of.")] = "A",
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    as_json: Annotated[bool, typer.Option("--json", help="Print every output of every task as JSON.")] = False,
) -> None:
    """Positional bias of a model, from answers that another harness has logged; no model is run."""
    from hf_ext.mcq_bias.logs import measure_logs

    try:
        index = int(anchor) if anchor.isdecimal() else anchor
        results, refused = measure_logs(path, anchor=index, confidence=confidence)
    except (ValueError, OSError) as error:
        _refuse(str(error))
    if as_json:
        defined = {task: {name: _json_number(x) for name, x in found.items()} for task, found in results.items()}
        print(json.dumps({"tasks": defined, "refused": refused}, indent=1))
    else:
        _show_bias(results, refused)
    if not results:
        _refuse(f"{path} has no task whose options are positions")


def main() -> None:
    app()


def _refuse(message: str) -> None:
    typer.echo(f"hf-ext: {message}", err=True)
    raise typer.Exit(2)


def _require_writable(out: Path) -> None:
    """Better now than when everything was measured."""
    if out.exists() and not out.is_dir():
        _refuse(f"--out {out} is a file; name a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=out):
            pass
    except OSError as error:
        _refuse(f"--out {out} cannot be written to: {error.strerror}")


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hf_ext.doctor import summary

    console = Console(markup=False, highlight=False)
    console.print(summary(report))
    hosts = Table("host", "version", "names", "state", "reason")
    for name, host in report["hosts"].items():
        hosts.add_row(name, host["version"] or "-", ", ".join(host["names"]), host["state"], host["reason"] or "")
    engines = Table("attention engine", "chosen", "reason")
    for engine in report["engines"]:
        engines.add_row(engine["name"], "yes" if engine["chosen"] else "no", engine["reason"])
    versions = Table("library", "installed", "tested", "")
    for name, version in report["versions"].items():
        versions.add_row(name, version["installed"] or "-", version["tested"], "" if version["ok"] else "untested")
    for table in (hosts, engines, versions):
        console.print(table)
    if report["model"]:
        _show_model(report["model"], console)
    for problem in report["problems"]:
        console.print(f"problem: {problem}", style="red")
    if report["ok"]:
        console.print("No problems.", style="green")


def _json_number(x: float) -> float | None:
    return None if x != x else x  # JSON has no NaN


def _show_bias(results: dict[str, dict[str, float]], refused: dict[str, str]) -> None:
    """Every output of one task; of several the chief ones, a line each."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    if len(results) == 1:
        ((task, found),) = results.items()
        table = Table("output", task)
        for name, x in found.items():
            table.add_row(name, f"{x:.4g}")
        console.print(table)
    elif results:
        chief = ("n", "accuracy", "anchored_bias_rate", "cmh_z", "cmh_p_value", "tvd", "calibrated_accuracy")
        table = Table()
        for name in ("task", *chief):
            table.add_column(name, overflow="fold")
        for task, found in results.items():
            table.add_row(task, *(f"{found[name]:.3g}" for name in chief))
        console.print(table)
    for task, reason in refused.items():
        console.print(f"left out: {task}: {reason}")


def _show_model(model: dict[str, Any], console: Any) -> None:
    for string in model["strings"]:
        effect = "takes effect" if string["effective"] else f"has no effect: {string['reason']}"
        console.print(f"{model['path']}/{string['file']}: {string['key']} = {string['value']!r} {effect}")
    if not model["strings"]:
        console.print(f"{model['path']} carries none of our strings")
