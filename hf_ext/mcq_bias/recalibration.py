"""Attention recalibration (arXiv 2405.03205): exchange or even out the last token's weights on chosen positions."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_ext.checks import check_word, is_integer, read_object, refuse_unknown
from hf_ext.mcq_bias.attention import LastQuery, watched_attention
from hf_ext.mcq_bias.batches import asked_rows
from hf_ext.mcq_bias.examples import WHERE
from hf_ext.mcq_bias.families import require_supported

MODES = ("swap", "equalise")
FILE = "recalibration.json"
Heads = Literal["all"] | Sequence[tuple[int, int]]


@dataclass(frozen=True)
class RecalibrationConfig:
    """What to recalibrate; given to `recalibrate_attention` in place of heads and mode.

    Args:
        heads: "all", or pairs (layer, head), counted from 0.
        mode: "swap" or "equalise", see `recalibrate_attention`.
        where: on which token of an option the positions stand, "letter", "colon" or "content". Positions differ from
            prompt to prompt and are not kept here: `option_positions(tokenizer, prompts, num_choices, config.where)`.

    Raises:
        ValueError: naming the value, what is allowed and the nearest match.
    """

    heads: Heads = "all"
    mode: str = "swap"
    where: str = "letter"

    def __post_init__(self) -> None:
        check_word("mode", self.mode, MODES)
        check_word("where", self.where, WHERE)
        object.__setattr__(self, "heads", _checked_heads(self.heads))

    def save_pretrained(self, path: str | Path) -> None:
        """Write `recalibration.json` into the folder `path`, which is made where it is missing."""
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "RecalibrationConfig":
        """Read what `save_pretrained` wrote.

        Raises:
            OSError: there is no `recalibration.json` in `path`.
            ValueError: it is no JSON object, lacks an option, or holds an unknown one or an unknown value.
        """
        file = Path(path, FILE)
        values = read_object(file, "RecalibrationConfig.save_pretrained")
        known = [option.name for option in fields(cls)]
        refuse_unknown(values, known, str(file))
        try:
            config = cls(**values)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        if lacking := [name for name in known if name not in values]:
            raise ValueError(
                f"{file} lacks {', '.join(lacking)}; save_pretrained writes every option, so it was damaged"
            )
        return config


@contextmanager
def recalibrate_attention(
    model: nn.Module, heads: Heads | RecalibrationConfig, positions: Any, mode: str | None = None
) -> Iterator[None]:
    """Alter, inside the context, the attention weights of each prompt's last token (arXiv 2405.03205).

    Weights are altered, not the weighted values: their sum would not notice an exchange. Rows keep summing to 1. It
    acts on the last token of whole prompts: in `generate` on the first forward, with or without a cache, not on those
    that follow, and not with a static cache, of which a warning tells. It ends with the context, exceptions included.
    Other models are not touched, though they share the config; nor is a copy of the model made inside, which keeps the
    eager engine. Positions of the right option are an oracle: with them this is an experiment, not a repair.

    Args:
        model: gpt2, llama, mistral, qwen2 or qwen3, adapters allowed. Pad its batches on the left.
        heads: "all", [] for none, [(layer, head), ...], or a `RecalibrationConfig`.
        positions: integers, (m,) for every row or (rows, m), counted from the end: -1 is the last token. 0 = absent.
            `option_positions` finds them. Rows are those of the forward's batch; in `score_choices` and its like those
            of all prompts, in the order given.
        mode: "swap": the two positions of a row (m = 2) exchange their weights; a row that lacks one stays as it is.
            "equalise": all positions of a row get their mean. None: that of the configuration, or "swap".

    Raises:
        ValueError: an unknown family, head or mode; a mode that is not the configuration's; positions that are
            positive, no integers, or not two for "swap". At the forward: another number of rows than in `positions`; a
            position before the row's first token, in its padding, or beyond the layer's window; padding on the right.
    """
    if isinstance(heads, RecalibrationConfig):
        if mode not in (None, heads.mode):
            raise ValueError(f"mode={mode!r} contradicts the configuration, which says {heads.mode!r}")
        heads, mode = heads.heads, heads.mode
    mode = "swap" if mode is None else mode
    check_word("mode", mode, MODES)
    chosen = _heads_by_layer(model, _checked_heads(heads))
    places = _checked_positions(positions, mode)

    def alter(query: LastQuery) -> Tensor | None:
        picked = chosen.get(query.layer)
        if not picked or query.weights.shape[-1] == 1:
            return None
        columns = _columns(places, query)
        altered = (_swapped if mode == "swap" else _equalised)(query.weights, columns)
        mask = torch.zeros(query.weights.shape[1], dtype=torch.bool, device=altered.device)
        mask[picked] = True
        return torch.where(mask[:, None], altered, query.weights)

    with watched_attention(model, alter):
        yield


def _swapped(weights: Tensor, columns: Tensor) -> Tensor:
    """weights (B, H, T) with those of the two `columns` (B, 2) exchanged; -1 = absent."""
    order = torch.arange(weights.shape[-1], device=weights.device).repeat(len(columns), 1)
    rows = (columns >= 0).all(1).nonzero()[:, 0]
    first, second = columns[rows].unbind(1)
    order[rows, first], order[rows, second] = second, first
    return weights.gather(-1, order[:, None].expand_as(weights))


def _equalised(weights: Tensor, columns: Tensor) -> Tensor:
    """weights (B, H, T) with those of the `columns` (B, m) replaced by their mean; -1 = absent."""
    named = torch.zeros(len(columns), weights.shape[-1] + 1, dtype=torch.bool, device=weights.device)
    named = named.scatter(1, columns % named.shape[1], True)[:, None, :-1]  # the absent fall into the extra column
    mean = (weights * named).sum(-1, keepdim=True) / named.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(named, mean, weights)


def _columns(places: Tensor, query: LastQuery) -> Tensor:
    """(B, m): columns of the positions in this forward, -1 where absent."""
    rows, _, length = query.weights.shape
    if places.ndim == 1:
        places = places.expand(rows, -1)
    elif (asked := asked_rows()) is not None:
        numbers, count = asked
        if len(places) != count:
            raise ValueError(f"positions are for {len(places)} rows, and there are {count} prompts")
        places = places[numbers]
    if len(places) != rows:
        raise ValueError(
            f"positions are for {len(places)} rows, and the batch has {rows}; generate with num_beams or "
            "num_return_sequences makes as many rows of each, one behind the other"
        )
    places = places.to(query.weights.device)
    columns = torch.where(places < 0, places + length, -1)
    wrong = (places < 0) & (columns < 0)
    if query.hidden is not None:
        hidden = query.hidden.expand(rows, -1)
        if hidden[:, -1].any():
            row = int(hidden[:, -1].nonzero()[0])
            raise ValueError(f"row {row} of the batch is padded on the right; pad on the left (padding_side='left')")
        wrong |= (columns >= 0) & hidden.gather(1, columns.clamp(min=0))
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"positions: {int(places[row, column])} in row {row} is no token that the last one sees in layer "
            f"{query.layer}: it lies before the prompt's first token (of {length} with padding), or beyond the window"
        )
    return columns


def _heads_by_layer(model: nn.Module, heads: Heads) -> dict[int, list[int]]:
    require_supported(model)
    config = model.config
    layers, width = config.num_hidden_layers, config.num_attention_heads
    if heads == "all":
        return {layer: list(range(width)) for layer in range(layers)}
    chosen: dict[int, list[int]] = {}
    for layer, head in heads:
        if layer >= layers or head >= width:
            raise ValueError(
                f"heads: ({layer}, {head}) is none of this model's: its layers are 0 to {layers - 1}, its heads 0 to "
                f"{width - 1}"
            )
        chosen.setdefault(layer, []).append(head)
    return chosen


def _checked_heads(heads: Any) -> Heads:
    if isinstance(heads, str) and heads == "all":
        return "all"
    try:
        if isinstance(heads, str | Mapping):
            raise TypeError
        pairs = [tuple(pair) for pair in (heads.tolist() if isinstance(heads, np.ndarray | Tensor) else heads)]
    except TypeError:
        raise ValueError(f"heads={heads!r} is neither 'all' nor a list of pairs (layer, head)") from None
    for pair in pairs:
        if len(pair) != 2 or not all(is_integer(n) and n >= 0 for n in pair):
            raise ValueError(f"heads: {pair!r} is no pair (layer, head) of integers of at least 0")
    return [(int(layer), int(head)) for layer, head in pairs]


def _checked_positions(positions: Any, mode: str) -> Tensor:
    try:
        places = torch.as_tensor(positions)
    except (ValueError, TypeError, RuntimeError):
        raise ValueError(f"positions={positions!r} is no table of integers, (m,) or (rows, m)") from None
    if places.ndim not in (1, 2) or places.is_floating_point() or places.dtype == torch.bool or not places.numel():
        raise ValueError(
            f"positions must be integers, (m,) or (rows, m), not {places.dtype} of shape {tuple(places.shape)}"
        )
    if (places > 0).any():
        raise ValueError(
            f"positions: {int(places.max())} is positive; they are counted from the end: -1 is the last token, 0 an "
            "absent one"
        )
    if mode == "swap" and places.shape[-1] != 2:
        raise ValueError(f"positions: mode='swap' needs exactly 2 for every row, not {places.shape[-1]}")
    return places.long()
