"""Fits that are taken up again: weights and history after an epoch, in one file that is complete or absent."""

import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_ext.checks import check_count
from hf_ext.importance_weights.config import ImportanceConfig
from hf_ext.importance_weights.problem import Problem
from hf_ext.importance_weights.ranks import Ranks

FILE = "checkpoint.safetensors"
FORMAT = "2"
State = tuple[np.ndarray, list[dict[str, Any]]]


class Checkpoints:
    """Written into `directory` every `every` epochs and at the end; `resume` names one to begin with.

    resume: a folder, or True for `directory`. Rank 0 decides, reads and writes, and the others follow: they may lack
    the folder.

    Raises:
        ValueError, FileNotFoundError: an option is wrong, or there is nothing to resume from; on every rank.
    """

    def __init__(self, ranks: Ranks, config: ImportanceConfig, directory: Any, every: int, resume: Any) -> None:
        self.ranks = ranks
        self.directory, self.every, self.source = ranks.first(lambda: _places(config, directory, every, resume))

    def load(self, problem: Problem) -> State | None:
        """The state to begin with.

        Raises:
            ValueError: it is of other data or options, or damaged; on every rank.
        """
        if self.source is None:
            return None
        digest = problem.digest
        return self.ranks.first(lambda: _read(self.source, problem.config, digest))

    def save(self, problem: Problem, weights: np.ndarray, history: list[dict[str, Any]]) -> None:
        done = len(history)
        if self.directory is None or (done % self.every and done != problem.config.epochs):
            return
        digest = problem.digest
        self.ranks.first(lambda: _write(self.directory, problem.config, digest, weights, history))


def _places(config: ImportanceConfig, directory: Any, every: int, resume: Any) -> tuple[Path | None, int, Path | None]:
    """The folder to write to, how often, and the file to begin with."""
    check_count("checkpoint_every", every)
    resume = None if resume is False else resume
    if (directory is not None or resume is not None) and config.method != "multilinear":
        raise ValueError(f"method={config.method!r} takes no epochs: there is nothing to write or to resume")
    if resume is True and directory is None:
        raise ValueError("resume_from_checkpoint=True takes up what is in checkpoint_dir, and none is given")
    source = directory if resume is True else resume
    if source is not None and not (Path(source) / FILE).is_file():
        raise FileNotFoundError(
            f"there is no {FILE} in {source}; fit without resume_from_checkpoint, with checkpoint_dir, to write one"
        )
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
    return (
        None if directory is None else Path(directory),
        every,
        None if source is None else Path(source) / FILE,
    )


def _read(source: Path, config: ImportanceConfig, digest: str) -> State:
    try:
        with safe_open(source, "numpy") as file:
            metadata, weights = file.metadata() or {}, file.get_tensor("weights")
        facts, seal = {name: metadata[name] for name in ("options", "history", "digest")}, metadata["sha256"]
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{source} is no checkpoint of importance weights, or damaged: {error}") from None
    version = metadata.get("format_version")
    if version != FORMAT:
        raise ValueError(f"{source} is of format {version!r}, and this version of hf_ext reads {FORMAT!r}; fit again")
    if weights.dtype != np.float64 or weights.ndim != 1 or seal != _sha256(weights, facts):
        raise ValueError(f"{source} is damaged: its weights, options and history are not those that were written")
    options, history = json.loads(facts["options"]), json.loads(facts["history"])
    mine = config.to_dict()
    free = {"epochs"} if config.delta == 0 else set()
    differ = [name for name in mine if name not in free and options.get(name) != mine[name]]
    if differ:
        pairs = ", ".join(f"{name}={options.get(name)!r} there and {mine[name]!r} here" for name in differ)
        why = "; epochs may not change where delta > 0, since it sizes the sample" if "epochs" in differ else ""
        raise ValueError(f"{source} was written under other options: {pairs}{why}")
    if facts["digest"] != digest:
        raise ValueError(f"{source} was written for other data: its rows, ids, utilities or groups differ")
    if len(history) > config.epochs:
        raise ValueError(f"{source} holds {len(history)} epochs, and epochs={config.epochs}; it may only grow")
    return weights, history


def _write(folder: Path, config: ImportanceConfig, digest: str, weights: np.ndarray, history: Any) -> None:
    facts = {"options": json.dumps(config.to_dict()), "history": json.dumps(history), "digest": digest}
    metadata = {"format_version": FORMAT, **facts, "sha256": _sha256(weights, facts)}
    unfinished = folder / f"{FILE}.{os.getpid()}"
    try:
        save_file({"weights": weights}, unfinished, metadata)
        os.replace(unfinished, folder / FILE)
    finally:
        unfinished.unlink(missing_ok=True)


def _sha256(weights: np.ndarray, facts: dict[str, str]) -> str:
    """Of all that is read, and of how the bytes of the weights are read."""
    about = json.dumps([str(weights.dtype), weights.shape, facts], sort_keys=True)
    return sha256(about.encode() + weights.tobytes()).hexdigest()
