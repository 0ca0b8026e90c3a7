"""OFQ beside full precision and beside fake quantisation made of ordinary operations, as published code has it.

Training: one linear layer, and a model like DeiT-T. Inference: the whole of DeiT-T in float32, bfloat16, torchao's int8
and ours. Files. On the CPU with one thread, by CPU time; on CUDA where there is a device (ofq_cuda.py).
"""

import copy
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ext.bench import ofq_cuda
from hf_ext.bench.harness import Row, compare, often, step
from hf_ext.ofq_quantizer import OFQConfig, calibrate, lsq_init, quantize, save_packed, statsq, to_int8
from hf_ext.ofq_quantizer.integer import keep_freed_memory

ARCHITECTURE = "deit_tiny_patch16_224"
LINEAR, NAIVE = "nn.Linear", "fake quantisation by ordinary operations"


def rows(quick: bool = False) -> Iterator[Row]:
    """`quick`: fewer tokens, blocks and repeats, to see that it runs; its numbers mean little."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    repeats = 2 if quick else 7
    yield from linear_rows(2 if quick else 16, repeats)
    yield from model_rows(1 if quick else 3, 2 if quick else 8, repeats)
    yield from inference_rows(1 if quick else 12, 1 if quick else 4, repeats)
    yield file_row(1 if quick else 12)
    yield from statsq_rows(quick, repeats)
    yield from ofq_cuda.rows(quick)


# --- training: one layer


class NaiveLinear(nn.Linear):
    """The same quantisers by ordinary operations and straight-through tricks: autograd keeps every step of them."""

    def __init__(self, tokens: int, columns: int, outputs: int) -> None:
        super().__init__(columns, outputs)
        self.scale = nn.Parameter(torch.ones(tokens, 1))
        self.bias_in, self.bias_out = (nn.Parameter(torch.zeros(columns)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        factor = (x.numel() / self.scale.numel()) ** -0.5
        scale = (self.scale - self.scale * factor).detach() + self.scale * factor
        v = ((x + self.bias_in) / scale).clamp(-2, 1)
        x = ((v.round() - v).detach() + v) * scale + self.bias_out
        step = 2 * self.weight.abs().mean(1, keepdim=True).detach()
        t = (self.weight / step).clamp(-1, 1 - 1e-6) * 2 - 0.5
        rounded = (t.round() + 0.5) / 2 * step
        return F.linear(x, (rounded - self.weight).detach() + self.weight, self.bias)


def linear_rows(images: int, repeats: int) -> Iterator[Row]:
    """Step and kept bytes of 192 -> 768 on `images` times 197 tokens, W2A2."""
    tokens, columns, outputs = 197, 192, 768
    x = torch.randn(images, tokens, columns, requires_grad=True)
    gradient = torch.randn(images, tokens, outputs)
    plain, naive = nn.Linear(columns, outputs), NaiveLinear(tokens, columns, outputs)
    naive.scale.data.copy_(lsq_init(x, 2).unsqueeze(-1))
    ours = quantized_layer(plain, x)
    what = f"linear layer {columns} to {outputs}, {images} x {tokens} tokens, W2A2"
    for peer, name, step_limit, bytes_limit in ((plain, LINEAR, 1.15, 1.05), (naive, NAIVE, None, None)):
        yield compare(
            f"{what}: forward + backward",
            partial(step, ours, x, gradient),
            partial(step, peer, x, gradient),
            peer_name=name,
            repeats=repeats,
            at_most=step_limit,
            tags={"kind": "step", "layer": name},
        )
        mine, theirs = kept_bytes(ours, x), kept_bytes(peer, x)
        yield Row(
            f"{what}: kept for backward",
            name,
            ours=mine / 2**10,
            peer=theirs / 2**10,
            ratio=theirs / mine,
            unit="KiB",
            target=None if bytes_limit is None else f"ours <= {bytes_limit:.2f} x",
            met=None if bytes_limit is None else mine <= bytes_limit * theirs,
            tags={"kind": "bytes", "layer": name},
        )


def quantized_layer(plain: nn.Linear, x: Tensor) -> nn.Module:
    """`plain` as OFQ has it inside a model, with its scales."""
    from hf_ext.ofq_quantizer.convert import convert_linear
    from hf_ext.ofq_quantizer.quantizer import Switches

    layer = nn.Linear(plain.in_features, plain.out_features)
    layer.load_state_dict({name: plain.state_dict()[name] for name in ("weight", "bias")})
    layer = convert_linear(layer, Switches(OFQConfig()), tokens=x.shape[1], unsigned=False)
    layer(x)  # the first forward of training sets the scales
    return layer


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that the graph of a training step keeps, every storage counted once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)
    del y
    return sum(kept.values())


# --- training: a model


def model_rows(depth: int, images: int, repeats: int) -> Iterator[Row]:
    """A training step of a model like DeiT-T, with and without QKR."""
    x = torch.randn(images, 3, 224, 224)
    plain = deit(depth)
    gradient = torch.randn(images, 1000)
    for bits in (2, 4):
        for reparam in (False, True):
            config = OFQConfig(w_bits=bits, a_bits=bits, qk_reparam=reparam)
            recipe = f"W{bits}A{bits}" + (" QKR" if reparam else "")
            ours = calibrate(quantize(copy.deepcopy(plain), config), [x])
            yield compare(
                f"DeiT-T of depth {depth}, {images} images, {recipe}: forward + backward",
                partial(step, ours, x, gradient),
                partial(step, plain, x, gradient),
                peer_name="full precision, fused attention",
                repeats=repeats,
                at_most=None if reparam else 1.5,
            )


def deit(depth: int) -> nn.Module:
    """DeiT-T with random weights and a head that is not all zeros."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(ARCHITECTURE, depth=depth)
    nn.init.normal_(model.head.weight, std=0.05)
    return model


