"""attn_implementation="anchor" in whole models: against stock attention given a mask, and document by document."""

import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from anchor_models import (
    ANCHOR,
    PAD,
    ROWS,
    VISIBLE,
    VOCABULARY,
    additive,
    build,
    check_text,
    config_of,
    gradients_of,
    logits,
    results,
    skip_without_positions,
    stock_mask,
)
from anchor_oracle import (
    assert_equal,
    documents_of,
    segments_of,
    visible_documents,
    visible_segments,
)
from torch import Tensor
from transformers import (
    DataCollatorWithFlattening,
    StaticCache,
)

from hf_ext import compat
from hf_ext.anchor_attention.support import AnchorUnsupportedError

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
    skip_without_positions(model_type)
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
    compat.enable_checkpointing(model, reentrant)
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
    # Older transformers insist on a last token for it; this one never comes.
    "prompt_lookup": {"prompt_lookup_num_tokens": 3, "eos_token_id": VOCABULARY},
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


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_generation_with_an_assistant_equals_stock_token_for_token(model_type):
    """An assistant of the same implementation; in mistral both caches slide, and are cut back."""
    prompt = {name: x[1:2] for name, x in prompts().items()}
    options = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": PAD}

    def assisted(name: str) -> Tensor:
        assistant = build(config_of(model_type, num_hidden_layers=1), name)
        return build(config_of(model_type), name).generate(**prompt, assistant_model=assistant, **options)

    try:
        stock = assisted("sdpa")
    except ValueError as error:
        if "Cannot `crop`" not in str(error):
            raise
        pytest.skip(f"this transformers cuts back no cache that has slid, under sdpa either: {error}")
    ours = assisted("anchor")
    assert torch.equal(ours, stock)
    assert torch.equal(ours, build(config_of(model_type), "sdpa").generate(**prompt, **options))


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


# ---------------------------------------------------------------- beside other libraries and modes


SHORT = torch.tensor([[0, 1] * 12]).expand(3, -1)  # documents of two tokens
SHARED = {
    "position_ids": torch.arange(24).expand(3, -1),
    "anchor_doc_ids": documents_of([[5, 9, 9], [20, 1, 2], [1, 1, 21]]),
}


@pytest.mark.parametrize(
    "packed", [{"position_ids": ROWS.position_ids}, {"position_ids": SHORT}, SHARED], ids=["replica", "short", "shared"]
)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_packed_rows_behind_a_cache_are_refused(llama, packed, static):
    """A row behind a cache is one document; several would see each other, silently."""
    if static:
        cache = StaticCache(config=llama.config, max_cache_len=64)
    else:
        cache = llama(input_ids=ROWS.input_ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(AnchorUnsupportedError) as caught:
        llama(input_ids=ROWS.input_ids, **packed, past_key_values=cache)
    check_text(str(caught.value), "cached keys")


@pytest.mark.parametrize("padding", [0, 1])
def test_left_padding_behind_a_cache_is_no_packed_row(llama, padding):
    """Whichever position the padding was given."""
    positions = torch.tensor([[padding] * 3 + [*range(21)]]).expand(3, -1)
    llama(
        input_ids=ROWS.input_ids,
        position_ids=positions,
        past_key_values=StaticCache(config=llama.config, max_cache_len=64),
    )


def test_inference_mode(llama):
    expected = logits(llama, input_ids=ROWS.input_ids, position_ids=ROWS.position_ids)
    with torch.inference_mode():
        positions = ROWS.position_ids + 0
        assert torch.equal(llama(input_ids=ROWS.input_ids, position_ids=positions).logits, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # tracing reads every property of the model
def test_a_trace_is_refused(llama):
    """It would hold the documents of its example for ever."""
    call = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids}
    with pytest.raises(AnchorUnsupportedError) as caught:
        torch.jit.trace(llama, example_kwarg_inputs=call, strict=False)
    check_text(str(caught.value), "trace")
