"""Demo of AnchorAttention: one script, the same packed rows, two strings."""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_ext.anchor_attention import AnchorPacking
from hf_ext.anchor_attention.reference import same_segment, visible_keys
from hf_ext.demo.report import Outcome, Run
from hf_ext.demo.text import documents, train_tokenizer

LENGTH, STEPS, TEST_ROWS = 4096, 75, 4
RUNS = {"sdpa": "stock sdpa", "anchor": "anchor"}


def prepare(out: Path, quick: bool) -> list[Run]:
    """Write text, tokenizer, packed rows and the model's configuration; return the commands to run."""
    length, steps = (256, 10) if quick else (LENGTH, STEPS)
    texts = documents(400 if quick else 4000, seed=0)
    tokenizer = train_tokenizer(texts, vocab_size=1024)
    tokenizer.save_pretrained(out / "tokenizer")
    tokens = Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})
    packing = AnchorPacking(max_length=length, anchor_token_id=tokenizer.bos_token_id)
    rows = tokens.map(packing, batched=True, batch_size=len(tokens), remove_columns=tokens.column_names)
    rows.train_test_split(TEST_ROWS, seed=0).save_to_disk(out / "packed")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    config.save_pretrained(out / "model")
    script = ["train.py", "--dataset", "packed", "--config_name", "model", "--max_steps", str(steps)]
    stock = [*script, "--attn_implementation", "sdpa", "--whole_rows", "--output_dir", "runs/sdpa"]
    ours = [*script, "--attn_implementation", "anchor", "--output_dir", "runs/anchor"]
    return [Run(RUNS["sdpa"], stock, steps), Run(RUNS["anchor"], ours, steps, proof="anchor")]


def judge(out: Path) -> Outcome:
    """Compare the two trainings, and hold the trained model to its promises."""
    results = {name: json.loads((out / "runs" / name / "results.json").read_text()) for name in RUNS}
    step = {name: statistics.median(result["step_seconds"]) for name, result in results.items()}
    row = load_from_disk(str(out / "packed"))["test"].with_format("torch")[:2]
    anchor = AutoModelForCausalLM.from_pretrained(out / "runs" / "anchor", attn_implementation="anchor").eval()
    stock = AutoModelForCausalLM.from_pretrained(out / "runs" / "sdpa", attn_implementation="sdpa").eval()
    leaks = _leak(anchor, row, row["position_ids"])
    stock_leaks = _leak(stock, row, None)
    off = _distance_from_dense(anchor, row)
    passed = leaks == 0.0 and off < 1e-3 and stock_leaks > 0.0
    return Outcome(
        string="--attn_implementation anchor",
        baseline=f"sdpa on whole rows: {_ms(step['sdpa'])} a step, test loss {results['sdpa']['eval_loss']:.3f}",
        ours=f"{_ms(step['anchor'])} a step ({step['sdpa'] / step['anchor']:.1f}x), "
        f"test loss {results['anchor']['eval_loss']:.3f}",
        check=f"changing one document moves the logits of the others by {leaks:g} (stock: {stock_leaks:.2g}); "
        f"distance from dense attention {off:.0e}",
        passed=passed,
        numbers={"results": results, "leak": leaks, "stock_leak": stock_leaks, "distance_from_dense": off},
    )


def panel(axes: Any, outcome: Outcome) -> None:
    for (name, label), colour in zip(RUNS.items(), ("0.6", "tab:blue"), strict=True):
        result = outcome.numbers["results"][name]
        clock = torch.tensor(result["step_seconds"]).cumsum(0)
        steps, losses = zip(*result["losses"], strict=True)
        axes.plot(clock[torch.tensor(steps) - 1], losses, color=colour, label=label)
    axes.set_title("AnchorAttention: the same steps in less time")
    axes.set_xlabel("training time on this machine (s)")
    axes.set_ylabel("training loss (nats a token)")
    axes.legend()


@torch.no_grad()
def _leak(model: Any, row: dict[str, Tensor], position_ids: Tensor | None) -> float:
    """Largest change of a logit in a row's other documents when one token of its first document is replaced."""
    ids = row["input_ids"]
    first_document = same_segment(row["position_ids"])[:, 0]
    changed = ids.clone()
    changed[:, 1] = (ids[:, 1] + 1) % model.config.vocab_size
    before, after = (model(input_ids=x, position_ids=position_ids).logits for x in (ids, changed))
    return (before - after)[~first_document].abs().max().item()


@torch.no_grad()
def _distance_from_dense(model: Any, row: dict[str, Tensor]) -> float:
    """Largest difference from the host's sdpa with the document mask written out."""
    arguments = {"input_ids": row["input_ids"], "position_ids": row["position_ids"]}
    ours = model(**arguments).logits
    model.set_attn_implementation("sdpa")
    mask = visible_keys(same_segment(row["position_ids"]))[:, None]
    dense = model(**arguments, attention_mask=mask).logits
    model.set_attn_implementation("anchor")
    return (ours - dense).abs().max().item()


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"
