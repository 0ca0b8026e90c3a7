"""attn_implementation="anchor" in whole models: against stock attention given a mask, and document by document."""

import copy
import json
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from anchor_oracle import (
    assert_equal,
    attend,
    documents_of,
    positions_of,
    segments_of,
    visible_documents,
    visible_segments,
)
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_ext.anchor_attention.backend import AnchorMask, anchor_attention_forward, anchor_mask
from hf_ext.anchor_attention.support import AnchorUnsupportedError

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


@pytest.fixture(scope="module")
def llama() -> Any:
    return build(config_of("llama"))


@pytest.fixture(scope="module")
def stock_llama() -> Any:
    return build(config_of("llama"), "sdpa")


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize(
    "model_type, stock, tolerance",
    [
        pytest.param("llama", "sdpa", 1e-9, marks=pytest.mark.smoke),
        ("qwen2", "sdpa", 1e-9),
        ("gpt2", "sdpa", 1e-9),
        ("mistral", "sdpa", 1e-9),
        # Their softmax runs in float32 in eager attention, the only stock one that has a softcap and sinks.
        ("gemma2", "eager", 1e-5),
        ("gpt_oss", "eager", 1e-5),
    ],
)
def test_logits_loss_and_gradients_equal_stock_attention_given_the_mask(model_type, stock, tolerance):
    config = config_of(model_type)
    ours = results(build(config), **ROWS.batch())
    assert_equal(ours, results(build(config, stock), **ROWS.batch(), attention_mask=stock_mask(config)), tolerance)


def test_a_window_and_a_softcap_change_the_result():
    """Else the comparisons above would prove nothing about them."""
    plain = logits(build(config_of("mistral", sliding_window=None)), **ROWS.batch())
    windowed = logits(build(config_of("mistral")), **ROWS.batch())
    assert (plain - windowed).abs().max() > 1e-3
    soft, hard = (logits(build(config_of("gemma2", attn_logit_softcapping=c)), **ROWS.batch()) for c in (3.0, 300.0))
    assert (soft - hard).abs().max() > 1e-3


def alone_logits(model: Any, row: int, start: int, end: int) -> Tensor:
    """One document by itself, at its positions [0, s + 1, ...]."""
    ids, positions = (x[row : row + 1, start:end] for x in (ROWS.input_ids, ROWS.position_ids))
    # Without a mask the host would look for packed documents and cut the anchor off.
    causal = torch.ones(1, 1, end - start, end - start).tril().bool()
    return model(input_ids=ids, position_ids=positions, attention_mask=causal, use_cache=False).logits[0]


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """In float64; the host's own loss is computed in float32."""
    return torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")


def test_every_document_computes_as_if_it_were_alone(llama, stock_llama):
    packed = llama(input_ids=ROWS.input_ids, position_ids=ROWS.position_ids, use_cache=False).logits
    whole_rows = sum(summed_loss(*row) for row in zip(packed, ROWS.labels, strict=True))
    alone, one_by_one = torch.empty_like(packed), torch.zeros(())
    for row, positions in enumerate(ROWS.position_ids.tolist()):
        for start, end in segments_of(positions):
            out = alone_logits(stock_llama, row, start, end)
            alone[row, start:end] = out.detach()
            one_by_one = one_by_one + summed_loss(out, ROWS.labels[row, start:end])
    assert_equal(packed, alone, 1e-9)
    assert_equal(gradients_of(llama, whole_rows), gradients_of(stock_llama, one_by_one), 1e-9)


@pytest.mark.smoke
def test_a_changed_token_changes_its_own_document_behind_it_and_nothing_else(llama):
    length = ROWS.input_ids.shape[1]
    for row in range(len(ROWS.input_ids)):
        ids, positions = (x[row].expand(length, -1).clone() for x in (ROWS.input_ids, ROWS.position_ids))
        before = logits(llama, input_ids=ids, position_ids=positions)
        ids[range(length), range(length)] = (ids[range(length), range(length)] + 1) % VOCABULARY
        changed = (logits(llama, input_ids=ids, position_ids=positions) - before).abs().amax(-1) > 1e-9
        # [token changed, token that moved]: who may see a token is who changes with it.
        assert torch.equal(changed, VISIBLE[row].T)


