"""The engines for CUDA: what they hand to their kernels, how they are proved, and which one is taken when.

No GPU is needed: stand-ins with the kernels' signatures compute in float64 on the CPU, as strict as the kernels are.
"""

import sys
import types
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from anchor_models import build, config_of, packed_rows
from anchor_oracle import (
    assert_equal,
    attend,
    documents_of,
    positions_of,
    visible_documents,
    visible_segments,
    with_gradients,
)
from torch.nn.attention.flex_attention import flex_attention

from hf_ext.anchor_attention import anchor_attention, available_engines, choice, flex, use_engine, varlen
from hf_ext.anchor_attention.kernel import Call
from hf_ext.anchor_attention.segments import build_table

EVERYTHING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ROWS = [[5, 1, 14, 20], [40]]


def packed(q, k, v, bounds, longest, scale, *, left=-1, causal=False, cap=None, sinks=None, groups=True):
    """What every such kernel computes, segment by segment; and the conditions that they set."""
    assert bounds.dtype == torch.int32 and bounds[0] == 0 and bounds[-1] == len(q)
    assert bounds.diff().max() == longest and isinstance(longest, int)
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0
    assert groups or q.shape[1] == k.shape[1], "heads are not grouped unless asked for"
    outputs = []
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        distance = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
        seen = distance >= 0 if causal else torch.ones_like(distance).bool()
        seen = seen & (distance <= left) if left >= 0 else seen
        qkv = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        outputs.append(attend(*qkv, seen[None], scaling=scale, softcap=cap, sinks=sinks)[0].transpose(0, 1))
    return torch.cat(outputs)


# The signatures, as far as our calls reach: the first of torch's and today's, and FlashAttention's three generations.


