"""Tiny random models of every supported family, a tokenizer of words, and multiple-choice prompts in its words."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

FAMILIES = ("gpt2", "llama", "mistral", "qwen2", "qwen3")
LETTERS = "ABCDE"
WORDS = ["[UNK]", "<s>", "Question", "Answer", "Choices", ":", "?", ".", *LETTERS, *(f"w{i}" for i in range(20))]

ROTARY = {
    "vocab_size": len(WORDS),
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,  # not hidden_size / heads: heads are cut by head_dim
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "vocab_size": len(WORDS),
        "n_embd": 24,
        "n_layer": 2,
        "n_head": 3,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
        # On purpose: everything here has to run without it.
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
    },
    "llama": {**ROTARY, "attention_bias": True, "mlp_bias": True},
    "mistral": {**ROTARY, "sliding_window": 6},
    "qwen2": {**ROTARY, "head_dim": 6},  # cannot be set on the first releases with Qwen2
    "qwen3": {**ROTARY, "attention_bias": True, "tie_word_embeddings": True},
}


def tiny_model(family: str, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: Any) -> Any:
    """A random causal model in evaluation mode, two layers, every bias and norm weight away from its initial value."""
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.2 * noise)
    return model.to(dtype).eval()


def with_float64_norms(model: Any) -> Any:
    """The host's RMSNorm rounds to float32 inside; this gives its modules a forward that does not."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm(module)
    return model


def _rms_norm(module: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()

    return forward


def word_tokenizer(words: Sequence[str] = WORDS, bos: bool = False) -> PreTrainedTokenizerFast:
    """One token a word or mark. It has no padding token, as GPT-2's. bos: put "<s>" before every text."""
    vocabulary = {word: index for index, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "[UNK]"}
    if "<s>" in vocabulary:
        names["bos_token"] = "<s>"
    if bos:
        start = [("<s>", vocabulary["<s>"])]
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=start)
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def prompts_and_counts(rows: int = 7, seed: int = 0) -> tuple[list[str], list[int]]:
    """Prompts of different lengths in the paper's style with 2 to 5 choices, and those numbers."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> str:
        count = int(torch.randint(low, high, (), generator=generator))
        return " ".join(f"w{int(i)}" for i in torch.randint(0, 20, (count,), generator=generator))

    prompts, counts = [], []
    for row in range(rows):
        counts.append(2 + row % 4)
        choices = " ".join(f"{letter}: {words(1, 4)}" for letter in LETTERS[: counts[-1]])
        prompts.append(f"Question: {words(1, 9)}? Answer Choices: {choices} Answer:")
    return prompts, counts


def examples(rows: int = 7, seed: int = 0) -> list[dict[str, Any]]:
    """The same as examples with `prompt`, `num_choices` and `label`."""
    prompts, counts = prompts_and_counts(rows, seed)
    labels = [(row * row + row // 2) % k for row, k in enumerate(counts)]
    columns = zip(prompts, counts, labels, strict=True)
    return [{"prompt": prompt, "num_choices": k, "label": label} for prompt, k, label in columns]


def alone(model: Any, tokenizer: Any, prompt: str) -> torch.Tensor:
    """(vocabulary,): the logits behind the last token of one unpadded prompt, by a plain forward."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
    assert not math.isnan(float(logits.sum()))
    return logits
