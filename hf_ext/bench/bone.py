"""Bone beside the frozen layer, LoRA and MiSS of PEFT: a training step of one layer, decoding, and what is kept.

MiSS's bat form is the algorithm that PEFT's Bone had. LoRA has as many parameters: rank r / 2 on a square layer.
On the CPU with one thread, by CPU time; on CUDA where there is a device (bone_cuda.py).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext import compat
from hf_ext.bench import bone_cuda
from hf_ext.bench.harness import Row, compare, often, peak_memory, step

WIDTH = 2048
# dtype of the base, r, tokens of a training step
CASES = {"bfloat16": (torch.bfloat16, 16, 2048), "float32": (torch.float32, 64, 512)}
FROZEN, LORA, MISS, OLD = "frozen layer", "LoRA", "MiSS, tile", "old-style bat"
FORMS = {"tile": True, "bat": "bat", "bat_row": "bat_row"}
# Times the frozen layer that a training step, and one token of decoding, may take; None where nothing was set.
STEP_TARGETS = {"tile": 1.2, "bat": 2.0, "bat_row": 2.0}
# Times LoRA's: faster in bfloat16; in float32 no slower, but for what such a measurement is off by.
LORA_TARGETS = {("bfloat16", "tile", LORA): 1.0, ("float32", "tile", LORA): 1.05}
SINGLE = 20  # calls that are timed together
TOKEN_TARGETS = {"tile": 1.5, "bat": 3.0, "bat_row": None}
PEERS = {"tile": (FROZEN, LORA, MISS), "bat": (FROZEN, LORA, OLD), "bat_row": (FROZEN, LORA)}


def rows(quick: bool = False) -> Iterator[Row]:
    """`quick`: an eighth of width and tokens and fewer repeats, to see that it runs; its numbers mean little."""
    if compat.has_native_bone():
        yield Row("Bone", "", skipped="this peft has Bone itself, and ours is not used")
        return
    shrink, repeats = (8, 2) if quick else (1, 7)
    torch.set_num_threads(1)
    for name, (dtype, r, tokens) in CASES.items():
        yield from _grid(name, WIDTH // shrink, dtype, r, tokens // shrink, repeats)
        yield from _kept(name, WIDTH // shrink, dtype, r, tokens // shrink)
    yield from _memory(shrink, 1 if quick else None)
    yield from bone_cuda.rows(quick)


def layer(method: str, width: int, dtype: torch.dtype, r: int) -> nn.Module:
    """A square layer without bias under `method`, a form of ours or one of the peers, its adapter not at zero."""
    from peft import LoraConfig, MissConfig, get_peft_model

    from hf_ext import BoneConfig

    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(width, width, bias=False, dtype=dtype).requires_grad_(False))
    configs = {
        LORA: partial(LoraConfig, r=r // 2, lora_alpha=r // 2),
        MISS: partial(MissConfig, r=r),
        OLD: partial(MissConfig, r=r, init_weights="bat"),
        **{form: partial(BoneConfig, r=r, init_weights=init_weights) for form, init_weights in FORMS.items()},
    }
    if method == FROZEN:
        return base[0]
    adapted = get_peft_model(base, configs[method](target_modules=["0"]))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return adapted.base_model.model[0]


@torch.no_grad()
def decode(module: nn.Module, x: Tensor) -> None:
    module(x)


def _grid(name: str, width: int, dtype: torch.dtype, r: int, tokens: int, repeats: int) -> Iterator[Row]:
    """Every form against its peers: a training step, and one token."""
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    gradient, token = torch.randn(tokens, width, dtype=dtype), torch.randn(1, width, dtype=dtype)
    peers = {peer: layer(peer, width, dtype, r) for peer in (FROZEN, LORA, MISS, OLD)}
    what = f"{name} base of width {width}, r {r}"
    for form in FORMS:
        ours = layer(form, width, dtype, r)
        for peer in PEERS[form]:
            yield compare(
                f"{form}, {what}, {tokens} tokens, forward + backward",
                partial(step, ours, x, gradient),
                partial(step, peers[peer], x, gradient),
                peer_name=peer,
                repeats=repeats,
                at_most=STEP_TARGETS[form] if peer == FROZEN else LORA_TARGETS.get((name, form, peer)),
                tags={"case": name, "form": form, "kind": "step"},
            )
            yield compare(
                f"{form}, {what}, {SINGLE} single tokens, forward",
                often(partial(decode, ours, token), SINGLE),
                often(partial(decode, peers[peer], token), SINGLE),
                peer_name=peer,
                repeats=repeats,
                at_most=TOKEN_TARGETS[form] if peer == FROZEN else None,
                tags={"case": name, "form": form, "kind": "token"},
            )


# --- what a layer keeps for backward: an exact number


def kept_bytes(method: str, width: int, dtype: torch.dtype, r: int, tokens: int) -> int:
    """Bytes that the graph of a training step keeps beyond x and the layer's own parameters."""
    module = layer(method, width, dtype, r)
    x = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *module.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(kept.values())


