"""Attention recalibration: what it alters, what it leaves alone, and that it leaves nothing behind."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from mcq_models import FAMILIES, LETTERS, WORDS, prompts_and_counts, tiny_model, word_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, masking_utils, modeling_utils

import hf_ext
from hf_ext.mcq_bias import RecalibrationConfig, attribute, option_positions, recalibrate_attention, score_choices
from hf_ext.mcq_bias.attention import NAME, watched_attention

ROWS, LENGTH = 3, 9
IDS = torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 23
POSITIONS = torch.tensor([[-2, -5], [-4, -3], [-6, -2]])  # within the window of 6
ATTENTION = {"gpt2": "transformer.h.{}.attn"}
HEADS = {
    "first_layer": [(0, 1)],
    "one_head_a_layer": [(0, 2), (1, 0)],
    "all": "all",
}


def attention_of(model, layer):
    return model.get_submodule(ATTENTION.get(model.config.model_type, "model.layers.{}.self_attn").format(layer))


def heads_of(model, heads):
    everything = [(layer, head) for layer in range(2) for head in range(model.config.num_attention_heads)]
    return everything if heads == "all" else heads


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


def padded(rows=((2, 7, 9, 4), (5, 8, 11, 3, 6, 1, 12), (4, 4, 9, 20, 13, 2, 0))):
    """Inputs of rows of different lengths, padded on the left, and the rows."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"ids": ids, "attention_mask": mask, "position_ids": positions}, rows


# --- the oracle: the altered weights, times the values, forced into the last projection


def altered_by_hand(weights, row_positions, mode):
    """weights (T,) of one row and head."""
    weights = weights.clone()
    where = [len(weights) + p for p in row_positions if p]
    if mode == "swap":
        weights[where[0]], weights[where[1]] = weights[where[1]].item(), weights[where[0]].item()
    else:
        weights[where] = sum(weights[i] for i in set(where)) / len(set(where))
    return weights


