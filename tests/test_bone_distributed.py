"""Two processes under gloo, against the same adapters in one process that is given the whole batch."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from anchor_models import VOCABULARY, build, config_of
from anchor_oracle import assert_equal
from bone_native import by_form, ours_only
from packaging.version import Version
from peft import BoneConfig, PeftModel, get_peft_model
from ranks import RANKS, whole
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from hf_ext import compat

# The tile form with an r that is no multiple of the processes, so that their parts are unequal.
FORMS = {"tile": [True], "bat": ["bat"], "bat_row": ["bat_row"], "mixed": ["bat_row", True, "bat"]}
SIZE = {True: 5, "bat": 8, "bat_row": 8}
IDS = torch.randint(3, VOCABULARY, (2 * RANKS, 12), generator=torch.Generator().manual_seed(1))
OPTIMIZER = {"lr": 0.01, "eps": 1e-3}


def base(dtype: torch.dtype = torch.float64) -> Any:
    """With biases; a new one every time."""
    return build(config_of("llama", vocab_size=72, attention_bias=True, mlp_bias=True), "sdpa", dtype)


def adapted(form: str, dtype: torch.dtype = torch.float64, *targets: str, bias: str = "bone_only") -> Any:
    """All of the adapters active and trained, with the same random blocks every time."""
    model = base(dtype)
    for i, start in enumerate(FORMS[form]):
        targets = targets or ("q_proj", "v_proj", "gate_proj", "down_proj")
        # Only one of several adapters may train biases.
        config = BoneConfig(r=SIZE[start], init_weights=start, target_modules=[*targets], bias="none" if i else bias)
        if i:
            model.add_adapter(f"adapter{i}", config)
        else:
            model = get_peft_model(model, config, "adapter0")
    model.base_model.set_adapter([f"adapter{i}" for i in range(len(FORMS[form]))])
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model.train()


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def sharded(model: Any, **options: Any) -> Any:
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def mine(rank: int) -> Tensor:
    return IDS.chunk(RANKS)[rank]


def loss_of(model: Any, ids: Tensor) -> Tensor:
    """In the dtype of the logits; the host's own is in float32."""
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def step(model: Any, parallel: Any, ids: Tensor) -> dict[str, Tensor]:
    """The loss and the gradient of all that is trained."""
    loss = loss_of(parallel, ids)
    loss.backward()
    return {"loss": loss.detach(), **{name: whole(x.grad) for name, x in trained(model).items()}}


# ---------------------------------------------------------------- gradients


def under_ddp(rank: int, form: str, reentrant: bool | None) -> dict[str, Tensor]:
    model = adapted(form)
    if reentrant is not None:
        model.enable_input_require_grads()
        compat.enable_checkpointing(model, reentrant)
    return step(model, DistributedDataParallel(model), mine(rank))


def under_fsdp(rank: int, form: str, reentrant: bool | None) -> dict[str, Tensor]:
    model = adapted(form)
    if reentrant is not None:
        compat.enable_checkpointing(model, reentrant)
    return step(model, sharded(model), mine(rank))


@pytest.mark.parametrize("form", by_form(FORMS))
@pytest.mark.parametrize(
    "job, reentrant",
    [(under_ddp, None), (under_ddp, True), (under_ddp, False), (under_fsdp, None), (under_fsdp, False)],
    ids=["ddp", "ddp_reentrant", "ddp_checkpointing", "fsdp2", "fsdp2_checkpointing"],
)
def test_gradients_are_those_of_the_whole_batch(both, job, reentrant, form):
    model = adapted(form)
    expected = step(model, model, IDS)
    answers = both(job, form, reentrant)
    loss = sum(answer.pop("loss") for answer in answers) / RANKS
    assert_equal(loss, expected.pop("loss"), 1e-9)
    assert len(expected) >= len(FORMS[form]) * 12
    for answer in answers:
        assert_equal(answer, expected, 1e-6)


def in_low_precision(rank: int, form: str, options: dict[str, Any]) -> dict[str, Tensor]:
    model = adapted(form, torch.float32 if options else torch.bfloat16, bias="none")
    return step(model, sharded(model, **options), mine(rank))


