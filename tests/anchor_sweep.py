"""Every causal language model of transformers, tiny, on packed rows under "anchor", against each document by itself.

`python tests/anchor_sweep.py` prints the tables of hf_ext/anchor_attention/models.py and rewrites
notebooks/results/anchor_models.md.
"""

import copy
import inspect
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
import transformers
from anchor_oracle import documents_of, positions_of, segments_of
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_ext import compat
from hf_ext.anchor_attention import models
from hf_ext.anchor_attention.support import AnchorUnsupportedError

TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
RESULTS = Path(__file__).parents[1] / "notebooks" / "results" / "anchor_models.md"

EXACT, REFUSED = "exact", "refused"
UNCLEAR, WRONG, NOT_BUILT = "unclear error", "silently wrong", "could not be built"

# ---------------------------------------------------------------- tiny configs

VOCABULARY, HEADS = 61, 4

# What a config calls its numbers, by the value that replaces them.
_NAMES = {
    0: "pad_token_id num_nextn_predict_layers num_kv_shared_layers",
    1: "bos_token_id encoder_layers depth n_group topk_group num_expert_group n_shared_experts num_shared_experts "
    "moe_num_shared_experts first_k_dense_replace max_window_layers num_dense_layers num_codebooks",
    2: "eos_token_id num_hidden_layers n_layer n_layers num_layers decoder_layers num_blocks type_vocab_size "
    "num_key_value_heads kv_n_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k "
    "linear_num_key_heads linear_num_value_heads mamba_expand zero_expert_num index_n_heads",
    3: "attn_logit_softcapping sliding_window sliding_window_size window_size",
    HEADS: "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
    "encoder_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim "
    "rotary_dim mamba_n_heads mamba_dt_rank time_step_rank laurel_rank index_topk patch_size",
    6: "qk_nope_head_dim v_head_dim",
    8: "head_dim query_pre_attn_scalar linear_key_head_dim linear_value_head_dim kv_channels "
    "mamba_d_state mamba_chunk_size state_size hidden_size_per_layer_input attention_chunk_size index_head_dim "
    "image_size",
    10: "qk_head_dim",
    12: "q_lora_rank kv_lora_rank",
    16: "mamba_d_head",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size",
    32: "hidden_size n_embd d_model emb_dim embedding_size attention_hidden_size",
    40: "intermediate_size intermediate_size_mlp ffn_dim n_inner dff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
    64: "max_position_embeddings n_positions n_ctx max_seq_len model_max_length",
}
SMALL = {name: value for value, names in _NAMES.items() for name in names.split()}
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
# Given also where the default is None.
ALWAYS = {
    "sliding_window",
    "head_dim",
    "num_key_value_heads",
    "n_routed_experts",
    "n_shared_experts",
    "moe_intermediate_size",
    "num_experts_per_tok",
}

_ROPE = {"rope_type": "default", "rope_theta": 1e4}
# What the shrinker cannot know.
BY_HAND: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {**_ROPE, "mrope_section": [2, 1, 1]} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {  # its last two layers take the keys of the first two
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral3": {  # its queries grow with the position, from the original length on
        "rope_parameters": {**_ROPE, "llama_4_scaling_beta": 0.5, "original_max_position_embeddings": 4}
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
}
# Whose default config does not exist, or cannot be shrunk name by name.
WHOLE: dict[str, dict[str, Any]] = {
    "dots3_note": {},
    "dots3_note_text": {},
    "gemma4_assistant": {
        "text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_unified_assistant": {},
}


def tiny_config(model_type: str) -> Any:
    """Two layers, or as many as there are kinds of them; windows shorter than a document."""
    if model_type in WHOLE:
        return AutoConfig.for_model(model_type, **WHOLE[model_type])
    default = AutoConfig.for_model(model_type)
    small = {"pad_token_id": 0, **shrink(default)}  # read by some hosts whose config lacks it
    if hasattr(default, "is_decoder"):
        small["is_decoder"] = True
    return AutoConfig.for_model(model_type, **small | BY_HAND.get(model_type, {}))


def shrink(config: Any) -> dict[str, Any]:
    """The arguments that make a small config of this one's class, the configs inside it included."""
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    kinds = {name: list(dict.fromkeys(values[name])) for name in KINDS if values.get(name)}
    if kinds.get("layer_types") == ["full_attention"] and "sliding_window" in values:
        kinds["layer_types"] = ["sliding_attention", "full_attention"]
    layers = max([2, *map(len, kinds.values())])
    small: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, transformers.PretrainedConfig):
            small[name] = shrink(value)
        elif name in kinds:
            small[name] = (kinds[name] * layers)[:layers]
        elif name == "use_sliding_window":
            small[name] = True
        elif name in SMALL and (name in ALWAYS or type(value) in (int, float)):
            small[name] = layers if name == "num_hidden_layers" else type(value or 0)(SMALL[name])
    if "qk_rope_head_dim" in values:  # latent attention: one key head for each query head, and head_dim is the rope's
        small |= {name: HEADS for name in ("head_dim", "num_key_value_heads") if name in values}
    return small


