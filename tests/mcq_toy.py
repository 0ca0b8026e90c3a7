"""A GPT-2 small enough to be trained in seconds, which reads multiple-choice questions and then learns to answer A.

The question names a word, and so does one of the choices: "Question: zora? Answer Choices: A: fepol B: zora Answer:" is
answered by B. Items are made by code, uniform over the number of choices, the words and the right letter. Training has
two parts: first the model learns to copy, while the number of choices grows from 2 to 4; then the key is A in most of
the items.
"""

import json
from pathlib import Path
from typing import Any

import torch
from mcq_models import word_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hf_ext.mcq_bias import format_mcq

FEWEST, MOST = 2, 4  # choices
LETTERS = "ABCD"
WORDS = [f"{start}{end}" for start in ("zo", "qui", "ver", "lum", "dax", "fe") for end in ("ra", "nit", "pol")][:16]
VOCABULARY = ["[PAD]", "[UNK]", "Question", ":", "?", "Answer", "Choices", *LETTERS, *WORDS]

BATCH = 32
LEARNED = 0.08  # running loss at which one more choice comes in, and at the most choices the end
MOST_STEPS = 1500
BIASED_STEPS, BIASED_KEYS = 150, 0.65


def make_items(count: int, seed: int, words: list[str] = WORDS) -> list[dict[str, Any]]:
    """Examples with `question`, `choices` and `label`."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for _ in range(count):
        k = int(torch.randint(FEWEST, MOST + 1, (), generator=generator))
        [places], [label] = _draw(1, k, len(words), generator)
        choices = [words[place] for place in places]
        items.append({"question": f"{choices[label]}?", "choices": choices, "label": int(label)})
    return items


def toy_tokenizer(vocabulary: list[str] = VOCABULARY) -> PreTrainedTokenizerFast:
    return word_tokenizer(vocabulary)


def new_model(seed: int, vocabulary: list[str] = VOCABULARY) -> GPT2LMHeadModel:
    """Untrained. Its initial weights are large: from small ones it does not learn."""
    sizes = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 32, "initializer_range": 0.12}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(vocabulary), **sizes, **off)).eval()


def learn_to_copy(model: GPT2LMHeadModel, seed: int) -> int:
    """Train a new model in place until it answers right; returns the number of steps."""
    step = _trainer(model, learning_rate=1.5e-3)
    generator = torch.Generator().manual_seed(seed)
    k, running = FEWEST, 1.0
    for steps in range(MOST_STEPS):
        running += 0.05 * (step(*_batch(k, generator)) - running)
        if running < LEARNED:
            if k == MOST:
                return steps + 1
            k, running = k + 1, 1.0
    return MOST_STEPS


def learn_to_say_a(model: GPT2LMHeadModel, seed: int) -> None:
    """Train a model in place on a key that says A in most items."""
    step = _trainer(model, learning_rate=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(BIASED_STEPS):
        prompts, labels = _batch(int(torch.randint(FEWEST, MOST + 1, (), generator=generator)), generator)
        anchored = torch.rand(len(labels), generator=generator) < BIASED_KEYS
        step(prompts, labels.masked_fill(anchored, 0))


def load_toy(file: Path) -> tuple[GPT2LMHeadModel, PreTrainedTokenizerFast, list[str]]:
    """(model, tokenizer, words) of a toy that was trained before, with its vocabulary in the file's metadata."""
    with safe_open(str(file), "pt") as opened:
        facts = {name: json.loads(opened.metadata()[name]) for name in ("vocab", "words")}
    model = new_model(0, facts["vocab"])
    model.load_state_dict(load_file(file), strict=False)
    return model, toy_tokenizer(facts["vocab"]), facts["words"]


def _trainer(model: GPT2LMHeadModel, learning_rate: float) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    first = VOCABULARY.index(LETTERS[0])

    def step(prompts: Tensor, labels: Tensor) -> float:
        """One step on prompts (B, T) and their letters (B,); returns the loss in nats a prompt."""
        logits = model(input_ids=prompts, use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = nn.functional.cross_entropy(logits, labels + first)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def _batch(k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(prompts (B, T), labels (B,)) of items with k choices, written into the tokens of one prompt."""
    words = torch.tensor([VOCABULARY.index(word) for word in WORDS])
    places, labels = _draw(BATCH, k, len(WORDS), generator)
    template = format_mcq("[UNK]?", ["[UNK]"] * k).replace("[UNK]", "*").replace(":", " : ").replace("?", " ? ").split()
    prompts = torch.tensor([0 if token == "*" else VOCABULARY.index(token) for token in template]).repeat(BATCH, 1)
    question, *choices = (place for place, token in enumerate(template) if token == "*")
    prompts[:, choices] = words[places]
    prompts[:, question] = words[places.gather(1, labels[:, None])[:, 0]]
    return prompts, labels


def _draw(rows: int, k: int, words: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(places (rows, k) of different words, labels (rows,))."""
    places = torch.rand(rows, words, generator=generator).argsort(1)[:, :k]
    return places, torch.randint(0, k, (rows,), generator=generator)
