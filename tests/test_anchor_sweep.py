"""Every causal language model of transformers under "anchor": exact or refused, and as the committed tables say."""

from contextlib import contextmanager
from typing import Any

import anchor_sweep
import pytest
import torch
import transformers
from anchor_sweep import EXACT, NOT_BUILT, REFUSED, RESULTS, TYPES, UNCLEAR, WRONG, judge
from torch import Tensor

from hf_ext import compat
from hf_ext.anchor_attention import models

_FAMILIES = """
llama mistral ministral3 mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text gemma4_text phi phi3 gpt_oss
gpt2 gpt_neox deepseek_v2 deepseek_v3 olmo olmo2 olmo3 olmoe glm glm4 glm4_moe cohere cohere2 smollm3 granite granitemoe
opt starcoder2 stablelm nemotron exaone4 ernie4_5 seed_oss minimax_m2 apertus helium
"""
POPULAR = set(_FAMILIES.split())

COMMITTED = RESULTS.read_text(encoding="utf-8")
on_the_tables_version = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in COMMITTED, reason="the tables are of another transformers"
)


@pytest.mark.parametrize("model_type", TYPES)
def test_a_type_is_exact_or_refused(model_type):
    verdict = judge(model_type)
    assert verdict.outcome not in (WRONG, UNCLEAR), verdict.detail


@on_the_tables_version
def test_every_type_can_be_judged():
    assert not {name: judge(name).detail for name in TYPES if judge(name).outcome == NOT_BUILT}


@on_the_tables_version
def test_popular_types_and_many_others_are_exact():
    exact = {name for name in TYPES if judge(name).outcome == EXACT}
    assert not POPULAR - exact
    assert len(exact) >= 40


@on_the_tables_version
def test_the_tables_of_the_package_are_what_was_found():
    verdicts = {name: judge(name) for name in TYPES}
    exact = {name: verdict for name, verdict in verdicts.items() if verdict.outcome == EXACT}
    refused = {name: verdict.detail for name, verdict in verdicts.items() if verdict.outcome == REFUSED}
    assert {*exact, *(verdict.model_type for verdict in exact.values())} == models.EXACT_TYPES
    assert {name for name, verdict in exact.items() if not verdict.flagged} == models.UNFLAGGED_TYPES
    assert {name for name, verdict in exact.items() if verdict.shifted} == models.SHIFTED_TYPES
    assert refused == models.REFUSED_TYPES


@on_the_tables_version
def test_the_committed_page_is_what_was_found():
    found = anchor_sweep.page({name: judge(name) for name in TYPES})
    assert table_rows(COMMITTED) == table_rows(found)


def table_rows(page: str) -> list[str]:
    return [line for line in page.splitlines() if line.startswith("|")]


# ---------------------------------------------------------------- the sweep itself sees what it must


def cut_off_documents(arguments: dict[str, Any]) -> None:
    arguments["position_ids"] = torch.arange(arguments["position_ids"].shape[1])[None]


def lose_window(arguments: dict[str, Any]) -> None:
    arguments["attention_mask"].window = arguments["sliding_window"] = None


def lose_softcap(arguments: dict[str, Any]) -> None:
    arguments["softcap"] = None


def lose_sinks(arguments: dict[str, Any]) -> None:
    arguments["s_aux"] = None


def rescale(arguments: dict[str, Any]) -> None:
    arguments["scaling"] *= 1.01


def detach_keys(arguments: dict[str, Any]) -> None:
    """Right logits, wrong gradients."""
    arguments["key"] = arguments["key"].detach()


@pytest.mark.parametrize(
    "model_type, damage",
    [
        ("llama", cut_off_documents),
        ("mistral", lose_window),
        ("qwen3", lose_window),
        ("gemma2", lose_window),
        ("gemma2", lose_softcap),
        ("gpt_oss", lose_sinks),
        ("deepseek_v3", rescale),
        ("llama", detach_keys),
    ],
)
def test_damage_is_seen(model_type, damage):
    with damaged(damage):
        assert judge.__wrapped__(model_type).outcome == WRONG


@contextmanager
def damaged(damage: Any) -> Any:
    table, _ = compat.attention_tables()
    ours = table["anchor"]

    def broken(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any) -> Any:
        arguments |= {"query": query, "key": key, "value": value, "attention_mask": attention_mask}
        damage(arguments)
        return ours(module, **arguments)

    table["anchor"] = broken
    try:
        yield
    finally:
        table["anchor"] = ours


CLAIMED = ("lfm3", "minimax", "moshi", "doge", "deepseek_v32", "gpt_bigcode")


@pytest.mark.parametrize("model_type", [name for name in CLAIMED if name in TYPES])
def test_a_refusal_is_needed(model_type, monkeypatch):
    """The flags of these classes claim support."""
    assert judge(model_type).outcome == REFUSED
    monkeypatch.setattr("hf_ext.anchor_attention.support.why_unsupported", lambda *_: None)
    assert judge.__wrapped__(model_type).outcome != EXACT
