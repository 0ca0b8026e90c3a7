"""What a causal model answers to multiple-choice prompts: the logits of the letters behind "Answer:"."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ext.mcq_bias.batches import Batch, batches, encode, evaluating
from hf_ext.mcq_bias.examples import check_num_choices
from hf_ext.mcq_bias.families import at_least_float32, output_head, without_autocast
from hf_ext.mcq_bias.letters import LETTERS
from hf_ext.mcq_bias.words import check_count

STEM = "Answer:"
# A head in bfloat16 rounds each logit to 8 bits.
ROUNDED = 0.05


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
            `batch_size` < 1. At the first: logits of a half precision model that are not its head's output.
    """
    check_count("batch_size", batch_size)
    counts = _counts(prompts, choices)
    questions = prepare(model, tokenizer, prompts, counts, letter_prefix, prepend_bos)
    scores = np.full((len(counts), len(questions.letters)), -np.inf)
    top1 = np.empty(len(counts), dtype=np.int64)
    with evaluating(model):
        for batch in batches(questions.encoded, batch_size, model.device, progress):
            letters, vocabulary = answers(model, batch, questions)
            scores[batch.rows] = letters.double().cpu().numpy()
            top1[batch.rows] = _top1(vocabulary, letters, questions.letters).cpu().numpy()
    return ChoiceScores(scores, questions.num_choices.numpy(), top1)


def prepare(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    num_choices: Sequence[int],
    letter_prefix: str,
    prepend_bos: bool,
) -> Questions:
    """
    Raises:
        ValueError: what `output_head`, `encode` and `letter_tokens` refuse.
    """
    output_head(model)
    letters = letter_tokens(tokenizer, LETTERS[: max(num_choices)], letter_prefix)
    encoded = encode(model, tokenizer, prompts, prepend_bos)
    return Questions(encoded, torch.tensor(num_choices), torch.tensor(letters))


def letter_tokens(tokenizer: Any, letters: Sequence[str], letter_prefix: str = " ") -> list[int]:
    """The one token by which each letter continues "Answer:".

    Raises:
        ValueError: none or several tokens, or one that is unknown or another letter's too; with the tokens.
    """
    if not isinstance(letter_prefix, str):
        raise ValueError(f"letter_prefix={letter_prefix!r} is no text")
    stem = list(tokenizer(STEM)["input_ids"])
    owner: dict[int, str] = {}
    for letter in letters:
        text = f"{STEM}{letter_prefix}{letter}"
        ids = list(tokenizer(text)["input_ids"])
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


def answers(model: Any, batch: Batch, questions: Questions) -> tuple[Tensor, Tensor]:
    """((B, K) logits of the letters in at least float32, -inf beyond a row's choices; (B, V) the model's own)."""
    head = output_head(model)
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, -1]))
    try:
        output = model(**batch.inputs, use_cache=False, logits_to_keep=1, return_dict=True)
    finally:
        handle.remove()
    vocabulary = output.logits[:, -1]
    letters = _letter_logits(head, seen[-1], vocabulary, questions.letters.to(vocabulary.device))
    places = torch.arange(letters.shape[1], device=letters.device)
    counts = questions.num_choices[batch.rows].to(letters.device)
    return letters.masked_fill(places >= counts[:, None], -torch.inf), vocabulary


def _letter_logits(head: nn.Module, hidden: Tensor, vocabulary: Tensor, tokens: Tensor) -> Tensor:
    """(B, K) in at least float32: logits of half precision tie, and an argmax would then invent a bias."""
    own = at_least_float32(vocabulary[:, tokens])
    if all(tensor.dtype in (torch.float32, torch.float64) for tensor in (vocabulary, hidden, head.weight)):
        return own
    bias = getattr(head, "bias", None)
    with without_autocast(hidden):
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


def _top1(vocabulary: Tensor, letters: Tensor, tokens: Tensor) -> Tensor:
    highest, token = vocabulary.max(-1)
    alone = (vocabulary == highest[:, None]).sum(-1) == 1
    is_letter = (token[:, None] == tokens.to(token.device)) & (letters > -torch.inf)
    return torch.where(alone & is_letter.any(-1), is_letter.int().argmax(-1), -1)


def _counts(prompts: Sequence[str], choices: Any) -> list[int]:
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts: found a {type(prompts).__name__}, expected a list of texts")
    if not len(prompts):
        raise ValueError("there are no prompts")
    if isinstance(choices, str) or not hasattr(choices, "__len__"):
        return [check_num_choices(choices)] * len(prompts)
    if len(choices) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and choices for {len(choices)}; one number, or list, a prompt")
    counts = []
    for row, choice in enumerate(choices):
        if isinstance(choice, str):
            raise ValueError(f"choices[{row}]={choice!r} is neither a number nor a list of choices")
        try:
            counts.append(check_num_choices(len(choice) if hasattr(choice, "__len__") else choice))
        except ValueError as error:
            raise ValueError(f"choices[{row}]: {error}") from None
    return counts


def _shown(tokenizer: Any, ids: list[int]) -> str:
    return " ".join(f"{id_} ({token!r})" for id_, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True))
