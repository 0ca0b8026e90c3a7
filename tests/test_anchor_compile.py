"""torch.compile and torch.export under attn_implementation="anchor": one graph without breaks, equal to eager."""

import pytest
import torch
from anchor_models import ROWS, build, config_of, gradients_of, logits, results
from anchor_oracle import assert_equal, attend, documents_of, visible_segments
from transformers.masking_utils import causal_mask_function

from hf_ext import compat
from hf_ext.anchor_attention import AnchorUnsupportedError, backend, compiled, segments
from hf_ext.anchor_attention.mask import anchor_mask


@pytest.fixture(autouse=True)
def no_leftovers():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


MASK = torch.ones_like(ROWS.position_ids)
MASK[0, :3] = MASK[2, 19:] = 0


@pytest.mark.parametrize("extra", [{}, {"attention_mask": MASK}], ids=["plain", "padded"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_one_graph_equals_eager(model_type, extra):
    """Windows, softcap and padding pass through it."""
    model = build(config_of(model_type))
    batch = {**ROWS.batch(), **extra}
    expected = results(model, **batch)
    compiled_model = torch.compile(model, backend="aot_eager", fullgraph=True)
    out = compiled_model(**batch, use_cache=False)
    got = {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients_of(model, out.loss)}
    if extra:
        got["logits"], expected["logits"] = (x["logits"] * MASK[..., None] for x in (got, expected))
    assert_equal(got, expected, 1e-9)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_one_graph_with_an_empty_cache(model_type):
    """Some hosts tell where the row begins in tensors, by which no graph can branch."""
    model = build(config_of(model_type))
    batch = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids}
    got = torch.compile(model, backend="aot_eager", fullgraph=True)(**batch).logits
    assert_equal(got, logits(model, **batch), 1e-9)


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["inside", "outside of it"])
@pytest.mark.parametrize("what", ["queries", "keys", "sight"])
def test_what_begins_or_sees_beyond_0_is_refused_when_the_graph_runs(what, dropout):
    """Attention with dropout runs outside of the graph that its mask comes from."""
    config = config_of("llama")
    query, key, value = (torch.randn(1, 2, 24, 8) for _ in range(3))

    @torch.compile(backend="aot_eager", fullgraph=not dropout)
    def run(start):
        offsets = {"q_offset": start if what == "queries" else 0, "kv_offset": start if what == "keys" else 0}
        sees = (lambda b, h, q, k: k <= q + start) if what == "sight" else causal_mask_function
        mask = anchor_mask(1, q_length=24, kv_length=24, mask_function=sees, config=config, device="cpu", **offsets)
        given = {"position_ids": ROWS.position_ids[:1], "dropout": dropout}
        return backend.anchor_attention_forward(torch.nn.Module(), query, key, value, mask, **given)[0]

    expected = attend(query, key, value, visible_segments(ROWS.position_ids[:1]), scaling=8**-0.5).transpose(1, 2)
    found = run(torch.tensor(0))
    if not dropout:
        assert_equal(found, expected, 1e-5)
    with pytest.raises(AnchorUnsupportedError, match="lets a token see later ones"):
        run(torch.tensor(3))