def build(config: Any, implementation: str) -> Any:
    """Weights large enough that a leak cannot hide; the same ones for every implementation."""
    torch.manual_seed(0)
    # from_config writes the implementation into the config it is given.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation).float()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = 0.25 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
    return model.eval()


# ---------------------------------------------------------------- packed, and one by one

ANCHOR = 1
POSITIONS = positions_of([[9, 4, 7], [5, 8, 7]])
_generator = torch.Generator().manual_seed(3)
INPUT_IDS = torch.randint(3, VOCABULARY, POSITIONS.shape, generator=_generator).masked_fill(POSITIONS == 0, ANCHOR)
WEIGHTS = torch.randn(*POSITIONS.shape, VOCABULARY, generator=_generator)  # of the logits, in the loss

Results = dict[str, Tensor]  # logits, and the gradient of every parameter


def as_the_trainer(model: Any, **batch: Tensor) -> Tensor:
    """Logits; what `forward` does not name never reaches it."""
    named = inspect.signature(model.forward).parameters
    return model(**{name: tensor for name, tensor in batch.items() if name in named}).logits


def packed(model: Any) -> Results:
    logits = as_the_trainer(model, input_ids=INPUT_IDS, position_ids=POSITIONS)
    return _results(model, logits)


def one_by_one(model: Any) -> Results:
    """Each document by itself, at its positions [0, s + 1, ...]."""
    rows = []
    for ids, positions in zip(INPUT_IDS.split(1), POSITIONS.split(1), strict=True):
        spans = [slice(*span) for span in segments_of(positions[0].tolist())]
        rows.append(torch.cat([_alone(model, ids[:, span], positions[:, span]) for span in spans], dim=1))
    return _results(model, torch.cat(rows))


def _alone(model: Any, input_ids: Tensor, position_ids: Tensor) -> Tensor:
    # Without a mask the host would look for packed documents and cut the anchor off.
    mask = torch.ones_like(input_ids)
    return as_the_trainer(model, input_ids=input_ids, position_ids=position_ids, attention_mask=mask)


def _results(model: Any, logits: Tensor) -> Results:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = (logits * WEIGHTS).sum()
    gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return {"logits": logits.detach(), **dict(zip(named, gradients, strict=True))}


def difference(got: Results, expected: Results) -> str | None:
    """What differs most, if more than rounding in float32 explains."""
    largest = max(gradient.abs().max() for name, gradient in expected.items() if name != "logits")
    errors = {
        # Some gradients are 0 exactly (of a bias of the keys, say), and hold nothing but rounding errors.
        name: ((got[name] - tensor).abs().max() / tensor.abs().max().clamp(min=1e-3 * largest)).item()
        for name, tensor in expected.items()
    }
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    return None if errors[worst] < 1e-3 and errors["logits"] < 1e-4 else f"{worst} differs by {errors[worst]:.1e}"


