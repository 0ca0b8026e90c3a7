"""Multiple-choice questions: their wordings, where the options stand in them, and rows as users have them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_ext.checks import check_word
from hf_ext.mcq_bias.letters import FEWEST, LETTERS, MOST, check_num_choices, choice_index, plain

# What stands before the options, before each of them, and at the end.
STYLES = {
    "paper": ("Question: {} Answer Choices:", " {}: ", " Answer:"),
    "mmlu": ("{}", "\n{}. ", "\nAnswer:"),
}
WHERE = ("letter", "colon", "content")
KINDS = "a list of dicts or a datasets.Dataset"


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
    check_word("style", style, tuple(STYLES))
    question = _text(question, "question")
    if not _is_list(choices, "choices"):
        raise ValueError(f"choices={choices!r} is no list of texts")
    if not FEWEST <= len(choices) <= MOST:
        raise ValueError(f"{len(choices)} choices; {FEWEST} to {MOST} are allowed, one a letter")
    start, mark, end = STYLES[style]
    options = (
        mark.format(letter) + _text(text, f"choice {letter}") for letter, text in zip(LETTERS, choices, strict=False)
    )
    return start.format(question) + "".join(options) + end


def _text(value: str, what: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{what}={value!r} is no text")
    return value.strip()


def option_positions(
    tokenizer: Any, prompts: Sequence[str], num_choices: int | Sequence[int], where: str = "letter"
) -> np.ndarray:
    """Where the options stand in prompts of `format_mcq`, as `recalibrate_attention` takes it.

    Args:
        tokenizer: a fast tokenizer, which knows the characters of its tokens.
        prompts: texts that end with a question in one of the two wordings; others, with answers, may come before it.
        num_choices: one integer for all, or one a prompt.
        where: the token of an option's "letter" (A), of the "colon" behind it (the stop in "mmlu"), or the first of its
            "content".

    Returns:
        (rows, largest number of choices) int64, counted from the end: -1 is the last token; 0 beyond a row's choices.

    Raises:
        ValueError: a slow tokenizer, an unknown `where`, another number of choices, or a prompt in neither wording or
            in which an option's mark, such as " B: ", occurs more than once; with its row.
    """
    check_word("where", where, WHERE)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not know the characters of its tokens: use a fast tokenizer")
    counts = read_counts(prompts, num_choices, "num_choices")
    positions = np.zeros((len(prompts), max(counts)), np.int64)
    for row, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
        try:
            places = _characters(prompt, count, where)
            with untouched(tokenizer):
                encoded = tokenizer(prompt)
            tokens = [encoded.char_to_token(place) for place in places]
            if None in tokens:
                raise ValueError(f"the tokenizer leaves out {prompt[places[tokens.index(None)]]!r}, part of an option")
            positions[row, :count] = np.array(tokens) - len(encoded["input_ids"])
        except ValueError as error:
            raise ValueError(f"prompts[{row}]: {error}") from None
    return positions


def _characters(prompt: str, count: int, where: str) -> list[int]:
    """Index in `prompt` of the letter of each option, of the colon, or of the content."""
    style = next((style for style in STYLES.values() if isinstance(prompt, str) and prompt.endswith(style[-1])), None)
    if style is None:
        raise ValueError(f"{prompt!r} does not end as format_mcq has it")
    _, mark, end = style
    start = prompt.rfind(end, 0, -len(end)) + 1  # behind the questions before it
    marks = [mark.format(letter) for letter in LETTERS[:count]]
    for text in marks:
        if (times := prompt.count(text, start)) != 1:
            raise ValueError(f"{text!r} is found {times} times in its last question, and once is expected")
    found = [prompt.index(text, start) for text in marks]
    if found != sorted(found):
        raise ValueError(f"its options are not in the order {', '.join(LETTERS[:count])}")
    return [place + {"letter": 1, "colon": 2, "content": len(marks[0])}[where] for place in found]


@contextmanager
def untouched(tokenizer: Any) -> Iterator[None]:
    """A fast tokenizer truncates and pads as before afterwards: every call of it sets that in its backend anew."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        yield
        return
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        backend.no_truncation() if truncation is None else backend.enable_truncation(**truncation)
        backend.no_padding() if padding is None else backend.enable_padding(**padding)