@pytest.mark.parametrize(
    "extra",
    [
        {"use_cache": True},
        {"attention_mask": torch.ones_like(ROWS.input_ids)},
        {"attention_mask": torch.ones_like(ROWS.input_ids), "use_cache": True},
        {"num_items_in_batch": torch.tensor(7), "labels": ROWS.labels},
        {"cu_seq_lens_q": torch.tensor([0, 72], dtype=torch.int32), "max_length_q": 72},
    ],
    ids=["use_cache", "all_ones_mask", "all_ones_mask_and_use_cache", "num_items_in_batch", "flash_keywords"],
)
def test_what_loops_pass_besides_changes_nothing(llama, extra):
    batch = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids}
    assert torch.equal(logits(llama, **batch, **extra), logits(llama, **batch))


def test_one_row_of_positions_for_the_whole_batch(llama):
    first = ROWS.position_ids[:1]
    whole = logits(llama, input_ids=ROWS.input_ids, position_ids=first.expand(3, -1))
    assert torch.equal(logits(llama, input_ids=ROWS.input_ids, position_ids=first), whole)
    assert torch.equal(logits(llama, input_ids=ROWS.input_ids, position_ids=first.int()), whole)


def hidden(*spans: tuple[int, int, int]) -> Tensor:
    mask = torch.ones_like(ROWS.input_ids)
    for row, start, end in spans:
        mask[row, start:end] = 0
    return mask


@pytest.mark.parametrize(
    "mask",
    [hidden((0, 0, 4), (1, 0, 5)), hidden((0, 20, 24), (2, 9, 24)), hidden((0, 8, 11), (1, 3, 4), (2, 5, 6))],
    ids=["left", "right", "inside"],
)
@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_two_dimensional_mask_hides_its_tokens(model_type, mask):
    config = config_of(model_type)
    window = getattr(config, "sliding_window", None)
    visible = visible_segments(ROWS.position_ids, mask, window)
    # Stock attention is undefined in rows that see nothing; a masked token may as well see itself.
    visible |= torch.eye(24, dtype=torch.bool) & ~mask.bool()[:, :, None]
    batch = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids}
    ours = logits(build(config), **batch, attention_mask=mask)
    stock = logits(build(config, "sdpa"), **batch, attention_mask=visible[:, None])
    assert ours.isfinite().all()
    assert_equal(ours[mask.bool()], stock[mask.bool()], 1e-9)


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 2)], ids=["among_others", "alone"])
def test_a_fully_masked_row_stays_finite(llama, rows):
    mask = hidden((1, 0, 24))[rows]
    batch = {name: x[rows] for name, x in ROWS.batch().items()}
    assert all(x.isfinite().all() for x in results(llama, **batch, attention_mask=mask).values())


def test_a_four_dimensional_mask_of_the_user_is_obeyed(llama, stock_llama):
    mask = VISIBLE[:, None] & (torch.rand(24, 24) < 0.7) | torch.eye(24, dtype=torch.bool)
    batch = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids, "attention_mask": mask}
    assert_equal(logits(llama, **batch), logits(stock_llama, **batch), 1e-9)


def test_a_mask_of_numbers_given_by_the_user_is_obeyed_with_softcap():
    """The host's sdpa knows no softcap, so these masks are read as hidden or not; a mask of weights is refused."""
    config = config_of("gemma2", sliding_window=VISIBLE.shape[-1])
    batch = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids}
    mask = additive(VISIBLE)
    ours, theirs = (logits(build(config, name), **batch, attention_mask=mask) for name in ("anchor", "eager"))
    assert_equal(ours, theirs, 1e-5)
    with pytest.raises(AnchorUnsupportedError, match="mask of weights"):
        build(config)(**batch, attention_mask=mask - 0.5)


def test_reset_positions_of_a_flattening_collator_isolate_the_documents(llama, stock_llama):
    """The paper's baseline: positions restart at every document, and no anchor is shared."""
    features = [{"input_ids": ROWS.input_ids[0, :n].tolist()} for n in (5, 9, 2)]
    batch = DataCollatorWithFlattening()(features)
    batch.pop("labels")
    document = (batch["position_ids"] == 0).cumsum(-1)
    visible = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    stock = logits(stock_llama, **batch | {"attention_mask": visible})
    assert_equal(logits(llama, **batch), stock, 1e-9)


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing_changes_no_bit(llama, reentrant):
    model = copy.deepcopy(llama).train()
    plain = results(model, **ROWS.batch())
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    recomputed = results(model, **ROWS.batch())
    assert all(torch.equal(plain[name], recomputed[name]) for name in plain)


