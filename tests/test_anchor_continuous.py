"""attn_implementation="anchor_continuous": stock padding-free batches equal AnchorCollator's under "anchor"."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from anchor_models import ANCHOR, PAD, VOCABULARY, build, config_of, logits, results, skip_without_positions
from anchor_oracle import assert_equal
from peft import LoraConfig, get_peft_model
from processes import answer, run
from torch import Tensor
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, DynamicCache

from hf_ext import AnchorCollator, AnchorPacking, compat
from hf_ext.anchor_attention import continuous
from hf_ext.anchor_attention.support import AnchorUnsupportedError

NAME = "anchor_continuous"
generator = torch.Generator().manual_seed(3)
DOCUMENTS = [
    [ANCHOR, *torch.randint(3, VOCABULARY, (size,), generator=generator).tolist()] for size in (4, 11, 1, 7, 9)
]
FEATURES = [{"input_ids": document} for document in DOCUMENTS]


def padded(features: list[dict[str, Any]]) -> dict[str, Tensor]:
    """As TRL pads: zeros for positions, no labels."""
    batch = DataCollatorWithFlattening()(features)
    fills = {"input_ids": PAD, "labels": -100, "position_ids": 0}
    return {name: torch.nn.functional.pad(x, (0, 5), value=fills[name]) for name, x in batch.items()}


def stock_batch() -> dict[str, Tensor]:
    return DataCollatorWithFlattening()(FEATURES)


def anchor_batch(inner: Any = None) -> dict[str, Tensor]:
    return AnchorCollator(inner, anchor_token_id=ANCHOR)(FEATURES)


@pytest.fixture(scope="module")
def model() -> Any:
    return build(config_of("llama"), NAME)


# ---------------------------------------------------------------- equal to the collator


@pytest.mark.parametrize("inner", [DataCollatorWithFlattening(), padded], ids=["", "padded"])
@pytest.mark.parametrize(
    "model_type", [pytest.param("llama", marks=pytest.mark.smoke), "gemma2", "gpt2"], ids=lambda name: name
)
def test_stock_batches_equal_those_of_the_collator(model_type, inner):
    skip_without_positions(model_type)
    config = config_of(model_type)
    ours = results(build(config, NAME), **inner(FEATURES))
    assert_equal(ours, results(build(config), **anchor_batch(inner)), 0)
    reset = results(build(config), **inner(FEATURES))
    assert (ours["logits"] - reset["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing(model, reentrant):
    trained = copy.deepcopy(model).train()
    compat.enable_checkpointing(trained, reentrant)
    assert_equal(results(trained, **stock_batch()), results(build(config_of("llama")), **anchor_batch()), 0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("when", ["at construction", "on the base model", "through the wrapper"])
def test_inside_peft(when):
    """The tuners of older versions call the forward of the model they wrap, and not its hooks."""

    def adapted(name: str, first: str) -> Any:
        base = build(config_of("llama"), first)
        if when == "on the base model":
            base.set_attn_implementation(name)
        torch.manual_seed(0)
        wrapped = get_peft_model(
            base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        )
        if when == "through the wrapper":
            wrapped.set_attn_implementation(name)
        return wrapped.double()

    def outcome(wrapped: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        out = wrapped(**batch)
        out.loss.backward()
        return {"logits": out.logits} | {name: x.grad for name, x in wrapped.named_parameters() if x.requires_grad}

    first = when == "at construction"
    ours, theirs = (adapted(name, name if first else "sdpa") for name in (NAME, "anchor"))
    expected = outcome(theirs, anchor_batch())
    assert_equal(outcome(ours, stock_batch()), expected, 0)
    ours.zero_grad()
    ours.base_model.forward, called = ours.base_model.model.forward, ours.base_model.forward
    assert_equal(outcome(ours, stock_batch()), expected, 0)
    ours.base_model.forward = called


def test_compiled(model):
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        assert_equal(compiled(**stock_batch()).logits, logits(build(config_of("llama")), **anchor_batch()), 1e-12)


WORKER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

def work(rank, port, queue):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    from anchor_models import ANCHOR, build, config_of
    from test_anchor_continuous import FEATURES
    from hf_ext import AnchorCollator
    from transformers import DataCollatorWithFlattening

    features = FEATURES[:2] if rank == 0 else FEATURES[2:]
    stock = DataCollatorWithFlattening()(features)
    ours = AnchorCollator(anchor_token_id=ANCHOR)(features)
    worst = 0.0
    gradients = []
    for name, batch in (("anchor_continuous", stock), ("anchor", ours)):
        model = DistributedDataParallel(build(config_of("llama"), name).train())
        model(**batch, use_cache=False).loss.backward()
        gradients.append([x.grad.clone() for x in model.parameters()])
    worst = max((a - b).abs().max().item() for a, b in zip(*gradients))
    queue.put((rank, worst, max(x.abs().max().item() for x in gradients[1])))
    dist.destroy_process_group()

if __name__ == "__main__":
    import socket
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = mp.get_context("spawn")
    queue = context.Queue()
    workers = [context.Process(target=work, args=(rank, port, queue)) for rank in range(2)]
    [worker.start() for worker in workers]
    found = [queue.get(timeout=90) for _ in workers]
    [worker.join() for worker in workers]
    print(json.dumps(found))
"""