@pytest.mark.parametrize("form", by_form(FORMS))
@pytest.mark.parametrize(
    "options",
    [{}, {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}],
    ids=["bf16_base", "bf16_policy"],
)
def test_fsdp2_with_parameters_of_two_precisions(both, form, options):
    """Blocks in float32 beside a base in bfloat16, as PEFT makes them; and what mixed precision makes of float32."""

    def alone(rank: int) -> dict[str, Tensor]:
        model = adapted(form, torch.float32 if options else torch.bfloat16, bias="none")
        for parameter in model.parameters() if options else ():
            parameter.data = parameter.data.bfloat16()
        return step(model, model, mine(rank))

    parts = [alone(rank) for rank in range(RANKS)]
    mean = {name: sum(part[name].float() for part in parts) / RANKS for name in parts[0]}
    for answer, part in zip(both(in_low_precision, form, options), parts, strict=True):
        assert_equal(answer.pop("loss"), part["loss"], 0)
        assert all(gradient.dtype == torch.float32 for gradient in answer.values())
        assert_equal(answer, {name: mean[name] for name in answer}, 0)


# ---------------------------------------------------------------- merging


def merged_under_fsdp(
    rank: int, form: str, call: str, options: dict[str, Any], targets: list[str]
) -> tuple[str, list[str], Tensor]:
    """After a forward, which leaves the parameters of the root, or all of them, whole in every process."""
    model = sharded(adapted(form, torch.float64, *targets), **options)
    before = loss_of(model, IDS)
    try:
        getattr(model, call)()
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    before.backward()
    merged = [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]
    return said, merged, torch.stack([before, loss_of(model, IDS)]).detach()


@ours_only("which merges into sharded weights without a word")
@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("form", ["tile", "mixed"])
@pytest.mark.parametrize(
    "options, targets",
    [({}, []), ({}, ["lm_head"]), ({"reshard_after_forward": False}, [])],
    ids=["sharded", "root", "kept_whole"],
)
def test_merging_under_fsdp2_is_refused_and_changes_nothing(both, form, call, options, targets):
    for said, merged, (before, after) in both(merged_under_fsdp, form, call, options, targets):
        assert "sharded over processes" in said
        assert merged == []
        assert before == after


# ---------------------------------------------------------------- saving


# Before, PEFT does not save the biases that it trains beside an adapter of this kind.
BIAS = "bone_only" if Version(peft.__version__) >= Version("0.21.0") else "none"


def updates(parallel: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    for _ in range(2):
        loss_of(parallel, ids).backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_from_fsdp(rank: int, form: str, folder: Path) -> None:
    model = sharded(adapted(form, bias=BIAS))
    updates(model, torch.optim.AdamW(trained(model).values(), **OPTIMIZER), mine(rank))
    values = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=values)


def saved_from_accelerate(rank: int, form: str, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), adapted(form, bias=BIAS)
    assert accelerator.num_processes == RANKS
    optimizer = torch.optim.AdamW(trained(model).values(), **OPTIMIZER)
    parallel, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(2):
        accelerator.backward(loss_of(parallel, mine(rank)))
        optimizer.step()
        optimizer.zero_grad()
    values, model = accelerator.get_state_dict(parallel), accelerator.unwrap_model(parallel)
    model.save_pretrained(folder, is_main_process=accelerator.is_main_process, state_dict=values)


@pytest.mark.parametrize("form", by_form(FORMS))
@pytest.mark.parametrize("job", [saved_from_fsdp, saved_from_accelerate], ids=["fsdp2", "accelerate_ddp"])
def test_what_two_processes_trained_is_what_one_loads(both, tmp_path, job, form):
    model = adapted(form, bias=BIAS)
    updates(model, torch.optim.AdamW(trained(model).values(), **OPTIMIZER), IDS)
    both(job, form, tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "adapter0", "adapter0", is_trainable=True)
    for i in range(1, len(FORMS[form])):
        loaded.load_adapter(tmp_path / f"adapter{i}", f"adapter{i}", is_trainable=True)
    loaded.base_model.set_adapter([*loaded.peft_config])
    assert_equal(trained(loaded), trained(model), 1e-6)