def read_counts(prompts: Sequence[str], choices: Any, name: str = "choices") -> list[int]:
    """The number of choices of each prompt. choices: a number, a number a prompt, or a list of choices a prompt.

    Raises:
        ValueError: no prompts, or numbers that are no integers from 2 to 26 or not as many; naming the row of `name`.
    """
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        raise ValueError(f"prompts: found a {type(prompts).__name__}, expected a list of texts")
    if not len(prompts):
        raise ValueError("there are no prompts")
    choices = plain(choices)
    if not _is_list(choices, name):
        return [check_num_choices(choices, name)] * len(prompts)
    if len(choices) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {name} for {len(choices)}; one number, or list, a prompt")
    counts = []
    for row, choice in enumerate(map(plain, choices)):
        is_list = _is_list(choice, f"{name}[{row}]")
        what = f"len({name}[{row}])" if is_list else f"{name}[{row}]"
        counts.append(check_num_choices(len(choice) if is_list else choice, what))
    return counts


def _is_list(values: Any, name: str) -> bool:
    """
    Raises:
        ValueError: options that have no order, or names of their own.
    """
    if isinstance(values, Mapping):
        raise ValueError(f"{name}={values!r} is a dict, expected its list of options: pass {name}['text'] or the like")
    if isinstance(values, Set):
        raise ValueError(f"{name}={values!r} is a {type(values).__name__}, without an order: pass a list")
    return hasattr(values, "__len__") and not isinstance(values, str | bytes)


@dataclass(frozen=True)
class Examples:
    """Rows in their order. labels: indices of the right choices; None where nobody asked for them."""

    prompts: list[str]
    num_choices: list[int]
    labels: list[int] | None

    def __len__(self) -> int:
        return len(self.prompts)


def read_examples(
    examples: Iterable[Mapping[str, Any]], with_labels: bool, anchor: int | None = None, name: str = "examples"
) -> Examples:
    """
    Args:
        examples: rows with `prompt` and `num_choices` (or `choices`), or with `question` and `choices`, which are
            put in the paper's wording. A value that is None counts as absent.
        with_labels: read `label`, an index or a letter, too; else nothing looks at it.
        anchor: an index that has to be a choice of every row, if given.
        name: of the user's argument.

    Raises:
        ValueError: no rows, or one that is not as it has to be, with its number.
    """
    if isinstance(examples, Mapping | str) or not isinstance(examples, Iterable):
        hint = "; choose one of its splits" if isinstance(examples, Mapping) else ""
        raise ValueError(f"{name}: found a {type(examples).__name__}, expected {KINDS}{hint}")
    if hasattr(examples, "iterrows"):
        raise ValueError(
            f"{name}: found a {type(examples).__name__}, expected {KINDS}: give {name}.to_dict('records') or "
            "datasets.Dataset.from_pandas"
        )
    prompts, counts, labels = [], [], []
    for row, example in enumerate(examples):
        try:
            prompt, count = _prompt_and_count(example)
            if anchor is not None and anchor >= count:
                raise ValueError(f"the anchor {LETTERS[anchor]} is beyond its {count} choices")
            if with_labels:
                labels.append(_label(example, count))
        except ValueError as error:
            raise ValueError(f"{name}[{row}]: {error}") from None
        prompts.append(prompt)
        counts.append(count)
    if not prompts:
        raise ValueError(f"{name}: there are no examples")
    return Examples(prompts, counts, labels if with_labels else None)


def _prompt_and_count(example: Any) -> tuple[str, int]:
    if not isinstance(example, Mapping):
        raise ValueError(f"found a {type(example).__name__}, expected a dict")
    prompt, question, choices = (example.get(name) for name in ("prompt", "question", "choices"))
    if choices is not None and not _is_list(choices, "choices"):
        raise ValueError(f"choices={choices!r} is no list")
    if prompt is None:
        if question is None or choices is None:
            names = ", ".join(repr(name) for name, value in example.items() if value is not None) or "nothing"
            raise ValueError(f"it has {names}; 'prompt' and 'num_choices', or 'question' and 'choices', are needed")
        return format_mcq(question, choices), len(choices)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r} is no text")
    count = plain(example.get("num_choices"))
    if count is None and choices is None:
        raise ValueError("it has a 'prompt', and neither 'num_choices' nor 'choices'")
    count = check_num_choices(len(choices), "len(choices)") if count is None else check_num_choices(count)
    if choices is not None and len(choices) != count:
        raise ValueError(f"num_choices={count}, and {len(choices)} choices")
    return prompt, count


def _label(example: Mapping[str, Any], count: int) -> int:
    if example.get("label") is None:
        raise ValueError("it has no 'label'")
    return choice_index("label", plain(example["label"]), count)