def oracle(model, heads, positions, mode):
    """Logits (B, L, V), by the host's eager attention and hooks; layer by layer, as a change reaches later ones."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    for layer in range(model.config.num_hidden_layers):
        attention, seen = attention_of(model, layer), {}
        source = attention.c_attn if hasattr(attention, "c_attn") else attention.v_proj
        handles = [
            source.register_forward_hook(lambda *x, seen=seen: seen.update(values=x[2])),
            attention.register_forward_hook(lambda *x, seen=seen: seen.update(weights=x[2][1])),
        ]
        logits(model)
        for handle in handles:
            handle.remove()
        force(attention, seen, [head for at, head in heads if at == layer], positions, mode)
    return logits(model)


def force(attention, seen, heads, positions, mode):
    rows, count, length, _ = seen["weights"].shape
    width = attention.head_dim
    values = seen["values"][..., -seen["values"].shape[-1] // 3 :] if hasattr(attention, "c_attn") else seen["values"]
    values = values.reshape(rows, length, -1, width)
    groups = count // values.shape[2]
    projection = attention.c_proj if hasattr(attention, "c_proj") else attention.o_proj

    def replace(module, inputs):
        mixed = inputs[0].clone()
        for row in range(rows):
            for head in heads:
                weights = altered_by_hand(seen["weights"][row, head, -1], positions[row], mode)
                mixed[row, -1, head * width : (head + 1) * width] = weights @ values[row, :, head // groups]
        return (mixed,)

    projection.register_forward_pre_hook(replace)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mode", ["swap", "equalise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_altered_weights_forced_through_the_last_projection(family, mode, heads):
    model = tiny_model(family)
    before = logits(model)
    with recalibrate_attention(model, HEADS[heads], POSITIONS, mode):
        actual = logits(model)
    expected = oracle(model, heads_of(model, HEADS[heads]), POSITIONS.tolist(), mode)
    # The host's eager Llama rounds the weights to float32.
    assert (actual - expected).abs().max() < (1e-12 if family == "gpt2" else 1e-5)
    assert (actual - before)[:, -1].abs().max() > 1e-3
    assert torch.equal(actual[:, :-1], before[:, :-1]) or (actual - before)[:, :-1].abs().max() < 1e-12


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_no_heads_is_the_models_own_forward(family):
    model = tiny_model(family)
    with recalibrate_attention(model, [], POSITIONS):
        assert (logits(model) - logits(tiny_model(family))).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_padded_on_the_left_are_as_alone(family, dtype):
    model = tiny_model(family, dtype)
    inputs, rows = padded()
    with recalibrate_attention(model, "all", [-2, -4]):
        together = logits(model, **inputs)[:, -1]
        alone = torch.cat([logits(model, torch.tensor([row]))[:, -1] for row in rows])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.15}[dtype]
    assert (together - alone).abs().max() < tolerance


def test_swap_twice_and_swap_with_itself_change_nothing():
    model = tiny_model("gpt2")
    with recalibrate_attention(model, "all", [-3, -3]):
        assert torch.allclose(logits(model), logits(tiny_model("gpt2")), atol=1e-12, rtol=0)
    with recalibrate_attention(model, [(0, 0)], [-3, -5]), recalibrate_attention(model, [(0, 0)], [-5, -3]):
        assert torch.allclose(logits(model), logits(tiny_model("gpt2")), atol=1e-12, rtol=0)


@pytest.mark.parametrize(("mode", "positions"), [("swap", [-3, 0]), ("swap", [0, 0]), ("equalise", [-3, 0, -3])])
def test_absent_positions_are_left_out(mode, positions):
    model = tiny_model("llama")
    with recalibrate_attention(model, "all", positions, mode):
        assert torch.allclose(logits(model), logits(tiny_model("llama")), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mode", ["swap", "equalise"])
def test_rows_keep_summing_to_one(mode):
    model, seen = tiny_model("qwen2"), []
    with recalibrate_attention(model, "all", POSITIONS, mode), watched_attention(model, seen.append):
        logits(model)
    assert len(seen) == 2
    for query in seen:
        assert torch.allclose(query.weights.sum(-1), torch.ones((), dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["list", "array", "tensor", "one_for_all"])
def test_positions_in_any_form(form):
    same = [[-2, -5]] * ROWS
    forms = {"list": same, "array": np.array(same), "tensor": torch.tensor(same), "one_for_all": (-2, -5)}
    model = tiny_model("gpt2")
    with recalibrate_attention(model, "all", forms[form]):
        actual = logits(model)
    with recalibrate_attention(model, np.array([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]), same):
        assert torch.equal(actual, logits(model))


# --- what is left alone


def engines(model):
    return [module.config._attn_implementation for module in model.modules() if "config" in vars(module)]


def traces(model):
    return [name for module in model.modules() for name in vars(module) if name.startswith("_mcq")]


@pytest.mark.smoke
@pytest.mark.parametrize("raising", [False, True], ids=["in_peace", "by_an_exception"])
def test_everything_is_restored(raising):
    model = tiny_model("llama")
    config, before = model.config, logits(model)
    try:
        with recalibrate_attention(model, "all", POSITIONS):
            assert set(engines(model)) == {NAME}
            logits(model)
            if raising:
                raise KeyError("somewhere")
    except KeyError:
        assert raising
    assert model.config is config
    assert all(module.config is config for module in model.modules() if "config" in vars(module))
    assert set(engines(model)) == {"sdpa"}
    assert traces(model) == []
    assert torch.equal(logits(model), before)


def test_error_at_the_forward_restores_too():
    model = tiny_model("gpt2")
    with pytest.raises(ValueError, match="rows"), recalibrate_attention(model, "all", [[-1, -2]] * 2):
        logits(model)
    assert (set(engines(model)), traces(model)) == ({"sdpa"}, [])


def test_model_that_shares_the_config_is_not_touched():
    model = tiny_model("gpt2")
    other = AutoModelForCausalLM.from_config(model.config).double().eval()
    other.config = model.config  # from_config copies it on some versions
    other.transformer.config = model.config
    for block in other.transformer.h:
        block.attn.config = model.config
    before = logits(other)
    with recalibrate_attention(model, "all", POSITIONS):
        assert set(engines(other)) == {"sdpa"}
        assert torch.equal(logits(other), before)
        inside = logits(model)
    assert not torch.equal(inside, logits(model))


def test_nested_contexts_follow_each_other():
    model = tiny_model("gpt2")
    with recalibrate_attention(model, [(0, 0), (1, 1)], POSITIONS):
        expected = logits(model)
    with recalibrate_attention(model, [(0, 0)], POSITIONS):
        with recalibrate_attention(model, [(1, 1)], POSITIONS):
            assert torch.equal(logits(model), expected)
        assert not torch.equal(logits(model), expected)
        assert set(engines(model)) == {NAME}


def test_only_the_prompt_is_recalibrated_when_generating():
    model = tiny_model("llama")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(IDS)
    plain = model.generate(IDS, attention_mask=mask, **options)
    with recalibrate_attention(model, "all", POSITIONS):
        ours = model.generate(IDS, attention_mask=mask, **options)
        first = logits(model)[:, -1].argmax(-1)
        cached = model(input_ids=IDS, use_cache=True)
        step = model(input_ids=first[:, None], past_key_values=cached.past_key_values).logits[:, -1].argmax(-1)
    assert ours.shape == plain.shape == (ROWS, LENGTH + 5)
    assert torch.equal(ours[:, LENGTH], first)
    assert torch.equal(ours[:, LENGTH + 1], step)
    cached = model(input_ids=IDS, use_cache=True)
    after = model(input_ids=first[:, None], past_key_values=cached.past_key_values).logits
    with recalibrate_attention(model, [], POSITIONS):
        cached = model(input_ids=IDS, use_cache=True)
    with recalibrate_attention(model, "all", POSITIONS):
        again = model(input_ids=first[:, None], past_key_values=cached.past_key_values).logits
    assert (after - again).abs().max() < 1e-12


def test_gradients_flow_through():
    model = tiny_model("gpt2")
    with recalibrate_attention(model, "all", POSITIONS, "equalise"):
        model(input_ids=IDS).logits[:, -1].square().sum().backward()
    assert all(block.attn.c_attn.weight.grad.abs().sum() > 0 for block in model.transformer.h)


def test_model_with_an_adapter():
    model = get_peft_model(tiny_model("gpt2"), LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True))
    with recalibrate_attention(model, "all", POSITIONS):
        actual = logits(model)
    bare = tiny_model("gpt2")
    with recalibrate_attention(bare, "all", POSITIONS):  # the adapter is new, and does nothing yet
        assert torch.allclose(actual, logits(bare), atol=1e-12, rtol=0)
    assert traces(model) == []
    assert (actual - logits(model)).abs().max() > 1e-3


# --- the name by itself


@pytest.mark.smoke
@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_name_without_the_context_is_plain_eager(family):
    if family == "gemma2":  # a soft cap and windows of its own
        from anchor_models import build, config_of

        model = build(config_of("gemma2"), "eager")
    else:
        model = tiny_model(family, torch.float32)
        model.set_attn_implementation("eager")
    inputs, _ = padded()
    inputs = inputs if family != "gemma2" else {"ids": inputs["ids"]}
    expected = logits(model, **inputs)
    model.set_attn_implementation(NAME)
    assert torch.equal(logits(model, **inputs), expected)


def test_dropout_is_honoured():
    """In training, as by the host's eager function with the same random numbers."""
    model = tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0).train()
    outputs = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        torch.manual_seed(0)
        outputs.append(logits(model))
    with recalibrate_attention(model, [], [-1, -2]):
        torch.manual_seed(0)
        outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.allclose(outputs[0], outputs[2], atol=1e-12, rtol=0)
    model.eval()
    assert not torch.allclose(outputs[0], logits(model), atol=1e-3)