def statsq_rows(quick: bool, repeats: int) -> Iterator[Row]:
    """StatsQ under torch.compile against copies: of a model's weights, in one graph; of one weight, time and again.

    Of one, entering the graph is a fifth of the time, which a compiled copy pays as well.
    """
    keep_freed_memory()  # else page faults are timed, by the chance of where a tensor lies
    columns, several = 192 if quick else 3072, 2 if quick else 12
    weights = [torch.randn(768, columns) for _ in range(several)]
    quantize, copied = (
        torch.compile(partial(_each, f), fullgraph=True) for f in (partial(statsq, bits=2), torch.clone)
    )
    copy_each = partial(_each, torch.clone)
    yield compare(
        f"StatsQ of {several} weights 768 x {columns}, compiled",
        partial(quantize, weights),
        partial(copy_each, weights),
        peer_name="clone() of each",
        repeats=repeats,
        at_most=1.5,
    )
    for name, peer, at_most in (("clone()", copy_each, 1.5), ("clone(), compiled", copied, None)):
        yield compare(
            f"StatsQ of one weight 768 x {columns}, compiled, 20 times",
            often(partial(quantize, weights[:1]), 20),
            often(partial(peer, weights[:1]), 20),
            peer_name=name,
            repeats=repeats,
            at_most=at_most,
        )


def _each(function: Callable[[Tensor], Tensor], weights: list[Tensor]) -> list[Tensor]:
    return [function(weight) for weight in weights]


# --- inference


def inference_rows(depth: int, images: int, repeats: int) -> Iterator[Row]:
    """The whole of DeiT-T: ours in integers against float32, compiled bfloat16 and torchao's int8."""
    x = torch.randn(images, 3, 224, 224)
    plain = deit(depth).eval()
    peers = {
        "float32": (plain, x),
        "bfloat16, compiled": _compiled_bfloat16(plain, x),
        "torchao int8": _torchao(plain, x),
    }
    for bits in (4, 2):
        fake = calibrate(quantize(copy.deepcopy(plain), OFQConfig(w_bits=bits, a_bits=bits)), [x]).eval()
        ours = to_int8(fake)
        what = f"DeiT-T of depth {depth}, {images} images, int8 arithmetic, W{bits}A{bits}"
        for name, peer in peers.items():
            if peer is None:
                yield Row(what, name, skipped="torchao is not installed: `pip install 'hf-ext[quantised]'`")
                continue
            yield compare(
                f"{what}: forward",
                partial(infer, ours, x),
                partial(infer, *peer),
                peer_name=name,
                repeats=repeats,
                at_least=3.0 if name == "float32" else None,
                tags={"kind": "inference", "bits": bits},
            )
        distance = (infer(ours, x) - infer(fake, x)).abs().max().item()
        yield Row(
            f"{what}: largest distance of a logit from fake quantisation",
            "",
            ours=distance * 1e6,
            unit="millionths",
            target="<= 100",
            met=distance <= 1e-4,
        )


