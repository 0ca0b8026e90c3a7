"""What a causal model answers to multiple-choice prompts: the logits of the letters behind "Answer:"."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ext.checks import check_count
from hf_ext.mcq_bias.batches import Batch, asked, batches, encode, evaluating_eagerly
from hf_ext.mcq_bias.examples import read_counts, untouched
from hf_ext.mcq_bias.families import at_least_float32, output_head
from hf_ext.mcq_bias.letters import LETTERS
from hf_ext.mcq_bias.trial import Trial
from hf_ext.modes import no_autocast

STEM = "Answer:"
# A head in bfloat16 rounds each logit to 8 bits.
ROUNDED = 0.05


class NotFiniteError(ValueError):
    """A model's logits are NaN or infinite."""


@dataclass(frozen=True, eq=False, repr=False)
class ChoiceScores:
    """Scores for `bias_metrics` or `evaluate.load("anchored_mcq_bias")`, n prompts with up to K choices.

    Args:
        scores: (n, K) float64, the logit of each letter; -inf beyond a row's choices.
        num_choices: (n,) int64.
        top1: (n,) int64, the letter's index where the one highest logit of the whole vocabulary is one of the row's
            letters, else -1. This is the paper's notion of "answers A"; the best of the letters is another.
    """

    scores: np.ndarray
    num_choices: np.ndarray
    top1: np.ndarray

    def __repr__(self) -> str:
        return f"ChoiceScores({len(self.scores)} prompts of up to {self.scores.shape[1]} choices)"


@dataclass(frozen=True, eq=False)
class Questions:
    """Checked prompts. encoded: tokens of each. num_choices: (n,) int64. letters: (K,) tokens of A, B, ..."""

    encoded: list[list[int]]
    num_choices: Tensor
    letters: Tensor


def score_choices(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    choices: int | Sequence[int] | Sequence[Sequence[Any]],
    batch_size: int = 8,
    letter_prefix: str = " ",
    prepend_bos: bool = False,
    progress: bool = True,
) -> ChoiceScores:
    """Logits of the letters as the next token of each prompt. Tokenizer and `model.training` are left as found.

    Args:
        model: a causal model of transformers, or a PeftModel.
        tokenizer: its tokenizer; padding is done here, so that it needs no padding token.
        prompts: texts that end where the letter would follow, see `format_mcq`.
        choices: their number, the same for all prompts; or a number a prompt; or a list of choices a prompt.
        batch_size: prompts in a forward.
        letter_prefix: what stands between "Answer:" and the letter.
        prepend_bos: begin each prompt with the BOS token unless the tokenizer adds it (GPT-2's does not).
        progress: show a bar over the batches.

    Raises:
        ValueError: before the first forward: no causal model, no prompts, one longer than the model's positions (never
            cut), numbers of choices that do not fit, a letter that is not one token, two that are the same,
            a prompt that ends in a blank before a `letter_prefix` that begins with one, tokens that the model does not
            have, `batch_size` < 1. At the first: logits of a half precision model that are not its head's output; a
            model that is not causal, or answers otherwise in a batch than alone (tried on a prompt where its family is
            none of those of `attribute`). At any: logits that are not finite, with their rows.
    """
    check_count("batch_size", batch_size)
    counts = read_counts(prompts, choices)
    questions = prepare(model, tokenizer, prompts, counts, letter_prefix, prepend_bos)
    scores = np.full((len(counts), len(questions.letters)), -np.inf)
    top1 = np.empty(len(counts), dtype=np.int64)
    trial = Trial(model)
    with evaluating_eagerly(model):
        for batch in batches(questions.encoded, batch_size, model.device, progress):
            letters, vocabulary, half = answers(model, batch, questions)
            _require_finite(letters, batch.rows)
            trial.check(model, batch, questions.encoded, vocabulary, half)
            scores[batch.rows] = letters.cpu().double().numpy()  # MPS has no float64
            top1[batch.rows] = _top1(vocabulary, letters, questions.letters).cpu().numpy()
    return ChoiceScores(scores, questions.num_choices.numpy(), top1)


def prepare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    num_choices: Sequence[int],
    letter_prefix: str,
    prepend_bos: bool,
    name: str = "prompts",
) -> Questions:
    """
    Raises:
        ValueError: what `output_head`, `encode` and `letter_tokens` refuse, a head or a tokenizer that does not fit, a
            blank before the letter's own; rows are those of `name`.
    """
    _require_weights(model)
    letters = letter_tokens(tokenizer, LETTERS[: max(num_choices)], letter_prefix)
    with untouched(tokenizer):
        encoded = encode(model, tokenizer, prompts, prepend_bos, name)
    for row, prompt in enumerate(prompts):
        if prompt[-1:].isspace() and letter_prefix[:1].isspace():
            raise ValueError(
                f"{name}[{row}] ends in {prompt[-1]!r}, and letter_prefix={letter_prefix!r} puts another blank before "
                'the letter: strip the prompt, or give letter_prefix=""'
            )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for row, ids in enumerate([*encoded, letters]):
        if max(ids) >= vocabulary:
            where = f"{name}[{row}]" if row < len(encoded) else "a letter"
            raise ValueError(
                f"{where} has the token {max(ids)}, and the model {vocabulary} tokens: this is not its tokenizer"
            )
    return Questions(encoded, torch.tensor(num_choices), torch.tensor(letters))


