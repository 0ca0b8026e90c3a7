"""Prompts in their two wordings, and examples as users have them."""

import datasets
import numpy as np
import pandas
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_ext.mcq_bias import format_mcq, option_positions
from hf_ext.mcq_bias.examples import read_examples
from hf_ext.mcq_bias.letters import anchor_index, letter_index

QUESTION, CHOICES = "Who is it?", ["Ann", "Bob", "Eve"]
PAPER = "Question: Who is it? Answer Choices: A: Ann B: Bob C: Eve Answer:"


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("style", "expected"),
    [("paper", PAPER), ("mmlu", "Who is it?\nA. Ann\nB. Bob\nC. Eve\nAnswer:")],
    ids=["paper", "mmlu"],
)
def test_wordings(style, expected):
    assert format_mcq(QUESTION, CHOICES, style=style) == expected
    assert format_mcq(f" {QUESTION}\n", [f"\t{choice} " for choice in CHOICES], style) == expected


def test_the_paper_is_the_default_and_a_tuple_or_an_array_will_do():
    assert format_mcq(QUESTION, tuple(CHOICES)) == format_mcq(QUESTION, np.array(CHOICES)) == PAPER


def test_two_to_twenty_six_choices():
    assert format_mcq("q", ["a", "b"]) == "Question: q Answer Choices: A: a B: b Answer:"
    assert format_mcq("q", list("abcdefghijklmnopqrstuvwxyz")).endswith("Y: y Z: z Answer:")


@pytest.mark.parametrize(
    ("question", "choices", "style", "message"),
    [
        ("q", ["a"], "paper", r"1 choices; 2 to 26"),
        ("q", ["a"] * 27, "paper", r"27 choices; 2 to 26"),
        ("q", ["a", " "], "paper", r"choice B=' ' is no text"),
        ("q", ["a", 3], "paper", r"choice B=3 is no text"),
        ("q", "ab", "paper", r"choices='ab' is no list"),
        ("q", None, "paper", r"choices=None is no list"),
        ("q", {"text": ["a", "b"], "label": ["A", "B"]}, "paper", r"choices=.* is a dict, .*pass choices\['text'\]"),
        ("q", {"a", "b"}, "paper", r"choices=.* is a set, without an order: pass a list"),
        ("", ["a", "b"], "paper", r"question='' is no text"),
        (None, ["a", "b"], "paper", r"question=None is no text"),
        ("q", ["a", "b"], "mlu", r"style='mlu' is none of 'paper', 'mmlu'; did you mean 'mmlu'"),
    ],
)
def test_refused(question, choices, style, message):
    with pytest.raises(ValueError, match=message):
        format_mcq(question, choices, style)


# --- letters


@pytest.mark.parametrize("text", ["B", "b", " B", "(B)", "B.", "B:", "(b) ", "B)\n"])
def test_a_letter(text):
    assert letter_index(text) == 1
    assert anchor_index(text) == 1


@pytest.mark.parametrize("text", ["", "AB", "Bob", "1", "((B", "B..", "Ä"])
def test_no_letter(text):
    assert letter_index(text) is None


@pytest.mark.parametrize("anchor", ["", "AB", "ä", -1, 26, 1.0, True, None])
def test_no_anchor(anchor):
    with pytest.raises(ValueError, match=r"is neither an index 0 to 25 nor a letter A to Z"):
        anchor_index(anchor)


# --- examples


ROWS = [
    {"question": QUESTION, "choices": CHOICES, "label": "C"},
    {"question": "And?", "choices": ["x", "y", "z", "w"], "label": 0},
]


def test_question_and_choices():
    read = read_examples(ROWS, with_labels=True)
    assert read.prompts == [PAPER, "Question: And? Answer Choices: A: x B: y C: z D: w Answer:"]
    assert read.num_choices == [3, 4]
    assert read.labels == [2, 0]
    assert len(read) == 2


def test_prompt_goes_before_question():
    rows = [{"prompt": "p", "num_choices": 3, "label": np.int64(2)}, {"prompt": "q", **ROWS[1], "label": "(b)"}]
    read = read_examples(rows, with_labels=True)
    assert (read.prompts, read.num_choices, read.labels) == (["p", "q"], [3, 4], [2, 1])


