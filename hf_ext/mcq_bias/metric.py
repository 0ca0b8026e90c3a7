"""The metric behind `evaluate.load("anchored_mcq_bias")`: brings rows to one schema, and then asks `bias`."""

from dataclasses import asdict, replace
from inspect import signature
from typing import Any

import datasets
import evaluate

from hf_ext import compat
from hf_ext.checks import refuse_unknown
from hf_ext.mcq_bias import METRIC as NAME
from hf_ext.mcq_bias.answers import gather
from hf_ext.mcq_bias.bias import measure
from hf_ext.mcq_bias.columns import MIXED, Columns, common_num_choices, read_columns
from hf_ext.mcq_bias.config import OPTIONS, BiasOptions
from hf_ext.mcq_bias.letters import check_num_choices

EXTRA_COLUMNS = ("num_choices", "group", "permutation")

_DESCRIPTION = """\
Positional bias in multiple-choice answers: how often a model picks one letter (the anchor, "A") although it is wrong,
whether that is more than chance, what it costs, and what calibration or reordered choices would give.
"""

_INPUTS = """
Args:
    predictions: rows of scores, one number a choice, or answers: indices, -1 for none, or letters.
    references: indices or letters of the right choices.
    num_choices: one integer, or one a row; without it the length of a row of scores, or what all indices fit in.
    group: labels; rows of one label are the same question with its choices reordered.
    permutation: lists, the option behind each position; without it (position - gold) mod k, for cyclic rotations.
    anchor, confidence, n_resamples, seed: options of `compute`; all but seed can be set by `evaluate.load`, too, as
        can num_choices.
Returns:
    a flat dict of int and float; see the README beside the script for each.
Examples:
    >>> import evaluate
    >>> metric = evaluate.load("anchored_mcq_bias")
    >>> result = metric.compute(predictions=["A", "A", "B", "A"], references=["A", "B", "B", "C"], num_choices=3)
    >>> result["accuracy"], result["anchored_bias_rate"]
    (0.5, 0.6666666666666666)
"""

_CITATION = """\
@inproceedings{li-gao-2025-anchored,
    title = "Anchored Answers: Unravelling Positional Bias in {GPT}-2's Multiple-Choice Questions",
    author = "Li, Ruizhe and Gao, Yanjun",
    booktitle = "Findings of the Association for Computational Linguistics: ACL 2025",
    year = "2025",
    pages = "2439--2465"
}
"""


