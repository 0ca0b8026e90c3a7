"""Saved and loaded: the files of section 3.2, every reader as before, files that are damaged; pickle and copy."""

import copy
import inspect
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import disable_progress_bars, enable_progress_bars
from datasets.fingerprint import Hasher
from importance_corpora import METHODS, NEUTRAL, corpus, fitted, heard, source_of, table_of, validation
from safetensors.numpy import load_file, save_file

import hf_ext
from hf_ext import ImportanceWeights

FILES = {"config.json", "importance.safetensors", "keys.arrow", "history.json"}
OPTIONS: dict[str, Any] = {
    "k": 10,
    "method": "multilinear",
    "id_column": "id",
    "group_column": None,
    "retrieved_column": "retrieved",
    "utility_column": "utility",
    "learning_rate": "auto",
    "epochs": 50,
    "group_update": "mean",
    "unseen": "keep",
    "epsilon": 0.0,
    "delta": 0.0,
    "dtype": "float64",
    "seed": 0,
    "answer_column": "answers",
    "output_column": "importance",
    "prior_strength": 2.0,
}
KEYWORDS = {"answer_column", "output_column", "prior_strength"}
CASES: dict[str, dict[str, Any]] = {
    "items": {},
    "integers": {"kind": "int"},
    "groups": {"group_column": "source"},
    "exact groups": {"group_column": "source", "group_update": "exact", "unseen": "drop"},
    "float32": {"dtype": "float32", "unseen": 0.25},
    "truncated": {"epsilon": 0.05, "learning_rate": 2.0},
    "sampled": {"epsilon": 0.5, "delta": 0.1, "seed": 3},
    "own column": {"output_column": "trust", "k": 2},
} | {method: {"method": method} for method in METHODS[1:]}


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    disable_progress_bars()
    yield
    enable_progress_bars()


@pytest.fixture(params=CASES)
def case(request) -> tuple[ImportanceWeights, str]:
    options = dict(CASES[request.param])
    return fitted(**options), options.get("kind", "string")


@pytest.fixture
def saved(tmp_path) -> Path:
    fitted().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def anywhere(tree: Any, name: str) -> list:
    """All values under this name, at whatever depth."""
    if isinstance(tree, list):
        return [found for part in tree for found in anywhere(part, name)]
    if not isinstance(tree, dict):
        return []
    return [tree[name]] * (name in tree) + [found for part in tree.values() for found in anywhere(part, name)]


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


# ---------------------------------------------------------------- options


def test_signature():
    parameters = inspect.signature(ImportanceWeights).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == OPTIONS
    assert list(parameters) == list(OPTIONS)
    assert {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY} == KEYWORDS


def test_signature_of_fit():
    parameters = inspect.signature(ImportanceWeights.fit).parameters
    named = {
        "accelerator": None,
        "progress": True,
        "groups": None,
        "checkpoint_dir": None,
        "checkpoint_every": 10,
        "resume_from_checkpoint": None,
        "presharded": False,
        "num_threads": None,
    }
    assert list(parameters) == ["self", "validation_dataset", *named]
    assert {name: parameters[name].default for name in named} == named
    only = [name for name in named if parameters[name].kind is inspect.Parameter.KEYWORD_ONLY]
    assert only == list(named)[2:]


def test_options_live_in_a_dataclass():
    config = ImportanceWeights().config
    assert is_dataclass(config)
    assert type(config).__name__ == "ImportanceConfig"
    assert {field.name for field in fields(config)} >= set(OPTIONS)
    assert {name: getattr(config, name) for name in OPTIONS} == OPTIONS
    changed = OPTIONS | {"k": 3, "method": "mean", "unseen": 0.5, "answer_column": "said"}
    assert {name: getattr(ImportanceWeights(**changed).config, name) for name in OPTIONS} == changed


def test_public_names():
    assert hf_ext.importance_weights.ImportanceWeights is hf_ext.ImportanceWeights
    for name in ("retrieve", "multilinear_gradient", "shapley_values", "group_gradient"):
        assert callable(getattr(hf_ext.importance_weights, name))
    assert "ImportanceWeights" in dir(hf_ext)
    assert "ImportanceWeights" in hf_ext.__all__


# ---------------------------------------------------------------- the files