def test_a_dataset_and_what_it_fills_with_none():
    first = {"prompt": "p", "num_choices": 2, "question": None, "choices": None, "label": 1}
    dataset = datasets.Dataset.from_list([first, ROWS[0] | {"label": 2}])
    assert dataset[1]["prompt"] is dataset[1]["num_choices"] is None
    read = read_examples(dataset, with_labels=True)
    assert (read.prompts, read.num_choices, read.labels) == (["p", PAPER], [2, 3], [1, 2])


def test_a_generator():
    assert read_examples((row for row in ROWS), with_labels=False).num_choices == [3, 4]


class Unlabelled(dict):
    def get(self, key, default=None):
        assert key != "label"
        return super().get(key, default)

    __getitem__ = get


def test_labels_are_not_looked_at_unless_asked_for():
    read = read_examples([Unlabelled(ROWS[0]), {**ROWS[1], "label": "nonsense"}], with_labels=False)
    assert read.labels is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": 0}, r"examples\[1\]: it has 'label'; 'prompt' and 'num_choices', or 'question' and 'choices'"),
        ({}, r"examples\[1\]: it has nothing"),
        ({"question": "q", "label": 0}, r"examples\[1\]: it has 'question', 'label'"),
        ({"question": "q", "choices": ["a"], "label": 0}, r"examples\[1\]: 1 choices"),
        ({"question": "q", "choices": "ab", "label": 0}, r"examples\[1\]: choices='ab' is no list"),
        ({"question": "q", "choices": {"text": ["a"]}, "label": 0}, r"examples\[1\]: choices=\{.* is a dict"),
        ({"prompt": "p", "label": 0}, r"examples\[1\]: it has a 'prompt', and neither"),
        ({"prompt": " ", "num_choices": 2, "label": 0}, r"examples\[1\]: prompt=' ' is no text"),
        ({"prompt": "p", "num_choices": 1, "label": 0}, r"examples\[1\]: num_choices=1 is no number of choices"),
        ({"prompt": "p", "num_choices": 27, "label": 0}, r"examples\[1\]: num_choices=27 is no number of choices"),
        ({"prompt": "p", "num_choices": 2.0, "label": 0}, r"examples\[1\]: num_choices=2.0 is no number of choices"),
        ({"prompt": "p", "num_choices": 2, "choices": CHOICES, "label": 0}, r"num_choices=2, and 3 choices"),
        ({"prompt": "p", "num_choices": 2}, r"examples\[1\]: it has no 'label'"),
        ({"prompt": "p", "num_choices": 2, "label": 2}, r"label=2 is neither an index 0 to 1 nor a letter A to B"),
        ({"prompt": "p", "num_choices": 2, "label": "C"}, r"label='C' is neither"),
        ({"prompt": "p", "num_choices": 2, "label": -1}, r"label=-1 is neither"),
        ({"prompt": "p", "num_choices": 2, "label": 0.5}, r"label=0.5 is neither"),
        ({"prompt": "p", "num_choices": 2, "label": True}, r"label=True is neither"),
        ("row", r"examples\[1\]: found a str, expected a dict"),
    ],
)
def test_a_bad_row_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        read_examples([ROWS[0], row], with_labels=True)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], "there are no examples"),
        ("rows", "found a str"),
        (None, "found a NoneType"),
        (pandas.DataFrame(ROWS), r"found a DataFrame, .*give examples.to_dict\('records'\) or datasets.Dataset"),
        (datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS[:1])}), "choose one of its splits"),
    ],
    ids=["none", "str", "None", "table", "splits"],
)
def test_no_examples(examples, message):
    with pytest.raises(ValueError, match=message):
        read_examples(examples, with_labels=False)


def test_the_anchor_is_a_choice_of_every_row():
    assert len(read_examples(ROWS, with_labels=False, anchor=2)) == 2
    with pytest.raises(ValueError, match=r"examples\[0\]: the anchor D is beyond its 3 choices"):
        read_examples(ROWS, with_labels=False, anchor=3)


# --- where the options stand

WORDED = {style: format_mcq(QUESTION, CHOICES, style) for style in ("paper", "mmlu")}
SHOT = {
    "paper": "Question: Is it A: or B: ? Answer Choices: A: yes B: no Answer: B ",
    "mmlu": "Is it?\nA. yes\nB. no\nAnswer: B\n\n",
}


