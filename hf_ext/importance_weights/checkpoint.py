"""Fits that are taken up again: weights and history after an epoch, in one file that is complete or absent."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hf_ext.importance_weights.config import ImportanceConfig, check_count
from hf_ext.importance_weights.problem import Problem

FILE = "checkpoint.safetensors"
State = tuple[np.ndarray, list[dict[str, Any]]]


class Checkpoints:
    """Written by rank 0 into `directory` every `every` epochs and at the end; `resume` names one to begin with.

    resume: a folder, or True for `directory`.
    """

    def __init__(self, config: ImportanceConfig, directory: Any, every: int, resume: Any) -> None:
        check_count("checkpoint_every", every)
        resume = None if resume is False else resume
        if (directory is not None or resume is not None) and config.method != "multilinear":
            raise ValueError(f"method={config.method!r} takes no epochs: there is nothing to write or to resume")
        if resume is True and directory is None:
            raise ValueError("resume_from_checkpoint=True takes up what is in checkpoint_dir, and none is given")
        self.directory = None if directory is None else Path(directory)
        self.every = every
        source = self.directory if resume is True else resume
        self.source = None if source is None else Path(source) / FILE
        if self.source is not None and not self.source.is_file():
            raise FileNotFoundError(
                f"there is no {FILE} in {source}; fit without resume_from_checkpoint, with checkpoint_dir, to write one"
            )

    def load(self, problem: Problem) -> State | None:
        """The state to begin with.

        Raises:
            ValueError: it is of other data or options, or damaged; on every rank.
        """
        if self.source is None:
            return None
        digest = problem.digest
        return problem.ranks.agree(lambda: self._read(problem, digest))

    def _read(self, problem: Problem, digest: str) -> State:
        try:
            with safe_open(self.source, "numpy") as file:
                metadata, weights = file.metadata() or {}, file.get_tensor("weights")
            options, history = json.loads(metadata["options"]), json.loads(metadata["history"])
            other_data = metadata["digest"] != digest
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.source} is no checkpoint of importance weights, or damaged: {error}") from None
        mine = problem.config.to_dict()
        free = {"epochs"} if problem.config.delta == 0 else set()
        differ = [name for name in mine if name not in free and options.get(name) != mine[name]]
        if differ:
            pairs = ", ".join(f"{name}={options.get(name)!r} there and {mine[name]!r} here" for name in differ)
            why = "; epochs may not change where delta > 0, since it sizes the sample" if "epochs" in differ else ""
            raise ValueError(f"{self.source} was written under other options: {pairs}{why}")
        if other_data:
            raise ValueError(f"{self.source} was written for other data: its rows, ids, utilities or groups differ")
        if len(history) > problem.config.epochs:
            raise ValueError(
                f"{self.source} holds {len(history)} epochs, and epochs={problem.config.epochs}; it may only grow"
            )
        return weights, history

    def save(self, problem: Problem, weights: np.ndarray, history: list[dict[str, Any]]) -> None:
        done = len(history)
        if self.directory is None or (done % self.every and done != problem.config.epochs):
            return
        digest = problem.digest
        if problem.ranks.rank != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        metadata = {
            "options": json.dumps(problem.config.to_dict()),
            "history": json.dumps(history),
            "digest": digest,
        }
        unfinished = self.directory / f"{FILE}.{os.getpid()}"
        try:
            save_file({"weights": weights}, unfinished, metadata)
            os.replace(unfinished, self.directory / FILE)
        finally:
            unfinished.unlink(missing_ok=True)
