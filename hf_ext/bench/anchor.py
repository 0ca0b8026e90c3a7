"""AnchorAttention against the host's own attention, forward and backward, one thread, CPU time.

Three limits: plain causal SDPA over the whole row (what stock training pays), SDPA over documents that were cut
beforehand (what no arrangement of SDPA calls can beat), and SDPA with a written-out document mask (what the host does
with packed rows today).
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ext.anchor_attention import anchor_attention
from hf_ext.bench.harness import Row, compare, compare_cuda

HEADS, WIDTH, LENGTH = 4, 64, 8192


def rows(quick: bool = False) -> Iterator[Row]:
    """`quick`: an eighth of the length and fewer repeats, to see that it runs; its numbers mean little."""
    length, repeats = (LENGTH // 8, 2) if quick else (LENGTH, 5)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    ten = _even(length, 10)
    mixed = _mixed(length, 16, generator)
    for what, lengths, target in (
        ("ten equal documents", ten, 5.5),
        (f"sixteen documents of {min(mixed)} to {max(mixed)} tokens", mixed, 4.5),
    ):
        what = f"{what}, {sum(lengths)} tokens"
        yield _against_causal(what, lengths, repeats, target)
        yield _against_cut(what, lengths, repeats, 0.85)
    yield _against_causal(f"one document, {length} tokens", [length], repeats, 1 / 1.05)
    yield _against_mask(f"ten equal documents, {length // 4} tokens", _even(length // 4, 10), repeats)
    # A loop over the documents of the row: cut, attend, join.
    tiny = torch.randint(4, 19, (3000 * length // LENGTH,), generator=generator).tolist()
    yield _against_loop(f"{len(tiny)} documents of 4 to 18 tokens", tiny, repeats, 1 / 0.6)
    zeros = 6000 * length // LENGTH
    yield _against_loop(f"a tail of {zeros} single tokens", [1] * zeros, repeats, 5.0)
    yield from _memory([length // 4, length // 2, length] if quick else [16384, 32768, 65536])
    yield from _cuda()


def _even(length: int, documents: int) -> list[int]:
    return [length // documents + (i < length % documents) for i in range(documents)]


def _mixed(length: int, documents: int, generator: torch.Generator) -> list[int]:
    """Lengths between about 1/117 and 1/4 of the row (70 to 2,048 of 8,192), spread evenly on a log scale."""
    shares = torch.logspace(0, torch.log10(torch.tensor(2048 / 70)).item(), documents)
    shares = shares[torch.randperm(documents, generator=generator)]
    lengths = (shares / shares.sum() * length).long().tolist()
    return [*lengths[:-1], length - sum(lengths[:-1])]


def _inputs(length: int) -> list[Tensor]:
    """query, key, value (1, heads, length, width), strided as a projection leaves them."""
    return [torch.randn(1, length, HEADS, WIDTH).transpose(1, 2).requires_grad_() for _ in range(3)]


def _positions(lengths: list[int]) -> Tensor:
    positions = torch.arange(sum(lengths))
    positions[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = 0
    return positions[None]


def _step(attention: Callable[..., Tensor], *inputs: Tensor) -> None:
    out = attention(*inputs)
    out.backward(torch.ones_like(out))


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _ours(lengths: list[int]) -> Callable[[], None]:
    inputs, positions = _inputs(sum(lengths)), _positions(lengths)
    return lambda: _step(lambda q, k, v: anchor_attention(q, k, v, positions), *inputs)


def _against_causal(what: str, lengths: list[int], repeats: int, target: float) -> Row:
    inputs = _inputs(sum(lengths))
    peer = partial(_step, _causal, *inputs)
    return compare(what, _ours(lengths), peer, peer_name="causal SDPA", repeats=repeats, at_least=target)


def _against_cut(what: str, lengths: list[int], repeats: int, target: float) -> Row:
    documents = [_inputs(length) for length in lengths]

    def peer() -> None:
        for document in documents:
            _step(_causal, *document)

    return compare(what, _ours(lengths), peer, peer_name="SDPA per document", repeats=repeats, at_least=target)


def _against_loop(what: str, lengths: list[int], repeats: int, target: float) -> Row:
    inputs = _inputs(sum(lengths))

    def loop(*qkv: Tensor) -> Tensor:
        documents = zip(*(x.split(lengths, dim=2) for x in qkv), strict=True)
        return torch.cat([_causal(*document) for document in documents], dim=2)

    peer = partial(_step, loop, *inputs)
    return compare(what, _ours(lengths), peer, peer_name="loop over documents", repeats=repeats, at_least=target)


def _against_mask(what: str, lengths: list[int], repeats: int) -> Row:
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = (document[:, None] == document[None, :]).tril()
    inputs = _inputs(sum(lengths))

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    peer = partial(_step, masked, *inputs)
    return compare(what, _ours(lengths), peer, peer_name="SDPA, document mask", repeats=repeats)


# --- memory: a fresh process a length, since a peak cannot be taken back


_MEMORY = """
import sys, torch
from hf_ext.bench.anchor import peak_memory
from hf_ext.anchor_attention import anchor_attention
torch.set_num_threads(1)
length = int(sys.argv[1])
before = peak_memory()
q, k, v = (torch.randn(1, length, 4, 64).transpose(1, 2).requires_grad_() for _ in range(3))
positions = torch.arange(length)[None].clone()
positions[:, ::820] = 0
anchor_attention(q, k, v, positions).sum().backward()
print(peak_memory() - before)
"""


def peak_memory() -> float:
    """Highest resident size of this process so far, in MiB (Linux; getrusage would count the parent's as well)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def _memory(lengths: list[int]) -> Iterator[Row]:
    if not Path("/proc/self/status").exists():
        yield Row("peak memory of a training step", "", skipped="needs Linux's /proc")
        return
    smallest = None
    for length in lengths:
        command = [sys.executable, "-c", _MEMORY, str(length)]
        used = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        smallest = smallest or used / length
        growth = used / length / smallest
        yield Row(
            f"peak memory of a training step, {length} tokens, {HEADS} heads",
            f"{growth:.2f} x the memory a token at {lengths[0]} tokens",
            ours=used,
            unit="MiB",
            target="< 900 MiB, linear",
            met=used < 900 and growth < 1.2,
        )


# --- CUDA


def _cuda() -> Iterator[Row]:
    what = "32 documents of 2048 tokens, bfloat16, CUDA"
    if not torch.cuda.is_available():
        yield Row(what, "causal SDPA", skipped="needs a CUDA device")
        return
    lengths = [2048] * 32
    inputs = [x.detach().cuda().bfloat16().requires_grad_() for x in _inputs(sum(lengths))]
    positions = _positions(lengths).cuda()
    yield compare_cuda(
        what,
        lambda: _step(lambda q, k, v: anchor_attention(q, k, v, positions), *inputs),
        lambda: _step(_causal, *inputs),
        peer_name="causal SDPA",
    )
