"""Repair of a preference for one letter: a small, reversible edit of value vectors, delivered as a LoRA adapter."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from peft import PeftModel

import hf_ext
from hf_ext import compat
from hf_ext.checks import check_count
from hf_ext.mcq_bias.attribution import attribute
from hf_ext.mcq_bias.contributions import BiasAttribution
from hf_ext.mcq_bias.edits import (
    Chosen,
    Plan,
    RankOne,
    as_adapter,
    edits_for,
    heads_for_anchor,
    neurons_for_anchor,
    tried,
)
from hf_ext.mcq_bias.examples import Examples, read_examples
from hf_ext.mcq_bias.families import family_of
from hf_ext.mcq_bias.letters import LETTERS
from hf_ext.mcq_bias.saving import prompt_hash
from hf_ext.mcq_bias.scoring import letter_tokens
from hf_ext.mcq_bias.strength import Exam, matching_strength, over_answers


def mitigate(
    model: Any,
    tokenizer: Any,
    dev_examples: Iterable[Mapping[str, Any]],
    method: str = "project",
    components: str = "mlp",
    strength: float | str = "match",
    n: int = 64,
    anchor: str | int = "A",
    batch_size: int = 64,
    letter_prefix: str = " ",
    prepend_bos: bool = False,
    progress: bool = True,
    guard_examples: Iterable[Mapping[str, Any]] | None = None,
) -> PeftModel:
    """Weaken what makes a model answer the anchor, without labels, as a LoRA adapter of rank one a layer.

    With U[t] the row of token t in the output head as the final norm reads it, and e the unit vector along U[anchor]
    minus the mean of U over the other letters:

    - "project": v_i -= s (v_i . e) e for the n value vectors of MLP neurons that speak most for the anchor, and
      W_O,h -= s (W_O,h e) e' for every head that does. s = 1 removes e exactly.
    - "shift": v_i -= s sign(mean activation) e, MLP only.
    - "paper" (arXiv 2405.03205): v += s (8 mean U_c[gold] - U_c[anchor]), the gold letters those of the
      wrong answers in `dev_examples`, U_c centred over the vocabulary, for the one neuron that speaks most for the
      anchor against the gold letter; n is not read. s = 1 has the paper's weights. The paper edits with the gold letter
      of the very sample that it scores next; with a random letter the model then says the random letter, and an
      untrained one becomes perfect. That is not offered.

    PEFT wraps the given model in place and freezes it; `unload()` on the result gives it back, its weights bit for bit,
    and frozen: `requires_grad_(True)` before it is trained again. Call this in one process, with the model itself and
    no DistributedDataParallel around it. Saving, loading, `disable_adapter` and `merge_and_unload` are PEFT's own.
    Compare with output calibration, which is cheaper: `mitigation_report`.

    Args:
        model: a causal model of the families gpt2, llama, mistral, qwen2, qwen3, without adapters.
        tokenizer: its tokenizer.
        dev_examples: rows with `prompt` and `num_choices` (or `choices`), or `question` and `choices`. `label` is read
            for method="paper" only.
        method: "project", "shift" or "paper".
        components: "mlp", "attention" or "both".
        strength: s, at least 0; or "match": the s at which the anchor is answered as often as chance would have it on
            `dev_examples`, the mean of 1/k.
        n: how many neurons are edited, at most.
        anchor: the letter, or its index.
        batch_size: prompts in a forward.
        letter_prefix, prepend_bos, progress: as in `score_choices`.
        guard_examples: labelled rows, none of them in `dev_examples`, on which the accuracy must not fall.

    Returns:
        A PeftModel with `mcq_bias`, a dict: method, components, n, strength, anchor, letter_prefix, prepend_bos,
        target_share, share_before and share_after (of the anchor among the answers to `dev_examples`), edited (layer
        -> neurons), edited_heads (layer -> heads), fit_prompts (hashes), versions.

    Raises:
        ValueError: an option or example that is not as it has to be; a model that has adapters already; one that never
            answers the anchor, or without a component that favours it; an accuracy that falls on `guard_examples`;
            logits that are not finite. The model is as it was.
    """
    plan = Plan(method, components, strength, n, anchor)
    family = family_of(model)
    check_count("batch_size", batch_size)
    dev = read_examples(dev_examples, plan.needs_labels, plan.anchor, name="dev_examples")
    asking = {"batch_size": batch_size, "letter_prefix": letter_prefix, "prepend_bos": prepend_bos}
    exam = Exam(model, tokenizer, dev.prompts, dev.num_choices, asking, "dev_examples")
    exam.check()
    guard = _guard(exam, guard_examples, plan)

    before = exam.share(plan.anchor)
    _require_answers(before, "as it is")
    if before == 0:
        raise ValueError(_nothing(plan.anchor))
    target = "gold" if plan.needs_labels else "runner_up"
    attribution = attribute(model, tokenizer, _rows(dev), plan.anchor, target, progress=progress, **asking)
    if not attribution.selected.any():
        raise ValueError(_nothing(plan.anchor, " wrongly" if plan.needs_labels else " alone"))
    neurons, heads = _chosen(plan, attribution)
    tokens = letter_tokens(tokenizer, LETTERS[: max(dev.num_choices)], letter_prefix)
    with torch.no_grad():
        edits = edits_for(plan, family, model, attribution, tokens, neurons, heads)
    chosen, after = _strength(plan, exam, edits, before, progress)
    _require_answers(after, f"at strength {chosen:g}")
    if guard is not None:
        _require_accuracy(*guard, edits, chosen)

    adapted = as_adapter(model, edits, chosen)
    adapted.mcq_bias = {
        **asdict(plan),
        "strength": chosen,
        "anchor": LETTERS[plan.anchor],
        "letter_prefix": letter_prefix,
        "prepend_bos": prepend_bos,
        "target_share": exam.target_share(),
        "share_before": before,
        "share_after": after,
        "edited": neurons,
        "edited_heads": heads,
        "fit_prompts": sorted({prompt_hash(prompt) for prompt in dev.prompts}),
        "versions": _versions(),
    }
    return adapted


def _rows(examples: Examples) -> list[dict[str, Any]]:
    labels = [None] * len(examples) if examples.labels is None else examples.labels
    columns = zip(examples.prompts, examples.num_choices, labels, strict=True)
    return [{"prompt": prompt, "num_choices": k, "label": label} for prompt, k, label in columns]


def _guard(exam: Exam, examples: Any, plan: Plan) -> tuple[Exam, list[int]] | None:
    """The questions that watch over accuracy, and their labels."""
    if examples is None:
        if plan.method == "paper":
            warnings.warn(
                "method='paper' without guard_examples: nothing checks that the accuracy does not fall", stacklevel=3
            )
        return None
    rows = read_examples(examples, with_labels=True, name="guard_examples")
    if shared := len(set(rows.prompts) & set(exam.prompts)):
        raise ValueError(f"guard_examples: {shared} of its prompts are in dev_examples too; a guard sees others")
    guard = replace(exam, prompts=rows.prompts, num_choices=rows.num_choices, name="guard_examples")
    guard.check()
    return guard, rows.labels


def _chosen(plan: Plan, attribution: BiasAttribution) -> tuple[Chosen, Chosen]:
    """(neurons, heads) to edit."""
    neurons = heads = {}
    if plan.components != "attention":
        neurons = neurons_for_anchor(attribution, 1 if plan.method == "paper" else plan.n)
    if plan.components != "mlp":
        heads = heads_for_anchor(attribution)
    if not neurons and not heads:
        raise ValueError(f"no component favours the anchor {LETTERS[plan.anchor]} on dev_examples: nothing to mitigate")
    return neurons, heads


def _strength(plan: Plan, exam: Exam, edits: Sequence[RankOne], before: float, progress: bool) -> tuple[float, float]:
    """(strength, share of the anchor at it)."""

    def share_at(strength: float) -> float:
        with tried(exam.model, edits, strength):
            return exam.share(plan.anchor)

    if plan.strength != "match":
        return plan.strength, share_at(plan.strength)
    target = exam.target_share()
    if over_answers(before, target, len(exam.prompts)):
        return matching_strength(share_at, target, plan.anchor, progress)
    warnings.warn(
        f"the model does not over-answer {LETTERS[plan.anchor]}: its share is {before:.3f} on dev_examples, and chance "
        f"{target:.3f}. The strength is 0, and the adapter does nothing",
        stacklevel=3,
    )
    return 0.0, before


def _require_accuracy(guard: Exam, labels: list[int], edits: Sequence[RankOne], strength: float) -> None:
    before = guard.accuracy(labels)
    with tried(guard.model, edits, strength):
        after = guard.accuracy(labels)
    if after < before:
        raise ValueError(
            f"the accuracy on guard_examples falls from {before:.4f} to {after:.4f} at strength {strength:g}; the "
            "model is left as it was"
        )


def _require_answers(share: float, when: str) -> None:
    if math.isinf(share):
        raise ValueError(
            f"some logits of the model on dev_examples are not finite {when}, so that it has no answer; the model is "
            "left as it was"
        )


def _nothing(anchor: int, how: str = "") -> str:
    return f"the model never answers the anchor {LETTERS[anchor]}{how} on dev_examples: nothing to mitigate"


def _versions() -> dict[str, str | None]:
    hosts = {name: compat.supported(name)[0] for name in ("torch", "transformers", "peft")}
    return {"hf_ext": hf_ext.__version__, **hosts}
