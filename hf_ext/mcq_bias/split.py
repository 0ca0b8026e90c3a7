"""The terms of logit[a] - logit[b] at the last position, from what hooks see a model's parts receive there."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_ext.mcq_bias.attention import LastQuery, watched_attention
from hf_ext.mcq_bias.families import Family, at_least_float32, output_head
from hf_ext.modes import no_autocast


@dataclass
class LastPosition:
    """The last position in the latest forward.

    embedding, final: (B, d), input of block 0 and of the final norm. neurons: layer -> (B, F), input of the MLP's last
    projection. mixtures: layer -> (B, H * head_dim), input of the attention's. looks: layer -> its `LastQuery`.
    """

    embedding: Tensor | None = None
    final: Tensor | None = None
    neurons: dict[int, Tensor] = field(default_factory=dict)
    mixtures: dict[int, Tensor] = field(default_factory=dict)
    looks: dict[int, LastQuery] = field(default_factory=dict)


@contextmanager
def captured(family: Family, model: nn.Module, with_attention: bool) -> Iterator[LastPosition]:
    """Inside, each forward of `model` fills the LastPosition; the hooks are gone afterwards, whatever happens.

    with_attention: fill `looks` too, which has the model compute attention by our own function.
    """
    seen = LastPosition()
    blocks = family.blocks(model)
    handles = []

    def watch(module: nn.Module, keep: Callable[[Tensor], Any]) -> None:
        # A copy: a view would keep the activations of all positions alive.
        handles.append(module.register_forward_pre_hook(lambda _, args: keep(args[0][:, -1].clone())))

    def look(query: LastQuery) -> None:
        seen.looks[query.layer] = query._replace(weights=query.weights.clone())

    try:
        watch(blocks[0], lambda x: setattr(seen, "embedding", x))
        watch(family.final_norm(model), lambda x: setattr(seen, "final", x))
        for layer, block in enumerate(blocks):
            watch(family.mlp_projection(block), lambda x, layer=layer: seen.neurons.update({layer: x}))
            watch(family.attention_projection(block), lambda x, layer=layer: seen.mixtures.update({layer: x}))
        with watched_attention(model, look) if with_attention else nullcontext():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def terms_of(
    family: Family, model: nn.Module, seen: LastPosition, token_a: Tensor, token_b: Tensor
) -> dict[str, Tensor]:
    """The terms by their names in `BiasAttribution`, rows first, in at least float32; token_a, token_b: (B,).

    `head_positions` (B, L, H, T) is among them where the forward's attention was captured.
    """
    head = output_head(model)
    with no_autocast(token_a):
        direction = family.direction(model, token_a, token_b)
        scale = family.norm_scale(model, at_least_float32(seen.final))
        u = direction / scale[:, None]
        layers = [_layer(family, block, seen, layer, u) for layer, block in enumerate(family.blocks(model))]
        if seen.looks:
            for layer, block in enumerate(family.blocks(model)):
                layers[layer]["head_positions"] = _positions(family, block, seen, layer, u)
        return {
            "embedding": (at_least_float32(seen.embedding) * u).sum(-1),
            "final_norm_bias": _bias_along(family.final_norm(model), _difference(head.weight, token_a, token_b)),
            "output_bias": u.new_zeros(len(u)) if head.bias is None else _difference(head.bias, token_a, token_b),
            "norm_scale": scale,
            "direction_sum": direction.sum(-1),
            **{name: torch.stack([terms[name] for terms in layers], 1) for name in layers[0]},
        }


def total_of(terms: Mapping[str, Any]) -> Any:
    """(B,): the sum of the terms, which is the difference of the logits; tensors or arrays."""
    layers = terms["neurons"].sum(-1) + terms["heads"].sum(-1) + terms["mlp_bias"] + terms["attention_bias"]
    return terms["embedding"] + layers.sum(-1) + terms["final_norm_bias"] + terms["output_bias"]


def _layer(family: Family, block: nn.Module, seen: LastPosition, layer: int, u: Tensor) -> dict[str, Tensor]:
    activations = at_least_float32(seen.neurons[layer])
    heads = _outputs_along(family, block, u)
    mixtures = at_least_float32(seen.mixtures[layer]).view_as(heads)
    return {
        "activations": activations,
        "neurons": activations * (u @ at_least_float32(family.value_vectors(block)).T),
        "heads": (mixtures * heads).sum(-1),
        "mlp_bias": _bias_along(family.mlp_projection(block), u),
        "attention_bias": _bias_along(family.attention_projection(block), u),
    }


def _positions(family: Family, block: nn.Module, seen: LastPosition, layer: int, u: Tensor) -> Tensor:
    """(B, H, T): weight of each position times its value along u; padding has no weight."""
    weights, values = at_least_float32(seen.looks[layer].weights), at_least_float32(seen.looks[layer].values)
    return weights * torch.einsum("bhtd,bhd->bht", values, _outputs_along(family, block, u))


def _outputs_along(family: Family, block: nn.Module, u: Tensor) -> Tensor:
    """(B, H, head_dim): W_O,h u."""
    outputs = at_least_float32(family.head_outputs(block))
    return (u @ outputs.flatten(0, 1).T).view(len(u), *outputs.shape[:2])


def _difference(rows: Tensor, token_a: Tensor, token_b: Tensor) -> Tensor:
    return at_least_float32(rows[token_a]) - at_least_float32(rows[token_b])


def _bias_along(module: nn.Module, vectors: Tensor) -> Tensor:
    """(B,): zero for a module without bias."""
    bias = getattr(module, "bias", None)
    return vectors.new_zeros(len(vectors)) if bias is None else vectors @ at_least_float32(bias)
