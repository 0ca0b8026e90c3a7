"""Paired timing and result tables for the benchmarks."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

COLUMNS = ("measured", "ours", "peer", "peer / ours", "FLOP limit", "target", "met")
SCALES = ((1, "s"), (1e3, "ms"), (1e6, "us"))


@dataclass(frozen=True)
class Row:
    """One line of a benchmark.

    `ours` and `peer` are medians in `unit`; `ratio` is the median of the pairwise ratios peer / ours (above 1: ours is
    faster or smaller). `target` says what is to be reached, `met` whether it was; both None where a row only reports.
    `skipped` is the reason why nothing was measured. `limit` is the ratio that arithmetic allows. `tags` say for the
    picture what the text says for people.
    """

    what: str
    peer_name: str
    ours: float | None = None
    peer: float | None = None
    ratio: float | None = None
    unit: str = "s"
    target: str | None = None
    met: bool | None = None
    skipped: str | None = None
    limit: float | None = None
    tags: dict[str, Any] = field(default_factory=dict)


def paired(ours: Callable[[], object], peer: Callable[[], object], repeats: int) -> tuple[float, float, float]:
    """Medians of ours, of the peer and of peer / ours, in CPU seconds; run in turn after one warm-up each."""
    ours(), peer()
    pairs = [(cpu_seconds(ours), cpu_seconds(peer)) for _ in range(repeats)]
    return (
        statistics.median(a for a, _ in pairs),
        statistics.median(b for _, b in pairs),
        statistics.median(b / a for a, b in pairs),
    )


def compare(
    what: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    peer_name: str,
    repeats: int,
    at_least: float | None = None,
    at_most: float | None = None,
    **rest: Any,
) -> Row:
    """A row of CPU times, met when peer / ours is `at_least` that, or ours / peer `at_most`; `rest`: fields of it."""
    return _judged(what, peer_name, paired(ours, peer, repeats), at_least, at_most, **rest)


def compare_cuda(
    what: str,
    ours: Callable[[], object],
    peer: Callable[[], object],
    *,
    peer_name: str,
    repeats: int = 10,
    at_least: float | None = None,
    at_most: float | None = None,
    **rest: Any,
) -> Row:
    """A row of times on the current CUDA device, by CUDA events; run in turn after one warm-up each."""
    ours(), peer()
    pairs = [(cuda_seconds(ours), cuda_seconds(peer)) for _ in range(repeats)]
    a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
    return _judged(what, peer_name, (a, b, statistics.median(y / x for x, y in pairs)), at_least, at_most, **rest)


def cuda_seconds(function: Callable[[], object]) -> float:
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def _judged(
    what: str,
    peer_name: str,
    times: tuple[float, float, float],
    at_least: float | None,
    at_most: float | None,
    **rest: Any,
) -> Row:
    if at_most is not None:
        return Row(what, peer_name, *times, target=f"ours <= {at_most:.2f} x", met=times[2] >= 1 / at_most, **rest)
    if at_least is not None:
        return Row(what, peer_name, *times, target=f">= {at_least:.2f} x", met=times[2] >= at_least, **rest)
    return Row(what, peer_name, *times, **rest)


def machine() -> dict[str, Any]:
    """What the numbers depend on: processor, device, threads, versions."""
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("hf-ext", "torch", "transformers")},
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(title: str, rows: Iterable[Row], about: dict[str, Any]) -> str:
    lines = [
        f"## {title}",
        "",
        f"{about['processor']}, {about['cores']} cores, {about['threads']} thread(s), {about['device']}; "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f"; {about['date']}",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(cells(row))} |" for row in rows), ""])


def cells(row: Row) -> list[str]:
    if row.skipped:
        return [row.what, "skipped", row.skipped, "", "", row.target or "", ""]
    met = "" if row.met is None else "yes" if row.met else "NO"
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    peer = row.peer_name if row.peer is None else f"{_number(row.peer, row.unit)} ({row.peer_name})"
    limit = "" if row.limit is None else f"{row.limit:.2f}"
    return [row.what, _number(row.ours, row.unit), peer, ratio, limit, row.target or "", met]


def save(out: Path, name: str, rows: list[Row], about: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    result = {"machine": about, "rows": [asdict(row) for row in rows]}
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / f"{name}.md").write_text(markdown(f"hf-ext bench {name}", rows, about))


def picture(out: Path, name: str, rows: list[Row], draw: Callable[[list[Row], Any], None]) -> None:
    """NAME.png, two plots side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw(rows, axes)
    figure.savefig(out / f"{name}.png", dpi=120)
    pyplot.close(figure)


def peak_memory() -> float:
    """Highest resident size of this process so far, in MiB (Linux; getrusage would count the parent's as well)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def often(function: Callable[[], object], times: int) -> Callable[[], None]:
    """What is too short to be timed alone."""

    def repeated() -> None:
        for _ in range(times):
            function()

    return repeated


def step(module: Any, x: Any, gradient: Any) -> None:
    """Forward and backward of a module, which leave no gradients behind."""
    module(x).backward(gradient)
    module.zero_grad(set_to_none=True)
    x.grad = None


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _number(value: float, unit: str) -> str:
    if unit == "s":
        scale, name = next((scale, name) for scale, name in SCALES if value * scale >= 1 or name == "us")
        return f"{value * scale:.3g} {name}"
    return f"{value:.0f} {unit}"


def _processor() -> str:
    """A virtual machine may call several generations by one name, which family and model tell apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return f"{facts['model name']} (family {facts['cpu family']}, model {facts['model']})"
    except (OSError, KeyError):
        return platform.processor() or platform.machine()