def pieces_tokenizer():
    """One token a letter, mark or word, white space left out."""
    words = [
        "[UNK]",
        *"ABCDE:.?\n",
        "Question",
        "Answer",
        "Choices",
        "Who",
        "is",
        "it",
        "Ann",
        "Bob",
        "Eve",
        "Is",
        "yes",
        "no",
    ]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


@pytest.mark.smoke
@pytest.mark.parametrize("before", [False, True], ids=["alone", "behind_a_shot"])
@pytest.mark.parametrize("style", ["paper", "mmlu"])
@pytest.mark.parametrize("where", ["letter", "colon", "content"])
def test_options_are_found(style, where, before):
    tokenizer = pieces_tokenizer()
    prompts = [SHOT[style] * before + WORDED[style], SHOT[style] * before + format_mcq("Is it?", ["no", "yes"], style)]
    positions = option_positions(tokenizer, prompts, [3, 2], where)
    assert positions.shape == (2, 3)
    assert positions[1, 2] == 0
    colon = {"paper": ":", "mmlu": "."}[style]
    expected = {"letter": ["A", "B", "C", "A", "B"], "colon": [colon] * 5, "content": [*CHOICES, "no", "yes"]}[where]
    found = []
    for prompt, row in zip(prompts, positions.tolist(), strict=True):
        tokens = tokenizer.tokenize(prompt)
        found += [tokens[place] for place in row if place]
    assert found == expected
    assert (positions[0] < positions[0, :1] + 8).all()  # of the last question, and not of the shot


def test_tokens_that_take_in_the_space_before_them():
    core = Tokenizer(models.BPE({"a": 0}, []))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    words = ["<unk>", *(f"\u2581{word}" for word in WORDED["paper"].split())]
    core.model = models.Unigram([(word, -float(i)) for i, word in enumerate(dict.fromkeys(words))], unk_id=0)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.tokenize(WORDED["paper"])[-7:] == [
        f"\u2581{word}" for word in ["A:", "Ann", "B:", "Bob", "C:", "Eve", "Answer:"]
    ]
    assert option_positions(tokenizer, [WORDED["paper"]], 3, "letter").tolist() == [[-7, -5, -3]]
    assert option_positions(tokenizer, [WORDED["paper"]], 3, "content").tolist() == [[-6, -4, -2]]


@pytest.mark.parametrize(
    ("prompts", "counts", "where", "message"),
    [
        ([WORDED["paper"]], 3, "leter", r"where='leter' is none of .*did you mean 'letter'"),
        ([WORDED["paper"]], [3, 3], "letter", r"1 prompts and num_choices for 2"),
        ([WORDED["paper"]], 1, "letter", r"num_choices=1 is no number"),
        ([WORDED["paper"], WORDED["paper"] + " A"], 3, "letter", r"prompts\[1\]: 'Ques.*' does not end as format_mcq"),
        ([WORDED["paper"], None], 3, "letter", r"prompts\[1\]: None does not end"),
        ([WORDED["paper"]], 4, "letter", r"prompts\[0\]: ' D: ' is found 0 times"),
        ([format_mcq("q", ["see B: b", "c"])], 2, "letter", r"prompts\[0\]: ' B: ' is found 2 times"),
        ([format_mcq("q", ["see A: b", "c"])], 2, "letter", r"prompts\[0\]: ' A: ' is found 2 times"),
        (["x A: a C: c B: b Answer:"], 3, "letter", r"prompts\[0\]: its options are not in the order A, B, C"),
    ],
)
def test_options_that_cannot_be_told(prompts, counts, where, message):
    with pytest.raises(ValueError, match=message):
        option_positions(pieces_tokenizer(), prompts, counts, where)


def test_options_need_a_fast_tokenizer():
    with pytest.raises(ValueError, match="Slow does not know the characters"):
        option_positions(type("Slow", (), {})(), [WORDED["paper"]], 3)


def test_a_data_set_of_tensors_is_read_as_one_of_numbers():
    rows = [{"question": "q", "choices": ["a", "b"], "label": 1}, {"question": "r", "choices": ["a", "b"], "label": 0}]
    found = read_examples(datasets.Dataset.from_list(rows).with_format("torch"), with_labels=True)
    assert found == read_examples(rows, with_labels=True)
    rows = [{"prompt": "p", "num_choices": np.int64(3), "label": np.int32(2)}]
    assert read_examples(rows, with_labels=True).labels == [2]
    assert read_examples(datasets.Dataset.from_list(rows).with_format("torch"), True).num_choices == [3]
