"""Tiny models under attn_implementation="anchor", rows for them, and what stock attention has to be given."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from anchor_oracle import (
    positions_of,
    visible_segments,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_ext import compat

ANCHOR, PAD, VOCABULARY = 1, 0, 67

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": ANCHOR,
    "eos_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": SHAPE,
    "mistral": {**SHAPE, "sliding_window": 5},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": ANCHOR,
        "eos_token_id": None,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "gemma2": {
        **SHAPE,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 5,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 20.0,
    },
    "gpt_oss": {
        **SHAPE,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "sliding_window": 5,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["sliding_attention", "full_attention"],
        # The faster ones know no float64; transformers before 5 has only this one and ignores the key.
        "experts_implementation": "eager",
    },
}


def config_of(model_type: str, **changes: Any) -> Any:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    return AutoConfig.for_model(model_type, **{**CONFIGS.get(model_type, {}), **changes})


def skip_without_positions(model_type: str) -> None:
    """Skip where this host's layers of `model_type` tell no attention function what their positions are."""
    told = []

    def recording(module: Any, query: Tensor, *tensors: Any, **keywords: Any) -> Any:
        told.append(keywords.get("position_ids"))
        return query.transpose(1, 2), None

    attention, masks = compat.attention_tables()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention, "recording", recording)
        patch.setitem(masks, "recording", masks["sdpa"])
        model = build(config_of(model_type), "recording")
        logits(model, input_ids=ROWS.input_ids, position_ids=ROWS.position_ids)
    if any(positions is None for positions in told):
        pytest.skip(f"the {model_type} of this transformers hands positions to no attention function")
    assert told


def build(config: Any, implementation: str = "anchor", dtype: torch.dtype = torch.float64) -> Any:
    """Weights large enough that a leak cannot hide; the same ones for every implementation."""
    torch.manual_seed(11)
    # from_config writes the implementation into the config it is given.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.25 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval()


@dataclass
class Rows:
    """Packed rows as the default collator hands them over."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor

    def batch(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "position_ids": self.position_ids, "labels": self.labels}


def packed_rows() -> Rows:
    """Ragged: an anchor alone, an anchor token inside a document, a row that starts inside one, zeros, padding."""
    positions = positions_of([[7, 1, 9, 7], [3, 8, 10, 1, 1, 1], [14, 5, 5]])
    positions[1, :3] += 41
    torch.manual_seed(2)
    ids = torch.randint(3, VOCABULARY, positions.shape)
    ids[positions == 0] = ANCHOR
    ids[0, 12] = ANCHOR
    ids[2, 19:] = PAD
    labels = ids.masked_fill(positions == 0, -100)
    labels[2, 19:] = labels[:, 0] = -100
    return Rows(ids, positions, labels)


ROWS = packed_rows()
VISIBLE = visible_segments(ROWS.position_ids)


def additive(visible: Tensor) -> Tensor:
    """For eager attention, which adds its mask: (B, L, L) bool -> (B, 1, L, L)."""
    return torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, float("-inf"))[:, None]


def stock_mask(config: Any) -> Any:
    """What stock attention has to be given so that it computes AnchorAttention on ROWS."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    windowed = visible_segments(ROWS.position_ids, window=window)
    if config.model_type in ("gemma2", "gpt_oss"):
        return {"full_attention": additive(VISIBLE), "sliding_attention": additive(windowed)}
    return windowed[:, None]


def results(model: Any, **batch: Any) -> dict[str, Tensor]:
    """Logits, loss, and the gradient of every parameter."""
    out = model(**batch, use_cache=False)
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients_of(model, out.loss)}


def gradients_of(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """By backward(), as checkpointing with reentrant autograd knows no other way."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def logits(model: Any, **batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def check_text(text: str, *words: str) -> None:
    assert all(word in text for word in ("attn_implementation", "anchor", *words))
    assert "is not supported by" in text
    reason = text.partition("is not supported by")[2].partition(": ")[2]
    assert len(reason) > 20, "no reason given"
