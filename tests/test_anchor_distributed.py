"""Two processes under gloo, against stock attention in one process that is given the whole batch and the mask."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as differentiable
from accelerate.big_modeling import _attach_context_parallel_hooks
from anchor_models import ROWS, SHAPE, build, check_text, config_of, gradients_of, results, stock_mask
from anchor_oracle import assert_equal
from ranks import RANKS, whole
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_ext import compat
from hf_ext.anchor_attention import AnchorUnsupportedError

LENGTH = ROWS.input_ids.shape[1]
BATCH = ROWS.batch()


def refused(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> str:
    """For jobs, whose errors are sent as text."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **keywords)
    return f"{type(caught.value).__name__}: {caught.value}"


# ---------------------------------------------------------------- every process has a row of its own


def row(rank: int) -> dict[str, Tensor]:
    return {name: x[rank : rank + 1] for name, x in BATCH.items()}


def trained(model: Any, parallel: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    out = parallel(**batch, use_cache=False)
    gradients = gradients_of(model, out.loss)
    return {"logits": out.logits.detach(), **{name: whole(gradient) for name, gradient in gradients.items()}}


def under_ddp(rank: int) -> dict[str, Tensor]:
    model = build(config_of("llama")).train()
    return trained(model, DistributedDataParallel(model), row(rank))


def under_fsdp(rank: int, checkpointing: bool) -> dict[str, Tensor]:
    model = build(config_of("llama")).train()
    if checkpointing:
        compat.enable_checkpointing(model)
    for layer in model.model.layers:
        fully_shard(layer)
    return trained(model, fully_shard(model), row(rank))


@pytest.mark.parametrize(
    "job",
    [(under_ddp,), (under_fsdp, False), (under_fsdp, True)],
    ids=["ddp", "fsdp2", "fsdp2_checkpointing"],
)
def test_gradients_are_those_of_the_mean_loss(both, stock_llama, job):
    mask = stock_mask(config_of("llama"))
    alone = [results(stock_llama, **row(rank), attention_mask=mask[rank : rank + 1]) for rank in range(RANKS)]
    for one, got in zip(alone, both(*job), strict=True):
        assert_equal(got.pop("logits"), one["logits"], 1e-9)
        assert_equal(got, {name: (alone[0][name] + alone[1][name]) / RANKS for name in got}, 1e-9)


# ---------------------------------------------------------------- every process has a part of each row: Ulysses


def exchange(x: Tensor, cut: int, join: int) -> Tensor:
    """Every process gives the others their part of dimension `cut`, and joins what it gets along `join`."""
    parts = torch.stack(x.chunk(RANKS, cut))
    return torch.cat([*differentiable.all_to_all_single(torch.empty_like(parts), parts)], join)


def gathered(positions: Tensor) -> Tensor:
    parts = [torch.empty_like(positions) for _ in range(RANKS)]
    dist.all_gather(parts, positions.contiguous())
    return torch.cat(parts, 1)


class Ulysses:
    """What DeepSpeed's UlyssesSPAttentionHF does: puts itself in the place of the function, and drops the mask."""

    def __init__(self, name: str = "anchor") -> None:
        self.name, self.attention = name, ALL_ATTENTION_FUNCTIONS[name]

    def __enter__(self) -> None:
        ALL_ATTENTION_FUNCTIONS[self.name] = self

    def __exit__(self, *_: Any) -> None:
        del ALL_ATTENTION_FUNCTIONS[self.name]

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **others: Any) -> Any:
        query, key, value = (exchange(x, cut=1, join=2) for x in (query, key, value))
        others["position_ids"] = gathered(others["position_ids"])  # a new tensor in every layer
        out, _ = self.attention(module, query, key, value, None, **others)
        return exchange(out, cut=1, join=2), None


def part(x: Tensor, rank: int) -> Tensor:
    return x.chunk(RANKS, 1)[rank]


def under_ulysses(rank: int, model_type: str) -> dict[str, Tensor]:
    model = build(config_of(model_type)).train()
    targets = F.pad(BATCH["labels"][:, 1:], (0, 1), value=-100)
    with Ulysses():
        inputs = {name: part(BATCH[name], rank) for name in ("input_ids", "position_ids")}
        logits = model(**inputs, use_cache=False).logits
        mine = part(targets, rank).flatten()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), mine, reduction="sum")  # float32 as the host's
        gradients = gradients_of(model, loss / (targets != -100).sum())
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    return {"logits": logits.detach(), **gradients}


# Eager attention takes its softmax in float32.
@pytest.mark.parametrize(
    "model_type, stock, tolerance", [("llama", "sdpa", 1e-9), ("mistral", "sdpa", 1e-9), ("gemma2", "eager", 1e-5)]
)
def test_ulysses(both, model_type, stock, tolerance):
    config = config_of(model_type)
    expected = results(build(config, stock).train(), **BATCH, attention_mask=stock_mask(config))
    answers = both(under_ulysses, model_type)
    assert_equal(torch.cat([answer.pop("logits") for answer in answers], 1), expected["logits"], tolerance)
    for answer in answers:
        assert_equal(answer, {name: expected[name] for name in answer}, tolerance)


