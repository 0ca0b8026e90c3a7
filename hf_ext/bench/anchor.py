"""AnchorAttention against the host's own attention: full causal, a written-out document mask, and cut documents.

On the CPU with one thread, by CPU time; on CUDA where there is a device (anchor_cuda.py). The FLOP limit beside a ratio
is 1 / phi: the pairs of a causal row over those inside its documents. What no arrangement of SDPA calls can beat is
SDPA on documents that were cut beforehand.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_ext.anchor_attention import anchor_attention
from hf_ext.bench import anchor_cuda
from hf_ext.bench.harness import Row, compare, peak_memory

HEADS, WIDTH, LENGTH = 4, 64, 8192
CAUSAL, MASK, CUT = "causal SDPA", "SDPA, document mask", "SDPA per document"
# Speed-up over causal SDPA that a row of LENGTH has to reach, forward and backward.
TARGETS = {"one document": 1 / 1.05, "ten documents": 5.5, "sixteen mixed documents": 4.5}


def rows(quick: bool = False) -> Iterator[Row]:
    """`quick`: an eighth of the length and fewer repeats, to see that it runs; its numbers mean little."""
    longest, repeats = (LENGTH // 8, 2) if quick else (LENGTH, 5)
    torch.set_num_threads(1)
    for length in (longest // 4, longest // 2, longest):
        for mix, lengths in mixes(length).items():
            yield from _grid(mix, lengths, repeats, TARGETS[mix] if length == longest else None)
    for mix, lengths in list(mixes(longest).items())[1:]:
        yield _against_cut(mix, lengths, repeats)
    yield from _tiny_documents(longest, repeats)
    yield from _memory([longest] if quick else [16384, 32768, 65536])
    yield from anchor_cuda.rows(quick)


def mixes(length: int) -> dict[str, list[int]]:
    """Names and document lengths; the mixed ones lie between about 1/117 and 1/4 of the row, evenly on a log scale."""
    shares = torch.logspace(0, torch.log10(torch.tensor(2048 / 70)).item(), 16)
    shares = shares[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    mixed = (shares / shares.sum() * length).long().tolist()
    return {
        "one document": [length],
        "ten documents": [length // 10 + (i < length % 10) for i in range(10)],
        "sixteen mixed documents": [*mixed[:-1], length - sum(mixed[:-1])],
    }


def flop_limit(lengths: list[int]) -> float:
    """1 / phi of the specification: query-key pairs of one causal row over those of its documents."""
    return sum(lengths) * (sum(lengths) + 1) / sum(n * (n + 1) for n in lengths)


def positions_of(lengths: list[int]) -> Tensor:
    positions = torch.arange(sum(lengths))
    positions[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = 0
    return positions[None]


def document_mask(lengths: list[int]) -> Tensor:
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return (document[:, None] == document[None, :]).tril()


def forward(attention: Callable[..., Tensor], *inputs: Tensor) -> None:
    with torch.no_grad():
        attention(*inputs)


def step(attention: Callable[..., Tensor], *inputs: Tensor) -> None:
    out = attention(*inputs)
    out.backward(torch.ones_like(out))


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _inputs(length: int) -> list[Tensor]:
    """query, key, value (1, heads, length, width), strided as a projection leaves them."""
    return [torch.randn(1, length, HEADS, WIDTH).transpose(1, 2).requires_grad_() for _ in range(3)]


def _anchor(lengths: list[int]) -> Callable[..., Tensor]:
    return partial(anchor_attention, position_ids=positions_of(lengths))


def _grid(mix: str, lengths: list[int], repeats: int, target: float | None) -> Iterator[Row]:
    """Forward alone, and forward with backward, each against the two ways that the host has."""
    length = sum(lengths)
    peers = {CAUSAL: causal}
    if len(lengths) > 1:
        peers[MASK] = partial(F.scaled_dot_product_attention, attn_mask=document_mask(lengths))
    for run, direction in ((forward, "forward"), (step, "forward + backward")):
        for peer_name, peer in peers.items():
            judged = target if (direction, peer_name) == ("forward + backward", CAUSAL) else None
            yield compare(
                f"{mix}, {length} tokens, {direction}",
                partial(run, _anchor(lengths), *_inputs(length)),
                partial(run, peer, *_inputs(length)),
                peer_name=peer_name,
                repeats=repeats,
                at_least=judged,
                limit=flop_limit(lengths) if peer_name == CAUSAL else None,
                tags={"mix": mix, "length": length, "direction": direction},
            )


def _against_cut(mix: str, lengths: list[int], repeats: int) -> Row:
    documents = [_inputs(length) for length in lengths]

    def peer() -> None:
        for document in documents:
            step(causal, *document)

    ours = partial(step, _anchor(lengths), *_inputs(sum(lengths)))
    what = f"{mix}, {sum(lengths)} tokens, forward + backward"
    return compare(what, ours, peer, peer_name=CUT, repeats=repeats, at_least=0.85)


def _tiny_documents(longest: int, repeats: int) -> Iterator[Row]:
    """Against a loop over the documents of the row: cut, attend, join."""
    generator = torch.Generator().manual_seed(0)
    tiny = torch.randint(4, 19, (3000 * longest // LENGTH,), generator=generator).tolist()
    zeros = [1] * (6000 * longest // LENGTH)
    for what, lengths, target in (
        (f"{len(tiny)} documents of 4 to 18 tokens", tiny, 1 / 0.6),
        (f"a tail of {len(zeros)} single tokens", zeros, 5.0),
    ):

        def loop(*qkv: Tensor, lengths: list[int] = lengths) -> Tensor:
            documents = zip(*(x.split(lengths, dim=2) for x in qkv), strict=True)
            return torch.cat([causal(*document) for document in documents], dim=2)

        yield compare(
            f"{what}, forward + backward",
            partial(step, _anchor(lengths), *_inputs(sum(lengths))),
            partial(step, loop, *_inputs(sum(lengths))),
            peer_name="loop over documents",
            repeats=repeats,
            at_least=target,
        )


# --- memory: a fresh process a measurement, since a peak cannot be taken back


_MEMORY = """
import sys, torch
from hf_ext.bench import anchor
torch.set_num_threads(1)
print(anchor.memory_of(sys.argv[1], int(sys.argv[2])))
"""


def memory_of(method: str, length: int) -> float:
    """MiB that a training step of one layer adds to this process, with documents of 820 tokens."""
    lengths = [820] * (length // 820) + [length % 820]
    before = peak_memory()
    attention = {
        "anchor": lambda: _anchor(lengths),
        CAUSAL: lambda: causal,
        MASK: lambda: partial(F.scaled_dot_product_attention, attn_mask=document_mask(lengths)),
    }[method]()
    step(attention, *_inputs(length))
    return peak_memory() - before


def _memory(lengths: list[int]) -> Iterator[Row]:
    if not Path("/proc/self/status").exists():
        yield Row("peak memory of a training step", "", skipped="needs Linux's /proc")
        return

    def fresh(method: str, length: int) -> float:
        command = [sys.executable, "-c", _MEMORY, method, str(length)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    ours = {length: fresh("anchor", length) for length in lengths}
    for length, used in ours.items():
        growth = used / length / (ours[lengths[0]] / lengths[0])
        yield Row(
            f"peak memory of a training step, {length} tokens, {HEADS} heads",
            f"{growth:.2f} x the memory a token at {lengths[0]} tokens",
            ours=used,
            unit="MiB",
            target="< 900 MiB, linear",
            met=used < 900 and growth < 1.2,
        )
    for method in (CAUSAL, MASK):
        used, peer = ours[lengths[0]], fresh(method, lengths[0])
        what = f"peak memory of a training step, {lengths[0]} tokens, {HEADS} heads"
        yield Row(what, method, ours=used, peer=peer, ratio=peer / used, unit="MiB")


# --- the picture


def draw(rows: list[Row], axes: list[Any]) -> None:
    """Speed-up over causal SDPA against the length of the row, with the FLOP limit; and over the written-out mask."""
    for axis, peer, title in zip(axes, (CAUSAL, MASK), ("over causal attention", "over a document mask"), strict=True):
        for mix in TARGETS:
            chosen = [row for row in rows if row.tags.get("mix") == mix and row.peer_name == peer]
            chosen = [row for row in chosen if row.tags["direction"] == "forward + backward"]
            if not chosen:
                continue
            lengths = [row.tags["length"] for row in chosen]
            [line] = axis.plot(lengths, [row.ratio for row in chosen], marker="o", label=mix)
            if peer == CAUSAL:
                axis.plot(lengths, [row.limit for row in chosen], ":", color=line.get_color())
        axis.set(title=f"anchor, forward + backward, {title}", xlabel="tokens a row", ylabel="times faster")
        axis.axhline(1, color="grey", linewidth=0.8)
        limit = "dotted: FLOP limit" if peer == CAUSAL else None
        axis.legend(title=limit, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