def letter_tokens(tokenizer: Any, letters: Sequence[str], letter_prefix: str = " ") -> list[int]:
    """The one token by which each letter continues "Answer:".

    Raises:
        ValueError: none or several tokens, or one that is unknown or another letter's too; with the tokens.
    """
    if not isinstance(letter_prefix, str):
        raise ValueError(f"letter_prefix={letter_prefix!r} is no text")
    if not callable(tokenizer):
        raise ValueError(f"tokenizer={tokenizer!r} is no tokenizer; load one with AutoTokenizer.from_pretrained")
    texts = [f"{STEM}{letter_prefix}{letter}" for letter in letters]
    with untouched(tokenizer):
        stem, *rows = (list(tokenizer(text)["input_ids"]) for text in (STEM, *texts))
    if stem[-1:] == [getattr(tokenizer, "eos_token_id", None)]:
        raise ValueError(
            f"the tokenizer puts its EOS token behind every text, {STEM!r} is {_shown(tokenizer, stem)}, and no letter "
            "follows that: load it with add_eos_token=False"
        )
    owner: dict[int, str] = {}
    for letter, text, ids in zip(letters, texts, rows, strict=True):
        if ids[:-1] != stem:
            raise ValueError(
                f"{letter!r} is not one token behind {STEM!r}: {text!r} is {_shown(tokenizer, ids)}, and {STEM!r} is "
                f"{_shown(tokenizer, stem)}. Try another letter_prefix than {letter_prefix!r}"
            )
        if ids[-1] == tokenizer.unk_token_id:
            raise ValueError(f"the tokenizer does not know {letter!r}: {text!r} is {_shown(tokenizer, ids)}")
        if ids[-1] in owner:
            raise ValueError(f"the letters {owner[ids[-1]]!r} and {letter!r} are one token, {_shown(tokenizer, ids)}")
        owner[ids[-1]] = letter
    return list(owner)


def answers(model: Any, batch: Batch, questions: Questions) -> tuple[Tensor, Tensor, bool]:
    """((B, K) logits of the letters in at least float32, -inf beyond a row's choices; (B, V) the model's own; whether
    those are of half precision)."""
    head = output_head(model)
    seen: list[tuple[Tensor, torch.dtype]] = []
    handle = head.register_forward_hook(lambda _, args, output: seen.append((args[0][:, -1], output.dtype)))
    try:
        with asked(batch.rows, len(questions.encoded)):
            output = model(**batch.inputs, use_cache=False, logits_to_keep=1, return_dict=True)
    finally:
        handle.remove()
    vocabulary, (hidden, dtype) = output.logits[:, -1], seen[-1]
    # Of the head and not of the logits, which Accelerate's mixed precision brings to float32 afterwards.
    half = not {dtype, vocabulary.dtype, hidden.dtype, head.weight.dtype} <= {torch.float32, torch.float64}
    tokens = questions.letters.to(vocabulary.device)
    letters = _exact(head, hidden, vocabulary, tokens) if half else vocabulary[:, tokens]
    places = torch.arange(letters.shape[1], device=letters.device)
    counts = questions.num_choices[batch.rows].to(letters.device)
    return letters.masked_fill(places >= counts[:, None], -torch.inf), vocabulary, half


def _exact(head: nn.Module, hidden: Tensor, vocabulary: Tensor, tokens: Tensor) -> Tensor:
    """(B, K) in at least float32: logits of half precision tie, and an argmax would then invent a bias."""
    own = at_least_float32(vocabulary[:, tokens])
    bias = getattr(head, "bias", None)
    with no_autocast(hidden):
        logits = nn.functional.linear(
            at_least_float32(hidden),
            at_least_float32(head.weight[tokens]),
            None if bias is None else at_least_float32(bias[tokens]),
        )
    if ((own - logits).abs() > ROUNDED * logits.abs().max()).any():
        raise ValueError(
            f"the logits of this model are not its output head's ({type(head).__name__}) alone, as with a scale, a "
            "soft cap, or an adapter on the head, and cannot be made exact from its half precision: load it in float32"
        )
    return logits


def _require_weights(model: Any) -> None:
    """
    Raises:
        ValueError: the model has no numbers, or its head no plain ones.
    """
    head = output_head(model)
    if model.device.type == "meta":
        raise ValueError(
            f"this {type(model).__name__} is on the meta device, without weights: load or place them first"
        )
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            f"the output head is a {type(head).__module__}.{type(head).__name__} without a plain weight: load the "
            "model without quantising its head"
        )


def _require_finite(letters: Tensor, rows: list[int]) -> None:
    """
    Raises:
        NotFiniteError: a row without a best letter. letters (B, K).
    """
    if not (bad := ~letters.max(1).values.isfinite()).any():
        return
    named = sorted(row for row, is_bad in zip(rows, bad.tolist(), strict=True) if is_bad)
    raise NotFiniteError(
        f"the logits of prompts {', '.join(map(str, named[:5]))}{', ...' if len(named) > 5 else ''} are not finite. "
        'Eager attention does so in float64 behind padding (attn_implementation="sdpa" does not), float16 where it '
        "overflows (bfloat16 does not), and weights that are NaN do"
    )


def _top1(vocabulary: Tensor, letters: Tensor, tokens: Tensor) -> Tensor:
    highest, token = vocabulary.max(-1)
    alone = (vocabulary == highest[:, None]).sum(-1) == 1
    is_letter = (token[:, None] == tokens.to(token.device)) & (letters > -torch.inf)
    return torch.where(alone & is_letter.any(-1), is_letter.int().argmax(-1), -1)


def _shown(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(f"{id_} ({token!r})" for id_, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
