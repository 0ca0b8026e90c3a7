"""Multiple-choice prompts, in the wordings of two publications."""

from collections.abc import Sequence

from hf_ext.mcq_bias.letters import LETTERS
from hf_ext.mcq_bias.words import check_word

STYLES = ("paper", "mmlu")


def format_mcq(question: str, choices: Sequence[str], style: str = "paper") -> str:
    """A prompt that ends with "Answer:", so that the model's next token is a letter.

    Args:
        question: stripped of white space around it.
        choices: 2 to 26 texts, stripped; they become A, B, ...
        style: "paper" (arXiv 2405.03205): `Question: {q} Answer Choices: A: {a} B: {b} Answer:`, one line.
            "mmlu" (arXiv 2009.03300): the question, a line `A. {a}` a choice, and `Answer:`.

    Raises:
        ValueError: not 2 to 26 choices, one that is no text or empty, or an unknown style with the nearest.
    """
    check_word("style", style, STYLES)
    question = _text(question, "question")
    if isinstance(choices, str) or not hasattr(choices, "__len__"):
        raise ValueError(f"choices={choices!r} is no list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise ValueError(f"{len(choices)} choices; 2 to {len(LETTERS)} are allowed, one a letter")
    named = [(letter, _text(text, f"choice {letter}")) for letter, text in zip(LETTERS, choices, strict=False)]
    if style == "mmlu":
        return "\n".join([question, *(f"{letter}. {text}" for letter, text in named), "Answer:"])
    return f"Question: {question} Answer Choices: {' '.join(f'{letter}: {text}' for letter, text in named)} Answer:"


def _text(value: str, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what}={value!r} is no text")
    return value.strip()
