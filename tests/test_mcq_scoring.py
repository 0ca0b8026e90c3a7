"""Scores of letters: those of single unpadded forwards, whatever the batch, the precision and the tokenizer."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mcq_models import FAMILIES, LETTERS, WORDS, alone, prompts_and_counts, tiny_model, word_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from hf_ext.mcq_bias import ChoiceScores, score_choices
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
    [(3, [3] * 7), (np.int64(2), [2] * 7), (np.array(COUNTS), COUNTS), ([LETTERS[:k] for k in COUNTS], COUNTS)],
    ids=["one number", "one numpy number", "array", "lists"],
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
        ({"choices": 1}, r"1 is no number of choices: an integer from 2 to 26"),
        ({"choices": 27}, r"27 is no number"),
        ({"choices": 2.5}, r"2.5 is no number"),
        ({"choices": True}, r"True is no number"),
        ({"choices": "AB"}, r"'AB' is no number"),
        ({"choices": [2, 3]}, r"7 prompts and choices for 2"),
        ({"choices": [2] * 6 + [1]}, r"choices\[6\]: 1 is no number"),
        ({"choices": [2] * 6 + ["AB"]}, r"choices\[6\]='AB' is neither"),
        ({"choices": [["a", "b"]] * 6 + [["a"]]}, r"choices\[6\]: 1 is no number"),
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
    assert scored(gemma(torch.float64)).scores.shape == (7, 5)