def test_ddp(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    found = answer(run(tmp_path / "worker.py", Path(__file__).parent))
    assert sorted(rank for rank, *_ in found) == [0, 1]
    assert all(worst == 0 and largest > 1e-3 for _, worst, largest in found)


# ---------------------------------------------------------------- what the layers are given


def given_to_layers(model: Any, *args: Any, **batch: Any) -> Tensor:
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(*args, **batch)
    finally:
        handle.remove()
    return seen[0]


def row(*documents: list[int]) -> tuple[Tensor, Tensor]:
    """input_ids and restarting position_ids (1, L)."""
    tokens = [token for document in documents for token in document]
    return torch.tensor([tokens]), torch.tensor([[i for document in documents for i in range(len(document))]])


IDS, RESET = row([1, 5, 6], [1, 7], [1, 8, 9, 4])
BATCH = {"input_ids": IDS, "position_ids": RESET}
RUN_ON = [[0, 1, 2, 0, 4, 0, 6, 7, 8]]


@pytest.mark.smoke
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_positions_run_on_and_the_callers_stay(model, mode):
    positions = RESET.clone()
    version = positions._version
    given = given_to_layers(getattr(copy.deepcopy(model), mode)(), input_ids=IDS, position_ids=positions)
    assert given.tolist() == RUN_ON
    assert torch.equal(positions, RESET)
    assert positions._version == version


@pytest.mark.parametrize(
    "positions, expected",
    [
        (RESET.int(), RUN_ON),
        (torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0, 0]]), [[0, 1, 2, 0, 4, 0, 6, 7, 8]]),
        (torch.tensor([[0, 0, 0, 0, 1, 2, 0, 0, 1]]), [[0, 0, 0, 0, 4, 5, 0, 0, 8]]),
        (torch.tensor([[41, 42, 0, 1, 2, 3, 4, 5, 6]]), [[0, 1, 0, 3, 4, 5, 6, 7, 8]]),
    ],
    ids=["int32", "padding", "documents of one token", "begins inside a document"],
)
def test_rows(model, positions, expected):
    given = given_to_layers(model, input_ids=torch.full_like(IDS, ANCHOR), position_ids=positions)
    assert given.tolist() == expected
    assert given.dtype == positions.dtype