def _kept(name: str, width: int, dtype: torch.dtype, r: int, tokens: int) -> Iterator[Row]:
    what = f"{name} base of width {width}, r {r}, {tokens} tokens"
    for form in FORMS:
        allowed = tokens * r * 4 if form == "tile" else 0
        ours = kept_bytes(form, width, dtype, r, tokens)
        for peer in PEERS[form]:
            theirs = kept_bytes(peer, width, dtype, r, tokens)
            yield Row(
                f"{form}, {what}: kept for backward beyond x and parameters",
                peer,
                ours=ours / 2**10,
                peer=theirs / 2**10,
                ratio=theirs / ours if ours else None,
                unit="KiB",
                target=f"<= {allowed / 2**10:.0f} KiB",
                met=ours <= allowed,
            )


# --- memory: a fresh process a measurement, since a peak cannot be taken back


_MEMORY = """
import sys
from hf_ext.bench import bone
print(bone.memory_of(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


def memory_of(method: str, case: str, shrink: int) -> float:
    """MiB that three training steps of one layer, its weight included, add to this process."""
    torch.set_num_threads(1)
    dtype, r, tokens = CASES[case]
    small = torch.randn(4, 16, dtype=dtype, requires_grad=True)
    step(layer(method, 16, dtype, 4), small, torch.ones_like(small))  # what is loaded on first use is not the method's
    before = peak_memory()
    module = layer(method, WIDTH // shrink, dtype, r)
    x = torch.randn(tokens // shrink, WIDTH // shrink, dtype=dtype, requires_grad=True)
    for _ in range(3):
        step(module, x, torch.ones_like(x))
    return peak_memory() - before


def _memory(shrink: int, most: int | None) -> Iterator[Row]:
    """most: of the cases, forms and peers; every process takes seconds to start."""
    if not Path("/proc/self/status").exists():
        yield Row("peak memory of a training step", "", skipped="needs Linux's /proc")
        return

    def fresh(method: str, case: str) -> float:
        command = [sys.executable, "-c", _MEMORY, method, case, str(shrink)]
        # Every tensor of some size in pages of its own: what is freed leaves the process at once.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        return float(done.stdout)

    for case in list(CASES)[:most]:
        peers = {peer: fresh(peer, case) for peer in (FROZEN, LORA, OLD)[:most]}
        for form in list(FORMS)[:most]:
            ours = fresh(form, case)
            for peer, theirs in peers.items():
                judged = (case, form, peer) == ("bfloat16", "bat", FROZEN)
                yield Row(
                    f"{form}, {case} base of width {WIDTH // shrink}: peak memory of a training step",
                    peer,
                    ours=ours,
                    peer=theirs,
                    ratio=theirs / ours,
                    unit="MiB",
                    target="ours <= 1.60 x" if judged else None,
                    met=ours <= 1.6 * theirs if judged else None,
                )


# --- the picture


def draw(rows: list[Row], axes: list[Any]) -> None:
    """Times the frozen layer: a training step, and one token; ours coloured, peers grey."""
    for axis, kind, title in zip(axes, ("step", "token"), ("a training step", "one token"), strict=True):
        names, heights, colours = [], [], []
        for case in CASES:
            chosen = [row for row in rows if row.tags.get("case") == case and row.tags["kind"] == kind]
            frozen = {row.tags["form"]: row for row in chosen if row.peer_name == FROZEN}
            bars = {form: (1 / row.ratio, "tab:blue") for form, row in frozen.items()}
            # A peer was paired with one of our forms, which was paired with the frozen layer.
            for row in chosen:
                if row.peer_name != FROZEN and row.peer_name not in bars:
                    bars[row.peer_name] = (row.ratio / frozen[row.tags["form"]].ratio, "0.7")
            for name, (height, colour) in bars.items():
                names.append(f"{name}\n{case}")
                heights.append(height)
                colours.append(colour)
        bars = axis.bar(names, heights, color=colours)
        axis.bar_label(bars, fmt="%.1f")
        axis.set(title=f"{title} of one layer of width {WIDTH}", ylabel="times the frozen layer", yscale="log")
        axis.tick_params(axis="x", labelsize=7, rotation=60)
        axis.axhline(1, color="grey", linewidth=0.8)
