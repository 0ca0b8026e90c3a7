"""Examples as the user has them, read into prompts, numbers of choices and labels; every row checked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from hf_ext.mcq_bias.letters import LETTERS, letter_index
from hf_ext.mcq_bias.prompts import format_mcq

KINDS = "a list of dicts or a datasets.Dataset"


@dataclass(frozen=True)
class Examples:
    """Rows in their order. labels: indices of the right choices; None where nobody asked for them."""

    prompts: list[str]
    num_choices: list[int]
    labels: list[int] | None

    def __len__(self) -> int:
        return len(self.prompts)


def read_examples(examples: Iterable[Mapping[str, Any]], with_labels: bool, anchor: int | None = None) -> Examples:
    """
    Args:
        examples: rows with `prompt` and `num_choices` (or `choices`), or with `question` and `choices`, which are
            put in the paper's wording. A value that is None counts as absent.
        with_labels: read `label`, an index or a letter, too; else nothing looks at it.
        anchor: an index that has to be a choice of every row, if given.

    Raises:
        ValueError: no rows, or one that is not as it has to be, with its number.
    """
    if isinstance(examples, Mapping | str) or not isinstance(examples, Iterable):
        hint = "; choose one of its splits" if isinstance(examples, Mapping) else ""
        raise ValueError(f"examples: found a {type(examples).__name__}, expected {KINDS}{hint}")
    prompts, counts, labels = [], [], []
    for row, example in enumerate(examples):
        try:
            prompt, count = _prompt_and_count(example)
            if anchor is not None and anchor >= count:
                raise ValueError(f"the anchor {LETTERS[anchor]} is beyond its {count} choices")
            if with_labels:
                labels.append(_label(example, count))
        except ValueError as error:
            raise ValueError(f"examples[{row}]: {error}") from None
        prompts.append(prompt)
        counts.append(count)
    if not prompts:
        raise ValueError("there are no examples")
    return Examples(prompts, counts, labels if with_labels else None)


def check_num_choices(count: Any) -> int:
    """
    Raises:
        ValueError: no integer from 2 to 26.
    """
    if not isinstance(count, Integral) or isinstance(count, bool) or not 2 <= count <= len(LETTERS):
        raise ValueError(f"{count!r} is no number of choices: an integer from 2 to {len(LETTERS)}")
    return int(count)


def _prompt_and_count(example: Any) -> tuple[str, int]:
    if not isinstance(example, Mapping):
        raise ValueError(f"found a {type(example).__name__}, expected a dict")
    prompt, question, choices = (example.get(name) for name in ("prompt", "question", "choices"))
    if choices is not None and (isinstance(choices, str | Mapping) or not hasattr(choices, "__len__")):
        raise ValueError(f"choices={choices!r} is no list")
    if prompt is None:
        if question is None or choices is None:
            names = ", ".join(repr(name) for name, value in example.items() if value is not None) or "nothing"
            raise ValueError(f"it has {names}; 'prompt' and 'num_choices', or 'question' and 'choices', are needed")
        return format_mcq(question, choices), len(choices)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt={prompt!r} is no text")
    count = example.get("num_choices")
    if count is None and choices is None:
        raise ValueError("it has a 'prompt', and neither 'num_choices' nor 'choices'")
    count = check_num_choices(len(choices) if count is None else count)
    if choices is not None and len(choices) != count:
        raise ValueError(f"num_choices={count}, and {len(choices)} choices")
    return prompt, count


def _label(example: Mapping[str, Any], count: int) -> int:
    label = example.get("label")
    if label is None:
        raise ValueError("it has no 'label'")
    index = letter_index(label) if isinstance(label, str) else label
    if not isinstance(index, Integral) or isinstance(index, bool) or not 0 <= index < count:
        last = LETTERS[count - 1]
        raise ValueError(f"label={label!r} is neither an index 0 to {count - 1} nor a letter A to {last}")
    return int(index)