def test_only_rows_that_restart_are_changed(model):
    positions = torch.cat([RESET, torch.arange(9)[None] + 3, torch.tensor(RUN_ON)])
    expected = [*RUN_ON, list(range(3, 12)), *RUN_ON]
    given = given_to_layers(model, input_ids=IDS.expand(3, -1), position_ids=positions)
    assert given.tolist() == expected


def test_arguments_by_position_embeddings_and_one_row_for_all(model):
    assert given_to_layers(model, IDS, None, RESET).tolist() == RUN_ON
    assert given_to_layers(model, IDS, torch.ones_like(IDS), RESET, use_cache=False).tolist() == RUN_ON
    embeddings = model.get_input_embeddings()(IDS).detach()
    assert given_to_layers(model, inputs_embeds=embeddings, position_ids=RESET).tolist() == RUN_ON
    assert given_to_layers(model, input_ids=IDS.expand(2, -1), position_ids=RESET).tolist() == RUN_ON


def test_left_padding_is_no_document(model):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9])
    alone = torch.tensor([[1, 1, 1, 0, 1, 2, 3, 4, 5], list(range(9))])
    batch = {"input_ids": torch.full((2, 9), ANCHOR), "attention_mask": mask}
    assert given_to_layers(model, **batch, position_ids=alone) is alone
    packed = torch.tensor([[1, 1, 1, 0, 1, 2, 0, 1, 2], RESET[0].tolist()])
    given = given_to_layers(model, **batch, position_ids=packed)
    assert given[0, 3:].tolist() == [0, 4, 5, 0, 7, 8]
    assert given[1].tolist() == RUN_ON[0]


@pytest.mark.parametrize(
    "batch",
    [
        {"position_ids": torch.arange(9)[None]},
        {"position_ids": torch.tensor(RUN_ON)},
        {"position_ids": torch.tensor([[41, 42, 43, 0, 4, 5, 0, 7, 8]])},
        {"position_ids": RESET, "attention_mask": torch.ones(1, 1, 9, 9).tril().bool()},
        {"position_ids": RESET, "past_key_values": DynamicCache()},
    ],
    ids=["no restart", "anchor ids", "anchor ids from inside a document", "a mask of the user's", "a cache"],
)
def test_passed_as_they_are(model, batch):
    assert given_to_layers(model, input_ids=IDS, **batch) is batch["position_ids"]


def test_rows_of_anchor_packing_pass(model):
    packing = AnchorPacking(12, ANCHOR)
    rows = {name: torch.tensor(x) for name, x in packing({"input_ids": DOCUMENTS}).items()}
    assert given_to_layers(model, **rows) is rows["position_ids"]


def test_no_positions_are_no_documents(model):
    assert given_to_layers(model, input_ids=IDS).tolist() == [list(range(9))]


@pytest.mark.smoke
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["cache", "beams", "no_cache"])
def test_generation_equals_stock(model, options):
    prompts = torch.randint(3, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, **options}
    stock = build(config_of("llama"), "sdpa").generate(prompts, **how)
    assert torch.equal(model.generate(prompts, **how), stock)


def test_it_is_done_once_a_forward(model, monkeypatch):
    """The outer and the inner model carry the hook, and each time costs a wait for the device."""
    calls = []
    real = continuous._rewritten
    monkeypatch.setattr(continuous, "_rewritten", lambda *given: calls.append(1) or real(*given))
    logits(model, input_ids=IDS, position_ids=RESET)
    assert calls == [1]


# ---------------------------------------------------------------- what is wrong with a row


@pytest.mark.parametrize("implementation", ["anchor", NAME])
@pytest.mark.parametrize(
    "rows",
    [RESET.expand(2, -1), RESET[:, :-1], RESET[0], RESET.expand(3, 1, -1)],
    ids=["rows", "length", "1-D", "multimodal"],
)
def test_positions_of_another_shape_are_refused(implementation, rows):
    with pytest.raises(ValueError, match="position_ids must be") as caught:
        build(config_of("llama"), implementation)(input_ids=IDS, position_ids=rows)
    assert str(tuple(IDS.shape)) in str(caught.value)
    assert str(tuple(rows.shape)) in str(caught.value)


