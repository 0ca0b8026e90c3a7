"""The mask function and the attention function, called by hand as the host calls them."""

import copy
from typing import Any

import pytest
import torch
from anchor_models import (
    check_text,
    config_of,
)
from anchor_oracle import (
    assert_equal,
    attend,
    documents_of,
    positions_of,
    visible_documents,
    visible_segments,
)
from torch import Tensor

from hf_ext.anchor_attention.backend import anchor_attention_forward
from hf_ext.anchor_attention.mask import AnchorMask, anchor_mask
from hf_ext.anchor_attention.support import AnchorUnsupportedError

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


@pytest.mark.parametrize(
    "flags", [{}, {"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}], ids=str
)
def test_scaling_that_the_host_leaves_to_us_is_that_of_its_layer(flags):
    """The GPT-2 of transformers 4 hands none over."""
    layer = OddAttention()
    vars(layer).update(flags, layer_idx=2)
    factor = 1.0 if flags.get("scale_attn_weights") is False else 6**-0.5
    factor /= 3 if flags.get("scale_attn_by_inverse_layer_idx") else 1
    out, _ = call_attention(module=layer, scaling=None)
    assert torch.equal(out, call_attention(module=layer, scaling=factor)[0])
    assert not torch.equal(out, call_attention(module=layer, scaling=0.3)[0])


def test_a_mask_of_heads_is_refused():
    call_attention(head_mask=None)
    with pytest.raises(AnchorUnsupportedError, match="head_mask"):
        call_attention(head_mask=torch.ones(4))