def test_layout(case, tmp_path):
    iw, _ = case
    iw.save_pretrained(tmp_path / "new" / "folder")
    folder = tmp_path / "new" / "folder"
    assert {path.name for path in folder.iterdir()} == FILES | {"README.md"}
    config = config_of(folder)
    assert config["format_version"] == 2
    for name, value in asdict(iw.config).items():
        assert anywhere(config, name) == [value], name
    assert anywhere(config, "threshold") == [None]
    assert anywhere(config, "value") == [iw.value]
    assert anywhere(config, "learning_rate_") == [iw.learning_rate_]
    tensors = load_file(folder / "importance.safetensors")
    assert {name: tensor.dtype.name for name, tensor in tensors.items()} == {"weights": "float64", "counts": "int64"}
    assert tensors["weights"].tolist() == iw.weights.tolist()
    assert tensors["counts"].tolist() == iw.counts.tolist()
    with pa.OSFile(str(folder / "keys.arrow")) as file, pa.ipc.open_file(file) as reader:
        keys = reader.read_all()
    assert keys.column_names == ["key"]
    assert keys["key"].to_pylist() == iw.keys.to_pylist()
    assert json.loads((folder / "history.json").read_text()) == iw.history


@pytest.mark.parametrize("method", METHODS)
def test_the_neutral_value_is_saved(method, tmp_path):
    """It is what an unseen id gets, and no other file has it: the mean of all slots for method="mean"."""
    iw = fitted(method=method)
    iw.save_pretrained(tmp_path)
    slots = [utility for row in validation()["utility"] for utility in row]
    neutral = NEUTRAL.get(method, math.fsum(slots) / len(slots))
    found = [value for name, value in config_of(tmp_path).items() if "neutral" in name]
    assert found == pytest.approx([neutral], rel=1e-12)
    assert ImportanceWeights.from_pretrained(tmp_path).lookup(["stranger"]) == iw.lookup(["stranger"])