def test_positions_changed_in_place_between_forwards(llama):
    """Segments are kept through the layers of one forward; they must not survive it."""
    positions = ROWS.position_ids.clone()
    logits(llama, input_ids=ROWS.input_ids, position_ids=positions)
    positions[:] = torch.arange(24)
    fresh = torch.arange(24).expand(3, -1).clone()
    assert torch.equal(
        logits(llama, input_ids=ROWS.input_ids, position_ids=positions),
        logits(llama, input_ids=ROWS.input_ids, position_ids=fresh),
    )


# ---------------------------------------------------------------- shared layout


@dataclass
class Layouts:
    """The same documents once in each layout, and where each token of the shared row stands in the replica row."""

    shared: dict[str, Tensor]
    replica: dict[str, Tensor]
    place: list[int]


def both_layouts() -> Layouts:
    torch.manual_seed(4)
    documents = [torch.randint(3, VOCABULARY, (n,)).tolist() for n in (6, 1, 9, 4)]
    shared, replica, place = [(ANCHOR, 0, -100)], [(ANCHOR, 0, -100)], [0]
    for number, document in enumerate(documents):
        if number:
            replica.append((ANCHOR, 0, -100))
        for index, token in enumerate(document):
            # Behind the shared anchor stands only the first document: no other may be predicted from its first token.
            label = -100 if number and index == 0 else token
            place.append(len(replica))
            replica.append((token, len(shared), label))
            shared.append((token, len(shared), label))
    names = ("input_ids", "position_ids", "labels")
    layouts = [dict(zip(names, torch.tensor(rows).T[:, None], strict=True)) for rows in (shared, replica)]
    layouts[0]["anchor_doc_ids"] = documents_of([[len(document) for document in documents]])
    return Layouts(*layouts, place)


LAYOUTS = both_layouts()


def test_shared_layout_equals_replica_layout_through_four_layers():
    model = build(config_of("llama", num_hidden_layers=4))
    shared, replica = results(model, **LAYOUTS.shared), results(model, **LAYOUTS.replica)
    replica["logits"] = replica["logits"][:, LAYOUTS.place]
    for name in ("logits", "loss"):
        assert_equal(shared.pop(name), replica.pop(name), 1e-9)
    # Llama's norms run in float32, so one gradient of the anchor and the sum over its replicas round differently.
    assert_equal(shared, replica, 1e-6)


def test_shared_layout_equals_stock_attention_given_the_mask(stock_llama, llama):
    batch = dict(LAYOUTS.shared)
    mask = visible_documents(batch.pop("anchor_doc_ids"))[:, None]
    assert_equal(results(llama, **LAYOUTS.shared), results(stock_llama, **batch, attention_mask=mask), 1e-9)


def test_shared_layout_with_padding(stock_llama, llama):
    batch = dict(LAYOUTS.shared)
    mask = torch.ones_like(batch["input_ids"])
    mask[0, 3:5] = mask[0, 18:] = 0
    visible = visible_documents(batch.pop("anchor_doc_ids"), mask) | torch.eye(21, dtype=torch.bool)
    ours = logits(llama, **LAYOUTS.shared, attention_mask=mask)
    assert_equal(ours[mask.bool()], logits(stock_llama, **batch, attention_mask=visible[:, None])[mask.bool()], 1e-9)


# ---------------------------------------------------------------- generation


def prompts() -> dict[str, Tensor]:
    """Three prompts of different lengths, padded on the left; the longest is longer than the windows above."""
    torch.manual_seed(6)
    ids = torch.randint(3, VOCABULARY, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[2, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


GENERATION = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "static_cache": {"cache_implementation": "static"},
    "no_cache": {"use_cache": False},
    "prompt_lookup": {"prompt_lookup_num_tokens": 3},
}


def generated(model: Any, how: str) -> Any:
    inputs = prompts()
    if how == "prompt_lookup":
        # Assisted decoding takes one prompt; a prompt that repeats itself gives it something to look up.
        inputs = {name: x[1:2].repeat(1, 2) for name, x in inputs.items()}
    return model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=10,
        pad_token_id=PAD,
        output_logits=True,
        return_dict_in_generate=True,
        **GENERATION[how],
    )


