"""The CUDA rows of `hf-ext bench anchor`: the engines beside their bare kernels, and a training step of a Llama."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hf_ext import compat
from hf_ext.anchor_attention import anchor_attention, available_engines, use_engine
from hf_ext.anchor_attention.choice import ENGINES
from hf_ext.anchor_attention.engines import engine_for
from hf_ext.anchor_attention.kernel import Kernel
from hf_ext.anchor_attention.options import Options
from hf_ext.anchor_attention.segments import SegmentTable, build_table
from hf_ext.bench import harness
from hf_ext.bench.harness import Row, compare_cuda

DOCUMENT = 2048
# A layer of Llama-3-8B.
SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "num_hidden_layers": 4,
}
CHUNK = 4096  # tokens whose logits exist at once


def rows(quick: bool = False) -> Iterator[Row]:
    if not torch.cuda.is_available():
        yield Row("attention and training steps in bfloat16 on CUDA", "", skipped="needs a CUDA device")
        return
    documents = 4 if quick else 32
    yield from attention_rows([DOCUMENT] * documents, torch.device("cuda"), torch.bfloat16)
    for length in (8192,) if quick else (32768, 65536, 131072):
        target = 1.9 if length == 65536 else None
        yield from step_rows([DOCUMENT] * (length // DOCUMENT), torch.device("cuda"), torch.bfloat16, SHAPE, target)


def attention_rows(lengths: list[int], device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """Every engine against its own kernel on the same segments, and against the fastest stock attention on the row."""
    heads, key_heads, width, total = 32, 8, 128, sum(lengths)
    q, k, v = (
        torch.randn(1, total, h, width, device=device, dtype=dtype).transpose(1, 2).requires_grad_()
        for h in (heads, key_heads, key_heads)
    )
    positions = positions_on(device, lengths)
    what = f"{len(lengths)} documents of {lengths[0]} tokens, {str(dtype).removeprefix('torch.')}"
    stock_name, stock = fastest(_stock(q, k, v), lambda attention: _step(attention, q, k, v))
    for name, (usable, reason, _) in available_engines().items():
        if name == "dense":
            continue
        if not usable:
            yield Row(f"{what}, engine {name}", "", skipped=f"CUDA: {reason}")
            continue
        with use_engine(name):
            ours = partial(_step, partial(anchor_attention, position_ids=positions), q, k, v)
            kernel, bare = bare_kernel(q, k, v, positions)
            yield compare_cuda(
                f"{what}, engine {name}, forward + backward", ours, bare, peer_name=f"bare {kernel.name}", at_least=0.95
            )
            best = 12.0 if available_engines()[name].chosen else None
            yield compare_cuda(
                f"{what}, engine {name}, forward + backward",
                ours,
                partial(_step, stock, q, k, v),
                peer_name=f"{stock_name}, whole row",
                at_least=best,
                limit=total * (total + 1) / sum(n * (n + 1) for n in lengths),
            )


def positions_on(device: torch.device, lengths: list[int]) -> Tensor:
    positions = torch.arange(sum(lengths), device=device)
    positions[torch.tensor([0, *lengths[:-1]]).cumsum(0).to(device)] = 0
    return positions[None]


def bare_kernel(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Kernel, Callable[[], None]]:
    """The kernel of the engine in use, handed a finished table of segments and packed tensors."""
    table = build_table((1, q.shape[2]), positions)
    options = Options(q.shape[-1] ** -0.5)
    kernel = engine_for(q, v, table, options)
    packed = [x.detach().transpose(1, 2).flatten(0, 1).requires_grad_() for x in (q, k, v)]
    return kernel, partial(_step, partial(_run, kernel, table, options), *packed)


def _run(kernel: Kernel, table: SegmentTable, options: Options, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return kernel.run(q, k, v, table, options)


def _stock(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[..., Tensor]]:
    """Causal attention over the whole row: torch's SDPA, and the kernels behind our engines, told of one document."""
    table = SegmentTable((1, q.shape[2]), [q.shape[2]], [q.shape[2]])
    options = Options(q.shape[-1] ** -0.5)
    found = {"SDPA": partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)}
    for name in ("varlen", "flash", "flex"):
        kernels = ENGINES[name].kernels()
        if not isinstance(kernels, str) and available_engines()[name].usable:
            found[kernels[0].name] = partial(_whole_row, kernels[0], table, options)
    return found


def _whole_row(kernel: Kernel, table: SegmentTable, options: Options, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    return kernel.run(q, k, v, table, options).unsqueeze(0).transpose(1, 2)


def fastest(candidates: dict[str, Callable], run: Callable[[Callable], None]) -> tuple[str, Callable]:
    times = {name: harness.cuda_seconds(partial(run, candidate)) for name, candidate in candidates.items()}
    best = min(times, key=times.__getitem__)
    return best, candidates[best]


def _step(attention: Callable[..., Tensor], *inputs: Tensor) -> None:
    out = attention(*inputs)
    out.backward(torch.ones_like(out))


# --- a training step


def step_rows(
    lengths: list[int], device: torch.device, dtype: torch.dtype, shape: dict[str, int], target: float | None
) -> Iterator[Row]:
    """Layers of a Llama with gradient checkpointing and a chunked loss: anchor against the host's sdpa on the row.

    Both sides run kernels of one generation: torch's own.
    """
    length = sum(lengths)
    ids = torch.randint(shape["vocab_size"], (1, length), device=device)
    steps = {
        "anchor": partial(training_step, ids=ids, positions=positions_on(device, lengths)),
        "sdpa": partial(training_step, ids=ids, positions=torch.arange(length, device=device)[None]),
    }
    ours, peer = (partial(step, llama(name, shape, length, device, dtype)) for name, step in steps.items())
    what = f"training step, {shape['num_hidden_layers']} layers of Llama-3-8B, {length} tokens"
    what = f"{what} in documents of {lengths[0]}"
    with use_engine("varlen" if available_engines()["varlen"].usable else "auto"):
        yield compare_cuda(what, ours, peer, peer_name="sdpa on the whole row", repeats=3, at_least=target)
        a, b = peak_mib(ours), peak_mib(peer)
        yield Row(f"{what}: peak memory", "sdpa on the whole row", a, b, b / a, unit="MiB")


def peak_mib(function: Callable[[], None]) -> float:
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 2**20


def llama(name: str, shape: dict[str, int], length: int, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, max_position_embeddings=length, use_cache=False)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, attn_implementation=name, dtype=dtype)
    compat.enable_checkpointing(model)
    return model.train()


def training_step(model: Any, ids: Tensor, positions: Tensor) -> None:
    hidden = model.model(input_ids=ids, position_ids=positions).last_hidden_state[0, :-1]
    chunks = zip(hidden.split(CHUNK), ids[0, 1:].split(CHUNK), strict=True)
    loss = sum(checkpoint(_loss, model.lm_head, h, labels, use_reentrant=False) for h, labels in chunks)
    (loss / hidden.shape[0]).backward()
    model.zero_grad(set_to_none=True)


def _loss(head: torch.nn.Module, hidden: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), labels, reduction="sum")
