"""Scores of letters: those of single unpadded forwards, whatever the batch, the precision and the tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from mcq_models import FAMILIES, LETTERS, WORDS, alone, prompts_and_counts, tiny_model, word_tokenizer
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertForMaskedLM,
    PreTrainedTokenizerFast,
)

from hf_ext.mcq_bias import ChoiceScores, option_positions, score_choices, scoring
from hf_ext.mcq_bias.families import FAMILIES as SUPPORTED
from hf_ext.mcq_bias.scoring import letter_tokens

DATA = Path(__file__).parents[2] / "shared" / "data" / "mcq" / "dev"
PROMPTS, COUNTS = prompts_and_counts()
IDS = [WORDS.index(letter) for letter in LETTERS]
TOKENIZER = word_tokenizer()


def scored(model, prompts=PROMPTS, choices=COUNTS, tokenizer=TOKENIZER, **options):
    return score_choices(model, tokenizer, prompts, choices, **{"progress": False, **options})


def expected_scores(model, tokenizer=TOKENIZER, dtype=torch.float64):
    """(n, 5), one prompt at a time."""
    rows = np.full((len(PROMPTS), 5), -np.inf)
    for row, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        rows[row, :count] = alone(model, tokenizer, prompt)[IDS[:count]].to(dtype).numpy()
    return rows


@pytest.mark.smoke
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_single_unpadded_forwards(family, batch_size):
    model = tiny_model(family)
    result = scored(model, batch_size=batch_size)
    assert isinstance(result, ChoiceScores)
    assert result.scores.dtype == np.float64
    assert result.num_choices.tolist() == COUNTS
    np.testing.assert_allclose(result.scores, expected_scores(model), rtol=0, atol=1e-9)


def test_eager_attention_and_another_prompt_order():
    model = tiny_model("gpt2")
    expected = expected_scores(model)
    model.set_attn_implementation("eager")
    order = [4, 0, 6, 2, 1, 5, 3]
    result = scored(model, [PROMPTS[i] for i in order], [COUNTS[i] for i in order], batch_size=4)
    np.testing.assert_allclose(result.scores, expected[order], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("choices", "counts"),
    [
        (3, [3] * 7),
        (np.int64(2), [2] * 7),
        (np.array(4), [4] * 7),
        (torch.tensor(4), [4] * 7),
        (np.array(COUNTS), COUNTS),
        (torch.tensor(COUNTS), COUNTS),
        ([LETTERS[:k] for k in COUNTS], COUNTS),
    ],
    ids=["number", "numpy number", "array of one", "tensor of one", "array", "tensor", "lists"],
)
def test_choices(choices, counts):
    choices = [list(choice) for choice in choices] if isinstance(choices, list) else choices
    result = scored(tiny_model("gpt2"), choices=choices)
    assert result.num_choices.tolist() == counts
    assert result.scores.shape == (7, max(counts))
    for row, count in enumerate(counts):
        assert np.isfinite(result.scores[row, :count]).all()
        assert np.isneginf(result.scores[row, count:]).all()


# --- top1


def test_top1_is_the_best_of_the_whole_vocabulary():
    model = tiny_model("mistral")
    expected = []
    for prompt, count in zip(PROMPTS, COUNTS, strict=True):
        best = int(alone(model, TOKENIZER, prompt).argmax())
        expected.append(IDS.index(best) if best in IDS[:count] else -1)
    assert {-1} < set(expected), "else nothing is tested"
    assert scored(model).top1.tolist() == expected


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(["A"], 0), (["B"], 1), (["E"], -1), (["A", "B"], -1), (["A", "w3"], -1), (["w3", "w4"], -1)],
    ids=["A", "B", "beyond k", "two letters", "a letter and a word", "two words"],
)
def test_top1_with_ties(raised, expected):
    """A head whose only non-zero rows are equal ties them exactly."""
    model = tiny_model("llama")
    last = torch.tensor(TOKENIZER(PROMPTS[0])["input_ids"])[None]
    hidden = model.model(last).last_hidden_state[0, -1]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[TOKENIZER.convert_tokens_to_ids(raised)] = hidden
    result = scored(model, PROMPTS[:2], [3, 5])
    assert result.top1[0] == expected


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_scores_are_exact_products_with_the_head(dtype):
    model = tiny_model("qwen2", dtype)
    result = scored(model, batch_size=1)
    for row, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        ids = torch.tensor([TOKENIZER(prompt)["input_ids"]])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state[0, -1]
        exact = model.lm_head.weight.double()[IDS[:count]] @ hidden.double()
        np.testing.assert_allclose(result.scores[row, :count], exact.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_half_precision_does_not_tie_where_the_models_own_logits_do():
    model = tiny_model("llama", torch.bfloat16)
    with torch.no_grad():
        row = model.lm_head.weight[IDS[0]].clone()
        row[row.abs().argmin()] += 0.002
        model.lm_head.weight[IDS[1]] = row
    own = torch.stack([alone(model, TOKENIZER, prompt)[IDS[:2]] for prompt in PROMPTS])
    scores = scored(model, choices=2, batch_size=1).scores
    ties = (own[:, 0] == own[:, 1]).numpy()
    assert ties.any(), "else nothing is tested"
    assert (scores[ties, 0] != scores[ties, 1]).all()


def test_under_autocast():
    model = tiny_model("gpt2", torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scored(model, choices=2).scores
    assert not np.array_equal(scores, torch.from_numpy(scores).bfloat16().double().numpy())
    np.testing.assert_allclose(scores, scored(model, choices=2).scores, atol=0.1)


def test_a_head_with_a_bias():
    model = tiny_model("gpt2", torch.bfloat16)
    model.lm_head.bias = torch.nn.Parameter(torch.arange(len(WORDS)).bfloat16())
    with torch.no_grad():
        own = torch.stack([alone(model, TOKENIZER, prompt)[IDS[:2]] for prompt in PROMPTS]).double()
    np.testing.assert_allclose(scored(model, choices=2, batch_size=1).scores, own, rtol=0.01)


def gemma(dtype):
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=len(WORDS),
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=12,
        final_logit_softcapping=0.1,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def test_a_capped_head_is_scored_with_the_cap_or_refused():
    model = gemma(torch.float32)
    np.testing.assert_allclose(scored(model).scores, expected_scores(model), atol=1e-6)
    with pytest.raises(ValueError, match=r"not its output head's .* alone.*load it in float32"):
        scored(gemma(torch.bfloat16))


# --- everything is left as found


def test_model_and_tokenizer_are_left_as_found():
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    tokenizer = word_tokenizer()
    state = [tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side, len(tokenizer)]
    result = scored(model, tokenizer=tokenizer)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert state == [tokenizer.padding_side, tokenizer.pad_token, tokenizer.truncation_side, len(tokenizer)]
    # Dropout is off meanwhile.
    np.testing.assert_allclose(result.scores, expected_scores(model), rtol=0, atol=1e-9)


def test_also_after_an_exception(monkeypatch):
    model = tiny_model("gpt2").train()
    monkeypatch.setattr(model.lm_head, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scored(model)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_progress(capsys):
    scored(tiny_model("gpt2"), batch_size=4, progress=True)
    assert "2/2" in capsys.readouterr().err
    scored(tiny_model("gpt2"))
    assert not capsys.readouterr().err


def test_an_adapter_takes_part():
    model = tiny_model("llama", torch.float32).requires_grad_(False)  # torch has another kernel for frozen weights
    before = scored(model).scores
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    after = scored(adapted).scores
    assert np.abs(after[:, :2] - before[:, :2]).min() > 1e-4
    with adapted.disable_adapter():
        np.testing.assert_array_equal(scored(adapted).scores, before)
    merged = adapted.merge_and_unload()
    np.testing.assert_allclose(scored(merged).scores, after, atol=1e-4)


# --- BOS


def test_prepend_bos():
    model = tiny_model("gpt2")
    with_bos = scored(model, prepend_bos=True).scores
    np.testing.assert_allclose(
        with_bos, scored(model, [f"<s> {prompt}" for prompt in PROMPTS], tokenizer=spelt_bos()).scores, atol=1e-9
    )
    assert np.abs(with_bos[:, :2] - scored(model).scores[:, :2]).min() > 1e-6


def spelt_bos():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    return tokenizer


def test_never_a_second_bos():
    model, tokenizer = tiny_model("gpt2"), word_tokenizer(bos=True)
    without, with_bos = (scored(model, tokenizer=tokenizer, prepend_bos=flag).scores for flag in (False, True))
    np.testing.assert_array_equal(without, with_bos)
    np.testing.assert_allclose(without, scored(model, prepend_bos=True).scores, atol=1e-9)


def test_no_bos_to_prepend():
    tokenizer = word_tokenizer([word for word in WORDS if word != "<s>"])
    with pytest.raises(ValueError, match=r"prepend_bos=True, and the tokenizer has no BOS token"):
        scored(tiny_model("gpt2"), tokenizer=tokenizer, prepend_bos=True)


# --- letters


def test_letters_of_a_word_level_tokenizer():
    assert letter_tokens(TOKENIZER, LETTERS) == IDS
    assert letter_tokens(word_tokenizer(bos=True), LETTERS, "") == IDS


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_letters_of_a_sentencepiece_tokenizer(scheme):
    """Llama's kind, where a word begins with a mark for the space before it."""
    words = ["<unk>", "\u2581Answer", ":", *(f"\u2581{letter}" for letter in "ABC"), *"ABC"]
    core = Tokenizer(models.Unigram([(word, -float(i)) for i, word in enumerate(words)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.tokenize("Answer: B") == ["\u2581Answer", ":", "\u2581B"]
    assert letter_tokens(tokenizer, "ABC") == [3, 4, 5]
    assert letter_tokens(tokenizer, "ABC", "") == [6, 7, 8]
    with pytest.raises(ValueError, match="does not know 'D'"):
        letter_tokens(tokenizer, "ABCD", "")


@pytest.mark.skipif(not DATA.is_dir(), reason="no reference data")
def test_letters_of_gpt2():
    tokenizer = AutoTokenizer.from_pretrained(DATA / "gpt2-bpe")
    assert letter_tokens(tokenizer, LETTERS) == [317, 347, 327, 360, 412]
    assert letter_tokens(tokenizer, "ABC", "") == [32, 33, 34]
    with pytest.raises(
        ValueError, match=r"'A' is not one token behind 'Answer:'.*25 \(':'\).*letter_prefix than ' \('"
    ):
        letter_tokens(tokenizer, "A", " (")


@pytest.mark.parametrize(
    ("words", "prefix", "message"),
    [
        (WORDS, " w1 ", r"'A' is not one token behind 'Answer:': 'Answer: w1 A' is 3 \('Answer'\) 5 \(':'\) .*'w1'"),
        ([word for word in WORDS if word != "B"], " ", r"the tokenizer does not know 'B': .* 0 \('\[UNK\]'\)"),
        (WORDS, 3, r"letter_prefix=3 is no text"),
    ],
    ids=["two tokens", "unknown", "no text"],
)
def test_letters_that_are_not_one_token(words, prefix, message):
    with pytest.raises(ValueError, match=message):
        letter_tokens(word_tokenizer(words), LETTERS, prefix)


def test_two_letters_that_are_one_token():
    class Lower:
        unk_token_id = None

        def __call__(self, text):
            return {"input_ids": [ord(x) for x in text.replace("B", "A")]}

        def convert_ids_to_tokens(self, ids):
            return [chr(x) for x in ids]

    with pytest.raises(ValueError, match=r"the letters 'A' and 'B' are one token, .*65 \('A'\)"):
        letter_tokens(Lower(), "AB", "")


# --- bad input: nothing is computed


class Forwards:
    def __init__(self, model):
        self.count = 0
        model.register_forward_pre_hook(self.seen)

    def seen(self, module, args):
        self.count += 1


LONG = " ".join(["w1"] * 65)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [PROMPTS[0], LONG], "choices": 2}, r"prompts\[1\] has 65 tokens, and the model 64 positions"),
        ({"prompts": ["w1 " * 64], "choices": 2, "prepend_bos": True}, r"prompts\[0\] has 65 tokens"),
        ({"prompts": [PROMPTS[0], ""], "choices": 2}, r"prompts\[1\]='' has no token"),
        ({"prompts": [PROMPTS[0], None], "choices": 2}, r"prompts\[1\]=None is no text"),
        ({"prompts": PROMPTS[0]}, r"prompts: found a str"),
        ({"prompts": [], "choices": []}, r"there are no prompts"),
        ({"choices": 1}, r"choices=1 is no number of choices: an integer from 2 to 26"),
        ({"choices": 27}, r"27 is no number"),
        ({"choices": 2.5}, r"2.5 is no number"),
        ({"choices": True}, r"True is no number"),
        ({"choices": "AB"}, r"'AB' is no number"),
        ({"choices": [2, 3]}, r"7 prompts and choices for 2"),
        ({"choices": [2] * 6 + [1]}, r"choices\[6\]=1 is no number"),
        ({"choices": [2] * 6 + ["AB"]}, r"choices\[6\]='AB' is no number"),
        ({"choices": [["a", "b"]] * 6 + [["a"]]}, r"len\(choices\[6\]\)=1 is no number"),
        ({"choices": {"text": ["a", "b"]}}, r"choices=.* is a dict, .* pass choices\['text'\]"),
        ({"choices": [{"text": ["a", "b"], "label": ["A", "B"]}] * 7}, r"choices\[0\]=.* is a dict.*pass .*'text'"),
        ({"choices": [{"a", "b"}] * 7}, r"choices\[0\]=.* is a set, without an order"),
        ({"prompts": [*PROMPTS[:6], PROMPTS[6] + " "]}, r"prompts\[6\] ends in ' ', .*strip the prompt, or .*=\"\""),
        ({"tokenizer": None}, r"tokenizer=None is no tokenizer; load one with AutoTokenizer"),
        ({"tokenizer": "gpt2"}, r"tokenizer='gpt2' is no tokenizer"),
        (
            {"tokenizer": word_tokenizer([*WORDS, "w20"]), "prompts": ["w20"] * 7},
            r"prompts\[0\] .* this is not its tok",
        ),
        (
            {
                "tokenizer": word_tokenizer([*(word.replace("E", "y") for word in WORDS), "E"]),
                "prompts": ["w1"] * 7,
            },
            r"a letter has the token 33, and the model 33",
        ),
        ({"batch_size": 0}, r"batch_size=0 is no integer of at least 1"),
        ({"batch_size": 1.5}, r"batch_size=1.5 is no integer"),
        ({"batch_size": True}, r"batch_size=True is no integer"),
        ({"choices": 6}, r"the tokenizer does not know 'F'"),
        ({"letter_prefix": " w1 "}, r"'A' is not one token"),
    ],
)
def test_refused_before_any_forward(options, message):
    model = tiny_model("gpt2")
    forwards = Forwards(model)
    with pytest.raises(ValueError, match=message):
        scored(model, **options)
    assert forwards.count == 0


