"""Where a preference for the anchor comes from: the split of logit[anchor] - logit[target] over a model's parts."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_ext.checks import check_count, check_word
from hf_ext.mcq_bias.batches import batches, evaluating_eagerly
from hf_ext.mcq_bias.contributions import BiasAttribution
from hf_ext.mcq_bias.examples import read_examples
from hf_ext.mcq_bias.families import family_of
from hf_ext.mcq_bias.lens import lens_weights
from hf_ext.mcq_bias.letters import anchor_index
from hf_ext.mcq_bias.scoring import answers, prepare
from hf_ext.mcq_bias.split import captured, terms_of, total_of

TARGETS = ("gold", "runner_up")
# Of the letters' logits, how much the terms of the first batch may miss: rounding, by the precision of the activations.
TOLERANCE = {torch.float16: 0.1, torch.bfloat16: 0.1}
TOLERANCE_FULL = 1e-3


def attribute(
    model: Any,
    tokenizer: Any,
    examples: Iterable[Mapping[str, Any]],
    anchor: str | int = "A",
    target: str = "gold",
    batch_size: int = 8,
    per_position: bool = False,
    letter_prefix: str = " ",
    prepend_bos: bool = False,
    progress: bool = True,
) -> BiasAttribution:
    """Split logit[anchor] - logit[target] at the last position into a sum over neurons, heads and biases.

    With x the final norm's input and dW the difference of the two rows of the output head, a part that adds a vector to
    the residual stream adds its product with u to the difference, u = (g dW - mean(g dW)) / sqrt(var(x) + eps) for
    LayerNorm and g dW / sqrt(mean(x^2) + eps) for RMSNorm. The split is exact; the scale of u comes from all parts.

    The result holds two numbers a neuron and row, 8 n L F bytes in float32: 0.4 GB for 128 rows of a Llama of 7 billion
    parameters.

    Args:
        model: a causal model of the families gpt2, llama, mistral, qwen2, qwen3, without adapters.
        tokenizer: its tokenizer.
        examples: rows with `prompt` and `num_choices` (or `choices`), or `question` and `choices`, as a list of dicts
            or a datasets.Dataset; `label`, an index or a letter, is read for target="gold" only.
        anchor: the letter, or its index, that the model is thought to prefer.
        target: "gold": against the right letter; "runner_up": against the best letter other than the anchor, which
            needs no labels.
        batch_size: prompts in a forward.
        per_position: also split each head's term over source positions.
        letter_prefix, prepend_bos, progress: as in `score_choices`.

    Raises:
        ValueError: before the first forward: an unsupported model, an unknown target, missing or wrong labels, a row
            without a choice for the anchor, and what `score_choices` refuses. At the first: terms that do not add up to
            the model's logits, within 0.1 % of the letters' logits (10 % in half precision).
    """
    check_word("target", target, TARGETS)
    check_count("batch_size", batch_size)
    anchor = anchor_index(anchor)
    family = family_of(model)
    rows = read_examples(examples, with_labels=target == "gold", anchor=anchor)
    questions = prepare(model, tokenizer, rows.prompts, rows.num_choices, letter_prefix, prepend_bos, "examples")
    labels = None if rows.labels is None else torch.tensor(rows.labels)
    arrays: dict[str, np.ndarray] = {}
    length = max(map(len, questions.encoded))
    with evaluating_eagerly(model), captured(family, model, with_attention=per_position) as seen:
        for batch in batches(questions.encoded, batch_size, model.device, progress):
            letters, _, _ = answers(model, batch, questions)
            compared = _compared(letters, anchor, None if labels is None else labels[batch.rows])
            tokens = questions.letters.to(letters.device)
            targets = tokens[compared["target_index"]]
            terms = compared | terms_of(family, model, seen, tokens[anchor].expand_as(targets), targets)
            if not arrays:
                _require_sum(model, terms, letters, TOLERANCE.get(seen.neurons[0].dtype, TOLERANCE_FULL))
            _write(arrays, terms, batch.rows, len(rows), length)
    return BiasAttribution(anchor=anchor, target=target, lens=lens_weights(family, model), **arrays)


def _compared(letters: Tensor, anchor: int, labels: Tensor | None) -> dict[str, Tensor]:
    """What the answer itself says: the fields target_index, logit_difference and selected."""
    others = letters.index_fill(1, torch.tensor(anchor, device=letters.device), -torch.inf)
    target = others.argmax(1) if labels is None else labels.to(letters.device)
    return {
        "target_index": target,
        "logit_difference": letters[:, anchor] - letters.gather(1, target[:, None])[:, 0],
        # Of two letters that are equally good, neither is the answer.
        "selected": (letters[:, anchor] > others.max(1).values) & (target != anchor),
    }


def _require_sum(model: Any, terms: Mapping[str, Tensor], letters: Tensor, tolerance: float) -> None:
    miss = (total_of(terms) - terms["logit_difference"]).abs().max().item()
    size = letters[letters > -torch.inf].abs().max().item() if (letters > -torch.inf).any() else 0.0
    if not miss <= tolerance * size:
        raise ValueError(
            f"the terms of the first batch miss the logits of this {type(model).__name__} by {miss:.3g}, and "
            f"{tolerance * size:.3g} is allowed: it computes something beyond its matrices (an adapter, a hook, a "
            "patched forward), or numbers that are not finite"
        )


def _write(
    arrays: dict[str, np.ndarray], terms: Mapping[str, Tensor], rows: list[int], count: int, length: int
) -> None:
    """Put a batch into its rows of arrays with `count` rows, made at the first batch; positions are right-aligned."""
    for name, term in terms.items():
        values = term.cpu().numpy()
        if name == "head_positions":
            arrays.setdefault(name, np.zeros((count, *values.shape[1:-1], length), values.dtype))
            arrays[name][rows, ..., length - values.shape[-1] :] = values
        else:
            arrays.setdefault(name, np.empty((count, *values.shape[1:]), values.dtype))
            arrays[name][rows] = values
