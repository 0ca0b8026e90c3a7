"""Sums and products of adapters, as one new adapter."""

import math
import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from hf_ext.bone_adapter import ops
from hf_ext.bone_adapter.config import BoneConfig
from hf_ext.checks import is_number, listed

COMBINATIONS = ("linear", "compose")


@dataclass(frozen=True)
class Plan:
    """How the blocks of one new adapter follow from those of others.

    Args:
        config: of the new adapter; its targets are the layers that any of the others is on.
        weights: {adapter: factor}, in the order of composition.
        combination_type: "linear" or "compose".
    """

    config: BoneConfig
    weights: Mapping[str, float]
    combination_type: Literal["linear", "compose"]

    def block(self, r: int, blocks: Mapping[str, Tensor]) -> Tensor:
        """The new block of one layer, of size `r`, from those that the layer has: {adapter: block}, at least one."""
        scaled = [factor * blocks[name] for name, factor in self.weights.items() if name in blocks]
        if self.combination_type == "compose":
            return ops.composed(scaled)
        if self.config.form == "tile":  # row k of B belongs to the inputs k, k + r, ...: r rows repeat into a multiple
            scaled = [block.repeat(r // len(block), 1) for block in scaled]
        return sum(scaled)


def plan(
    configs: Mapping[str, BoneConfig],
    targets: Set[str],
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str | None,
) -> Plan:
    """Check a call of `add_weighted_adapter` and settle the new adapter's config.

    `targets`: paths of the layers that carry any of `adapters`.

    Raises:
        ValueError: see `BoneModel.add_weighted_adapter`.
    """
    if adapter_name in configs:
        raise ValueError(f"There is an adapter {adapter_name!r} already; choose another name or delete_adapter() it.")
    if isinstance(adapters, str) or isinstance(weights, (str, int, float)):
        raise ValueError(f"adapters and weights are lists: got {adapters!r} and {weights!r}.")
    if unknown := [name for name in adapters if name not in configs]:
        raise ValueError(f"No adapter {', '.join(map(repr, unknown))}; there are {', '.join(configs)}.")
    if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        raise ValueError(
            f"One weight for each of at least one distinct adapter: got {list(adapters)}, {list(weights)}."
        )
    if not all(map(is_number, weights)):
        raise ValueError(f"The weights have to be finite numbers: got {list(weights)}.")
    chosen = [configs[name] for name in adapters]
    if lost := [name for name in adapters if configs[name].bias != "none" or configs[name].modules_to_save]:
        warnings.warn(f"The biases and modules_to_save of {', '.join(lost)} are not combined.", stacklevel=3)
    form = _common_form(dict(zip(adapters, chosen, strict=True)))
    combination_type = combination_type or ("linear" if form == "tile" else "compose")
    _check_combination(combination_type, form)
    config = replace(
        chosen[0],
        r=math.lcm(*(config.r for config in chosen)),
        init_weights=True if form == "tile" else form,
        target_modules=set(targets),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        bias="none",
        modules_to_save=None,
    )
    return Plan(config, dict(zip(adapters, weights, strict=True)), combination_type)


def _common_form(chosen: Mapping[str, BoneConfig]) -> str:
    kinds = {(config.form, None if config.form == "tile" else config.r) for config in chosen.values()}
    if len(kinds) > 1:
        raise ValueError(
            "Adapters of one form can be combined, block-affine ones of one r: got "
            + ", ".join(f"{name} ({config.form}, r={config.r})" for name, config in chosen.items())
        )
    return next(iter(kinds))[0]


def _check_combination(combination_type: str, form: str) -> None:
    allowed = COMBINATIONS[:1] if form == "tile" else COMBINATIONS
    if combination_type not in allowed:
        known = listed(combination_type, allowed)
        raise ValueError(f"combination_type={combination_type!r}: the {form} form allows {known}")