def test_sinks_pass_through_the_operator():
    torch.manual_seed(1)
    shapes = [(1, 2, 6, 3), (1, 1, 6, 3), (1, 1, 6, 2), (2,)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    positions = torch.tensor([[0, 1, 2, 0, 4, 5]])

    def run(q, k, v, s):
        return compiled.compiled_attention(q, k, v, positions, None, None, s, None, 0.3, None, 2.0)

    assert torch.autograd.gradcheck(run, inputs)


def test_the_operator_keeps_the_rules_of_custom_operators():
    torch.manual_seed(1)
    tensors = [torch.randn(2, 4, 24, 8), torch.randn(2, 2, 24, 8), torch.randn(2, 2, 24, 6), torch.randn(4)]
    q, k, v, sinks = (x.requires_grad_() for x in tensors)
    mask, documents = MASK[:2].bool(), documents_of([[5, 9, 9], [20, 1, 2]])
    for arguments in [
        (q, k, v, ROWS.position_ids[:2], None, None, None, None, 0.3, None, None),
        (q, k, v, ROWS.position_ids[:2], mask, None, sinks, torch.tensor(False), 0.3, 5, 2.0),
        (q, k, v, ROWS.position_ids[:2], None, documents, sinks, None, 0.3, None, None),
    ]:
        torch.library.opcheck(compiled.compiled_attention, arguments)


def test_a_mask_that_looks_ahead_is_refused_when_the_graph_runs():
    q, k, v = (torch.randn(1, 2, 24, 8) for _ in range(3))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(looks_ahead):
        return compiled.compiled_attention(
            *(q, k, v, ROWS.position_ids[:1], None, None, None, looks_ahead), 0.3, None, None
        )

    run(torch.tensor(False))
    with pytest.raises(AnchorUnsupportedError, match="lets a token see later ones"):
        run(torch.tensor(True))


def test_other_lengths_and_other_documents_need_no_graph_each():
    model = build(config_of("llama", num_hidden_layers=1))
    compiled_model = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for columns in (24, 17, 21, 19):
        ids, positions = ROWS.input_ids[:, :columns], ROWS.position_ids[:, :columns].clone()
        positions[:, columns // 2] = 0
        expected = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        got = compiled_model(input_ids=ids, position_ids=positions, use_cache=False).logits
        assert_equal(got, expected, 1e-9)
    # The hook and the forward, each for contiguous tokens and for slices of a row.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_positions_changed_in_place_between_compiled_forwards():
    model = build(config_of("llama"))
    compiled_model = torch.compile(model, backend="aot_eager", fullgraph=True)
    positions = ROWS.position_ids.clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            held = positions.clone()
            compiled_model(input_ids=ROWS.input_ids, position_ids=held, use_cache=False)
            held[:, 5] = 0
            got = compiled_model(input_ids=ROWS.input_ids, position_ids=held, use_cache=False).logits
            assert_equal(got, logits(model, input_ids=ROWS.input_ids, position_ids=held.clone()), 1e-9)


def test_gradient_checkpointing_inside_a_compiled_model():
    model = build(config_of("llama")).train()
    expected = results(model, **ROWS.batch())
    compat.enable_checkpointing(model)
    out = torch.compile(model, backend="aot_eager")(**ROWS.batch(), use_cache=False)
    got = {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients_of(model, out.loss)}
    assert_equal(got, expected, 1e-9)


def test_dropout_breaks_the_graph_and_says_so():
    model = build(config_of("llama", attention_dropout=0.5, num_hidden_layers=1)).train()
    torch.compile(model, backend="aot_eager")(**ROWS.batch(), use_cache=False)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="attention dropout"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(**ROWS.batch(), use_cache=False)


def test_autocast():
    model = build(config_of("llama"), dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(**ROWS.batch(), use_cache=False).logits
        got = torch.compile(model, backend="aot_eager", fullgraph=True)(**ROWS.batch(), use_cache=False).logits
    assert_equal(got, expected, 5e-2)


def test_an_exported_model_still_reads_its_documents_from_the_positions():
    model = build(config_of("llama"))
    model.config.use_cache = False
    inputs = {"input_ids": ROWS.input_ids, "position_ids": ROWS.position_ids}
    exported = torch.export.export(model, (), inputs, strict=False).module()
    other = ROWS.position_ids.clone()
    other[:, 6] = 0
    for positions in (ROWS.position_ids, other):
        batch = {"input_ids": ROWS.input_ids, "position_ids": positions}
        assert_equal(exported(**batch).logits, logits(model, **batch), 1e-9)


# ---------------------------------------------------------------- one table a forward


@pytest.fixture
def tables(monkeypatch):
    """How many segment tables were made."""
    made = []

    def counted(*arguments):
        made.append(segments.build_table(*arguments))
        return made[-1]

    monkeypatch.setattr(backend, "build_table", counted)
    monkeypatch.setattr(compiled, "build_table", counted)
    return made


@pytest.mark.parametrize("extra", [{}, {"attention_mask": MASK}], ids=["plain", "padded"])
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_one_table_for_all_layers_and_their_backward(tables, model_type, extra):
    """Gemma 2 asks for two masks a forward."""
    model = build(config_of(model_type)).train()
    for checkpointing in (False, True):
        if checkpointing:
            compat.enable_checkpointing(model)
        tables.clear()
        results(model, **ROWS.batch(), **extra)
        assert len(tables) == 1


def test_one_table_for_a_compiled_forward_and_backward(tables):
    model = build(config_of("llama")).train()
    compiled_model = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        tables.clear()
        gradients_of(model, compiled_model(**ROWS.batch(), use_cache=False).loss)
        assert 1 <= len(tables) <= 2


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_one_copy_to_the_host_a_forward(model_type):
    model = build(config_of(model_type), dtype=torch.bfloat16).cuda()
    batch = {name: x.cuda() for name, x in ROWS.batch().items() if name != "labels"}
    model(**batch, use_cache=False)  # the engine proves itself here
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        model(**batch, use_cache=False)
        torch.cuda.synchronize()
    stock = build(config_of(model_type), "sdpa", dtype=torch.bfloat16).cuda()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as stock_profile:
        stock(**batch, use_cache=False)
        torch.cuda.synchronize()
    copies = [sum(event.count for event in p.key_averages() if "DtoH" in event.key) for p in (profile, stock_profile)]
    assert copies[0] <= copies[1] + 1


@pytest.mark.gpu
def test_one_graph_equals_eager_on_cuda():
    model = build(config_of("llama"), dtype=torch.bfloat16).cuda()
    batch = {name: x.cuda() for name, x in ROWS.batch().items()}
    expected = results(model, **batch)
    out = torch.compile(model, fullgraph=True)(**batch, use_cache=False)
    got = {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients_of(model, out.loss)}
    assert_equal(got, expected, 5e-2)