def test_multimodal_positions_that_restart_are_refused():
    """The host takes the first of its axes for the text."""
    given = {"position_ids": RESET.expand(4, 1, -1), "input_ids": IDS}
    with pytest.raises(ValueError, match="multimodal"):
        continuous.continued(None, given)
    running = torch.arange(IDS.shape[1]).expand(4, 1, -1)
    assert continuous.continued(None, {**given, "position_ids": running}) is None


def test_the_name_in_the_config_of_a_finished_model_is_refused():
    """It has no hook, and would give the baseline."""
    model = build(config_of("llama"), "sdpa")
    model.config._attn_implementation = NAME
    with pytest.raises(AnchorUnsupportedError, match="set_attn_implementation"):
        model(input_ids=IDS, position_ids=RESET)
    model = build(config_of("llama"), "anchor")  # it has one
    model.config._attn_implementation = NAME
    assert_equal(logits(model, **BATCH), logits(build(config_of("llama"), NAME), **BATCH), 0)


def test_documents_of_one_token_at_the_end_of_finished_positions_stay(model):
    """Zeros at the end may be padding, of which nobody sees the difference; or documents."""
    ids, positions = torch.tensor([[1, 5, 1, 7, 1, 9]]), torch.tensor([[0, 1, 0, 3, 0, 0]])
    ours = logits(model, input_ids=ids, position_ids=positions)
    assert_equal(ours, logits(build(config_of("llama")), input_ids=ids, position_ids=positions), 0)


@pytest.mark.parametrize("limit", [None, 8])
def test_one_graph(limit):
    """No branch on data, except where a row is longer than the model allows, if it is packed."""
    changes = {} if limit is None else {"max_position_embeddings": limit}
    model = build(config_of("llama", num_hidden_layers=1, **changes), NAME)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=limit is None)
    if limit is None:
        assert_equal(compiled(**BATCH).logits, model(**BATCH).logits, 1e-9)
    else:
        with pytest.raises(ValueError, match="--per_device_train_batch_size 1"):
            compiled(**BATCH)
    torch._dynamo.reset()


def test_a_row_beyond_the_trained_positions_is_refused():
    short = build(config_of("llama", max_position_embeddings=8), NAME)
    with pytest.raises(ValueError) as caught:
        short(input_ids=IDS, position_ids=RESET)
    for word in (NAME, "9 tokens", "max_position_embeddings", "8", "--per_device_train_batch_size 1"):
        assert word in str(caught.value)
    logits(short, input_ids=IDS, position_ids=torch.arange(9)[None])
    logits(short, input_ids=IDS[:, :8], position_ids=RESET[:, :8])


