"""The CUDA rows of `hf-ext bench bone`: training steps of a 3B Llama in bfloat16, beside LoRA and the old bat form."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_ext.bench.harness import Row, compare_cuda

# Llama-3.2-3B.
SHAPE = {
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "num_hidden_layers": 28,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
RANK, TOKENS = 64, 4096
LORA, OLD = "LoRA", "old-style bat"
FORMS = {"tile": True, "bat": "bat", "bat_row": "bat_row"}
# Times LoRA's that a step may take, and its memory.
STEP_TARGETS = {"tile": 0.95, "bat": 1.15, "bat_row": None}


def rows(quick: bool = False) -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield Row("training steps of a 3B Llama in bfloat16 on CUDA", "", skipped="needs a CUDA device")
        return
    shape, tokens = (SHAPE | {"num_hidden_layers": 2}, TOKENS // 8) if quick else (SHAPE, TOKENS)
    yield from step_rows(shape, torch.device("cuda"), torch.bfloat16, tokens, RANK)


def step_rows(shape: dict[str, Any], device: torch.device, dtype: torch.dtype, tokens: int, r: int) -> Iterator[Row]:
    """Forward, backward and AdamW with adapters on all linear layers."""
    ids = torch.randint(shape["vocab_size"], (1, tokens), device=device)
    steps = {method: training_step(method, shape, device, dtype, ids, r) for method in (*FORMS, LORA, OLD)}
    added = {method: added_mib(step) for method, step in steps.items()}
    size = f"{shape['num_hidden_layers']} layers of width {shape['hidden_size']}, {tokens} tokens, r {r}"
    for form in FORMS:
        for peer in (LORA, OLD) if form == "bat" else (LORA,):
            target = STEP_TARGETS[form] if peer == LORA else None
            what = f"{form}, training step, {size}"
            yield compare_cuda(what, steps[form], steps[peer], peer_name=peer, at_most=target)
            yield Row(
                f"{what}: memory that it adds",
                peer,
                ours=added[form],
                peer=added[peer],
                ratio=added[peer] / added[form],
                unit="MiB",
                target="ours <= 1.00 x" if peer == LORA else None,
                met=added[form] <= added[peer] if peer == LORA else None,
            )


def training_step(
    method: str, shape: dict[str, Any], device: torch.device, dtype: torch.dtype, ids: Tensor, r: int
) -> Callable[[], None]:
    """A step of a model of its own: forward, backward, AdamW."""
    model = adapted(method, shape, device, dtype, ids.shape[1], r)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    return partial(_step, model, optimizer, ids)


def adapted(method: str, shape: dict[str, Any], device: torch.device, dtype: torch.dtype, tokens: int, r: int) -> Any:
    from peft import LoraConfig, MissConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from hf_ext import BoneConfig

    config = LlamaConfig(**shape, max_position_embeddings=tokens, use_cache=False)
    with torch.device(device):
        base = LlamaForCausalLM._from_config(config, dtype=dtype)
    configs = {
        LORA: partial(LoraConfig, r=lora_rank(base, r)),
        OLD: partial(MissConfig, r=r, init_weights="bat"),
        **{form: partial(BoneConfig, r=r, init_weights=init_weights) for form, init_weights in FORMS.items()},
    }
    return get_peft_model(base, configs[method](target_modules="all-linear")).train()


def lora_rank(base: torch.nn.Module, r: int) -> int:
    """The rank at which LoRA has about as many parameters as the tile form with r."""
    linear = [m for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"]
    outputs, both = sum(m.out_features for m in linear), sum(m.in_features + m.out_features for m in linear)
    return max(1, round(r * outputs / both))


def added_mib(step: Callable[[], None]) -> float:
    """What a step has allocated at its peak, beyond what is there before it."""
    step()  # the optimizer's state comes with its first
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
