"""How `mitigate` edits a model: its options, its three methods as edits of rank one, their trial and their delivery."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_ext.checks import check_count, check_word, is_number
from hf_ext.mcq_bias.contributions import BiasAttribution
from hf_ext.mcq_bias.families import Family, at_least_float32
from hf_ext.mcq_bias.letters import anchor_index
from hf_ext.modes import no_autocast

METHODS = ("project", "shift", "paper")
COMPONENTS = ("mlp", "attention", "both")
GOLD_WEIGHT = 8.0  # of the paper: how much more the gold letters are favoured than the anchor is weakened
CHUNK = 4096  # tokens of the vocabulary that are read at once
Chosen = dict[int, list[int]]  # layer -> neurons, or heads


@dataclass(frozen=True)
class Plan:
    """How to mitigate; the arguments are those of `mitigate`, the anchor is kept as its index.

    Raises:
        ValueError: naming the option, its value, what is allowed and the nearest match.
    """

    method: str
    components: str
    strength: float | str
    n: int
    anchor: str | int

    def __post_init__(self) -> None:
        check_word("method", self.method, METHODS)
        check_word("components", self.components, COMPONENTS)
        if self.method != "project" and self.components != "mlp":
            raise ValueError(
                f"components={self.components!r}: method={self.method!r} edits MLP neurons only. Use components='mlp', "
                "or method='project'"
            )
        if isinstance(self.strength, str):
            check_word("strength", self.strength, ("match",), "or a number of at least 0")
        elif not is_number(self.strength) or self.strength < 0:
            raise ValueError(f"strength={self.strength!r} is neither 'match' nor a number of at least 0")
        else:
            object.__setattr__(self, "strength", float(self.strength))
        check_count("n", self.n)
        object.__setattr__(self, "n", int(self.n))
        object.__setattr__(self, "anchor", anchor_index(self.anchor))

    @property
    def needs_labels(self) -> bool:
        return self.method == "paper"


@dataclass(frozen=True, eq=False)
class RankOne:
    """At strength s the layer `module`, of inputs x, gives s (x . read) write more.

    read: (in,), write: (out,), both in at least float32.
    """

    module: str
    read: Tensor
    write: Tensor


def neurons_for_anchor(attribution: BiasAttribution, n: int) -> Chosen:
    """The up to n neurons with the largest positive mean contribution."""
    return _by_layer([(term.layer, term.index) for term in attribution.top(n, "neuron") if term.mean > 0])


def heads_for_anchor(attribution: BiasAttribution) -> Chosen:
    """Every head with a positive mean contribution."""
    return _by_layer(np.argwhere(attribution.mean(attribution.heads) > 0).tolist())


def anchor_direction(family: Family, model: nn.Module, letters: Tensor, anchor: int) -> Tensor:
    """(d,), of length 1: U[anchor] minus the mean of U over the other letters, U as the final norm reads the head.

    Raises:
        ValueError: the model's head does not tell the anchor from the other letters.
    """
    rows = family.readout(model, letters)
    direction = rows[anchor] - torch.cat([rows[:anchor], rows[anchor + 1 :]]).mean(0)
    length = direction.norm()
    if not length > 0:
        raise ValueError("the output head has the same weights for the anchor as for the other letters")
    return direction / length


def edits_for(
    plan: Plan,
    family: Family,
    model: nn.Module,
    attribution: BiasAttribution,
    tokens: Sequence[int],
    neurons: Chosen,
    heads: Chosen,
) -> list[RankOne]:
    """What `plan` does to the chosen neurons and heads, an edit a layer. tokens: of the letters A, B, ...

    Raises:
        ValueError: the model's head does not tell the anchor from the other letters.
    """
    letters = torch.tensor(tokens, device=model.get_output_embeddings().weight.device)
    if plan.method == "paper":
        gold = letters[torch.from_numpy(attribution.target_index[attribution.selected]).to(letters.device)]
        return paper(family, model, neurons, letters[plan.anchor], gold)
    direction = anchor_direction(family, model, letters, plan.anchor)
    if plan.method == "shift":
        return shift(family, direction, neurons, attribution.mean(attribution.activations))
    with no_autocast(direction):
        return [
            *project(family, model, direction, neurons, family.mlp_path),
            *project(family, model, direction, heads, family.attention_path),
        ]


def project(family: Family, model: nn.Module, direction: Tensor, chosen: Chosen, path: str) -> list[RankOne]:
    """v_i -= s (v_i . direction) direction for MLP neurons; the same for each row of the output matrix of a head."""
    edits = []
    for layer, indices in chosen.items():
        block = family.blocks(model)[layer]
        vectors = family.value_vectors(block) if path == family.mlp_path else family.head_outputs(block)
        read = _only(at_least_float32(vectors) @ direction, indices).flatten()
        edits.append(RankOne(_name(family, layer, path), read, -direction))
    return edits


def shift(family: Family, direction: Tensor, neurons: Chosen, activations: np.ndarray) -> list[RankOne]:
    """v_i -= s sign(m_i) direction. activations: (L, F), the mean m of each neuron."""
    signs = torch.from_numpy(np.sign(activations)).to(direction)
    return [
        RankOne(_name(family, layer, family.mlp_path), _only(signs[layer], indices), -direction)
        for layer, indices in neurons.items()
    ]


def paper(family: Family, model: nn.Module, neuron: Chosen, anchor: Tensor, gold: Tensor) -> list[RankOne]:
    """v += s (8 mean U_c[gold] - U_c[anchor]) for one neuron (arXiv 2405.03205), U_c: U centred over the vocabulary.

    anchor: (), gold: (rows,), tokens.
    """
    [(layer, indices)] = neuron.items()
    vocabulary = torch.arange(len(model.get_output_embeddings().weight), device=gold.device)
    mean = sum(family.readout(model, tokens).sum(0) for tokens in vocabulary.split(CHUNK)) / len(vocabulary)
    favoured = family.readout(model, gold).mean(0) - mean
    write = GOLD_WEIGHT * favoured - (family.readout(model, anchor[None])[0] - mean)
    width = len(family.value_vectors(family.blocks(model)[layer]))
    return [RankOne(_name(family, layer, family.mlp_path), _only(write.new_ones(width), indices), write)]


def _only(values: Tensor, indices: Sequence[int]) -> Tensor:
    """`values` at these first indices, 0 elsewhere."""
    kept = torch.zeros_like(values)
    kept[indices] = values[indices]
    return kept


def _name(family: Family, layer: int, path: str) -> str:
    return f"{family.blocks_path}.{layer}.{path}"


def _by_layer(places: Sequence[Sequence[int]]) -> Chosen:
    chosen: Chosen = {}
    for layer, index in sorted(places):
        chosen.setdefault(layer, []).append(index)
    return chosen


@contextmanager
def tried(model: nn.Module, edits: Sequence[RankOne], strength: float) -> Iterator[None]:
    """Inside, `model` computes as with the adapter of `as_adapter`; not one of its weights is touched."""

    def added(edit: RankOne) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            more = (inputs[0].to(edit.read.dtype) @ edit.read)[..., None] * (strength * edit.write)
            return (output + more).to(output.dtype)

        return model.get_submodule(edit.module).register_forward_hook(hook)

    with ExitStack() as stack:
        for edit in edits:
            stack.callback(added(edit).remove)
        yield


def as_adapter(model: nn.Module, edits: Sequence[RankOne], strength: float) -> PeftModel:
    """`model`, wrapped in place with a frozen LoRA adapter of rank one on the edited layers and no others."""
    known = set(model.modules())
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        # Whole names: in GPT-2 "c_proj" is the end of the MLP as well as of the attention.
        target_modules=[edit.module for edit in edits],
        fan_in_fan_out=isinstance(model.get_submodule(edits[0].module), Conv1D),
        bias="none",
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial weights, which are replaced
        adapted = get_peft_model(model, config)
    for module in set(adapted.modules()) - known:
        module.training = model.training
    for edit in edits:
        layer = model.get_submodule(edit.module)
        # Parameters of our own, in the precision of the edit: PEFT would leave float32 in a float64 model.
        for part, weight in ((layer.lora_A, edit.read[None]), (layer.lora_B, strength * edit.write[:, None])):
            part["default"].weight = nn.Parameter(weight.clone(), requires_grad=False)
    return adapted