@pytest.mark.parametrize("by_layer", [False, True], ids=["plain", "by_inverse_layer"])
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
def test_scaling_is_the_modules_where_the_host_passes_none(scaled, by_layer):
    """The GPT-2 of transformers 4 passes none; simulated by taking the argument away."""
    options = {"scale_attn_weights": scaled, "scale_attn_by_inverse_layer_idx": by_layer}
    model = tiny_model("gpt2", **options)
    model.set_attn_implementation("eager")  # the sdpa of transformers 4 knows one scaling only
    expected = logits(model)
    table = modeling_utils.AttentionInterface._global_mapping
    ours = table[NAME]
    try:
        table[NAME] = lambda *args, scaling=None, **kwargs: ours(*args, **kwargs)
        with recalibrate_attention(model, [], POSITIONS):
            assert (logits(model) - expected).abs().max() < 1e-12
    finally:
        table[NAME] = ours


def test_mask_is_registered_with_it():
    table = masking_utils.AttentionMaskInterface._global_mapping
    assert table[NAME] is masking_utils.eager_mask


def test_without_the_name_it_is_refused():
    model = tiny_model("gpt2")
    hf_ext.unregister()
    try:
        with pytest.raises(RuntimeError, match=r"hf_ext\.register\(\)"), recalibrate_attention(model, [], [-1, -2]):
            pass
    finally:
        hf_ext.register()


