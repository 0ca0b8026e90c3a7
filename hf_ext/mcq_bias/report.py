"""What a mitigation did on held-out examples, beside its cheap rival, output calibration."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from hf_ext.mcq_bias.bias import bias_metrics
from hf_ext.mcq_bias.examples import read_examples
from hf_ext.mcq_bias.letters import LETTERS, anchor_index
from hf_ext.mcq_bias.saving import facts_of, prompt_hash
from hf_ext.mcq_bias.scoring import prepare, score_choices

ROWS = ("before", "output calibration", "after")
SHOWN = ("accuracy", "anchored_bias_rate", "cmh_z", "tvd", "recall_std")


@dataclass(frozen=True)
class MitigationReport:
    """The same examples before and after a mitigation; `str()` is a table.

    Args:
        anchor: the letter.
        before: outputs of `bias_metrics` with the adapter disabled. Its `calibrated_accuracy` and
            `calibrated_anchored_bias_rate` are the rival: each letter's mean score subtracted, no weight edited.
        after: the same with the adapter.
        localisation: number of edited neurons and of edited heads in each layer, {"neurons": {layer: number}, "heads":
            {...}}: where the preference was found. None of an adapter that came without its record.
    """

    anchor: str
    before: dict[str, int | float]
    after: dict[str, int | float]
    localisation: dict[str, dict[int, int]] | None = None

    def to_pandas(self) -> Any:
        """A DataFrame with the rows before, output calibration and after. NaN: not computed for calibration."""
        import pandas

        return pandas.DataFrame(self._table(), index=list(ROWS))

    def __str__(self) -> str:
        table = self._table()
        width = max(map(len, ROWS))
        lines = [f"{self.before['n']} examples, anchor {self.anchor}"]
        lines.append(" " * width + "".join(f"{name:>{_width(name)}}" for name in table))
        for row, title in enumerate(ROWS):
            cells = "".join(f"{_number(column[row]):>{_width(name)}}" for name, column in table.items())
            lines.append(f"{title:<{width}}{cells}")
        for kind, layers in (self.localisation or {}).items():
            if layers:
                lines.append(f"edited {kind}: " + ", ".join(f"{n} in layer {layer}" for layer, n in layers.items()))
        return "\n".join(lines)

    def _table(self) -> dict[str, list[float]]:
        return {
            name: [self.before[name], self.before.get(f"calibrated_{name}", math.nan), self.after[name]]
            for name in SHOWN
        }


def mitigation_report(
    pm: PeftModel,
    tokenizer: Any,
    examples: Iterable[Mapping[str, Any]],
    anchor: str | int | None = None,
    batch_size: int = 64,
    letter_prefix: str | None = None,
    prepend_bos: bool | None = None,
    progress: bool = True,
) -> MitigationReport:
    """Measure bias and accuracy with and without the adapter, on labelled examples that the fit has not seen.

    Args:
        pm: what `mitigate` or `load_mitigation` returned.
        tokenizer: the tokenizer of the model.
        examples: rows as for `mitigate`, with `label`.
        anchor: the letter, or its index.
        letter_prefix, prepend_bos: as in `score_choices`. These and the anchor are by default those of the fit, and
            "A", " " and False where `pm` has no record of it. Others than those of the fit cause a warning.
        batch_size, progress: as in `score_choices`.

    Raises:
        ValueError: `pm` is no PeftModel; missing or wrong labels; what `score_choices` refuses.
    """
    if not isinstance(pm, PeftModel):
        raise ValueError(f"found a {type(pm).__name__}, expected the PeftModel that mitigate returns")
    given = {"anchor": anchor, "letter_prefix": letter_prefix, "prepend_bos": prepend_bos}
    if anchor is not None:
        given["anchor"] = LETTERS[anchor_index(anchor)]
    asking = _as_in_the_fit(pm, given)
    index = anchor_index(asking.pop("anchor"))
    rows = read_examples(examples, with_labels=True)
    prepare(pm, tokenizer, rows.prompts, rows.num_choices, **asking, name="examples")
    _warn_of_overlap(pm, rows.prompts)

    def measured() -> dict[str, int | float]:
        scores = score_choices(
            pm, tokenizer, rows.prompts, rows.num_choices, batch_size=batch_size, progress=progress, **asking
        )
        return bias_metrics(scores.scores, rows.labels, num_choices=scores.num_choices, anchor=index)

    with pm.disable_adapter():
        before = measured()
    return MitigationReport(LETTERS[index], before, measured(), _localisation(pm))


def _localisation(pm: PeftModel) -> dict[str, dict[int, int]] | None:
    facts = facts_of(pm)
    if facts is None:
        return None
    kinds = {"neurons": facts.get("edited", {}), "heads": facts.get("edited_heads", {})}
    return {
        kind: {int(layer): len(chosen[layer]) for layer in sorted(chosen, key=int)} for kind, chosen in kinds.items()
    }


def _as_in_the_fit(pm: PeftModel, given: dict[str, Any]) -> dict[str, Any]:
    """Each option as given, else as in the fit, else its usual value."""
    fit, asking = facts_of(pm) or {}, {}
    for name, usual in (("anchor", "A"), ("letter_prefix", " "), ("prepend_bos", False)):
        recorded = fit.get(name, usual)
        asking[name] = recorded if given[name] is None else given[name]
        if name in fit and asking[name] != recorded:
            warnings.warn(
                f"{name}={asking[name]!r}, and the fit had {recorded!r}: what is measured is not what was mitigated",
                stacklevel=3,
            )
    return asking


def _warn_of_overlap(pm: PeftModel, prompts: list[str]) -> None:
    facts = facts_of(pm)
    if facts is None:
        warnings.warn(
            "this model has no mcq_bias, as after PeftModel.from_pretrained (load_mitigation reads it): whether these "
            "prompts occurred in the fit is not known",
            stacklevel=3,
        )
        return
    fitted = set(facts["fit_prompts"])
    seen = sum(prompt_hash(prompt) in fitted for prompt in prompts)
    if seen:
        warnings.warn(
            f"{seen} of the {len(prompts)} prompts occurred in the fit: their numbers say nothing of new ones",
            stacklevel=3,
        )


def _width(name: str) -> int:
    return 2 + max(len(name), len("-000.000"))


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"