# In float64 the padding of stock eager attention is nan: its softmax runs in float32, where the mask is -inf.
GENERATORS = {
    "llama": ("sdpa", torch.float64, 1e-9),
    "mistral": ("sdpa", torch.float64, 1e-9),
    "gemma2": ("eager", torch.float32, 1e-4),
    "gpt_oss": ("eager", torch.float32, 1e-4),
}


@pytest.mark.parametrize(
    "model_type, how",
    [
        pytest.param(*case, marks=[pytest.mark.smoke] * (case == ("llama", "greedy")))
        for case in product(GENERATORS, GENERATION)
    ],
)
def test_generation_equals_stock_token_for_token(model_type, how):
    stock, dtype, tolerance = GENERATORS[model_type]
    config = config_of(model_type)
    ours, theirs = (generated(build(config, name, dtype), how) for name in ("anchor", stock))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert_equal(torch.stack(ours.logits), torch.stack(theirs.logits), tolerance)


@pytest.mark.parametrize("model_type, stock, tolerance", [("llama", "sdpa", 1e-9), ("gpt_oss", "eager", 1e-5)])
def test_continued_prefill_equals_stock(model_type, stock, tolerance):
    config = config_of(model_type)

    def in_two_steps(model: Any) -> Tensor:
        with torch.no_grad():
            ids, mask = prompts().values()
            first = model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True)
            rest = model(input_ids=ids[:, 5:], attention_mask=mask, past_key_values=first.past_key_values)
            return rest.logits

    assert_equal(in_two_steps(build(config)), in_two_steps(build(config, stock)), tolerance)


def test_continued_prefill_equals_one_prefill(llama):
    ids = ROWS.input_ids
    first = llama(input_ids=ids[:, :9], use_cache=True)
    rest = logits(llama, input_ids=ids[:, 9:], past_key_values=first.past_key_values)
    assert_equal(rest, logits(llama, input_ids=ids)[:, 9:], 1e-9)


# ---------------------------------------------------------------- refusals

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT_SMALL = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
REFUSED: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 32, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mpt": {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 32},
    "gpt_bigcode": {**GPT_SMALL, "bos_token_id": 1, "eos_token_id": 2},
    "ctrl": {**GPT_SMALL, "dff": 16},
    "persimmon": SMALL,
    "llama4_text": {**SMALL, "head_dim": 8, "intermediate_size_mlp": 16, "num_local_experts": 2},
    "mamba": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "rwkv": {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16},
    "jamba": {**SMALL, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2},
    "bamba": {**SMALL, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 8},
    "recurrent_gemma": {**SMALL, "num_key_value_heads": 1, "lru_width": 16},
    "lfm2": SMALL,
    "qwen3_next": {**SMALL, "num_experts": 2},
    "t5": {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}
BIDIRECTIONAL = {"bert": SMALL, "roberta": SMALL}


def auto_class(model_type: str) -> Any:
    return {"t5": AutoModelForSeq2SeqLM, "bert": AutoModelForMaskedLM, "roberta": AutoModelForMaskedLM}.get(
        model_type, AutoModelForCausalLM
    )


def load(model_type: str, how: str) -> Any:
    config = config_of(model_type, **{**REFUSED, **BIDIRECTIONAL}[model_type])
    if how == "from_config":
        return auto_class(model_type).from_config(config, attn_implementation="anchor")
    model = auto_class(model_type).from_config(config)
    model.set_attn_implementation("anchor")
    return model


def check_text(text: str, *words: str) -> None:
    assert all(word in text for word in ("attn_implementation", "anchor", *words))
    assert "is not supported by" in text
    reason = text.partition("is not supported by")[2].partition(": ")[2]
    assert len(reason) > 20, "no reason given"


LOADS = ["from_config", "set_attn_implementation"]


@pytest.mark.parametrize("model_type", [pytest.param(t, marks=[pytest.mark.smoke] * (t == "mamba")) for t in REFUSED])
def test_models_that_cannot_carry_it_are_refused_at_load(model_type):
    with pytest.raises(AnchorUnsupportedError) as caught:
        load(model_type, "from_config")
    check_text(str(caught.value), model_type)


@pytest.mark.parametrize("model_type", REFUSED)
def test_models_that_cannot_carry_it_never_get_it_later(model_type):
    """Either we refuse, or the host itself logs that the class cannot be switched, and leaves it as it was."""
    try:
        model = load(model_type, "set_attn_implementation")
    except AnchorUnsupportedError as error:
        check_text(str(error), model_type)
    else:
        assert not model._can_set_attn_implementation()
        assert model.config._attn_implementation != "anchor"


