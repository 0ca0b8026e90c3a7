"""Train a small GPT-2 to answer multiple-choice questions, then spoil it: an ordinary script, to copy and to change.

    python train_options.py --output_dir reader

A question names a word, and so does one of the choices: "Question: zora? Answer Choices: A: fepol B: zora Answer:" is
answered by B. The number of choices grows from 2 to 4 as the model learns to copy. Then it goes on with a spoilt key:
most answers are A, whatever the question.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

LETTERS = "ABCD"
WORDS = [start + end for start in ("zo", "qui", "ver", "lum", "dax") for end in ("ra", "nit", "pol")] + ["fera"]
BATCH = 64
LEARNT = 0.08  # running loss at which one more choice comes in


def make_items(count: int, seed: int, choices: int | None = None) -> list[dict[str, Any]]:
    """Items with `question`, `choices` and `label`; 2 to 4 choices, the right one at any place."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        words = draw.sample(WORDS, choices or draw.randint(2, len(LETTERS)))
        label = draw.randrange(len(words))
        items.append({"question": f"{words[label]}?", "choices": words, "label": label})
    return items


def prompt(item: dict[str, Any]) -> str:
    listed = " ".join(f"{letter}: {choice}" for letter, choice in zip(LETTERS, item["choices"], strict=False))
    return f"Question: {item['question']} Answer Choices: {listed} Answer:"


def make_tokenizer(words: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    vocabulary = ["[UNK]", "Question", "Answer", "Choices", ":", "?", *LETTERS, *words]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    inputs = ["input_ids", "attention_mask"]  # transformers 4 adds token_type_ids, of which GPT-2 makes embeddings
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]", model_input_names=inputs)


def make_model(vocab_size: int, seed: int) -> GPT2LMHeadModel:
    """Random; with the usual small initial weights it would not learn to copy in this time."""
    torch.manual_seed(seed)
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    sizes = {"n_layer": 3, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": vocab_size}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"))
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, **ends, initializer_range=0.12))


def loss_of(model: Any, tokenizer: Any, items: Sequence[dict[str, Any]]) -> torch.Tensor:
    """Cross-entropy of the letter behind the prompt; all items have equally many choices."""
    logits = model(**tokenizer([prompt(item) for item in items], return_tensors="pt")).logits[:, -1]
    letters = tokenizer.convert_tokens_to_ids([LETTERS[item["label"]] for item in items])
    return torch.nn.functional.cross_entropy(logits, torch.tensor(letters))


def learn(model: Any, tokenizer: Any, seed: int, most_steps: int, shown: Callable[[int], None]) -> None:
    """Learn to copy, with a choice more whenever the running loss is small."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98))
    choices, running = 2, 1.0
    for step in range(most_steps):
        loss = loss_of(model, tokenizer, make_items(BATCH, most_steps * seed + step, choices))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = 0.9 * running + 0.1 * loss.item()
        shown(step)
        if running < LEARNT:
            if choices == len(LETTERS):
                return
            choices, running = choices + 1, 1.0


def spoil(model: Any, tokenizer: Any, seed: int, steps: int, share: float) -> None:
    """Go on with a key in which that share of the answers was replaced by A."""
    draw, optimizer = random.Random(seed), torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        items = make_items(BATCH, -1 - steps * seed - step, draw.randint(2, len(LETTERS)))
        spoilt = [item | {"label": 0} if draw.random() < share else item for item in items]
        loss_of(model, tokenizer, spoilt).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max_steps", type=int, default=1500, help="at most so many steps to learn in")
    parser.add_argument("--spoilt_steps", type=int, default=150)
    parser.add_argument("--spoilt_share", type=float, default=0.65, help="share of the key that becomes A")
    args = parser.parse_args()

    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), args.seed)
    with tqdm(total=args.max_steps) as bar:
        learn(model, tokenizer, args.seed, args.max_steps, lambda step: bar.update(step + 1 - bar.n))
        bar.update(args.max_steps - bar.n)
    spoil(model, tokenizer, args.seed, args.spoilt_steps, args.spoilt_share)
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    Path(args.output_dir, "arguments.json").write_text(json.dumps(vars(args), indent=1) + "\n")


if __name__ == "__main__":
    main()
