"""Fitted weights: what they are made of, their folder, and the part of them that decides what `map` writes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hf_ext.checks import read_object
from hf_ext.importance_weights.config import ImportanceConfig
from hf_ext.importance_weights.list_kernels import mix_slots
from hf_ext.importance_weights.lists import Lists, compact

FORMAT = 2
CONFIG, WEIGHTS, KEYS, HISTORY = "config.json", "importance.safetensors", "keys.arrow", "history.json"


@dataclass
class State:
    """What a fit found. rows: a digest of the validation set's rows, to tell when one tunes on them."""

    keys: pa.Array
    weights: np.ndarray
    counts: np.ndarray
    neutral: float
    value: float
    learning_rate: float | None
    history: list[dict[str, Any]] = field(default_factory=list)
    rows: str = ""
    threshold: float | None = None
    tuning: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # `map` hashes them and remembers: a change in place would not reach what it has cached.
        for array in (self.weights, self.counts):
            array.setflags(write=False)

    def copy(self) -> "State":
        return replace(self, history=[dict(row) for row in self.history], tuning=[dict(row) for row in self.tuning])

    def digest(self) -> str:
        """Of all of it."""
        found = json.dumps([self.rows, self.threshold, self.tuning, self.history], sort_keys=True)
        return sha256(f"{self.essence()[:4]!r}{found}".encode()).hexdigest()

    def essence(self) -> tuple[Any, ...]:
        """Plain bytes and numbers: equal weights are equal here, however they came about."""
        buffers = tuple(None if buffer is None else buffer.to_pybytes() for buffer in compact(self.keys).buffers()[1:])
        numbers = (self.weights.tobytes(), self.counts.tobytes(), self.neutral, self.value, self.learning_rate)
        return str(self.keys.type), len(self.keys), buffers, numbers, self.rows

    @classmethod
    def of(cls, essence: tuple[Any, ...]) -> "State":
        kind, count, buffers, (weights, counts, *numbers), rows = essence
        types = {str(known): known for known in (pa.int64(), pa.large_string())}
        memory = [None, *(None if buffer is None else pa.py_buffer(buffer) for buffer in buffers)]
        keys = pa.Array.from_buffers(types[kind], count, memory)
        return cls(keys, np.frombuffer(weights).copy(), np.frombuffer(counts, np.int64).copy(), *numbers, rows=rows)


def rows_digest(lists: Lists) -> str:
    """Of one process's rows, whatever their order."""
    return f"{len(lists)}-{len(lists.items)}-{mix_slots(lists.offsets, lists.items, lists.utilities, -1):016x}"


def write(folder: Path, config: ImportanceConfig, state: State) -> None:
    if (folder / CONFIG).exists() and not (folder / KEYS).exists():
        raise ValueError(f"{folder / CONFIG} is there, and not of importance weights; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"weights": state.weights, "counts": state.counts}, folder / WEIGHTS)
    with pa.OSFile(str(folder / KEYS), "wb") as sink:
        table = pa.table({"key": state.keys})
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / HISTORY).write_text(json.dumps(state.history, indent=1) + "\n", encoding="utf-8")
    facts = {name: getattr(state, name) for name in ("neutral", "value", "threshold", "tuning", "rows")}
    facts |= {"learning_rate_": state.learning_rate, "sha256": state.digest()}
    text = json.dumps({"format_version": FORMAT, **config.to_dict(), **facts}, indent=2)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[ImportanceConfig, State]:
    options = read_object(folder / CONFIG, "ImportanceWeights.save_pretrained")
    if "format_version" not in options:
        raise ValueError(f"{folder / CONFIG} is damaged, or of something else: it lacks 'format_version'")
    version = options.pop("format_version")
    if version != FORMAT:
        raise ValueError(
            f"{folder} is of format {version!r}, and this version of hf_ext reads {FORMAT}; a higher one takes a newer "
            "hf_ext, and weights of a lower one have to be fitted again"
        )
    try:
        facts = {name: options.pop(name) for name in ("neutral", "value", "threshold", "tuning", "rows")}
        learning_rate, digest = options.pop("learning_rate_"), options.pop("sha256")
    except KeyError as error:
        raise ValueError(f"{folder / CONFIG} lacks {error}") from None
    config = ImportanceConfig.from_dict(options)
    tensors = _read(folder / WEIGHTS, load_file)
    state = State(
        keys=_read(folder / KEYS, _read_keys),
        weights=_read(folder / WEIGHTS, lambda _: tensors["weights"]),
        counts=_read(folder / WEIGHTS, lambda _: tensors["counts"]),
        learning_rate=learning_rate,
        history=_read(folder / HISTORY, lambda path: json.loads(path.read_text(encoding="utf-8"))),
        **facts,
    )
    shapes = (state.weights.dtype, state.counts.dtype, state.weights.shape, state.counts.shape)
    count = len(state.keys)
    if shapes != (np.float64, np.int64, (count,), (count,)):
        raise ValueError(f"{folder} is damaged: {count} keys, and weights and counts of {shapes}")
    _check_types(folder, state)
    if state.digest() != digest:
        raise ValueError(
            f"{folder} is damaged: {WEIGHTS}, {KEYS}, {HISTORY} and what {CONFIG} says beside the options were not "
            "written together; was writing it interrupted?"
        )
    return config, state


def _check_types(folder: Path, state: State) -> None:
    numbers = (state.neutral, state.value, *(x for x in (state.threshold, state.learning_rate) if x is not None))
    for right, name, rule in (
        (all(map(_is_number, numbers)), CONFIG, "neutral, value, threshold and learning_rate_ are numbers"),
        (isinstance(state.rows, str), CONFIG, "rows is a string"),
        (_is_table(state.tuning), CONFIG, "tuning is a list of objects of numbers"),
        (_is_table(state.history), HISTORY, "it is a list of objects of numbers"),
    ):
        if not right:
            raise ValueError(f"{folder / name} is damaged: {rule}")


def _is_table(rows: Any) -> bool:
    return isinstance(rows, list) and all(isinstance(row, dict) and all(map(_is_number, row.values())) for row in rows)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: Path, reader: Callable[[Path], Any]) -> Any:
    try:
        return reader(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None


def _read_keys(path: Path) -> pa.Array:
    with pa.OSFile(str(path), "rb") as source:
        chunks = pa.ipc.open_file(source).read_all()["key"].chunks
    return pa.concat_arrays(chunks)