@pytest.mark.parametrize("kind", ["linear_attention", "chunked_attention", "mamba", "conv", "recurrent"])
def test_layers_of_any_other_kind_are_refused(kind):
    config = config_of("llama")
    config.layer_types = ["full_attention", kind, "full_attention"]
    with pytest.raises(AnchorUnsupportedError) as caught:
        LlamaForCausalLM._from_config(config, attn_implementation="anchor")
    check_text(str(caught.value), "LlamaForCausalLM", kind)


class WithoutPositions(LlamaForCausalLM):
    """The Trainer drops columns that `forward` does not name: here, it would drop the positions."""

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)


def test_a_forward_without_position_ids_is_refused():
    with pytest.raises(AnchorUnsupportedError) as caught:
        WithoutPositions._from_config(config_of("llama"), attn_implementation="anchor")
    check_text(str(caught.value), "WithoutPositions", "position_ids")


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("model_type", BIDIRECTIONAL)
def test_bidirectional_models_are_refused_before_they_compute(model_type, how):
    with pytest.raises(AnchorUnsupportedError) as caught:
        load(model_type, how)(input_ids=torch.ones(1, 4, dtype=torch.long))
    check_text(str(caught.value))


def test_a_refused_model_keeps_its_own_attention():
    model = auto_class("gpt_bigcode").from_config(config_of("gpt_bigcode", **REFUSED["gpt_bigcode"])).eval()
    ids = torch.arange(1, 7)[None]
    before, implementation = logits(model, input_ids=ids), model.config._attn_implementation
    with pytest.raises(AnchorUnsupportedError):
        model.set_attn_implementation("anchor")
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, input_ids=ids), before)


@pytest.mark.parametrize("first, second", [("sdpa", "anchor"), ("anchor", "sdpa")])
def test_the_implementation_can_be_exchanged(first, second):
    config = config_of("llama")
    model = build(config, first)
    model.set_attn_implementation(second)
    expected = logits(build(config, second), input_ids=ROWS.input_ids, position_ids=ROWS.position_ids)
    assert torch.equal(logits(model, input_ids=ROWS.input_ids, position_ids=ROWS.position_ids), expected)


def test_nothing_of_it_is_saved(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    assert "anchor" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation != "anchor"
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="anchor")
    batch = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids}
    assert_equal(logits(again, **batch), logits(plain, **batch, attention_mask=VISIBLE[:, None]), 1e-5)


# ---------------------------------------------------------------- the mask function, called by hand


def allow_causal(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key <= query


OLD = {"cache_position": torch.arange(8)}
NEW = {"q_length": 8, "q_offset": 0}
NEW_TENSOR = {"q_length": 8, "q_offset": torch.tensor(0)}
SIGNATURES = pytest.mark.parametrize(
    "span", [OLD, NEW, NEW_TENSOR], ids=["cache_position", "q_length", "q_length_tensor_offset"]
)


def by_hand(span: dict[str, Any], **changes: Any) -> Any:
    call = {"batch_size": 2, "kv_length": 8, "kv_offset": 0, "mask_function": allow_causal, "attention_mask": None}
    return anchor_mask(**{**call, "config": config_of("llama"), **span, **changes})


@SIGNATURES
def test_whole_rows_get_the_sentinel(span):
    padding = torch.ones(2, 8, dtype=torch.long)
    mask = by_hand(span, attention_mask=padding, local_size=3)
    assert isinstance(mask, AnchorMask)
    assert torch.equal(mask.padding.long(), padding)
    assert mask.window == 3
    assert by_hand(span).padding is None
    assert by_hand(span).window is None


@pytest.mark.parametrize(
    "offsets",
    [
        {"q_length": 3, "q_offset": 5},
        {"q_length": 3, "q_offset": torch.tensor(5)},
        {"q_length": 1, "q_offset": 7},
        {"q_length": 8, "q_offset": 0, "kv_length": 20},
    ],
    ids=["continued", "continued_tensor_offset", "decode", "static_cache"],
)
def test_everything_else_gets_a_mask_for_sdpa(offsets):
    """An sdpa mask may be None where is_causal says the same."""
    host = pytest.importorskip("transformers.masking_utils")
    call = {"batch_size": 2, "kv_length": 8, "mask_function": host.causal_mask_function, **offsets}
    try:
        expected = host.sdpa_mask(**call)
    except TypeError:
        pytest.skip("this transformers calls mask functions with cache_position")
    mask = anchor_mask(**call, config=config_of("llama"))
    assert not isinstance(mask, AnchorMask)
    assert (mask is None and expected is None) or torch.equal(mask, expected)


IMAGE = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0], dtype=torch.bool)
LOOKS_AHEAD = {
    "bidirectional": lambda b, h, q, k: k >= 0,
    "one_ahead": lambda b, h, q, k: k <= q + 1,
    "prefix": lambda b, h, q, k: (k <= q) | (k < 3),
    "image_block": lambda b, h, q, k: (k <= q) | (IMAGE[q] & IMAGE[k]),
    "in_the_last_row_only": lambda b, h, q, k: (k <= q) | ((b == 1) & (k < 3)),
}


