"""Entry points of timm: `ofq_w2a2.<architecture>` is that architecture, quantised.

timm splits a name at its first dot and hands the rest to the entry point as `pretrained_cfg`, so that one entry serves
every architecture. The rest is kept as the tag of the model's own configuration: that is how a saved model finds its
architecture again.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_ext import compat

if TYPE_CHECKING:
    from hf_ext.ofq_quantizer.config import OFQConfig

ENTRY_BITS = tuple((weights, activations) for weights in (2, 3, 4) for activations in (2, 3, 4, 8))


def entry_points() -> dict[str, Callable[..., nn.Module]]:
    """All 24 recipes: name -> entry point."""
    points = (_entry_point(*bits, reparam) for bits in ENTRY_BITS for reparam in (False, True))
    return {point.__name__: point for point in points}


def _entry_point(w_bits: int, a_bits: int, qk_reparam: bool) -> Callable[..., nn.Module]:
    fixed = {"w_bits": w_bits, "a_bits": a_bits, "qk_reparam": qk_reparam}

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return _create(create.__name__, fixed, pretrained, **kwargs)

    create.__name__ = create.__qualname__ = f"ofq_w{w_bits}a{a_bits}" + ("_qkr" if qk_reparam else "")
    create.__doc__ = f"OFQ with {w_bits}-bit weights and {a_bits}-bit activations{', QKR' if qk_reparam else ''}."
    create.__module__ = __name__
    return create


def _create(
    recipe: str,
    fixed: dict[str, Any],
    pretrained: bool,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    ofq: dict[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    from hf_ext.ofq_quantizer.convert import quantize  # here, for every import of timm imports this module

    if not isinstance(ofq, dict | None):
        raise TypeError(
            f"ofq takes a dict of further fields of OFQConfig, such as {{'activation_scale': 'tensor'}}, not {ofq!r}; "
            "hf_ext.ofq_quantizer.quantize takes an OFQConfig"
        )
    config = _config(recipe, fixed, ofq or {})
    saved = pretrained_cfg if isinstance(pretrained_cfg, dict) else None
    base = saved.get("tag") if saved else pretrained_cfg
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{recipe} is a way to quantise, and lacks the architecture: write {recipe}.<timm architecture>, such as "
            f"{recipe}.deit_tiny_patch16_224. (A pretrained_cfg of your own goes into pretrained_cfg_overlay.)"
        )
    if saved is None:
        model = compat.create_timm_model(base, pretrained, pretrained_cfg_overlay=pretrained_cfg_overlay, **kwargs)
    else:
        # What the file says of the images and classes counts, the base's own weights do not.
        model = compat.create_timm_model(base, False, pretrained_cfg_overlay=_without_source(saved), **kwargs)
    quantize(model, config, name=recipe)
    own = {"architecture": recipe, "tag": base, "custom_load": False}
    sources = {} if saved is None else saved | (pretrained_cfg_overlay or {})
    model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | sources | own
    if saved is not None and pretrained:
        compat.load_timm_weights(model, **kwargs)
    return model


def _config(recipe: str, fixed: dict[str, Any], options: dict[str, Any]) -> "OFQConfig":
    from hf_ext.ofq_quantizer.config import OFQConfig

    for name, value in fixed.items():
        if options.get(name, value) != value:
            raise ValueError(
                f"{recipe} means {name}={value}, and ofq={options!r} says {options[name]!r}; drop one of the two"
            )
    return OFQConfig.from_dict({**options, **fixed})


def _without_source(cfg: dict[str, Any]) -> dict[str, Any]:
    sources = ("architecture", "tag", "url", "file", "hf_hub_id", "hf_hub_filename", "state_dict", "source")
    return {name: value for name, value in cfg.items() if name not in sources}