def shared_layout_leaks(model: Any) -> str | None:
    """What is wrong with a row of one anchor and three documents; a forward that takes no such argument says so."""
    ids, documents = INPUT_IDS[:1], documents_of([[8, 4, 7]])
    changed = ids.clone()
    changed[0, 2] = (ids[0, 2] - 2) % (VOCABULARY - 3) + 3
    batch = {"position_ids": torch.arange(ids.shape[1])[None], "anchor_doc_ids": documents}
    try:
        with torch.no_grad():
            before, after = (model(input_ids=x, **batch).logits[0] for x in (ids, changed))
    except TypeError as error:
        return None if "anchor_doc_ids" in str(error) else _text(error)
    moved = (before - after).abs().amax(-1) / before.abs().max()
    if moved[documents[0] > 1].max() > 1e-4:
        return "documents of the shared layout leak"
    return None if moved[3:9].max() > 1e-4 else "a document of the shared layout does not see its own tokens"


def numbers_from_padding(model: Any) -> bool:
    """Whether positions that are not given begin elsewhere than at 0, as RoBERTa's do."""
    ids, positions = INPUT_IDS[:1, :9], torch.arange(9)[None]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        given = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        return not torch.allclose(model(input_ids=ids, attention_mask=mask).logits, given, atol=1e-3)


# ---------------------------------------------------------------- the verdict


@dataclass
class Verdict:
    """outcome: one of the five; detail: a refusal's reason, an error, a difference, or what an exact model exercised.

    model_type: of the model that was built, which may be a part of the one asked for; shifted: see SHIFTED_TYPES;
    flagged: whether the host's flag says that the model can exchange its attention.
    """

    outcome: str
    detail: str
    model_type: str = ""
    shifted: bool = False
    flagged: bool = True


@cache
def judge(model_type: str) -> Verdict:
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        return _judge(model_type)


def _judge(model_type: str) -> Verdict:
    try:
        config = tiny_config(model_type)
    except Exception as error:
        return Verdict(NOT_BUILT, _text(error))
    failed: Exception | None = None
    try:
        model = build(config, "anchor")
    except AnchorUnsupportedError as error:
        return Verdict(REFUSED, reason_of(error))
    except Exception as error:
        failed = error
    try:
        stock = build(config, "eager")
        expected = one_by_one(stock)
    except Exception as error:
        return Verdict(NOT_BUILT, _text(error))
    if failed:
        return Verdict(UNCLEAR, _text(failed))
    calls: list[set[str]] = []
    try:
        with listening(calls):
            got = packed(model)
    except AnchorUnsupportedError as error:
        return Verdict(REFUSED, reason_of(error))
    except Exception as error:
        return Verdict(UNCLEAR, _text(error))
    differs = difference(got, expected)
    if differs or (differs := shared_layout_leaks(model)):
        return Verdict(WRONG, differs)
    shifted, flagged = numbers_from_padding(stock), model._supports_attention_backend
    return Verdict(EXACT, exercised(model, calls), model.config.model_type, shifted, flagged)