def torch_first(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    scale = query.shape[-1] ** -0.5
    return packed(query, key, value, cu_seq_q, max_q, scale, causal=is_causal, groups=False)


def torch_today(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    return packed(
        *(query, key, value, cu_seq_k, max_k, scale),
        left=window_size[0],
        causal=window_size[1] == 0,
        groups=enable_gqa,
    )


def flash_2(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    return packed(
        q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, left=window_size[0], causal=causal, cap=softcap or None
    )


def flash_3(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    s_aux=None,
):
    out = packed(q, k, v, cu_seqlens_k, max_seqlen_k, softmax_scale, left=window_size[0], causal=causal, sinks=s_aux)
    return out, torch.zeros(1)


def flash_4(
    q,
    k,
    v,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
    max_seqlen_k=None,
    softmax_scale=None,
    causal=False,
    window_size=(None, None),
    learnable_sink=None,
    softcap=None,
):
    left = -1 if window_size[0] is None else window_size[0]
    out = packed(
        q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, left=left, causal=causal, cap=softcap, sinks=learnable_sink
    )
    return out, None


SIGNATURES = {f.__name__: f for f in (torch_first, torch_today, flash_2, flash_3, flash_4)}
FEATURES = {
    "plain": {},
    "scaling": {"scaling": 0.3},
    "window": {"sliding_window": 6},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": True},
}
HAS = {
    "torch_first": {"plain", "scaling"},
    "torch_today": {"plain", "scaling", "window"},
    "flash_2": {"plain", "scaling", "window", "softcap"},
    "flash_3": {"plain", "scaling", "window", "sinks"},
    "flash_4": {"plain", "scaling", "window", "softcap", "sinks"},
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No choice made by anybody; and none of a test's choices left behind."""
    monkeypatch.setattr(choice, "_named", [])
    monkeypatch.delenv(choice.ENGINE_VARIABLE, raising=False)
    monkeypatch.setattr(choice, "ENGINES", dict(choice.ENGINES))
    caches = [choice._automatic, choice._kernel, choice._disproof, varlen.varlen_kernels, varlen.flash_kernels]
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def on_cpu(kernel, **changes):
    return replace(kernel, cuda_only=False, dtypes=EVERYTHING, **changes)


def install(name, *kernels):
    """`kernels` as those of engine `name`, which auto then prefers."""
    choice.ENGINES[name] = choice.Engine("a stand-in", lambda: list(kernels))


def prefer(monkeypatch, *names):
    monkeypatch.setattr(choice, "_order", lambda call: [*names, "sdpa"])


def case(*, heads=(4, 2), widths=(6, 6), sinks=False, rows=ROWS, options=None):
    torch.manual_seed(3)
    length = sum(rows[0])
    shapes = {"query": (heads[0], widths[0]), "key": (heads[1], widths[0]), "value": (heads[1], widths[1])}
    inputs = {name: torch.randn(len(rows), h, length, d).double() for name, (h, d) in shapes.items()}
    if sinks:
        inputs["sinks"] = torch.randn(heads[0]).double()
    grad_out = torch.randn(len(rows), heads[0], length, widths[1]).double()
    return inputs, grad_out, {"scaling": widths[0] ** -0.5, **(options or {})}


def check(inputs, grad_out, options, ours, visible, mask=None):
    """`mask` (B, L): outputs of masked queries are undefined, so nothing may depend on them."""
    options, real = dict(options), torch.tensor(1.0) if mask is None else mask[:, None, :, None].double()
    window = options.pop("sliding_window", None)
    expected = with_gradients(partial(attend, visible=visible(window), **options), grad_out * real, **inputs)
    window = {} if window is None else {"sliding_window": window}
    got = with_gradients(partial(ours, **options, **window), grad_out * real, **inputs)
    assert_equal({**got, "out": got["out"] * real}, {**expected, "out": expected["out"] * real}, 1e-9)


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("signature", SIGNATURES)
def test_cumulative_kernels(signature, feature):
    """Outputs and gradients where the signature has the feature, and its name in the error where it has not."""
    install("varlen", on_cpu(varlen.kernel_of(signature, SIGNATURES[signature])))
    options = dict(FEATURES[feature])
    inputs, grad_out, options = case(sinks=options.pop("sinks", False), options=options)
    positions = positions_of(ROWS)
    ours = partial(anchor_attention, position_ids=positions)
    with use_engine("varlen"):
        if feature in HAS[signature]:
            check(inputs, grad_out, options, ours, lambda window: visible_segments(positions, window=window))
        else:
            with pytest.raises(RuntimeError, match=feature) as caught:
                ours(**inputs, **options)
            assert all(word in str(caught.value) for word in ("varlen", signature, "use_engine", "sdpa", "dense"))


@pytest.mark.parametrize("signature", SIGNATURES)
@pytest.mark.parametrize("heads, widths", [((4, 4), (8, 8)), ((6, 2), (12, 5)), ((3, 1), (4, 16))])
def test_cumulative_kernels_take_any_heads(signature, heads, widths):
    install("varlen", on_cpu(varlen.kernel_of(signature, SIGNATURES[signature])))
    inputs, grad_out, options = case(heads=heads, widths=widths)
    positions = positions_of(ROWS)
    with use_engine("varlen"):
        ours = partial(anchor_attention, position_ids=positions)
        check(inputs, grad_out, options, ours, lambda window: visible_segments(positions))


def test_cumulative_kernels_on_the_shared_layout_and_padding():
    install("flash", on_cpu(varlen.kernel_of("flash_2", flash_2)))
    documents = documents_of([[5, 14, 20], [8, 30, 1]])
    inputs, grad_out, options = case()
    with use_engine("flash"):
        ours = partial(anchor_attention, position_ids=torch.arange(40)[None], anchor_doc_ids=documents)
        check(inputs, grad_out, options, ours, lambda window: visible_documents(documents))
        mask = torch.ones(2, 40)
        mask[0, :3] = mask[1, 33:] = 0
        positions = positions_of(ROWS)
        ours = partial(anchor_attention, position_ids=positions, attention_mask=mask)
        check(inputs, grad_out, options, ours, lambda window: visible_segments(positions, mask), mask)


def test_a_window_of_columns_is_no_window_of_slots():
    """Behind a shared anchor, a document's slots are nearer to the anchor than its columns are."""
    install("flash", on_cpu(varlen.kernel_of("flash_2", flash_2)))
    inputs, _, _ = case()
    documents = documents_of([[5, 14, 20], [8, 30, 1]])
    with use_engine("flash"), pytest.raises(RuntimeError, match="gaps in the window"):
        anchor_attention(**inputs, position_ids=torch.arange(40)[None], anchor_doc_ids=documents, sliding_window=6)


def test_a_window_longer_than_every_segment_still_hides_a_far_anchor():
    documents = documents_of([[5, 14, 20], [8, 30, 1]])
    inputs, grad_out, options = case(options={"sliding_window": 35})
    ours = partial(anchor_attention, position_ids=torch.arange(40)[None], anchor_doc_ids=documents)
    check(inputs, grad_out, options, ours, lambda window: visible_documents(documents, window=window))


def test_padding_between_segments_is_no_gap():
    mask = torch.ones(2, 40)
    mask[0, :3] = mask[0, 18:20] = mask[1, 33:] = 0
    assert not build_table((2, 40), positions_of(ROWS), mask).gaps
    mask[1, 5] = 0
    assert build_table((2, 40), positions_of(ROWS), mask).gaps


def test_a_window_that_hides_nothing_asks_for_no_feature():
    install("varlen", on_cpu(varlen.kernel_of("torch_first", torch_first)))
    inputs, grad_out, options = case(options={"sliding_window": 40})
    positions = positions_of(ROWS)
    with use_engine("varlen"):
        ours = partial(anchor_attention, position_ids=positions)
        check(inputs, grad_out, options, ours, lambda window: visible_segments(positions))


# ---------------------------------------------------------------- flex


def written_out(query, key, value, score_mod, block_mask, scale, enable_gqa, return_aux=None):
    """flex_attention by its definition: full blocks as they are, partial ones through mask_mod, others hidden."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    length = query.shape[2]
    assert block_mask.seq_lengths == (length, length)
    seen = torch.zeros(length, length, dtype=torch.bool)
    index = torch.arange(length)
    pairs = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    block = block_mask.BLOCK_SIZE[0]
    lists = [
        (block_mask.kv_num_blocks, block_mask.kv_indices, pairs),
        (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, torch.ones_like(pairs)),
    ]
    for counts, indices, visible in lists:
        for row, count in enumerate(counts[0, 0].tolist()):
            for column in indices[0, 0, row, :count].tolist():
                tile = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
                assert not seen[tile].any(), "a block twice"
                seen[tile] = visible[tile]
    softcap = None if score_mod is None else CAP
    out = attend(query, key, value, seen[None], scaling=scale, softcap=softcap)
    if return_aux is None:
        return out
    groups = query.shape[1] // key.shape[1]
    scores = scale * query @ key.repeat_interleave(groups, 1).transpose(-1, -2)
    scores = scores if score_mod is None else score_mod(scores, 0, 0, 0, 0)
    lse = scores.masked_fill(~seen, float("-inf")).logsumexp(-1)
    return out, types.SimpleNamespace(lse=lse)


CAP = 0.7


@pytest.fixture
def flex_engine(monkeypatch):
    monkeypatch.setattr(flex, "BLOCK", 4)
    monkeypatch.setattr(flex, "_attention", lambda: written_out)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    [kernel] = flex.flex_kernels.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(flex, "BLOCK", 4)
    monkeypatch.setattr(flex, "_attention", lambda: written_out)
    monkeypatch.setattr(choice, "ENGINES", dict(choice.ENGINES))
    install("flex", on_cpu(kernel, trusted=True))
    with use_engine("flex"):
        yield


FLEX = {
    "plain": {},
    "window 6": {"sliding_window": 6},
    "window 1": {"sliding_window": 1},
    "window 13": {"sliding_window": 13},
    "softcap": {"softcap": CAP},
    "sinks": {"sinks": True},
    "all": {"sliding_window": 9, "softcap": CAP, "sinks": True},
}


@pytest.mark.usefixtures("flex_engine")
@pytest.mark.parametrize("feature", FLEX)
@pytest.mark.parametrize("rows", [ROWS, [[1] * 7 + [33], [16, 24]], [[9, 9, 9]]], ids=["mixed", "ones", "nines"])
def test_flex(feature, rows):
    options = dict(FLEX[feature])
    inputs, grad_out, options = case(rows=rows, sinks=options.pop("sinks", False), options=options)
    positions = positions_of(rows)
    ours = partial(anchor_attention, position_ids=positions)
    check(inputs, grad_out, options, ours, lambda window: visible_segments(positions, window=window))


@pytest.mark.usefixtures("flex_engine")
@pytest.mark.parametrize("window", [None, 7, 12, 35])
def test_flex_on_the_shared_layout_and_padding(window):
    documents = documents_of([[5, 14, 20], [8, 30, 1]])
    options = {} if window is None else {"sliding_window": window}
    inputs, grad_out, options = case(options=options)
    ours = partial(anchor_attention, position_ids=torch.arange(40)[None], anchor_doc_ids=documents)
    check(inputs, grad_out, options, ours, lambda window: visible_documents(documents, window=window))
    mask = torch.ones(2, 40)
    mask[0, 7:12] = mask[1, 12:20] = mask[1, 33:] = 0
    positions = positions_of(ROWS)
    ours = partial(anchor_attention, position_ids=positions, attention_mask=mask)
    check(inputs, grad_out, options, ours, lambda window: visible_segments(positions, mask, window), mask)


@pytest.mark.usefixtures("flex_engine")
def test_flex_refuses_dropout():
    inputs, _, _ = case()
    with pytest.raises(RuntimeError, match="flex_attention has no dropout"):
        anchor_attention(**inputs, position_ids=positions_of(ROWS), dropout=0.1)


def test_flex_block_mask_is_what_the_host_takes(monkeypatch):
    """The real function, forward only: on a CPU it has no backward."""
    monkeypatch.setattr(flex, "_attention", lambda: flex_attention)
    rows = [[70, 3, 200, 27]]
    inputs, _, options = case(rows=rows, widths=(16, 16), sinks=True)
    positions = positions_of(rows)
    kernel = choice.Kernel("flex", flex.flex_engine, frozenset({"sinks", "sliding window"}), trusted=True)
    install("flex", on_cpu(kernel))
    inputs = {name: x.float() for name, x in inputs.items()}
    with use_engine("flex"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # uncompiled, it says that it is slow
        out = anchor_attention(**inputs, position_ids=positions, sliding_window=90)
    expected = attend(
        **{name: x.double() for name, x in inputs.items()}, visible=visible_segments(positions, window=90), **options
    )
    assert_equal(out, expected, 1e-5)


# ---------------------------------------------------------------- the proof


def broken(what):
    """flash_4 with one defect."""

    def function(q, k, v, cu_seqlens_q=None, max_seqlen_q=None, softmax_scale=None, causal=False, window_size=None):
        if what == "raises":
            raise ValueError("head width 8 is not supported\nby anything")
        out = packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal=causal)
        if what == "window is ignored":
            return out
        if what == "gradient of the keys":
            return packed(q, k.detach(), v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal=causal) + 0 * k.sum()
        return {"nan": out * float("nan"), "no grouping": out.flip(1), "no gradient": out.detach()}[what]

    return on_cpu(varlen.kernel_of("broken", function))


@pytest.mark.parametrize("what", ["raises", "gradient of the keys", "nan", "no grouping", "no gradient"])
def test_a_kernel_that_fails_its_proof_is_not_used(monkeypatch, what):
    install("varlen", broken(what))
    prefer(monkeypatch, "varlen")
    inputs, _, _ = case()
    positions = positions_of(ROWS)
    with pytest.warns(UserWarning, match="'varlen' was passed over, as broken failed its self-test"):
        out = anchor_attention(**inputs, position_ids=positions)
    assert_equal(out, attend(**inputs, visible=visible_segments(positions), scaling=6**-0.5), 1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it said so once
        anchor_attention(**inputs, position_ids=positions)
    with use_engine("varlen"), pytest.raises(RuntimeError, match="failed its self-test"):
        anchor_attention(**inputs, position_ids=positions)


def test_a_feature_is_proved_before_it_is_used(monkeypatch):
    install("varlen", broken("window is ignored"))
    inputs, _, _ = case()
    with use_engine("varlen"):
        anchor_attention(**inputs, position_ids=positions_of(ROWS))
        with pytest.raises(RuntimeError, match=r"failed its self-test: it differed by \de-01"):
            anchor_attention(**inputs, position_ids=positions_of(ROWS), sliding_window=6)


def test_the_proof_runs_whatever_the_caller_does():
    """Inside inference mode or autocast, it needs gradients and full precision all the same; and no random numbers."""
    install("varlen", on_cpu(varlen.kernel_of("flash_2", flash_2)))
    inputs, _, _ = case()
    state = torch.get_rng_state()
    with use_engine("varlen"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        anchor_attention(**inputs, position_ids=positions_of(ROWS))
    assert torch.equal(torch.get_rng_state(), state)


def test_once_proved_a_kernel_is_not_tried_again(monkeypatch):
    calls = []

    def counted(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal):
        calls.append(len(q))
        return packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal=causal)

    install("varlen", on_cpu(varlen.kernel_of("counted", counted)))
    inputs, _, _ = case()
    with use_engine("varlen"):
        for _ in range(3):
            anchor_attention(**inputs, position_ids=positions_of(ROWS))
    assert calls == [129, 80, 80, 80]


# ---------------------------------------------------------------- the choice


def test_auto_moves_on_with_a_warning(monkeypatch):
    install("varlen", on_cpu(varlen.kernel_of("torch_today", torch_today)))
    install("flash", on_cpu(varlen.kernel_of("flash_2", flash_2)))
    prefer(monkeypatch, "varlen", "flash")
    inputs, grad_out, options = case(options={"softcap": 0.7})
    positions = positions_of(ROWS)
    with pytest.warns(
        UserWarning, match=r"uses flash_2: engine 'varlen' was passed over, as torch_today has no softcap"
    ):
        ours = partial(anchor_attention, position_ids=positions)
        check(inputs, grad_out, options, ours, lambda window: visible_segments(positions))


def test_auto_says_nothing_of_engines_that_are_not_here(monkeypatch):
    prefer(monkeypatch, "varlen", "flash", "flex")
    inputs, _, _ = case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anchor_attention(**inputs, position_ids=positions_of(ROWS))


@pytest.mark.parametrize(
    "dtype, hopper, flash, expected",
    [
        ("bfloat16", True, "FlashAttention 3 (x)", ["flash", "varlen", "flex", "sdpa"]),
        ("float16", False, "FlashAttention 3 (x)", ["varlen", "flash", "flex", "sdpa"]),
        ("bfloat16", True, "FlashAttention 2 (x)", ["varlen", "flash", "flex", "sdpa"]),
        ("bfloat16", True, None, ["varlen", "flash", "flex", "sdpa"]),
        ("float32", True, "FlashAttention 3 (x)", ["sdpa"]),
    ],
)
def test_order(monkeypatch, dtype, hopper, flash, expected):
    kernels = "nothing" if flash is None else [varlen.kernel_of(flash, flash_3)]
    monkeypatch.setattr(choice, "flash_kernels", lambda: kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9 if hopper else 8, 0))
    call = Call(torch.device("cuda"), getattr(torch, dtype), (64, 64))
    assert choice._order(call) == expected
    assert choice._order(call._replace(device=torch.device("cpu"))) == ["sdpa"]


def test_flash_takes_the_first_of_its_kernels_that_can():
    three, two = (varlen.kernel_of(name, SIGNATURES[name]) for name in ("flash_3", "flash_2"))
    install("flash", on_cpu(three), on_cpu(two))
    call = Call(torch.device("cpu"), torch.float64, (8, 8))
    with use_engine("flash"):
        assert choice.choose(call).name == "flash_3"
        assert choice.choose(call._replace(features=frozenset({"softcap"}))).name == "flash_2"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("name", ["varlen", "flash", "flex"])
class TestWithoutCuda:
    def test_status(self, name):
        assert available_engines()[name] == (False, "needs a CUDA device", False)

    def test_named(self, name):
        with pytest.raises(RuntimeError, match=f"use_engine: engine '{name}' cannot run here: needs a CUDA device"):
            use_engine(name)

    def test_named_by_the_environment(self, name, monkeypatch):
        monkeypatch.setenv(choice.ENGINE_VARIABLE, name)
        inputs, _, _ = case()
        with pytest.raises(RuntimeError, match=f"{choice.ENGINE_VARIABLE}: engine '{name}' cannot compute") as caught:
            anchor_attention(**inputs, position_ids=positions_of(ROWS))
        assert "Engines that can: sdpa, dense" in str(caught.value)
        assert available_engines()[name] == (False, "needs a CUDA device", False)


def test_kernels_take_neither_other_devices_nor_other_dtypes():
    kernel = varlen.kernel_of("flash_2", flash_2)
    call = Call(torch.device("cuda"), torch.bfloat16, (64, 64))
    assert kernel.lacks(call) is None
    assert kernel.lacks(call._replace(device=torch.device("cpu"))) == "flash_2 takes CUDA tensors, not cpu"
    assert kernel.lacks(call._replace(dtype=torch.float32)) == "flash_2 takes float16, bfloat16, not float32"


# ---------------------------------------------------------------- where FlashAttention is found


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("flash_attn_interface", "flash_attn", "flash_attn.cute", "kernels"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails


def module(name, function, **functions):
    made = types.ModuleType(name)
    vars(made).update(functions, flash_attn_varlen_func=function)
    return made


@pytest.mark.usefixtures("cuda")
def test_installed_generations_in_order(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn", flash_2))
    monkeypatch.setitem(sys.modules, "flash_attn_interface", module("flash_attn_interface", flash_3))
    names = [kernel.name for kernel in varlen.flash_kernels()]
    assert names == ["FlashAttention 3 (flash_attn_interface)", "FlashAttention 2 (flash_attn)"]


@pytest.mark.usefixtures("cuda")
def test_no_generation_at_all_says_where_it_looked():
    reason = varlen.flash_kernels()
    assert "pip install kernels" in reason
    assert all(source in reason for source in ("flash_attn_interface", "flash-attn3", "flash_attn.cute", "flash-attn2"))


@pytest.mark.usefixtures("cuda")
def test_hub_kernels_come_from_the_local_cache_only(monkeypatch):
    asked = []

    def install_kernel(repository, *, version, local_files_only):
        asked.append(local_files_only)
        if repository != "kernels-community/flash-attn3":
            raise FileNotFoundError("not in the cache")
        return f"cache/{repository}/{version}"

    def get_local_kernel(path):
        assert path == "cache/kernels-community/flash-attn3/1"
        return module("kernel", flash_3)

    fake = types.SimpleNamespace(install_kernel=install_kernel, get_local_kernel=get_local_kernel)
    monkeypatch.setitem(sys.modules, "kernels", fake)
    assert [kernel.name for kernel in varlen.flash_kernels()] == ["FlashAttention 3 (kernels-community/flash-attn3)"]
    assert asked and all(asked)


# ---------------------------------------------------------------- on a GPU


def skip_what_is_not_there(reason):
    """A missing library or feature; not a kernel that fails its self-test."""
    assert "self-test" not in reason, reason
    pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("feature", ["plain", "window", "softcap", "sinks", "grouped", "wide values"])
@pytest.mark.parametrize("name", ["varlen", "flash", "flex"])
def test_on_cuda(name, feature):
    status = available_engines()[name]
    if not status.usable:
        skip_what_is_not_there(status.reason)
    shape = {"grouped": {"heads": (8, 2)}, "wide values": {"widths": (96, 64)}}.get(feature, {})
    options = dict(FEATURES.get(feature, {}))
    rows = [[300, 1, 45, 654], [1000]]
    inputs, grad_out, options = case(
        rows=rows, sinks=options.pop("sinks", False), options=options, **({"widths": (64, 64)} | shape)
    )
    inputs = {key: x.bfloat16() for key, x in inputs.items()}
    grad_out, positions = grad_out.bfloat16(), positions_of(rows)
    window = options.pop("sliding_window", None)
    seen = visible_segments(positions, window=window)
    expected = with_gradients(
        partial(attend, visible=seen, **options), grad_out.double(), **{key: x.double() for key, x in inputs.items()}
    )
    ours = partial(anchor_attention, position_ids=positions.cuda(), sliding_window=window, **options)
    with use_engine(name):
        try:
            got = with_gradients(ours, grad_out.cuda(), **{key: x.cuda() for key, x in inputs.items()})
        except RuntimeError as error:
            if "has no" not in str(error):
                raise
            skip_what_is_not_there(str(error))
    assert_equal({key: x.cpu() for key, x in got.items()}, expected, 2e-2)


@pytest.mark.gpu
def test_stock_flash_attention_on_one_row_is_anchor_attention():
    """It cuts a single row wherever a position is 0."""
    pytest.importorskip("flash_attn")
    batch = {name: x[:1].cuda() for name, x in packed_rows().batch().items()}
    ours, stock = (build(config_of("llama"), name, torch.bfloat16).cuda() for name in ("anchor", "flash_attention_2"))
    assert_equal(ours(**batch, use_cache=False).logits, stock(**batch, use_cache=False).logits, 2e-2)