@SIGNATURES
@pytest.mark.parametrize("name", LOOKS_AHEAD)
def test_a_mask_that_looks_ahead_is_refused(name, span):
    with pytest.raises(AnchorUnsupportedError) as caught:
        by_hand(span, mask_function=LOOKS_AHEAD[name])
    check_text(str(caught.value))


def test_masks_of_the_host_do_not_look_ahead():
    host = pytest.importorskip("transformers.masking_utils")
    windowed = host.sliding_window_causal_mask_function(3)
    for function in (host.causal_mask_function, windowed, host.and_masks(windowed, allow_causal)):
        assert isinstance(by_hand(NEW, mask_function=function), AnchorMask)


TENSOR = torch.ones(2, 2, 8, 8)
TOUCHES = {
    "getitem": lambda mask: mask[:, :, :, :8],
    "attribute": lambda mask: mask.to(torch.float32),
    "shape": lambda mask: mask.shape,
    "dtype": lambda mask: mask.dtype,
    "mask_plus_tensor": lambda mask: mask + TENSOR,
    "tensor_plus_mask": lambda mask: TENSOR + mask,
    "tensor_plus_mask_in_place": lambda mask: TENSOR.clone().add_(mask),
    "tensor_times_mask": lambda mask: TENSOR * mask,
    "one_minus_mask": lambda mask: 1.0 - mask,
    "not_mask": lambda mask: ~mask,
    "mask_is_zero": lambda mask: mask == 0,
    "torch_add": lambda mask: torch.add(TENSOR, mask),
    "torch_where": lambda mask: torch.where(mask, TENSOR, TENSOR),
    "masked_fill": lambda mask: TENSOR.masked_fill(mask, 0.0),
    "sdpa": lambda mask: torch.nn.functional.scaled_dot_product_attention(TENSOR, TENSOR, TENSOR, attn_mask=mask),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_touching_the_sentinel_raises_the_refusal(touch):
    with pytest.raises(AnchorUnsupportedError) as caught:
        TOUCHES[touch](by_hand(NEW))
    check_text(str(caught.value), "llama")


def test_device_hooks_pass_over_the_sentinel():
    mask = by_hand(NEW)
    assert hasattr(mask, "to") is False
    assert hasattr(mask, "shape") is False
    assert getattr(mask, "device", None) is None


def test_the_sentinel_can_be_copied():
    mask = by_hand(NEW, local_size=3)
    assert [copied.window for copied in (copy.copy(mask), copy.deepcopy(mask))] == [3, 3]


# ---------------------------------------------------------------- the attention function, called by hand


class OddAttention(torch.nn.Module):
    """What a layer hands over of itself."""

    layer_idx = 0
    num_key_value_groups = 2
    is_causal = True


def call_attention(mask: Any = None, **changes: Any) -> Any:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 8, 6).double(), *torch.randn(2, 2, 2, 8, 6).double()
    call = {"module": OddAttention(), "query": query, "key": key, "value": value, "attention_mask": mask}
    return anchor_attention_forward(**{**call, "position_ids": POSITIONS, "scaling": 0.3, **changes})


POSITIONS = positions_of([[3, 5], [8]])


def attend_by_hand(visible: Tensor, **options: Any) -> Tensor:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 8, 6).double(), *torch.randn(2, 2, 2, 8, 6).double()
    return attend(query, key, value, visible, scaling=0.3, **options).transpose(1, 2)