# --- the configuration


@pytest.mark.parametrize("heads", ["all", [], [(0, 1), (1, 2)]], ids=str)
def test_configuration_survives_a_round_trip(tmp_path, heads):
    config = RecalibrationConfig(heads, "equalise", "content")
    config.save_pretrained(tmp_path / "new" / "folder")
    assert RecalibrationConfig.from_pretrained(tmp_path / "new" / "folder") == config


def test_configuration_stands_for_heads_and_mode():
    model = tiny_model("gpt2")
    with recalibrate_attention(model, [(1, 2)], POSITIONS, "equalise"):
        expected = logits(model)
    with recalibrate_attention(model, RecalibrationConfig([(1, 2)], "equalise"), POSITIONS):
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(("configured", "given"), [("swap", "equalise"), ("equalise", "swap")])
def test_configuration_that_contradicts_the_mode(configured, given):
    with (
        pytest.raises(ValueError, match=f"mode='{given}' contradicts .*'{configured}'"),
        recalibrate_attention(tiny_model("gpt2"), RecalibrationConfig("all", configured), POSITIONS, given),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"haeds": "all"}', ["'haeds'", "did you mean 'heads'"]),
        ('{"mode": "swop"}', ["'swop'", "did you mean 'swap'"]),
        ('["all"]', ["object"]),
        ("{", ["recalibration.json", "damaged"]),
    ],
    ids=["unknown_key", "unknown_mode", "list", "half"],
)
def test_damaged_file(tmp_path, text, words):
    (tmp_path / "recalibration.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        RecalibrationConfig.from_pretrained(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        RecalibrationConfig.from_pretrained(tmp_path)


def test_file_is_plain_json(tmp_path):
    RecalibrationConfig([(0, 1)]).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "recalibration.json").read_text())
    assert written == {"heads": [[0, 1]], "mode": "swap", "where": "letter"}


# --- bad input

