"""What the parts of a model receive at the last position of a forward, seen by hooks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from hf_ext.mcq_bias.attention import LastQuery, watched_attention
from hf_ext.mcq_bias.families import Family


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
