"""Importance weights beside the published package of the authors, over the shapes that decide the cost of a fit.

An epoch is the difference between a fit of 1 + E epochs and one of 1, so that reading and packing cancel; CPU time of
one thread, the best of several, rivals in turn. Where the difference drowns in noise nothing is reported.
"""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars

from hf_ext.bench.harness import Row, cpu_seconds, peak_memory
from hf_ext.importance_weights import ImportanceWeights

WHEEL = "ragbooster 0.1.1"
SHAPES = {(50, 10): 2000, (100, 20): 2000, (500, 50): 320}  # (M, K): tuples
TARGETS = {"float64": 12.0, "float32": 25.0}  # at M=100, K=20
ITEMS = 1000
NOISE = "the difference is below the noise of this machine"
Run = Callable[[int], object]


def rows(quick: bool = False) -> Iterator[Row]:
    """`quick`: fewer tuples and repeats, to see that it runs; its numbers mean little."""
    torch.set_num_threads(1)
    disable_progress_bars()
    shrink, repeats = (20, 1) if quick else (1, 7)
    yield from _against_the_wheel(shrink, repeats)
    yield from _by_shape(shrink, repeats)
    yield _truncated(shrink, repeats)
    yield from _by_corpus(shrink, repeats)
    yield from _annotated(shrink, repeats)
    yield from _large(shrink)
    yield from _accuracy(3 if quick else 16)
    yield from _on_cuda(shrink)


# --- data


def lists(tuples: int, length: int, items: int = ITEMS, levels: int = 2, seed: int = 0) -> pa.Table:
    """Lists of random items, with utilities of so many levels in [0, 1]."""
    generator = np.random.default_rng(seed)
    retrieved = generator.integers(0, items, tuples * length, dtype=np.int32)
    retrieved[: min(items, len(retrieved))] = np.arange(min(items, len(retrieved)))
    utility = generator.integers(0, levels, tuples * length) / (levels - 1)
    offsets = pa.array(np.arange(tuples + 1, dtype=np.int64) * length)
    columns = {"retrieved": retrieved, "utility": utility}
    return pa.table({name: pa.LargeListArray.from_arrays(offsets, pa.array(x)) for name, x in columns.items()})