def shared_under_ulysses(rank: int) -> str:
    documents = part((BATCH["position_ids"] == 0).cumsum(1), rank)
    model = build(config_of("llama"))
    inputs = {name: part(BATCH[name], rank) for name in ("input_ids", "position_ids")}
    with Ulysses():
        return refused(model, **inputs, anchor_doc_ids=documents, use_cache=False)


def test_the_shared_layout_does_not_pass_ulysses_and_says_so(both):
    for text in both(shared_under_ulysses):
        assert "anchor_doc_ids" in text
        assert f"(3, {LENGTH})" in text
        assert f"(3, {LENGTH // RANKS})" in text


# ---------------------------------------------------------------- what a dropped mask would lose


class Dropping(Ulysses):
    """Ulysses of one process."""

    def __call__(self, module: Any, query: Tensor, key: Tensor, value: Tensor, _: Any, **others: Any) -> Any:
        return self.attention(module, query, key, value, None, **others)


def windowed(model_type: str, window: int | None) -> Any:
    experts = {"num_local_experts": 2} if model_type == "phimoe" else {"num_experts": 2, "moe_intermediate_size": 8}
    layers = {"use_sliding_window": bool(window), "max_window_layers": 3} if model_type == "qwen2_moe" else {}
    config = config_of(model_type, **SHAPE, **experts, **layers, sliding_window=window, num_experts_per_tok=1)
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]._supports_attention_backend:
        pytest.skip(f"the layers of {model_type} do not go through this transformers' table of attention functions")
    return build(config, dtype=torch.float32)  # the experts know no float64


@pytest.mark.parametrize("model_type", ["phimoe", "qwen2_moe"])
def test_a_window_told_to_the_mask_alone_is_not_lost_with_it(model_type):
    with Dropping(), pytest.raises(AnchorUnsupportedError) as caught:
        windowed(model_type, 5)(**BATCH)
    check_text(str(caught.value), "window (5)", "sequence parallelism")
    model = windowed(model_type, None)
    expected = model(**BATCH).logits
    with Dropping():
        assert torch.equal(model(**BATCH).logits, expected)


def test_parts_of_a_row_are_not_numbered_by_the_second_string():
    """Its hook runs before the rows are gathered: the second process would begin at 0 in the middle of a document."""
    model = build(config_of("llama"), "anchor_continuous")
    with Dropping("anchor_continuous"), pytest.raises(AnchorUnsupportedError) as caught:
        model(input_ids=BATCH["input_ids"])
    check_text(str(caught.value), "anchor_continuous", "sequence parallelism", "AnchorCollator")


# ---------------------------------------------------------------- every process has a part of each row: a ring


def in_a_ring(_: int, hooks: bool) -> str:
    """As accelerate's `maybe_context_parallel`, which itself refuses CPUs; `hooks`: after its `prepare`."""
    from torch.distributed.tensor.experimental import context_parallel

    model = build(config_of("llama")).train()
    if hooks:
        _attach_context_parallel_hooks(model)
    batch = {name: x.clone() for name, x in BATCH.items()}
    mesh = init_device_mesh("cpu", (RANKS,))
    with context_parallel(mesh, buffers=[*batch.values()], buffer_seq_dims=[1] * len(batch)):
        assert batch["input_ids"].shape == (3, LENGTH // RANKS)
        text = refused(model, **batch)
    model = build(config_of("llama"))
    model(**BATCH)  # and nothing of it is left
    return text


@pytest.mark.parametrize("hooks", [False, True], ids=["torch", "accelerate"])
def test_context_parallelism_is_refused(both, hooks):
    for text in both(in_a_ring, hooks):
        check_text(text, "AnchorUnsupportedError", "context parallelism", "cp_size", "Ulysses")


def test_hooks_of_accelerate_that_drop_the_mask_are_refused():
    """Also outside of its context manager: the padding would be lost."""
    model = build(config_of("llama"))
    _attach_context_parallel_hooks(model)
    with pytest.raises(AnchorUnsupportedError) as caught:
        model(**BATCH)
    check_text(str(caught.value), "context parallelism", "Ulysses")


# ---------------------------------------------------------------- every process has some of the heads


def under_tensor_parallelism(_: int, folder: Path) -> dict[str, Tensor]:
    kind = {"tp_plan": "auto", "attn_implementation": "anchor", "dtype": torch.float64}
    model = AutoModelForCausalLM.from_pretrained(folder, **kind).train()
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == SHAPE["hidden_size"] // RANKS
    return trained(model, model, BATCH)


def test_tensor_parallelism(both, stock_llama, tmp_path):
    stock_llama.save_pretrained(tmp_path)
    expected = results(stock_llama, **BATCH, attention_mask=stock_mask(stock_llama.config))
    del expected["loss"]
    for answer in both(under_tensor_parallelism, tmp_path):
        assert_equal(answer, expected, 1e-9)
