"""Results of independent oracles, kept as files beside the repository; skipped where they are absent."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from anchor_oracle import assert_equal, visible_segments, with_gradients
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hf_ext import AnchorPacking
from hf_ext.anchor_attention import anchor_attention, rope_drift, use_engine

GOLDEN = Path(__file__).parent.parent.parent / "shared" / "golden" / "anchor_attention"
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no golden data at {GOLDEN}")


def lines(name: str) -> list[dict[str, Any]]:
    path = GOLDEN / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def op_cases() -> dict[str, dict[str, Any]]:
    path = GOLDEN / "op_cases.json"
    return json.loads(path.read_text()) if path.exists() else {}


def tensors_under(prefix: str, path: str) -> dict[str, Tensor]:
    """The tensors of a file whose names start with `prefix`, by the rest of their names."""
    return {k.removeprefix(prefix): x for k, x in load_file(GOLDEN / path).items() if k.startswith(prefix)}


@cache
def model_of(folder: str) -> Any:
    """In float64, with rotary phases as float32 gives them."""
    loaded = AutoModelForCausalLM.from_pretrained(GOLDEN / folder, attn_implementation="anchor", dtype=torch.float32)
    return loaded.double().eval()


@pytest.mark.parametrize("engine", ["sdpa", "dense"])
@pytest.mark.parametrize("case", op_cases())
def test_operation(case, engine):
    data = tensors_under(f"{case}.", "op_cases.safetensors")
    options = {name: op_cases()[case][name] for name in ("scaling", "sliding_window", "softcap")}
    inputs = {name: data[name] for name in ("query", "key", "value", "sinks") if name in data}
    expected = {"out": data["out"], **{name: data[f"grad_{name}"] for name in inputs}}
    mask = data.get("attention_mask")
    with use_engine(engine):
        computed = with_gradients(
            lambda **x: anchor_attention(
                **x, position_ids=data["position_ids"], attention_mask=data.get("attention_mask"), **options
            ),
            # Outputs of masked queries are undefined.
            data["grad_out"] if mask is None else data["grad_out"] * mask[:, None, :, None],
            **inputs,
        )
    if mask is not None:
        for result in (computed, expected):
            result["out"] = result["out"] * mask[:, None, :, None]
    assert_equal(computed, expected, 1e-12)


@pytest.mark.parametrize(
    "folder, tolerance, gradient_tolerance", [("llama_tiny", 1e-9, 1e-8), ("gemma2_tiny", 1e-5, 1e-5)]
)
def test_model(folder, tolerance, gradient_tolerance):
    data = load_file(GOLDEN / folder / "packed.safetensors")
    model = model_of(folder)
    model.zero_grad()
    logits = model(input_ids=data["input_ids"], position_ids=data["position_ids"]).logits
    # The host's own loss would be computed in float32.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), data["labels"][:, 1:].flatten())
    loss.backward()
    assert_equal(logits, data["logits"], tolerance)
    assert_equal(loss, data["loss"], tolerance)
    parameters = dict(model.named_parameters())
    gradients = {name.removeprefix("grad."): x for name, x in data.items() if name.startswith("grad.")}
    assert set(gradients) == set(parameters)
    assert_equal({name: parameters[name].grad for name in gradients}, gradients, gradient_tolerance)


def test_the_models_hold_what_they_are_meant_to_test():
    """A row that starts inside a document, an anchor alone, zeros at an end, an anchor token inside a document."""
    data = load_file(GOLDEN / "llama_tiny" / "packed.safetensors")
    positions, ids = data["position_ids"], data["input_ids"]
    assert positions[1, 0] > 0
    assert (positions[1, -2:] == 0).all()
    assert (visible_segments(positions).sum(-1) == 1).any()
    assert ((ids == 1) & (positions != 0)).any()


@pytest.mark.parametrize("layout", ["shared", "replica"])
def test_layouts(layout):
    data = tensors_under(f"{layout}.", "layouts.safetensors")
    expected = data.pop("logits")
    with torch.no_grad():
        assert_equal(model_of("llama_tiny")(**data).logits, expected, 1e-9)


def test_layouts_give_content_the_same_logits():
    """By token and position: both layouts hold every content token once, at the same position."""
    logits = []
    for layout in ("shared", "replica"):
        data = tensors_under(f"{layout}.", "layouts.safetensors")
        data.pop("logits")
        with torch.no_grad():
            out = model_of("llama_tiny")(**data).logits
        logits.append(out[data["position_ids"] > 0])
    assert_equal(*logits, 1e-9)


@pytest.mark.parametrize("case", lines("packing.jsonl"), ids=lambda case: case["name"].replace(" ", "_"))
@pytest.mark.filterwarnings("ignore:layout", "ignore:drop_remainder", "ignore:.*skipped")
def test_packing(case):
    batch = {"input_ids": case["documents"]}
    if case["labels"] is not None:
        batch["labels"] = case["labels"]
    assert AnchorPacking(**case["options"])(batch) == case["rows"]


def drifts() -> dict[str, float]:
    path = GOLDEN / "rope_drift.json"
    return json.loads(path.read_text())["D"] if path.exists() else {}


@pytest.mark.parametrize("case", drifts(), ids=lambda case: case.replace(" ", "_"))
def test_drift(case):
    """In float32 it is rounding alone, whose size is all that machines agree on."""
    dtype, *shifts = case.split()
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "llama_tiny", dtype=getattr(torch, dtype))
    model.config.max_position_embeddings = 4096  # the file goes beyond what the config allows
    ids = torch.tensor(json.loads((GOLDEN / "rope_drift.json").read_text())["input_ids"])
    factor = rope_drift(model, ids, *map(int, shifts)).d / drifts()[case]
    assert 0.95 < factor < 1.05 if dtype == "bfloat16" else 0.1 < factor < 10