def wheel() -> Any | None:
    """The compiled module of the authors' package, without what the package itself imports. None: not installed."""
    found = find_spec("ragbooster")
    if found is None:
        return None
    folder = Path(found.origin).parent
    path = next(path for suffix in EXTENSION_SUFFIXES if (path := folder / f"ragbooster{suffix}").exists())
    spec = spec_from_file_location("ragbooster", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- timing


def ours(table: pa.Table, k: int, **options: Any) -> Run:
    def run(epochs: int) -> object:
        weights = ImportanceWeights(k=k, epochs=epochs, **options)
        return weights.fit(table, progress=False, num_threads=1)

    return run


def theirs(module: Any, table: pa.Table, k: int) -> Run:
    columns = [table[name].to_pylist() for name in ("retrieved", "utility")]
    rows = [{"retrieved": ids, "utility_contributions": u} for ids, u in zip(*columns, strict=True)]

    def run(epochs: int) -> object:
        return module.learn_importance(rows, k=k, learning_rate=0.1, num_epochs=epochs, n_jobs=1)

    return run


def epochs_of(rivals: dict[str, tuple[Run, int]], repeats: int) -> dict[str, float | None]:
    """CPU seconds of an epoch, given how many to time; None where they drown in the noise of everything else."""
    short: dict[str, list[float]] = {name: [] for name in rivals}
    long: dict[str, list[float]] = {name: [] for name in rivals}
    for run, _ in rivals.values():
        run(1)
    for _ in range(repeats):
        for name, (run, epochs) in rivals.items():
            short[name].append(cpu_seconds(partial(run, 1)))
            long[name].append(cpu_seconds(partial(run, 1 + epochs)))
    result: dict[str, float | None] = {}
    for name, (_, epochs) in rivals.items():
        difference = min(long[name]) - min(short[name])
        noise = statistics.median(short[name]) - min(short[name])
        result[name] = difference / epochs if difference > 2 * noise else None
    return result


def _row(what: str, name: str, mine: float | None, peer: float | None, **rest: Any) -> Row:
    at_least, at_most = rest.pop("at_least", None), rest.pop("at_most", None)
    if mine is None or peer is None:
        return Row(what, name, skipped=NOISE, **rest)
    ratio, target, met = peer / mine, None, None
    if at_least is not None:
        target, met = f">= {at_least:g} x", ratio >= at_least
    elif at_most is not None:
        target, met = f"ours <= {at_most:g} x", mine <= at_most * peer
    return Row(what, name, mine, peer, ratio, target=target, met=met, **rest)


# --- an epoch


def _against_the_wheel(shrink: int, repeats: int) -> Iterator[Row]:
    module = wheel()
    if module is None:
        yield Row("the authors' package", WHEEL, skipped="not installed: `pip install --no-deps ragbooster==0.1.1`")
    for (length, k), tuples in SHAPES.items():
        tuples = max(tuples // shrink, 32)
        table = lists(tuples, length)
        rivals = {dtype: (ours(table, k, dtype=dtype), 40) for dtype in TARGETS}
        if module is not None:
            rivals[WHEEL] = (theirs(module, table, k), 2)
        seconds = epochs_of(rivals, repeats)
        for dtype, target in TARGETS.items():
            what = f"M={length}, K={k}, {dtype}: an epoch, a tuple"
            tags = {"kind": "epoch", "shape": (length, k), "dtype": dtype}
            if module is None:
                mine = seconds[dtype]
                yield Row(what, "", None if mine is None else mine / tuples, tags=tags, skipped=None if mine else NOISE)
                continue
            mine, peer = (None if seconds[name] is None else seconds[name] / tuples for name in (dtype, WHEEL))
            yield _row(what, WHEEL, mine, peer, at_least=target if (length, k) == (100, 20) else None, tags=tags)


def _by_shape(shrink: int, repeats: int) -> Iterator[Row]:
    """Linear in K, and no matter how many different utilities there are."""
    tuples = 2000 // shrink
    table = lists(tuples, 100)
    by_k = {k: (ours(table, k), 40) for k in (10, 20, 40)}
    seconds = epochs_of({str(k): rival for k, rival in by_k.items()}, repeats)
    for k in (20, 40):
        yield _row(f"M=100, K={k}: an epoch", "K=10", seconds[str(k)], seconds["10"], at_most=1.2 * k / 10)
    many = ours(lists(tuples, 100, levels=1001), 20)
    seconds = epochs_of({"many": (many, 40), "two": (ours(table, 20), 40)}, repeats)
    what = "M=100, K=20, 1,001 different utilities: an epoch"
    yield _row(what, "2 different utilities", seconds["many"], seconds["two"], at_most=1.3)


def _truncated(shrink: int, repeats: int) -> Row:
    table = lists(1000 // shrink, 600)
    still = {"learning_rate": 1e-12}  # all weights stay at 1/2
    rivals = {
        "cut": (ours(table, 10, epsilon=1e-3, **still), 40),
        "whole": (ours(table, 10, **still), 40),
    }
    seconds = epochs_of(rivals, repeats)
    return _row("M=600, K=10, epsilon=1e-3: an epoch", "exact", seconds["cut"], seconds["whole"], at_most=0.4)


def _by_corpus(shrink: int, repeats: int) -> Iterator[Row]:
    tuples = 20_000 // shrink
    rivals = {items: (ours(lists(tuples, 100, items), 20), 4) for items in (1_000, 100_000, 2_000_000)}
    seconds = epochs_of({str(items): rival for items, rival in rivals.items()}, min(repeats, 3))
    for items in list(rivals)[1:]:
        what = f"M=100, K=20, {tuples:,} tuples over {items:,} items: an epoch"
        yield _row(what, "1,000 items", seconds[str(items)], seconds["1000"])


# --- what surrounds it


def _annotated(shrink: int, repeats: int) -> Iterator[Row]:
    count = 200_000 // shrink
    weights = ImportanceWeights(k=5, epochs=1).fit(lists(2000, 50, 50_000), progress=False)
    corpus = Dataset.from_dict({"id": list(range(count)), "text": ["x" * 500] * count})

    def mapped() -> object:
        return corpus.map(weights, batched=True, load_from_cache_file=False)

    times = [[cpu_seconds(work) for work in (lambda: weights.annotate(corpus), mapped)] for _ in range(min(repeats, 3))]
    mine, peer = (min(column) for column in zip(*times, strict=True))
    yield _row(f"annotate() of {count:,} rows", "map", mine, peer, at_most=0.5)


_LARGE = """
import sys
from hf_ext.bench import importance
print(*importance.large(*map(int, sys.argv[1:])))
"""


def large(tuples: int, items: int, threads: int) -> tuple[float, float, float]:
    """(wall seconds of an epoch, CPU seconds of a fit of one epoch, MiB beyond the data) of lists of 100, K=20."""
    table = lists(tuples, 100, items)
    ImportanceWeights(k=20, epochs=1).fit(table.slice(0, 64), progress=False)  # what is compiled once is no epoch's
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on, not that of making the data
    before = peak_memory()
    times = []
    for epochs in (1, 1, 4):  # the first finds the memory
        weights = ImportanceWeights(k=20, epochs=epochs, dtype="float32")
        wall, cpu = time.perf_counter(), time.process_time()
        weights.fit(table, progress=False, num_threads=threads)
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return (times[2][0] - times[1][0]) / 3, times[0][1], peak_memory() - before


def _large(shrink: int) -> Iterator[Row]:
    """The shape of the authors' benchmark, and a tenth of it over as many different items as slots."""
    if not Path("/proc/self/status").exists():
        yield Row("1,000,000 tuples of 100", "", skipped="needs Linux's /proc")
        return
    for tuples, items, threads in ((1_000_000, 1_000, 2), (100_000, 1_000, 1), (100_000, 10_000_000, 1)):
        command = [sys.executable, "-c", _LARGE, str(tuples // shrink), str(items), str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        epoch, cpu, memory = map(float, done.stdout.split())
        what = f"{tuples // shrink:,} tuples of 100, {items:,} items, K=20, float32, {threads} thread(s)"
        if threads == 2:
            yield Row(f"{what}: an epoch, wall", "", epoch, target="<= 1.5 s", met=epoch <= 1.5)
            yield Row(f"{what}: memory beyond the data", "", memory, unit="MiB", target="<= 3000", met=memory <= 3000)
        else:
            few = items == 1_000
            yield Row(
                f"{what}: reading, packing, two passes, CPU",
                "",
                cpu,
                target="<= 3 s" if few else None,
                met=cpu <= 3 if few else None,
            )
            yield Row(
                f"{what}: memory beyond the data",
                "",
                memory,
                unit="MiB",
                target="<= 450" if few else None,
                met=memory <= 450 if few else None,
            )


# --- what it buys


def planted(seed: int, questions: int = 600, sources: int = 40, per_list: int = 30) -> dict[str, list[Any]]:
    """Lists of documents of sources, a quarter of which is mostly wrong; wrong answers are spread over nine."""
    generator = np.random.default_rng(seed)
    quality = np.where(np.arange(sources) < sources // 4, 0.15, 0.55)
    source = generator.integers(0, sources, (questions, per_list))
    right = generator.random(source.shape) < quality[source]
    answers = np.where(right, 0, generator.integers(1, 10, source.shape))
    return {
        "retrieved": [[f"{s}-{q}-{i}" for i, s in enumerate(row)] for q, row in enumerate(source.tolist())],
        "source": [[f"source {s}" for s in row] for row in source.tolist()],
        "utility": right.astype(float).tolist(),
        "answers": answers.tolist(),
    }


def _accuracy(seeds: int) -> Iterator[Row]:
    """Votes over 10 on a third split, pruned by learned weights and by the smoothed mean."""
    scores: dict[str, list[float]] = {"vanilla": [], "multilinear": [], "mean": []}
    for seed in range(seeds):
        whole = planted(seed)
        splits = [{name: rows[i : i + 200] for name, rows in whole.items()} for i in (0, 200, 400)]
        for method in ("multilinear", "mean"):
            weights = ImportanceWeights(k=10, group_column="source", method=method).fit(splits[0], progress=False)
            weights.tune_threshold(splits[1])
            found = weights.evaluate(splits[2])
            scores[method].append(found["prune"])
        scores["vanilla"].append(found["vanilla"])
    means = {name: 1000 * statistics.fmean(values) for name, values in scores.items()}
    errors = {name: 1000 * statistics.stdev(values) / seeds**0.5 for name, values in scores.items()}
    what = f"{seeds} corpora with bad sources, three splits: right of 1,000 after pruning"
    for peer in ("mean", "vanilla"):
        name = {"mean": "method='mean'", "vanilla": "nothing pruned"}[peer]
        yield Row(
            f"{what} (s.e. {errors['multilinear']:.1f})",
            f"{name}, s.e. {errors[peer]:.1f}",
            ours=means["multilinear"],
            peer=means[peer],
            unit="right",
        )


# --- CUDA


def _on_cuda(shrink: int) -> Iterator[Row]:
    what = "1,000,000 tuples of 100, 1,000 items, K=20, float32: an epoch"
    if not torch.cuda.is_available():
        yield Row(what, "CPU", skipped="needs a CUDA device")
        return
    from accelerate import Accelerator

    accelerator, table = Accelerator(), lists(1_000_000 // shrink, 100)
    times = {}
    for name, device in (("cuda", accelerator), ("cpu", None)):
        for epochs in (1, 3):
            weights = ImportanceWeights(k=20, epochs=epochs, dtype="float32")
            start = time.perf_counter()
            weights.fit(table, device, progress=False)
            times[name, epochs] = time.perf_counter() - start
    mine, peer = ((times[name, 3] - times[name, 1]) / 2 for name in ("cuda", "cpu"))
    yield _row(what, "CPU", mine, peer)


# --- the picture


def draw(rows: list[Row], axes: list[Any]) -> None:
    """Left: an epoch beside the wheel, by shape. Right: right answers by what is pruned."""
    left, right = axes
    shapes = list(SHAPES)
    names = [f"M={length}\nK={k}" for length, k in shapes]
    timed = {(row.tags["shape"], row.tags["dtype"]): row for row in rows if row.tags.get("kind") == "epoch"}
    series = {f"ours, {dtype}": [timed[shape, dtype].ours for shape in shapes] for dtype in TARGETS}
    series[WHEEL] = [timed[shape, "float64"].peer for shape in shapes]
    for at, (name, values) in enumerate(series.items()):
        heights = [float("nan") if value is None else 1e6 * value for value in values]
        if not any(values):
            continue
        colour = ("tab:blue", "tab:cyan", "0.7")[at]
        bars = left.bar(np.arange(len(names)) + 0.27 * (at - 1), heights, 0.26, label=name, color=colour)
        left.bar_label(bars, fmt="%.2g", fontsize=8)
    if any(value for values in series.values() for value in values):
        left.set_yscale("log")
    left.set_xticks(range(len(names)), names)
    left.set(title="an epoch, one thread", ylabel="microseconds a tuple")
    left.legend()
    scored = {row.peer_name.partition(",")[0]: row for row in rows if row.unit == "right"}
    heights = {name: row.peer / 10 for name, row in reversed(scored.items())}
    heights["learned"] = next(iter(scored.values())).ours / 10
    bars = right.bar(list(heights), list(heights.values()), color=["0.7", "0.7", "tab:blue"])
    right.bar_label(bars, fmt="%.1f")
    right.set(title="votes on a third split, bad sources pruned", ylabel="right (%)")