class AnchoredMCQBias(evaluate.Metric):
    """Positional bias of multiple-choice answers (arXiv 2405.03205), as a metric of `evaluate`.

    Args:
        num_choices: what `compute`, `add` and `add_batch` take where they get none: an integer from 2 to 26.
        anchor, confidence, n_resamples: the same for these options of `compute`.
        host: what `evaluate.load` hands over to every metric: num_process, process_id, experiment_id, ...

    Raises:
        ValueError: an unknown option, with the nearest one, or a value that is not allowed.
    """

    def __init__(
        self,
        config_name: str | None = None,
        *,
        num_choices: int | None = None,
        anchor: str | int = "A",
        confidence: float = 0.95,
        n_resamples: int = 10_000,
        **host: Any,
    ) -> None:
        hosts = [
            name for name in signature(evaluate.EvaluationModule.__init__).parameters if name not in ("self", "kwargs")
        ]
        known = ("num_choices", "anchor", "confidence", "n_resamples", *hosts)
        refuse_unknown(host, known, f"evaluate.load({NAME!r})")  # the host swallows what it does not know
        if config_name is not None:
            raise ValueError(
                f"config_name={config_name!r}: {NAME!r} has no configurations. For the letter: anchor={config_name!r}"
            )
        self.num_choices = None if num_choices is None else check_num_choices(num_choices)
        self.options = BiasOptions(anchor, confidence, n_resamples)
        self._holds_scores: bool | None = None  # what was added since the last compute
        super().__init__(config_name, **host)

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("int64")
        columns = {
            "predictions": datasets.Sequence(datasets.Value("float64")),  # an answer is a row of one number
            "references": number,
            "num_choices": number,
            "group": datasets.Value("string"),
            "permutation": datasets.Sequence(number),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(columns),
            reference_urls=["https://arxiv.org/abs/2405.03205"],
        )

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any] | None:
        """Measure the given rows and those added before; the result on process 0, None on the others.

        Args:
            predictions, references: rows, in addition to those added before; both or neither.
            kwargs: the other columns, and options.

        Raises:
            ValueError: naming the row or the option, its value and what is allowed.
        """
        refuse_unknown(kwargs, ("predictions", "references", *EXTRA_COLUMNS, *OPTIONS), NAME)
        options = replace(self.options, **{name: kwargs[name] for name in OPTIONS if name in kwargs})
        extra = {name: kwargs.get(name) for name in EXTRA_COLUMNS}
        columns, alone = None, [name for name, values in extra.items() if values is not None]
        if predictions is not None or references is not None:
            columns = self._read(predictions, references, **extra)
        elif alone:
            raise ValueError(
                f"{', '.join(alone)} without predictions and references: give them with the rows that they belong to, "
                "to compute, add or add_batch"
            )

        if self.num_process == 1 and self.writer is None:
            if columns is None:
                raise ValueError("predictions and references missing: give them to compute, or add them before")
            compat.announce(NAME, rows=len(columns))
            default = self.num_choices if extra["num_choices"] is None else extra["num_choices"]
            return measure(gather(columns, common_num_choices(default) or 0), options)

        if columns is not None:
            self._store(columns)
        elif self.writer is None:
            self._store(self._read([], []))  # process 0 waits for a file of every process
        self._holds_scores = None
        outcome = super().compute(**asdict(options))
        if isinstance(outcome, ValueError):
            raise outcome
        return outcome

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Keep rows for `compute`.

        Args:
            predictions, references: the rows.
            kwargs: the other columns.

        Raises:
            ValueError: naming the row, its value and what is allowed; nothing of the batch is kept.
        """
        refuse_unknown(kwargs, EXTRA_COLUMNS, f"{NAME}.add_batch")
        self._store(self._read(predictions, references, **kwargs))

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Keep one row for `compute`.

        Args:
            prediction, reference: of the row; `combine(...).add` calls them predictions and references. No prediction
                is an invalid answer.
            kwargs: num_choices, group and permutation of the row.

        Raises:
            ValueError: naming the value and what is allowed; the row is not kept.
        """
        refuse_unknown(kwargs, ("predictions", "references", *EXTRA_COLUMNS), f"{NAME}.add")
        row = {"predictions": prediction, "references": reference} | kwargs
        if row["references"] is None:
            raise ValueError("reference missing: the metric needs prediction and reference")
        others = {name: [value] for name, value in row.items() if name == "predictions" or value is not None}
        self._store(self._read(**others))

    def _read(self, predictions: Any, references: Any, num_choices: Any = None, **others: Any) -> Columns:
        default = self.num_choices if num_choices is None else num_choices
        return read_columns(predictions, references, default, **others)

    def _store(self, columns: Columns) -> None:
        if len(columns):
            has_scores = columns.scores is not None
            if self._holds_scores not in (None, has_scores):
                raise ValueError(MIXED)
        super().add_batch(**columns.to_lists())
        if len(columns):
            self._holds_scores = has_scores

    def _compute(
        self, predictions: Any, references: Any, num_choices: Any, group: Any, permutation: Any, **options: Any
    ) -> dict[str, Any] | ValueError:
        """The result of all rows, or what is wrong with them: raised here, the host would leave its files behind."""
        lists = {
            "predictions": predictions,
            "references": references,
            "num_choices": num_choices,
            "group": group,
            "permutation": permutation,
        }
        compat.announce(NAME, rows=len(references), processes=self.num_process)
        try:
            return measure(gather(Columns.from_lists(lists), self.num_choices or 0), BiasOptions(**options))
        except ValueError as error:
            return error