def test_the_config_is_plain_json(case, tmp_path):
    """No NaN nor Infinity, which other readers refuse."""
    iw, _ = case
    iw.save_pretrained(tmp_path)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for name in ("config.json", "history.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=refuse)


@pytest.mark.smoke
def test_saving_again_replaces(tmp_path):
    fitted(kind="int").save_pretrained(tmp_path)
    iw = fitted(method="mean")
    iw.tune_threshold(validation(6))
    iw.save_pretrained(str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == FILES | {"README.md"}
    loaded = ImportanceWeights.from_pretrained(str(tmp_path))
    assert loaded.to_dict() == iw.to_dict()
    assert (loaded.history, loaded.threshold) == ([], iw.threshold)


def test_a_loaded_object_can_be_saved_over_its_own_files(saved):
    """Its arrays may be views of these very files."""
    before = fitted().to_dict()
    loaded = ImportanceWeights.from_pretrained(saved)
    loaded.save_pretrained(saved)
    assert loaded.to_dict() == before
    assert ImportanceWeights.from_pretrained(saved).to_dict() == before


def test_a_loaded_object_outlives_its_files(saved, tmp_path):
    loaded = ImportanceWeights.from_pretrained(saved)
    shutil.rmtree(saved)
    assert loaded.to_dict() == fitted().to_dict()
    loaded.save_pretrained(tmp_path / "elsewhere")
    assert ImportanceWeights.from_pretrained(tmp_path / "elsewhere").to_dict() == loaded.to_dict()


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    fitted().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert ImportanceWeights.from_pretrained(tmp_path).to_dict() == fitted().to_dict()


def test_no_pickle(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle")

    iw = fitted()
    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for module, name in ((torch, "save"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    iw.save_pretrained(tmp_path)
    assert ImportanceWeights.from_pretrained(tmp_path).to_dict() == iw.to_dict()


def test_saved_twice_is_byte_for_byte_the_same(tmp_path):
    for name in ("a", "b"):
        fitted().save_pretrained(tmp_path / name)
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


# ---------------------------------------------------------------- readers


def readers(iw: ImportanceWeights, kind: str, folder: Path) -> dict[str, Any]:
    """What each says; tuning comes last, since it changes the threshold."""
    data, rows = corpus(kind), validation(6, kind=kind)
    keys = rows[iw.config.group_column or "retrieved"]
    iw.save_pretrained(folder)
    said = {
        "keys": (iw.keys.type, iw.keys.to_pylist()),
        "weights": (iw.weights.dtype, iw.weights.tobytes()),
        "counts": (iw.counts.dtype, iw.counts.tolist()),
        "to_dict": iw.to_dict(),
        "len": len(iw),
        "value": iw.value,
        "history": iw.history,
        "learning_rate_": iw.learning_rate_,
        "threshold": iw.threshold,
        "config": iw.config,
        "lookup": iw.lookup([*keys[0], None]).tolist(),
        "map": data.map(iw, batched=True).to_dict(),
        "map one by one": data.map(iw).to_dict(),
        "annotate": iw.annotate(data).to_dict(),
        "stream": list(iw.annotate(data.to_iterable_dataset())),
        "prune": iw.prune(data, 0.5).to_dict(),
        "prune as tuned": iw.prune(data).to_dict(),
        "weighted_vote": iw.weighted_vote(rows["answers"], keys),
        "evaluate": iw.evaluate(rows),
        "fingerprint": Hasher.hash(iw),
        "saved": {name: (folder / name).read_bytes() for name in FILES},
    }
    if iw.weights.min() >= 0 and iw.weights.max() <= 1:
        said["sample"] = iw.sample(data, seed=3).to_dict()
        said["sample by the seed of the fit"] = iw.sample(data).to_dict()
        said["sampler"] = list(iw.sampler(data))
        said["rescore"] = iw.rescore([1.0] * len(keys[0]), keys[0]).tolist()
        said["rescore distances"] = iw.rescore([1.0] * len(keys[0]), keys[0], higher_is_better=False).tolist()
    said["tune_threshold"] = iw.tune_threshold(validation(8, kind=kind), metric="utility")
    said["tuning"] = iw.tuning
    return said


def test_every_reader_is_as_before(case, tmp_path):
    iw, kind = case
    iw.tune_threshold(validation(6, kind=kind))
    iw.save_pretrained(tmp_path / "saved")
    loaded = ImportanceWeights.from_pretrained(tmp_path / "saved")
    wanted, found = readers(iw, kind, tmp_path / "a"), readers(loaded, kind, tmp_path / "b")
    assert list(found) == list(wanted)
    for name in wanted:
        assert found[name] == wanted[name], name


@pytest.mark.parametrize("name", ["items", "groups", "mean"])
def test_loaded_can_be_fitted_again(name, saved, tmp_path):
    fitted(**CASES[name]).save_pretrained(tmp_path / "other")
    loaded = ImportanceWeights.from_pretrained(tmp_path / "other")
    loaded.fit(validation(9), progress=False)
    assert loaded.to_dict() == fitted(validation(9), **CASES[name]).to_dict()


def test_loaded_still_knows_the_rows_of_its_fit(saved):
    """Tuning on them is warned of, as before."""
    with heard() as said:
        ImportanceWeights.from_pretrained(saved).tune_threshold(validation(6))
    assert not said
    with heard() as said:
        ImportanceWeights.from_pretrained(saved).tune_threshold(validation())
    assert len(said) == 1


def test_unseen_is_as_before(tmp_path):
    data = corpus()
    for mode in ("keep", "drop", 0.25):
        iw = fitted(unseen=mode)
        iw.save_pretrained(tmp_path)
        loaded = ImportanceWeights.from_pretrained(tmp_path)
        assert loaded.config.unseen == mode
        for threshold in (0.0, 0.3, 0.9):
            assert loaded.prune(data, threshold)["id"][:] == iw.prune(data, threshold)["id"][:]


def test_arrays_are_the_readers_own(saved):
    """Nobody's later write into a file, or into an array that was handed out, reaches the weights."""
    loaded = ImportanceWeights.from_pretrained(saved)
    before = loaded.to_dict()
    loaded.to_dict().clear()
    loaded.lookup(list(before))[:] = 9
    zeros = {"weights": np.zeros(len(before)), "counts": np.zeros(len(before), np.int64)}
    save_file(zeros, saved / "importance.safetensors")
    assert loaded.to_dict() == before


# ---------------------------------------------------------------- what is no saved fit


def test_no_such_folder(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        ImportanceWeights.from_pretrained(tmp_path / "nowhere")


def test_folder_without_config(saved):
    (saved / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json") as caught:
        ImportanceWeights.from_pretrained(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize("name", sorted(FILES - {"config.json"}))
def test_a_file_is_missing(saved, name):
    (saved / name).unlink()
    with pytest.raises(OSError, match=name):
        ImportanceWeights.from_pretrained(saved)


@pytest.mark.parametrize("version", [1, 3, 1000])
def test_newer_format(saved, version):
    edit(saved, format_version=version)
    with pytest.raises(ValueError, match=rf"format.*\b{version}\b.*\b2\b"):
        ImportanceWeights.from_pretrained(saved)


def test_config_of_something_else(saved):
    (saved / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"config\.json is damaged, or of something else: it lacks 'format_version'"):
        ImportanceWeights.from_pretrained(saved)


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "half of it": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "noise": lambda content: bytes(range(256)) * 4,
    "text": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", sorted(FILES))
def test_a_damaged_file_is_named(saved, name, damage):
    (saved / name).write_bytes(DAMAGE[damage]((saved / name).read_bytes()))
    with pytest.raises((OSError, ValueError), match=name):
        ImportanceWeights.from_pretrained(saved)


@pytest.mark.parametrize("tensor", ["weights", "counts"])
def test_lengths_that_do_not_fit_together(saved, tensor):
    tensors = load_file(saved / "importance.safetensors")
    save_file(tensors | {tensor: tensors[tensor][:-1].copy()}, saved / "importance.safetensors")
    with pytest.raises(ValueError, match=r"39.*40|40.*39"):
        ImportanceWeights.from_pretrained(saved)


@pytest.mark.parametrize("tensor", ["weights", "counts"])
def test_a_tensor_is_missing(saved, tensor):
    tensors = load_file(saved / "importance.safetensors")
    del tensors[tensor]
    save_file(tensors, saved / "importance.safetensors")
    with pytest.raises(ValueError, match=tensor):
        ImportanceWeights.from_pretrained(saved)


def test_an_unknown_key_in_the_config(saved):
    """Of the house: no option is ever swallowed."""
    config = config_of(saved)
    if "unseen" in config:
        edit(saved, unsen="drop")
    else:  # the options are a dict of their own
        (name,) = (name for name, part in config.items() if isinstance(part, dict) and "unseen" in part)
        edit(saved, **{name: config[name] | {"unsen": "drop"}})
    with pytest.raises(ValueError, match=r"'unsen'.*'unseen'"):
        ImportanceWeights.from_pretrained(saved)


def test_an_option_that_is_not_allowed_is_refused_when_loaded(saved):
    text = (saved / "config.json").read_text()
    assert '"multilinear"' in text
    (saved / "config.json").write_text(text.replace('"multilinear"', '"multilnear"'))
    with pytest.raises(ValueError, match=r"method.*'multilnear'"):
        ImportanceWeights.from_pretrained(saved)


def test_a_failed_save_leaves_the_old_files(saved, monkeypatch):
    """Saving needs a fit; what an earlier one wrote is still there afterwards."""
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(RuntimeError, match="fit"):
        ImportanceWeights().save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "shut").mkdir(mode=0o500)
    with pytest.raises(OSError):
        fitted().save_pretrained(tmp_path / "shut" / "weights")


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        fitted().save_pretrained(tmp_path / "taken")


# ---------------------------------------------------------------- pickle, copy, dict


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda iw: pickle.loads(pickle.dumps(iw)),
    "oldest protocol": lambda iw: pickle.loads(pickle.dumps(iw, protocol=2)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies(case, way):
    iw, kind = case
    data, rows = corpus(kind), validation(6, kind=kind)
    keys = rows[iw.config.group_column or "retrieved"]
    iw.lookup(keys[0])  # a copy of a used object, whose index is built
    twin = COPIES[way](iw)
    assert twin.config == iw.config
    assert twin.keys.to_pylist() == iw.keys.to_pylist()
    assert twin.weights.tobytes() == iw.weights.tobytes()
    assert twin.counts.tolist() == iw.counts.tolist()
    assert (len(twin), twin.to_dict()) == (len(iw), iw.to_dict())
    stranger = ["stranger"] if kind == "string" else [10**6]
    assert twin.lookup(stranger) == iw.lookup(stranger)
    assert data.map(twin, batched=True).to_dict() == data.map(iw, batched=True).to_dict()
    assert twin.prune(data, 0.5).to_dict() == iw.prune(data, 0.5).to_dict()
    assert twin.weighted_vote(rows["answers"], keys) == iw.weighted_vote(rows["answers"], keys)
    assert Hasher.hash(twin) == Hasher.hash(iw)


@pytest.mark.parametrize("way", ["copy", "deepcopy"])
def test_a_copy_is_fitted_on_its_own(way):
    iw = fitted()
    before, twin = iw.to_dict(), COPIES[way](iw)
    twin.fit(validation(9), progress=False)
    twin.tune_threshold(validation(6))
    assert iw.to_dict() == before != twin.to_dict()
    assert iw.threshold is None


@pytest.mark.parametrize("way", COPIES)
def test_copies_before_the_fit(way):
    twin = COPIES[way](ImportanceWeights(k=3, epochs=5))
    assert twin.config == ImportanceWeights(k=3, epochs=5).config
    with pytest.raises(RuntimeError, match="fit"):
        twin.lookup(["a"])
    assert twin.fit(validation(), progress=False).to_dict() == fitted().to_dict()


@pytest.mark.parametrize("kind", ["int", "string"])
def test_to_dict(kind):
    iw = fitted(kind=kind)
    found = iw.to_dict()
    assert found == table_of(iw)
    assert list(found) == sorted(found)
    assert {(type(key), type(weight)) for key, weight in found.items()} == {(int if kind == "int" else str, float)}
    json.dumps(found)


def test_length():
    assert len(fitted()) == 40
    assert len(fitted(group_column="source")) == len({source_of(i) for i in range(40)}) == 7


def test_weights_are_float64_in_the_unit_interval():
    for dtype in ("float64", "float32"):
        weights = fitted(dtype=dtype).weights
        assert weights.dtype == np.float64
        assert ((weights >= 0) & (weights <= 1)).all()


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ValueError, match="not of importance weights; name another folder"):
        fitted().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
