"""Prompts as left-padded batches, the same for scoring and for attribution."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_ext import modes


@dataclass(frozen=True, eq=False)
class Batch:
    """rows: numbers of the prompts. inputs: input_ids, attention_mask and position_ids, each (B, T)."""

    rows: list[int]
    inputs: dict[str, Tensor]


def encode(model: Any, tokenizer: Any, prompts: Sequence[str], prepend_bos: bool, name: str) -> list[list[int]]:
    """The tokens of each prompt. prepend_bos: begin with the BOS token, where the tokenizer does not add it itself.

    name: what the user calls the prompts.

    Raises:
        ValueError: a prompt that is no text, has no token, or is longer than the model's positions, with its row.
    """
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"{name}[{row}]={prompt!r} is no text")
    encoded = [list(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    if prepend_bos:
        bos = tokenizer.bos_token_id
        if bos is None:
            raise ValueError("prepend_bos=True, and the tokenizer has no BOS token")
        encoded = [ids if ids[:1] == [bos] else [bos, *ids] for ids in encoded]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    virtual = getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", None) or 0  # prompt learning's
    for row, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"{name}[{row}]={prompts[row]!r} has no token")
        if limit is not None and len(ids) + virtual > limit:
            more = f", {virtual} virtual ones before them" if virtual else ""
            raise ValueError(
                f"{name}[{row}] has {len(ids)} tokens{more}, and the model {limit} positions; it is not cut, since an "
                "answer to half a question means nothing"
            )
    return encoded


def batches(encoded: Sequence[list[int]], batch_size: int, device: torch.device, progress: bool) -> Iterator[Batch]:
    """Batches of prompts of like length, the longest first: what does not fit into memory fails at once."""
    order = sorted(range(len(encoded)), key=lambda row: -len(encoded[row]))
    for start in tqdm(range(0, len(order), batch_size), "prompts", disable=not progress):
        rows = order[start : start + batch_size]
        yield Batch(rows, left_padded([encoded[row] for row in rows], device))


def left_padded(encoded: Sequence[list[int]], device: torch.device) -> dict[str, Tensor]:
    """Model inputs, each (B, T), T the longest. What stands in the padding does not matter: it is masked."""
    length = max(map(len, encoded))
    input_ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in encoded], device=device)
    attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in encoded], device=device)
    # GPT-2 would count the padding too.
    position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}


_ASKED: ContextVar[tuple[list[int], int] | None] = ContextVar("asked", default=None)


@contextmanager
def asked(rows: list[int], count: int) -> Iterator[None]:
    """Inside, a forward is over these rows of `count` prompts, which come in another order than the user gave them."""
    token = _ASKED.set((rows, count))
    try:
        yield
    finally:
        _ASKED.reset(token)


def asked_rows() -> tuple[list[int], int] | None:
    """(rows, count) of the `asked` around; None in a forward of the user's own."""
    return _ASKED.get()


@contextmanager
def evaluating_eagerly(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients and no compiled code, which skips hooks; afterwards modules are in the mode found."""
    # Where dynamo is not there, nothing is compiled, and importing it takes seconds.
    eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
    with modes.evaluating(model), eager:
        yield