def test_the_longest_prompt_that_fits():
    model = tiny_model("gpt2")
    prompt = " ".join(["w1"] * 64)
    expected = alone(model, TOKENIZER, prompt)[IDS[:2]]
    result = scored(model, [PROMPTS[0], prompt], 2)
    np.testing.assert_allclose(result.scores[1], expected, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_no_causal_model(kind):
    small = {"vocab_size": 33, "d_model": 8, "n_layer": 1, "n_head": 1, "num_layers": 1, "num_heads": 1, "d_ff": 8}
    small |= {"n_embd": 8} if kind == "gpt2" else {"d_kv": 8}
    maker = AutoModel if kind == "gpt2" else AutoModelForSeq2SeqLM
    model = maker.from_config(AutoConfig.for_model(kind, **small))
    with pytest.raises(ValueError, match=r"is no causal language model; load one with AutoModelForCausalLM"):
        scored(model)


def test_other_families_are_scored_too():
    """Scoring needs no table of families; attribution does."""
    assert "gemma2" not in SUPPORTED
    assert scored(gemma(torch.float32)).scores.shape == (7, 5)


@pytest.mark.parametrize("wrapper", [torch.nn.DataParallel], ids=["DataParallel"])
def test_a_wrapper_is_named_and_how_to_undo_it(wrapper):
    with pytest.raises(ValueError, match=r"DataParallel wraps a GPT2LMHeadModel.*accelerator\.unwrap_model\(model\)"):
        scored(wrapper(tiny_model("gpt2")))


class WithoutFloat64(torch.Tensor):
    """As on MPS."""

    def double(self):
        raise TypeError("no float64 here")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_scores_leave_the_device_before_they_become_float64(monkeypatch):
    """On Apple's devices there is no float64."""
    answers = scoring.answers
    monkeypatch.setattr(scoring, "answers", lambda *x: (answers(*x)[0].as_subclass(WithoutFloat64), *answers(*x)[1:]))
    model = tiny_model("gpt2", torch.float32)
    np.testing.assert_allclose(scored(model).scores, expected_scores(model), rtol=0, atol=1e-5)


def test_result_says_what_it_is_and_is_not_compared_by_its_arrays():
    result = scored(tiny_model("gpt2"))
    assert repr(result) == "ChoiceScores(7 prompts of up to 5 choices)"
    assert result == result
    assert result != scored(tiny_model("gpt2"))
    assert len({result, result}) == 1


# --- forwards that cannot be believed


def small_model(kind, **options):
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=80,
        **options,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


ROBERTA = {"kind": "roberta", "is_decoder": True, "pad_token_id": 1}
RWKV = {"kind": "rwkv", "attention_hidden_size": 32, "context_length": 64}


@pytest.mark.parametrize(
    ("options", "batch_size", "message"),
    [
        (ROBERTA, 1, r"'roberta'\) .*counts positions .* of its own"),
        (ROBERTA, 8, r"'roberta'\) .*counts positions .* of its own"),
        (RWKV, 8, r"'rwkv'\) has other logits for prompt \d in a batch with padding.*Give batch_size=1"),
        ({"kind": "bert"}, 8, r"'bert'\) is not causal"),
    ],
    ids=["own positions", "own positions, padded", "recurrent", "not causal"],
)
def test_a_model_that_answers_otherwise_in_a_batch_is_refused(options, batch_size, message):
    with pytest.raises(ValueError, match=message):
        scored(small_model(**options), batch_size=batch_size)


def test_and_scored_where_its_answers_are_those_alone():
    model = small_model(**RWKV)
    np.testing.assert_allclose(scored(model, batch_size=1).scores, expected_scores(model), atol=1e-5)


def test_padding_is_tried_in_the_first_batch_that_has_some():
    prompts = ["w1 w2 w3 w4"] * 2 + ["w5 w6", "w7"]
    with pytest.raises(ValueError, match=r"for prompt 3 in a batch with padding"):
        scored(small_model(**RWKV), prompts, 3, batch_size=2)


def test_a_known_family_is_not_tried():
    model = tiny_model("gpt2")
    forwards = Forwards(model)
    scored(model, batch_size=4)
    assert forwards.count == 2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prompt_tuning(family):
    model = tiny_model(family, torch.float32)
    model = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    np.testing.assert_allclose(scored(model, batch_size=1).scores, expected_scores(model), atol=1e-5)
    with pytest.raises(ValueError, match=rf"'{family}'\) has other logits .*prompt learning.*Give batch_size=1"):
        scored(model)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 61 tokens, 4 virtual ones before them, and the model 64"):
        scored(model, ["w1 " * 60 + "w1"], 2)


def test_a_masked_language_model():
    model = BertForMaskedLM(
        AutoConfig.for_model(
            "bert", vocab_size=33, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        )
    )
    forwards = Forwards(model)
    with pytest.raises(ValueError, match="BertForMaskedLM is no causal language model"):
        scored(model)
    assert forwards.count == 0


def test_logits_that_are_not_finite():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")  # softmax in float32, where the mask of float64 is -inf
    with pytest.raises(ValueError, match=r'logits of prompts 0, .* are not finite.*attn_implementation="sdpa"'):
        scored(model)
    assert np.isfinite(scored(model, batch_size=1).scores[:, :2]).all()
    model.lm_head.weight.data[IDS[4], 0] = torch.nan
    with pytest.raises(ValueError, match=rf"logits of prompts {COUNTS.index(5)} are not finite"):
        scored(model, PROMPTS, COUNTS, batch_size=1)


def test_accelerates_mixed_precision_does_not_round():
    model = tiny_model("gpt2", torch.float32)
    expected = scored(model).scores
    AcceleratorState._reset_state(reset_partial_state=True)  # another precision may have been chosen in this process
    try:
        scores = scored(Accelerator(cpu=True, mixed_precision="bf16").prepare(model)).scores
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert not np.array_equal(scores, torch.from_numpy(scores).bfloat16().double().numpy())
    np.testing.assert_allclose(scores, expected, atol=0.2)


def test_a_model_without_weights_and_a_head_without_a_plain_one():
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is on the meta device"):
        scored(tiny_model("gpt2").to("meta"))
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(33, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"the output head is a .*Linear without a plain weight: .*quantising"):
        scored(model)


@pytest.mark.parametrize("how", ["whole", "wrapped", "blocks"])
def test_a_compiled_model_is_run_as_it_is(how):
    """Compiled code skips hooks."""
    model, expected = tiny_model("gpt2"), expected_scores(tiny_model("gpt2"))
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    if how == "whole":
        model.compile(backend=backend)
    elif how == "blocks":
        for block in model.transformer.h:
            block.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
    np.testing.assert_allclose(scored(model).scores, expected, rtol=0, atol=1e-9)
    assert not compiled
    alone(model, TOKENIZER, PROMPTS[0])
    assert compiled, "it is compiled again afterwards"


# --- tokenizers


def test_a_tokenizer_that_ends_every_text():
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "w0"})
    end = [("w0", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="$A w0", special_tokens=end)
    with pytest.raises(ValueError, match=r"EOS token behind every text, .*'w0'.*add_eos_token=False"):
        scored(tiny_model("gpt2"), tokenizer=tokenizer)


def test_truncation_and_padding_of_the_backend_are_left_as_found():
    tokenizer, model = word_tokenizer(), tiny_model("gpt2")
    tokenizer._tokenizer.enable_truncation(3, stride=1)
    tokenizer._tokenizer.enable_padding(length=10, pad_id=7)
    before = tokenizer._tokenizer.truncation, tokenizer._tokenizer.padding
    scores = scored(model, tokenizer=tokenizer).scores
    option_positions(tokenizer, PROMPTS, COUNTS)
    assert (tokenizer._tokenizer.truncation, tokenizer._tokenizer.padding) == before
    assert before[0]["max_length"] == 3
    np.testing.assert_array_equal(scores, scored(model).scores)


def test_a_blank_at_the_end_and_letters_without_one():
    assert np.isfinite(scored(tiny_model("gpt2"), [f"{PROMPTS[0]} "], 2, letter_prefix="").scores).all()
