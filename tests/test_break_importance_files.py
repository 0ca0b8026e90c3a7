"""Damaged folders of importance weights, and damaged checkpoints of their fits."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import OF_FILES, OF_JSON, OF_SAFETENSORS, STRANGERS, flips, mistyped, outcome, restored, swapped, wrong
from importance_corpora import fitted, validation
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from hf_ext import ImportanceWeights
from hf_ext.importance_weights.config import ImportanceConfig

CONFIG, WEIGHTS, KEYS, HISTORY = "config.json", "importance.safetensors", "keys.arrow", "history.json"
OPTIONS = tuple(ImportanceConfig().to_dict())


class Saved:
    """A folder of fitted weights, its copy to be damaged, and what has to be read from it."""

    def __init__(self, kind: str, folder: Path) -> None:
        iw = fitted(kind=kind)
        iw.tune_threshold(validation(6, kind=kind))
        self.good, self.copy = folder / "good", folder / "copy"
        iw.save_pretrained(self.good)
        self.expected = self.facts(iw)

    @staticmethod
    def facts(iw: ImportanceWeights) -> tuple[Any, ...]:
        arrays = iw.keys.to_pylist(), iw.weights.tobytes(), iw.counts.tolist()
        unseen = iw._state.neutral
        return arrays, iw.value, iw.learning_rate_, unseen, iw.threshold, iw.tuning, iw.history, iw._state.rows

    def restored(self) -> Path:
        return restored(self.good, self.copy)

    def outcome(self, *names: Any) -> str:
        """Options are checked as those of a call, and named without the file."""
        read = ImportanceWeights.from_pretrained
        return outcome(lambda: read(self.copy), lambda iw: self.facts(iw) == self.expected, self.copy, *names)


@pytest.fixture(scope="module", params=["string", "int"])
def saved(request, tmp_path_factory) -> Saved:
    return Saved(request.param, tmp_path_factory.mktemp(request.param))


def test_damaged_files_are_refused_by_name(saved):
    found = {}
    kinds = {CONFIG: OF_FILES | OF_JSON, WEIGHTS: OF_FILES | OF_SAFETENSORS, KEYS: OF_FILES, HISTORY: OF_FILES}
    for name, damages in kinds.items():
        for kind, damage in damages.items():
            damage(saved.restored() / name)
            found[f"{name}: {kind}"] = saved.outcome()
    for one, other in ((CONFIG, HISTORY), (WEIGHTS, KEYS), (CONFIG, WEIGHTS)):
        swapped(saved.restored() / one, saved.copy / other)
        found[f"{one} and {other}"] = saved.outcome()
    assert wrong(found) == {}
    newline = {f"{name}: cut at 100%" for name in (CONFIG, HISTORY)}
    assert {what for what, verdict in found.items() if verdict == "right"} <= newline


@pytest.mark.parametrize(("name", "count"), [(WEIGHTS, 60), (KEYS, 150)], ids=["weights", "keys"])
def test_a_changed_byte_of_arrays_is_refused_or_of_no_consequence(saved, name, count):
    found = {}
    for number, content in enumerate(flips((saved.good / name).read_bytes(), count)):
        (saved.restored() / name).write_bytes(content)
        found[str(number)] = saved.outcome()
    assert wrong(found) == {}


@pytest.mark.parametrize("name", ["weights", "counts"])
def test_arrays_of_another_type_or_form_are_refused(saved, name):
    tensors, found = load_file(saved.good / WEIGHTS), {}
    own = tensors[name]
    for what, array in {
        "type": own.view(np.int64 if name == "weights" else np.float64),
        "half the size": own.view(np.float32),
        "bytes": own.view(np.uint8),
        "matrix": own.reshape(2, -1),
        "none": own[:0],
        "NaN": np.full_like(own, np.nan if name == "weights" else -1),
        "reversed": own[::-1].copy(),
    }.items():
        save_file(tensors | {name: array}, saved.restored() / WEIGHTS)
        found[what] = saved.outcome()
    assert set(found.values()) == {"refused"}, wrong(found) or found


def test_facts_of_another_type_are_refused(saved):
    config, found = json.loads((saved.good / CONFIG).read_text()), {}
    for where, changed in mistyped(config, keep=("format_version",)):
        name = where.split(" ")[0]
        allowed = name in OPTIONS and _is_an_option(name, changed[name], config)
        if not allowed:
            (saved.restored() / CONFIG).write_text(json.dumps(changed))
            found[where] = saved.outcome(name)
    assert len(found) > 150
    assert set(found.values()) == {"refused"}, wrong(found) or found


def _is_an_option(name: str, value: Any, config: dict[str, Any]) -> bool:
    """Options may be edited: another one that is allowed is no damage."""
    try:
        ImportanceConfig.from_dict({option: config[option] for option in OPTIONS} | {name: value})
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", ["threshold", "rows", "tuning", "history"])
def test_what_no_weight_depends_on_is_checked_too(saved, name):
    config = json.loads((saved.good / CONFIG).read_text())
    found = {}
    for value in STRANGERS:
        if name == "history":
            (saved.restored() / HISTORY).write_text(json.dumps(value))
        else:
            (saved.restored() / CONFIG).write_text(json.dumps(config | {name: value}))
        found[repr(value)] = saved.outcome()
    assert wrong(found) == {}


# --- checkpoints of fits

CHECKPOINT = "checkpoint.safetensors"
ROWS = validation()


class Stopped:
    """A fit of six epochs that stopped after three."""

    def __init__(self, folder: Path) -> None:
        self.good, self.copy = folder / "good", folder / "copy"
        ImportanceWeights(k=3, epochs=3).fit(ROWS, progress=False, checkpoint_dir=self.good)
        self.whole = ImportanceWeights(k=3, epochs=6).fit(ROWS, progress=False)
        with safe_open(self.good / CHECKPOINT, "numpy") as file:
            self.metadata, self.weights = file.metadata(), file.get_tensor("weights")

    def restored(self) -> Path:
        return restored(self.good, self.copy) / CHECKPOINT

    def outcome(self) -> str:
        def resumed() -> ImportanceWeights:
            return ImportanceWeights(k=3, epochs=6).fit(ROWS, progress=False, resume_from_checkpoint=self.copy)

        return outcome(resumed, lambda iw: iw.weights.tobytes() == self.whole.weights.tobytes(), self.copy)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Stopped:
    return Stopped(tmp_path_factory.mktemp("stopped"))


def test_damaged_checkpoints_are_refused_by_name(stopped):
    found = {}
    for kind, damage in (OF_FILES | OF_SAFETENSORS).items():
        damage(stopped.restored())
        found[kind] = stopped.outcome()
    for number, content in enumerate(flips((stopped.good / CHECKPOINT).read_bytes(), 60)):
        stopped.restored().write_bytes(content)
        found[str(number)] = stopped.outcome()
    assert wrong(found) == {}
    assert {found[kind] for kind in OF_FILES | OF_SAFETENSORS} == {"refused"}


def test_options_in_a_checkpoint_of_another_type_are_refused(stopped):
    """Each option is compared with that of the fit."""
    found = {}
    for where, options in list(mistyped(json.loads(stopped.metadata["options"])))[::2]:
        save_file({"weights": stopped.weights}, stopped.restored(), stopped.metadata | {"options": json.dumps(options)})
        if not where.startswith("epochs"):  # which may grow
            found[where] = stopped.outcome()
    assert wrong(found) == {}


def test_leftovers_of_a_killed_writer_are_of_no_consequence(stopped):
    """It writes under a name of its own first."""
    folder = stopped.restored().parent
    (folder / f"{CHECKPOINT}.4242").write_bytes((folder / CHECKPOINT).read_bytes()[:100])
    assert stopped.outcome() == "right"


@pytest.mark.parametrize("as_what", ["int64", "float32", "bfloat16", "matrix"])
def test_weights_in_a_checkpoint_of_another_type_are_refused(stopped, as_what):
    if as_what == "bfloat16":  # which numpy does not know
        tensors = {"weights": torch.from_numpy(stopped.weights.copy()).view(torch.bfloat16)}
        save_torch_file(tensors, stopped.restored(), stopped.metadata)
    else:
        weights = stopped.weights.reshape(2, -1) if as_what == "matrix" else stopped.weights.view(as_what)
        save_file({"weights": weights}, stopped.restored(), stopped.metadata)
    assert stopped.outcome() == "refused"


def test_a_checkpoint_of_another_format_is_named(stopped):
    facts = {name: value for name, value in stopped.metadata.items() if name != "format_version"}
    for metadata, version in ((facts, "None"), (facts | {"format_version": "3"}, "'3'")):
        save_file({"weights": stopped.weights}, stopped.restored(), metadata)
        with pytest.raises(ValueError, match=f"{stopped.copy}.* is of format {version}, .* reads '2'"):
            ImportanceWeights(k=3, epochs=6).fit(ROWS, progress=False, resume_from_checkpoint=stopped.copy)


@pytest.mark.parametrize("name", ["options", "history"])
def test_metadata_of_a_checkpoint_of_another_type_are_refused(stopped, name):
    found = {}
    for value in (None, 5, "", "text", [], {}, json.loads(stopped.metadata["history"])[:2]):
        save_file({"weights": stopped.weights}, stopped.restored(), stopped.metadata | {name: json.dumps(value)})
        found[repr(value)] = stopped.outcome()
    assert wrong(found) == {}