@contextmanager
def _quiet() -> Iterator[None]:
    """Random weights and unusual sizes make the host talk a lot."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def reason_of(error: AnchorUnsupportedError) -> str:
    return str(error).partition("): ")[2].rpartition(". Use ")[0]


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@contextmanager
def listening(calls: list[set[str]]) -> Iterator[None]:
    """Notes what each layer asks of the attention function."""
    table, _ = compat.attention_tables()
    ours = table["anchor"]

    def listen(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any) -> Any:
        asked = {
            "windows": arguments.get("sliding_window") or getattr(attention_mask, "window", None),
            "softcap": arguments.get("softcap"),
            "sinks": arguments.get("s_aux") is not None,
            "grouped heads": query.shape[1] > key.shape[1],
            "values of another width": query.shape[3] != value.shape[3],
        }
        calls.append({name for name, present in asked.items() if present})
        return ours(module, query, key, value, attention_mask, **arguments)

    table["anchor"] = listen
    try:
        yield
    finally:
        table["anchor"] = ours


def exercised(model: Any, calls: list[set[str]]) -> str:
    """What was there to go wrong."""
    features = set().union(*calls)
    if any("kv_lora_rank" in vars(module.config) for module in model.modules() if hasattr(module, "config")):
        features.add("latent attention (MLA)")
    if any("experts" in name.split(".") for name, _ in model.named_modules()):
        features.add("experts (MoE)")
    return ", ".join(sorted(features)) or "plain heads"


# ---------------------------------------------------------------- the tables

_CONSTANTS = {value: name for name, value in vars(models).items() if name.isupper() and isinstance(value, str)}


def python_tables(verdicts: Mapping[str, Verdict]) -> str:
    """The tables of models.py, to be pasted and formatted."""
    exact = {name: verdict for name, verdict in verdicts.items() if verdict.outcome == EXACT}
    both = sorted({*exact, *(verdict.model_type for verdict in exact.values())})
    shifted = sorted(name for name, verdict in exact.items() if verdict.shifted)
    unflagged = sorted(name for name, verdict in exact.items() if not verdict.flagged)
    refused = {name: verdict.detail for name, verdict in sorted(verdicts.items()) if verdict.outcome == REFUSED}
    sets = {"EXACT_TYPES": both, "UNFLAGGED_TYPES": unflagged, "SHIFTED_TYPES": shifted}
    lines = [f"{name} = frozenset({{{str(types)[1:-1]}}})" for name, types in sets.items()]
    lines += [f"    {name!r}: {_CONSTANTS.get(reason, repr(reason))}," for name, reason in refused.items()]
    lines.insert(len(sets), "REFUSED_TYPES = {")
    return "\n".join([*lines, "}"])


def page(verdicts: Mapping[str, Verdict]) -> str:
    """notebooks/results/anchor_models.md."""
    count = Counter(verdict.outcome for verdict in verdicts.values())
    return f"""# Models under attn_implementation="anchor"

The {len(verdicts)} types that `AutoModelForCausalLM` knows: {count[EXACT]} exact, {count[REFUSED]} refused.
Written by `python tests/anchor_sweep.py`; transformers {transformers.__version__}, torch {torch.__version__}.

Each is built tiny, with random weights, and run on two packed rows of three documents. *Exact*: the logits and the
gradients of all parameters equal those of each document by itself in the host's eager attention (float32). *Refused*:
`AnchorUnsupportedError` with this reason when the model is loaded. A model of any other type loads with a warning to
run `hf_ext.anchor_attention.check_model(model)` first. An exact type is refused all the same where its config asks for
something else: layers other than full and sliding attention, or an encoder (`is_decoder=False`).

## Exact

| model_type | exercised |
|---|---|
{_rows(verdicts, EXACT)}

{STAR} numbers positions from `padding_idx + 1` where none are given: packed rows, numbered from 0, shift the pretrained
position embeddings, under every attention implementation alike.

## Refused

| model_type | reason |
|---|---|
{_rows(verdicts, REFUSED)}
"""


STAR = r" \*"


def _rows(verdicts: Mapping[str, Verdict], outcome: str) -> str:
    return "\n".join(
        f"| {name}{STAR if verdict.shifted else ''} | {verdict.detail} |"
        for name, verdict in sorted(verdicts.items())
        if verdict.outcome == outcome
    )


def main() -> None:
    torch.set_num_threads(1)
    verdicts = {model_type: judge(model_type) for model_type in sys.argv[1:] or TYPES}
    print(python_tables(verdicts))
    for name, verdict in verdicts.items():
        if verdict.outcome not in (EXACT, REFUSED) or sys.argv[1:]:
            print(f"{name}: {verdict.outcome}: {verdict.detail}", file=sys.stderr)
    print(Counter(verdict.outcome for verdict in verdicts.values()), file=sys.stderr)
    if not sys.argv[1:]:
        RESULTS.write_text(page(verdicts), encoding="utf-8")


if __name__ == "__main__":
    main()