@torch.no_grad()
def infer(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def _compiled_bfloat16(model: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
    return torch.compile(copy.deepcopy(model).bfloat16(), fullgraph=True), x.bfloat16()


def _torchao(model: nn.Module, x: Tensor) -> tuple[Any, Tensor] | None:
    """Dynamic int8 activations and int8 weights in every linear layer, compiled, as torchao recommends."""
    if find_spec("torchao") is None:
        return None
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return torch.compile(model, fullgraph=True), x


# --- files


def file_row(depth: int) -> Row:
    """Size of the packed file against that of the float32 weights; every shift counts, as after training."""
    from safetensors.torch import save_file

    plain = deit(depth)
    ours = calibrate(quantize(copy.deepcopy(plain), OFQConfig()), [torch.randn(2, 3, 224, 224)])
    for name, parameter in ours.named_parameters():
        if name.endswith(("bias_in", "bias_out")):
            nn.init.normal_(parameter, std=0.1)
    with tempfile.TemporaryDirectory() as folder:
        save_file(plain.state_dict(), f"{folder}/float32.safetensors")
        theirs = Path(folder, "float32.safetensors").stat().st_size
        save_packed(ours, f"{folder}/packed", {"depth": depth})
        mine = sum(path.stat().st_size for path in Path(folder, "packed").iterdir())
    return Row(
        f"packed files of DeiT-T of depth {depth}, W2A2",
        "float32 file",
        ours=mine / 2**10,
        peer=theirs / 2**10,
        ratio=theirs / mine,
        unit="KiB",
        target="<= 2.3 MiB",
        met=mine <= 2.3 * 2**20,
        tags={"kind": "file"},
    )


# --- the picture


def draw(rows: list[Row], axes: list[Any]) -> None:
    """Left: training one layer, times nn.Linear. Right: inference of the model, times float32."""
    left, right = axes
    chosen = {(row.tags["kind"], row.tags["layer"]): row for row in rows if row.tags.get("layer")}
    names, heights, colours = [], [], []
    for kind, title in (("step", "step"), ("bytes", "bytes kept")):
        own = 1 / chosen[kind, LINEAR].ratio
        for label, height, colour in (
            ("ours", own, "tab:blue"),
            ("fake\nquantisation", own * chosen[kind, NAIVE].ratio, "0.7"),
        ):
            names.append(f"{label}\n{title}")
            heights.append(height)
            colours.append(colour)
    left.bar_label(left.bar(names, heights, color=colours), fmt="%.2f")
    left.set(title="one linear layer, W2A2", ylabel="times nn.Linear")
    left.axhline(1, color="grey", linewidth=0.8)
    speeds = {"float32": (1.0, "0.7")}
    for row in rows:
        if row.tags.get("kind") == "inference" and row.ratio is not None:
            float32 = next(
                r for r in rows if r.tags.get("bits") == row.tags["bits"] and r.peer_name == "float32" and r.ratio
            )
            speeds[f"ours,\nW{row.tags['bits']}A{row.tags['bits']}"] = (float32.ratio, "tab:blue")
            if row.peer_name != "float32":
                speeds.setdefault(row.peer_name.replace(", ", ",\n"), (float32.ratio / row.ratio, "0.7"))
    right.bar_label(
        right.bar(
            list(speeds), [speed for speed, _ in speeds.values()], color=[colour for _, colour in speeds.values()]
        ),
        fmt="%.1f",
    )
    right.set(title="inference of DeiT-T", ylabel="times as fast as float32")