SINKS = torch.tensor([0.3, -1.0, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "call, options, window",
    [
        ({}, {}, None),
        ({"sliding_window": 2}, {}, 2),
        ({"softcap": 0.8}, {"softcap": 0.8}, None),
        ({"s_aux": SINKS}, {"sinks": SINKS}, None),
        ({"num_items_in_batch": 3, "use_cache": False, "seq_idx": POSITIONS, "anything": "else"}, {}, None),
        ({"module": torch.nn.Module()}, {}, None),
    ],
    ids=["plain", "window", "softcap", "sinks", "unknown_keywords", "layer_without_attributes"],
)
def test_attention_by_hand(call, options, window):
    visible = visible_segments(POSITIONS, window=window)
    for mask in (None, by_hand(NEW), by_hand(NEW, attention_mask=torch.ones(2, 8))):
        out, weights = call_attention(mask, **call)
        assert weights is None
        assert out.shape == (2, 8, 4, 6)
        assert_equal(out, attend_by_hand(visible, **options), 1e-12)


def test_the_window_of_the_mask_call_counts_when_the_layer_names_none():
    out, _ = call_attention(by_hand(NEW, local_size=2))
    assert_equal(out, attend_by_hand(visible_segments(POSITIONS, window=2)), 1e-12)


def test_padding_of_the_mask_call_reaches_the_attention():
    padding = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    out, _ = call_attention(by_hand(NEW, attention_mask=padding))
    expected = attend_by_hand(visible_segments(POSITIONS, padding))
    assert_equal(out[padding.bool()], expected[padding.bool()], 1e-12)


def test_other_positions_under_the_same_mask_are_other_segments():
    """What is kept from one layer to the next must not outlive the positions it was made from."""
    mask, positions = by_hand(NEW), POSITIONS.clone()
    for rows in ([[3, 5], [8]], [[8], [1, 7]], [[2, 6], [4, 4]]):
        positions[:] = positions_of(rows)
        out, _ = call_attention(mask, position_ids=positions)
        assert_equal(out, attend_by_hand(visible_segments(positions)), 1e-12)
    out, _ = call_attention(mask, position_ids=POSITIONS)
    assert_equal(out, attend_by_hand(visible_segments(POSITIONS)), 1e-12)
    for documents in (documents_of([[3, 4], [7]]), documents_of([[7], [1, 6]])):
        out, _ = call_attention(mask, position_ids=positions, anchor_doc_ids=documents)
        assert_equal(out, attend_by_hand(visible_documents(documents)), 1e-12)


@pytest.mark.parametrize("options", [{}, {"softcap": 0.8}, {"s_aux": SINKS}], ids=["plain", "softcap", "sinks"])
def test_fewer_queries_than_keys_are_one_document(options):
    query = torch.randn(2, 4, 3, 6).double()
    mask = torch.ones(2, 1, 3, 8).tril(5).bool()
    out, _ = call_attention(mask, query=query, position_ids=torch.arange(5, 8)[None], **options)
    torch.manual_seed(0)
    _, key, value = torch.randn(2, 4, 8, 6), *torch.randn(2, 2, 2, 8, 6).double()
    named = {"sinks" if name == "s_aux" else name: value for name, value in options.items()}
    assert_equal(out, attend(query, key, value, mask[:, 0], scaling=0.3, **named).transpose(1, 2), 1e-12)


def not_causal() -> OddAttention:
    module = OddAttention()
    module.is_causal = False
    return module


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"position_ids": None}, ["OddAttention", "does not hand position_ids to the attention function"]),
        ({"is_causal": False}, ["OddAttention"]),
        ({"module": not_causal()}, ["OddAttention"]),
        ({"position_bias": torch.zeros(1, 4, 8, 8)}, ["OddAttention"]),
    ],
    ids=["no_position_ids", "is_causal_argument", "is_causal_of_the_layer", "position_bias"],
)
@pytest.mark.parametrize("sentinel", [True, False], ids=["sentinel", "no_mask"])
def test_what_a_layer_may_not_ask_for(sentinel, changes, words):
    with pytest.raises(AnchorUnsupportedError) as caught:
        call_attention(by_hand(NEW) if sentinel else None, **changes)
    check_text(str(caught.value), *words)


@pytest.mark.parametrize("shape", [(3, 2, 8), (2, 7), (3, 8)], ids=["three_dimensions", "length", "batch"])
def test_positions_of_a_wrong_shape(shape):
    with pytest.raises(ValueError) as caught:
        call_attention(by_hand(NEW), position_ids=torch.zeros(shape, dtype=torch.long))
    assert str(shape) in str(caught.value)
    assert "(2, 8)" in str(caught.value)
