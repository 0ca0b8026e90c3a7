"""The side-by-side benchmarks behind `hf-ext bench`, one module a method: `rows(quick)` yields its measurements."""

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from hf_ext.bench.harness import COLUMNS, Row, cells, machine, picture, save


def measure_all(names: Sequence[str], out: Path | None, **how: bool) -> bool:
    """`measure` of each; of several, all rows together as well, in `out`/all.json and all.md."""
    measured = {name: measure(name, out, **how) for name in names}
    if out is not None and len(names) > 1:
        together = [replace(row, what=f"{name}: {row.what}") for name, (_, rows) in measured.items() for row in rows]
        save(out, "all", together, machine())
    return all(good for good, _ in measured.values())


def measure(name: str, out: Path | None, *, quick: bool = False, require_cuda: bool = False) -> tuple[bool, list[Row]]:
    """Run benchmark `name`, print its table, and save NAME.json, NAME.md and, where it has one, NAME.png in `out`.

    Returns whether every target was met (`quick` runs have none) and, with `require_cuda`, no CUDA row was skipped;
    and the rows.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    module, rows = import_module(f"hf_ext.bench.{name}"), []
    for row in module.rows(quick):
        rows.append(row)
        console.print(" | ".join(cell for cell in cells(row) if cell), style="dim")
    about = machine()
    table = Table(*COLUMNS, title=f"hf-ext bench {name}")
    for row in rows:
        table.add_row(*cells(row))
    console.print(table)
    if out is not None:
        save(out, name, rows, about)
        if hasattr(module, "draw") and find_spec("matplotlib") is not None:
            picture(out, name, rows, module.draw)
        elif hasattr(module, "draw"):
            console.print("No picture: matplotlib is missing. `pip install 'hf-ext[demo]'` brings it.")
    missed = not quick and any(row.met is False for row in rows)
    lacking = require_cuda and any(row.skipped and "CUDA" in row.skipped for row in rows)
    if lacking:
        console.print("--require-cuda: CUDA rows were skipped", style="red")
    return not missed and not lacking, rows