def warned(model: Any, **batch: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits(model, **batch)
    return [str(warning.message) for warning in caught if NAME in str(warning.message)]


def test_documents_without_a_shared_anchor_are_one_warning():
    model = build(config_of("llama"), NAME)
    ids, positions = row([5, 6, 1], [1, 6, 1], [5, 3])
    for harmless in ({"input_ids": IDS, "position_ids": RESET}, {"input_ids": ids}):
        assert warned(model, **harmless) == []
    first, *others = warned(model, input_ids=ids, position_ids=positions)
    assert not others
    for word in (NAME, "no anchor", "AnchorCollator", "BOS"):
        assert word in first
    assert warned(model, input_ids=ids, position_ids=positions) == []


def test_padding_needs_no_anchor():
    model = build(config_of("llama"), NAME)
    ids, positions = row([1, 5], [1, 6], [PAD], [PAD], [PAD])
    assert warned(model, input_ids=ids, position_ids=positions) == []
    rows = torch.tensor([[1, 5, 1, 6], [3, 5, 3, 6]])  # one anchor a row is enough
    assert warned(model, input_ids=rows, position_ids=torch.tensor([[0, 1, 0, 1]])) == []


# ---------------------------------------------------------------- the hook itself


def hooks(model: Any) -> list[int]:
    return [len(part._forward_pre_hooks) for part in (model, model.model)]


def test_it_follows_the_implementation_of_the_moment(model):
    changed = build(config_of("llama"), "sdpa")
    for name in (NAME, "sdpa", "anchor", NAME, NAME):
        changed.set_attn_implementation(name)
        expected = RUN_ON if name == NAME else RESET.tolist()
        assert given_to_layers(changed, input_ids=IDS, position_ids=RESET).tolist() == expected
    assert hooks(changed) == hooks(model) == [1, 1]
    assert given_to_layers(model, input_ids=IDS, position_ids=RESET).tolist() == RUN_ON


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_it(model, copied):
    twin = copied(model)
    assert given_to_layers(twin, input_ids=IDS, position_ids=RESET).tolist() == RUN_ON
    assert hooks(twin) == [1, 1]


def test_loaded_and_built_on_the_meta_device(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert "anchor" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    assert given_to_layers(loaded, input_ids=IDS, position_ids=RESET).tolist() == RUN_ON
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config_of("llama"), attn_implementation=NAME)
    filled = empty.to_empty(device="cpu")
    assert given_to_layers(filled, input_ids=IDS, position_ids=RESET).tolist() == RUN_ON


def test_the_inner_model_alone(model):
    """Chunked losses call it in place of the outer one, with its arguments by position or by name."""
    config = config_of("llama")
    for outer in (model, build(config, "sdpa")):
        outer.set_attn_implementation(NAME)
        expected = logits(build(config), input_ids=IDS, position_ids=torch.tensor(RUN_ON))
        for out in (outer.model(input_ids=IDS, position_ids=RESET), outer.model(IDS, None, RESET)):
            assert torch.equal(outer.lm_head(out.last_hidden_state), expected)


def test_an_inner_model_from_elsewhere(model):
    twin = copy.deepcopy(model)
    twin.model = build(config_of("llama"), "anchor").model
    twin.model.config = twin.config
    assert given_to_layers(twin, input_ids=IDS, position_ids=RESET).tolist() == RUN_ON


@pytest.mark.parametrize("model_type", ["mamba", "bloom"])
def test_a_refusal_names_the_string(model_type):
    with pytest.raises(AnchorUnsupportedError, match=f'attn_implementation="{NAME}" is not supported by'):
        AutoModelForCausalLM.from_config(config_of(model_type), attn_implementation=NAME)


def test_a_refusal_in_a_forward_names_the_string(model):
    def touch(_: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        kwargs["attention_mask"] + 1

    handle = model.model.layers[0].register_forward_pre_hook(touch, with_kwargs=True)
    try:
        with pytest.raises(AnchorUnsupportedError, match=f'attn_implementation="{NAME}" is not supported by'):
            model(input_ids=IDS, position_ids=RESET)
    finally:
        handle.remove()
    model.model.layers[0].self_attn.is_causal = False
    with pytest.raises(AnchorUnsupportedError, match=f'attn_implementation="{NAME}" is not supported by'):
        model(input_ids=IDS, position_ids=RESET)
    model.model.layers[0].self_attn.is_causal = True


@pytest.mark.gpu
def test_it_waits_for_the_device_once(model):
    on_device = copy.deepcopy(model).to("cuda")
    counts = {}
    for name in ("anchor", NAME):
        on_device.set_attn_implementation(name)
        batch = {"input_ids": IDS.cuda(), "position_ids": RESET.cuda()}
        logits(on_device, **batch)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits(on_device, **batch)
        torch.cuda.set_sync_debug_mode("default")
        counts[name] = len([warning for warning in caught if "synchroniz" in str(warning.message)])
    assert counts[NAME] == counts["anchor"] + 1