BAD = {
    "positive": ("all", [-1, 2], "swap", ["2 is positive", "from the end"]),
    "three_for_swap": ("all", [-1, -2, -3], "swap", ["exactly 2", "3"]),
    "one_for_swap": ("all", [[-1], [-2], [-3]], "swap", ["exactly 2"]),
    "fractions": ("all", [-1.0, -2.0], "swap", ["integers", "float"]),
    "bools": ("all", [True, False], "swap", ["integers", "bool"]),
    "ragged": ("all", [[-1, -2], [-1]], "swap", ["no table of integers"]),
    "none_at_all": ("all", [], "equalise", ["integers", "(0,)"]),
    "cube": ("all", [[[-1, -2]]], "swap", ["(1, 1, 2)"]),
    "head_beyond": ([(0, 3)], [-1, -2], "swap", ["(0, 3)", "0 to 2"]),
    "layer_beyond": ([(2, 0)], [-1, -2], "swap", ["(2, 0)", "0 to 1"]),
    "negative_head": ([(0, -1)], [-1, -2], "swap", ["(0, -1)"]),
    "head_without_layer": ([3], [-1, -2], "swap", ["pairs (layer, head)"]),
    "three_numbers": ([(0, 1, 2)], [-1, -2], "swap", ["(0, 1, 2)"]),
    "fractional_head": ([(0, 1.5)], [-1, -2], "swap", ["1.5"]),
    "unknown_word": ("al", [-1, -2], "swap", ["'al'", "'all'"]),
    "no_heads": (None, [-1, -2], "swap", ["None", "'all'"]),
    "unknown_mode": ("all", [-1, -2], "equalize", ["'equalize'", "did you mean 'equalise'"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_argument_is_named(case):
    heads, positions, mode, words = BAD[case]
    model = tiny_model("gpt2")
    with pytest.raises(ValueError) as caught, recalibrate_attention(model, heads, positions, mode):
        pass
    for word in words:
        assert word in str(caught.value)
    assert (set(engines(model)), traces(model)) == ({"sdpa"}, [])


@pytest.mark.parametrize(
    ("positions", "words"),
    [
        ([[-1, -2]] * 2, ["2 rows", "3"]),
        ([-1, -10], ["-10", "row 0"]),
        ([[-1, -2], [-1, -2], [-10, -2]], ["-10", "row 2"]),
    ],
    ids=["rows", "before_the_first", "in_one_row"],
)
def test_positions_that_do_not_fit_the_batch(positions, words):
    model = tiny_model("gpt2")
    with pytest.raises(ValueError) as caught, recalibrate_attention(model, [(1, 0)], positions):
        logits(model)
    for word in words:
        assert word in str(caught.value)


def test_position_in_the_padding():
    inputs, _ = padded()
    model = tiny_model("llama")
    with (
        pytest.raises(ValueError, match="-5 in row 0"),
        recalibrate_attention(model, "all", [-1, -5], "equalise"),
    ):
        logits(model, **inputs)


def test_position_beyond_the_window():
    model = tiny_model("mistral")
    with pytest.raises(ValueError, match="-8 in row 0"), recalibrate_attention(model, "all", [-1, -8]):
        logits(model)


def test_padding_on_the_right():
    model = tiny_model("gpt2")
    mask = torch.ones_like(IDS)
    mask[1, -2:] = 0
    with pytest.raises(ValueError, match="row 1"), recalibrate_attention(model, "all", [-1, -2]):
        logits(model, attention_mask=mask)


def test_other_family_is_refused_by_name():
    from anchor_models import build, config_of

    with (
        pytest.raises(ValueError, match=r"'gemma2'.*gpt2, llama"),
        recalibrate_attention(build(config_of("gemma2"), "eager"), "all", [-1, -2]),
    ):
        pass


def test_tokens_behind_a_cache_are_left_alone_and_said():
    """`caplog` does not see the host's logger."""
    from unittest.mock import patch

    model = tiny_model("gpt2")
    with recalibrate_attention(model, "all", POSITIONS), patch("hf_ext.mcq_bias.attention._log") as log:
        cached = model(input_ids=IDS, use_cache=True).past_key_values
        assert not log.warning_once.called
        model(input_ids=IDS[:, :3], past_key_values=cached)
    assert "behind a cache" in log.warning_once.call_args[0][0]


def test_wrapper_is_named():
    with (
        pytest.raises(ValueError, match=r"DataParallel wraps a GPT2LMHeadModel.*unwrap_model"),
        recalibrate_attention(torch.nn.DataParallel(tiny_model("gpt2")), "all", [-1, -2]),
    ):
        pass


def test_beams_multiply_the_rows():
    model = tiny_model("gpt2")
    with (
        pytest.raises(ValueError, match="for 3 rows, and the batch has 6; generate with num_beams or num_return_seq"),
        recalibrate_attention(model, "all", POSITIONS),
    ):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), num_beams=2, max_new_tokens=1, pad_token_id=0)


def test_head_mask_of_older_hosts_is_applied():
    """The GPT-2 of transformers 4 hands it to the attention function."""
    model, table = tiny_model("gpt2"), modeling_utils.AttentionInterface._global_mapping
    ours = table[NAME]
    seen = {}

    def masked(module, *args, **options):
        mask = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
        options.pop("head_mask", None)
        output, weights = ours(module, *args, head_mask=mask, **options)
        seen[module.layer_idx] = output.abs().max().item(), weights.abs().max().item()
        return output, weights

    try:
        table[NAME] = masked
        with recalibrate_attention(model, [], POSITIONS):
            logits(model)
    finally:
        table[NAME] = ours
    assert seen == {0: (0.0, 0.0), 1: (0.0, 0.0)}


def test_positions_of_options_are_ready_for_use():
    prompts, counts = prompts_and_counts()
    tokenizer, model = word_tokenizer(), tiny_model("gpt2")
    positions = option_positions(tokenizer, prompts, counts)
    for prompt, count, row in zip(prompts, counts, positions, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        seen = []
        with recalibrate_attention(model, "all", row, "equalise"), watched_attention(model, seen.append):
            logits(model, ids)
        letters = [place - ids.shape[1] for place, token in enumerate(ids[0].tolist()) if WORDS[token] in LETTERS]
        assert row[row < 0].tolist() == letters
        for query in seen:
            weights = query.weights[0, :, letters]
            assert (weights - weights.mean(-1, keepdim=True)).abs().max() < 1e-12
        assert count == len(letters)


# --- inside other code


PROMPTS, COUNTS = prompts_and_counts()
OWN = [[-row - 2, -row - 3] for row in range(len(PROMPTS))]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_rows_are_those_of_the_prompts_in_the_users_order(batch_size):
    """`score_choices` sorts prompts by length."""
    model, tokenizer = tiny_model("gpt2"), word_tokenizer()
    with recalibrate_attention(model, "all", OWN):
        together = score_choices(model, tokenizer, PROMPTS, COUNTS, batch_size, progress=False).scores
    for row, positions in enumerate(OWN):
        with recalibrate_attention(model, "all", positions):
            alone = score_choices(model, tokenizer, PROMPTS[row : row + 1], COUNTS[row], progress=False).scores
        np.testing.assert_allclose(together[row, : COUNTS[row]], alone[0], atol=1e-12)


def test_attribution_sees_the_same_rows():
    model, tokenizer = tiny_model("gpt2"), word_tokenizer()
    rows = [{"prompt": prompt, "num_choices": k} for prompt, k in zip(PROMPTS, COUNTS, strict=True)]
    with recalibrate_attention(model, "all", OWN):
        scores = score_choices(model, tokenizer, PROMPTS, COUNTS, progress=False).scores
        found = attribute(model, tokenizer, rows, target="runner_up", batch_size=2, progress=False)
    np.testing.assert_allclose(found.logit_difference, scores[:, 0] - scores[:, 1:].max(1), atol=1e-12)


def test_as_many_rows_as_prompts_and_not_as_a_batch_has():
    model, tokenizer = tiny_model("gpt2"), word_tokenizer()
    with (
        recalibrate_attention(model, "all", OWN[:2]),
        pytest.raises(ValueError, match="positions are for 2 rows, and there are 4 prompts"),
    ):
        score_choices(model, tokenizer, PROMPTS[:4], COUNTS[:4], batch_size=2, progress=False)


@pytest.mark.parametrize("adapter", [False, True], ids=["plain", "adapter"])
def test_generating_without_a_cache_recalibrates_the_first_forward_only(adapter):
    model = tiny_model("gpt2", torch.float32)
    if adapter:
        model = get_peft_model(
            model, LoraConfig(target_modules=["c_proj"], fan_in_fan_out=True, task_type="CAUSAL_LM")
        ).eval()
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": False}
    options |= {"attention_mask": torch.ones_like(IDS), "return_dict_in_generate": True, "output_logits": True}
    with recalibrate_attention(model, "all", POSITIONS):
        found = model.generate(input_ids=IDS, **options)
        first = logits(model)[:, -1]
        again = model.generate(input_ids=IDS, **options)
    torch.testing.assert_close(found.logits[0], first, rtol=0, atol=1e-4)
    for step in (1, 2):
        own = logits(model, found.sequences[:, : LENGTH + step])[:, -1]
        torch.testing.assert_close(found.logits[step], own, rtol=0, atol=1e-4)
    assert torch.equal(found.sequences, again.sequences)
    assert not any("generate" in vars(module) for module in model.modules())


def test_a_copy_made_inside_is_not_recalibrated():
    model = tiny_model("gpt2")
    before = logits(model)
    with recalibrate_attention(model, "all", POSITIONS):
        copied = copy.deepcopy(model)
        inside = logits(model)
        assert (logits(copied) - before).abs().max() < 1e-12
    assert (logits(copied) - before).abs().max() < 1e-12
    assert (inside - before).abs().max() > 1e-3
    assert copied.generate.generate.__self__ is copied


def test_what_is_written_into_the_config_inside_stays():
    model = tiny_model("gpt2")
    engine = model.config._attn_implementation
    config = model.config
    with recalibrate_attention(model, "all", POSITIONS), recalibrate_attention(model, [], POSITIONS):
        model.config.pad_token_id = 7
        model.config.new_name = "new"
    assert model.config is config
    assert (config.pad_token_id, config.new_name, config._attn_implementation) == (7, "new", engine)


def test_rows_with_an_adapter_which_is_tried_in_a_batch():
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    adapted = get_peft_model(model, LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")).double()
    with recalibrate_attention(adapted, "all", OWN):
        together = score_choices(adapted, tokenizer, PROMPTS, COUNTS, progress=False).scores
    with recalibrate_attention(adapted, "all", OWN[3]):
        alone = score_choices(adapted, tokenizer, PROMPTS[3:4], COUNTS[3], progress=False).scores
    np.testing.assert_allclose(together[3, : COUNTS[3]], alone[0], atol=1e-6)
