"""Importance weights: fitted on a validation set, looked up by `datasets.map`, and what else is done with them."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import IterableDataset
from torch.utils.data import WeightedRandomSampler

from hf_ext import compat
from hf_ext.checks import check_count
from hf_ext.importance_weights import corpus as corpora
from hf_ext.importance_weights import saving, votes
from hf_ext.importance_weights.checkpoint import Checkpoints
from hf_ext.importance_weights.config import ImportanceConfig
from hf_ext.importance_weights.fit import solve
from hf_ext.importance_weights.hub import SavedWeights
from hf_ext.importance_weights.lists import compact
from hf_ext.importance_weights.lookup import Lookup, find
from hf_ext.importance_weights.problem import prepare
from hf_ext.importance_weights.ranks import Ranks


class ImportanceWeights(SavedWeights):
    """How much each document, or source, of a retrieval corpus helps (arXiv 2307.03027).

    `fit` learns a weight for every id, or group of ids, that a validation set's lists of retrieved ids hold, from one
    utility an id; then `corpus.map(weights, batched=True)` adds them as a column. Options: see `ImportanceConfig`.

    Attributes, once fitted:
        keys: sorted ids or groups, an Arrow array. weights: (keys,) float64. counts: slots of each key in the fit.
        value: expected utility at the weights; for methods other than "multilinear", that of the whole corpus.
        history: a dict an epoch: epoch, value before its step, gradient_max, tuples, bound.
        learning_rate_: the step size used. threshold, tuning: what `tune_threshold` found.

    Raises:
        ValueError: an option out of range, with what is allowed and the nearest match.
    """

    def __init__(
        self,
        k: int = 10,
        method: str = "multilinear",
        id_column: str = "id",
        group_column: str | None = None,
        retrieved_column: str = "retrieved",
        utility_column: str = "utility",
        learning_rate: float | str = "auto",
        epochs: int = 50,
        group_update: str = "mean",
        unseen: float | str = "keep",
        epsilon: float = 0.0,
        delta: float = 0.0,
        dtype: str = "float64",
        seed: int = 0,
        *,
        answer_column: str = "answers",
        output_column: str = "importance",
        prior_strength: float = 2.0,
    ) -> None:
        self.config = ImportanceConfig(
            k=k,
            method=method,
            id_column=id_column,
            group_column=group_column,
            retrieved_column=retrieved_column,
            utility_column=utility_column,
            learning_rate=learning_rate,
            epochs=epochs,
            group_update=group_update,
            unseen=unseen,
            epsilon=epsilon,
            delta=delta,
            dtype=dtype,
            seed=seed,
            answer_column=answer_column,
            output_column=output_column,
            prior_strength=prior_strength,
        )
        self._state: saving.State | None = None

    # --- fitting

    def fit(
        self,
        validation_dataset: Any,
        accelerator: Any = None,
        progress: bool = True,
        *,
        groups: Any = None,
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 10,
        resume_from_checkpoint: str | Path | bool | None = None,
        presharded: bool = False,
        num_threads: int | None = None,
    ) -> "ImportanceWeights":
        """Learn the weights; returns self.

        Args:
            validation_dataset: rows of retrieved ids in rank order and one utility each (and with `group_column` one
                group each, in a column of that name): a Dataset, an IterableDataset, an Arrow table, a list of dicts or
                a dict of lists. In a job of several processes each passes the same rows, and works on a share.
            accelerator: of the job; on its CUDA device gradients are computed there.
            progress: show a bar over the epochs, on the first process.
            groups: id -> group, a mapping or a table of both columns, in place of the column.
            checkpoint_dir: where the first process writes weights and history, every `checkpoint_every` epochs and at
                the end.
            resume_from_checkpoint: a folder to go on from, to the bit; True: `checkpoint_dir`. The first process
                reads it.
            presharded: each process passes rows of its own.
            num_threads: threads of this process; torch's number by default.

        Raises:
            TypeError, ValueError: rows that are not as they have to be, with their number; on all processes.
            FileNotFoundError: no checkpoint to resume from.
        """
        if groups is not None and self.config.group_column is None:
            raise ValueError("groups is given and group_column is None; name the corpus's column of groups")
        ranks = Ranks(accelerator)
        ranks.agree(lambda: num_threads is None or check_count("num_threads", num_threads))
        ranks.same("options", self.config.to_dict())
        checkpoints = Checkpoints(ranks, self.config, checkpoint_dir, checkpoint_every, resume_from_checkpoint)
        problem = prepare(validation_dataset, self.config, ranks, accelerator, groups, presharded, num_threads)
        compat.announce("importance_weights", k=self.config.k, method=self.config.method)
        result = solve(problem, checkpoints, progress)
        self._state = saving.State(
            keys=compact(problem.keys),
            weights=result.weights,
            counts=problem.counts,
            neutral=result.neutral,
            value=result.value,
            learning_rate=result.learning_rate,
            history=result.history,
            rows=problem.rows_digest,
        )
        return self

    @property
    def _fitted(self) -> "saving.State":
        if self._state is None:
            raise RuntimeError(
                "these ImportanceWeights have no weights yet: call fit(validation_dataset) first, or read some with "
                "ImportanceWeights.from_pretrained(folder)"
            )
        return self._state

    @property
    def keys(self) -> pa.Array:
        """Sorted ids or groups, (keys,)."""
        return self._fitted.keys

    @property
    def weights(self) -> np.ndarray:
        """(keys,) float64."""
        return self._fitted.weights

    @property
    def counts(self) -> np.ndarray:
        """(keys,) int64: slots of each key in the validation set."""
        return self._fitted.counts

    @property
    def value(self) -> float:
        """Expected utility at the weights, exact; where nothing is pruned for methods without epochs."""
        return self._fitted.value

    @property
    def history(self) -> list[dict[str, Any]]:
        """A dict an epoch: epoch, value, gradient_max, tuples, bound."""
        return self._fitted.history

    @property
    def learning_rate_(self) -> float | None:
        """The step size used; None for methods without epochs."""
        return self._fitted.learning_rate

    @property
    def threshold(self) -> float | None:
        """What `prune` takes by default; None before `tune_threshold`.

        Not part of what `datasets` hashes, so that tuning makes no `map` run again: a function of your own that reads
        it is found in the cache after it has changed. `prune` is not.
        """
        return self._fitted.threshold

    @property
    def tuning(self) -> list[dict[str, float]]:
        """A dict a candidate of `tune_threshold`: threshold, score, kept."""
        return self._fitted.tuning

    def __len__(self) -> int:
        return len(self.keys)

    def to_dict(self) -> dict[Any, float]:
        """key -> weight."""
        return dict(zip(self.keys.to_pylist(), self.weights.tolist(), strict=True))

    def __repr__(self) -> str:
        state = "not fitted" if self._state is None else f"{len(self)} keys"
        return f"ImportanceWeights(k={self.config.k}, method={self.config.method!r}, {state})"

    # --- weights of a corpus

    @property
    def _lookup(self) -> Lookup:
        state, config = self._fitted, self.config
        return Lookup(config.key_column, state.keys, state.weights, state.neutral, config.unseen)

    def lookup(self, ids: Any) -> np.ndarray:
        """(n,) float64: the weight of each id, or group where weights are of groups.

        ids: list, array, tensor, Series or Arrow array; a null is an id that was never retrieved.

        Raises:
            TypeError: ids of another kind than the keys (strings and integers).
        """
        lookup = self._lookup
        return lookup.values(lookup.places(ids))

    def __call__(self, batch: Any) -> Any:
        """A batch, or an example, of a corpus: for `corpus.map(weights, batched=True)`.

        Returns the column `output_column` for a mapping, and for an Arrow table or a DataFrame that with the column.

        Raises:
            ValueError: the batch has no column of ids (or groups).
        """
        return corpora.with_column(batch, self._lookup, self.config.output_column, self.config.dtype)

    def annotate(self, corpus: Any) -> Any:
        """The corpus with the column of weights; a stream goes through `map`.

        The other columns are not written anew, unless the rows were selected or shuffled before: `datasets` puts those
        in order first.

        Raises:
            TypeError: neither a Dataset nor an IterableDataset.
            ValueError: it has no column of ids (or groups).
        """
        lookup, column = self._lookup, (self.config.output_column, self.config.dtype)
        if isinstance(corpus, IterableDataset):
            return corpora.annotate_stream(corpus, self, *column)
        return corpora.annotate(corpus, lookup, *column)

    def prune(self, corpus: Any, threshold: float | None = None) -> Any:
        """The rows whose weight is at least `threshold` (that of `tune_threshold` by default), in their order.

        Raises:
            ValueError: no threshold at all.
        """
        threshold = self.threshold if threshold is None else threshold
        if threshold is None:
            raise ValueError("there is no threshold: give one, or call tune_threshold(validation_dataset) first")
        return corpora.prune(corpus, self._lookup, threshold)

    def sample(self, corpus: Any, seed: int | None = None) -> Any:
        """The paper's reweighting: each key (a whole group) stays with the probability that is its weight.

        seed: of the draw, the configuration's by default; one uniform number a key, in their order.

        Raises:
            ValueError: a weight outside [0, 1].
        """
        return corpora.sample(corpus, self._lookup, self.config.seed if seed is None else seed)

    def sampler(
        self, dataset: Any, num_samples: int | None = None, replacement: bool = True, seed: int | None = None
    ) -> WeightedRandomSampler:
        """Rows of a data set in proportion to their weights, for `DataLoader(dataset, sampler=...)`.

        num_samples: how many are drawn, as many as there are rows by default. seed: of its own generator, the
        configuration's by default.

        Raises:
            ValueError: negative weights, none above 0, too few of them without replacement, or more than 2^24 rows.
        """
        seed = self.config.seed if seed is None else seed
        return corpora.sampler(dataset, self._lookup, num_samples, replacement, seed)

    # --- answers and scores

    def weighted_vote(self, answers: Any, ids: Any, k: int | None = None) -> Any:
        """The answer with the largest sum of weights among the first k items of weight > 0; ties to the first met.

        answers, ids: (M,) in rank order, or a list of such lists, which gives a list. None where nothing is left.

        Raises:
            ValueError: not as many answers as ids.
        """
        k = self.config.k if k is None else k
        check_count("k", k)
        if len(answers) != len(ids):
            raise ValueError(f"{len(answers)} answers and {len(ids)} ids; each answer needs the id it comes from")
        if len(ids) and not isinstance(ids, pa.Array | pa.ChunkedArray) and np.ndim(ids[0]) > 0:
            return [self.weighted_vote(row, row_ids, k) for row, row_ids in zip(answers, ids, strict=True)]
        padding = self._lookup.padding(np.asarray(ids))
        return votes.weighted_vote(list(answers), np.where(padding, 0.0, self.lookup(ids)), k)

    def rescore(self, scores: Any, ids: Any, higher_is_better: bool = True) -> np.ndarray:
        """Scores of a retriever times the weights; distances (`higher_is_better=False`) divided by them.

        scores, ids: arrays of one shape. An id of -1, a retriever's padding, scores -inf (inf as a distance), and so
        does a distance at weight 0.

        Raises:
            ValueError: shapes differ, or a score is negative: it would rise when it is shrunk.
        """
        return self._lookup.rescore(scores, ids, higher_is_better)

    def tune_threshold(self, validation_dataset: Any, metric: votes.Metric = "vote", *, groups: Any = None) -> float:
        """The best threshold for `prune` on rows that were not fitted; kept in `threshold`, the table in `tuning`.

        metric: "vote": the utility of the most frequent answer of the first k kept; "utility": the mean utility of the
        first k kept; or a callable, which gets {column: lists} of what is kept and returns a number. groups: as in
        `fit`.

        Raises:
            ValueError: "vote" without `answer_column`, unknown metric.
        """
        state = self._fitted
        judge = votes.Judge(validation_dataset, self.config, metric, groups)
        if saving.rows_digest(judge.lists) == state.rows:
            warnings.warn(
                "the threshold is tuned on the rows that the weights were fitted on, and will be too good there; split "
                "the validation set in three: to fit, to tune, to evaluate",
                stacklevel=2,
            )
        places, lookup = self._slots(judge), self._lookup
        table = []
        for threshold in votes.candidates(state.weights, state.counts):
            kept = lookup.kept(places, threshold)
            score = judge.score(kept.astype(np.float64))
            table.append({"threshold": threshold, "score": score, "kept": float(kept.mean()) if len(kept) else 0.0})
        state.tuning = table
        state.threshold = max(table, key=lambda row: (row["score"], -row["threshold"]))["threshold"]
        return state.threshold

    def evaluate(self, dataset: Any, metric: votes.Metric = "vote", *, groups: Any = None) -> dict[str, float | None]:
        """Scores on rows that were neither fitted nor tuned: {"rows", "vanilla", "prune", "weighted_vote"}.

        "prune" is None before `tune_threshold`, "weighted_vote" for metrics other than "vote".
        """
        state = self._fitted
        judge = votes.Judge(dataset, self.config, metric, groups)
        places, lookup = self._slots(judge), self._lookup
        pruned = (
            None if state.threshold is None else judge.score(lookup.kept(places, state.threshold).astype(np.float64))
        )
        return {
            "rows": len(judge.lists),
            "vanilla": judge.score(np.ones(len(places))),
            "prune": pruned,
            "weighted_vote": judge.score(lookup.values(places)) if metric == "vote" else None,
        }

    def _slots(self, judge: votes.Judge) -> np.ndarray:
        """The place among the keys of every slot of a validation set."""
        lists = judge.lists
        return find(self.config.key_column, self.keys, lists.keys)[lists.players()]

    # --- copies

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Also what `datasets` hashes: what a row's weight depends on, and nothing that use changes."""
        state = None if self._state is None else self._state.essence()
        return _restore, (self.config.to_dict(), state)

    def __copy__(self) -> "ImportanceWeights":
        twin = ImportanceWeights(**self.config.to_dict())
        twin._state = None if self._state is None else self._state.copy()
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImportanceWeights":
        return self.__copy__()


def _restore(options: dict[str, Any], essence: tuple[Any, ...] | None) -> ImportanceWeights:
    weights = ImportanceWeights(**options)
    weights._state = None if essence is None else saving.State.of(essence)
    return weights
