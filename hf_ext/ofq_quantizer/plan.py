"""What becomes of every layer of a model: all decisions of a conversion, and all its refusals."""

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib import import_module

from torch import nn

from hf_ext.ofq_quantizer.attention import QuantAttention
from hf_ext.ofq_quantizer.config import OFQConfig
from hf_ext.ofq_quantizer.layers import QuantWeight
from hf_ext.ofq_quantizer.probe import Trace, backbone, timm_model, trace

HOSTS = {"timm.": "timm_attention", "transformers.": "hf_attention"}
SKIPPED, FULL_PRECISION = "skipped", "full_precision"


@dataclass
class Plan:
    """By module name.

    attentions: adapter class and number of tokens. low_bit: number of tokens, and whether the input is unsigned; the
    tokens are None where an attention quantises the input. boundary: the 8-bit layers. left: the layers that stay as
    they are, with SKIPPED or FULL_PRECISION and the reason.
    """

    attentions: dict[str, tuple[type[QuantAttention], int]] = field(default_factory=dict)
    low_bit: dict[str, tuple[int | None, bool]] = field(default_factory=dict)
    boundary: list[str] = field(default_factory=list)
    left: dict[str, tuple[str, str]] = field(default_factory=dict)


def make_plan(model: nn.Module, config: OFQConfig) -> Plan:
    """The plan of converting `model`, which is not changed.

    Raises:
        ValueError: as `quantize` says.
    """
    planner = Planner(model, config)
    planner.refuse()
    for name, module in planner.modules.items():
        if type(module) in planner.families and not planner.skipped(name):
            planner.place_attention(name, module)
    for name, module in planner.modules.items():
        if isinstance(module, nn.Linear | nn.Conv2d):
            planner.place_layer(name, module)
    planner.refuse_empty()
    return planner.plan


class Planner:
    """Collects a `Plan`; attributes are what is known of the model and its hosts."""

    def __init__(self, model: nn.Module, config: OFQConfig) -> None:
        self.model, self.config = model, config
        self.modules = dict(model.named_modules())
        self.plan = Plan()
        self.families: dict[type[nn.Module], type[QuantAttention]] = {}
        self.refused: dict[type[nn.Module], str] = {}
        self.left_alone: dict[type[nn.Module], str] = {}
        self.subtrees: dict[str, str] = {}  # names of modules below which all stays as it is -> why
        for host, home in HOSTS.items():
            if any(type(module).__module__.startswith(host) for module in self.modules.values()):
                known = import_module(f"hf_ext.ofq_quantizer.{home}")
                self.families |= known.FAMILIES
                self.refused |= known.REFUSED
                self.left_alone |= known.LEFT_ALONE

    @cached_property
    def seen(self) -> Trace:
        """One forward of the model on the meta device."""
        return trace(self.model)

    @cached_property
    def heads(self) -> list[nn.Module]:
        """The classifiers."""
        host = timm_model(self.model)
        if host is None:
            return [module for module in self.model.children() if isinstance(module, nn.Linear)]
        if not hasattr(host, "get_classifier"):  # timm's features_only
            return []
        heads = host.get_classifier()
        return list(heads) if isinstance(heads, tuple | list) else [heads]

    def skipped(self, name: str) -> bool:
        """Whether a pattern of the configuration takes this module out, or one that it is a part of."""
        return any(fnmatchcase(parent, pattern) for parent in _parents(name) for pattern in self.config.skip_modules)

    def tokens(self, name: str, module: nn.Module) -> int:
        """Number of tokens of an image, or of a window, that enter the module."""
        if name not in self.seen.shapes:
            raise ValueError(f"{name}, a {type(module).__qualname__}, is no part of the forward pass of one image")
        return self.seen.shapes[name][1:-1].numel()

    def refuse(self) -> None:
        """Raise for what cannot be converted."""
        kind = type(self.model).__name__
        if any(isinstance(module, QuantWeight | QuantAttention) for module in self.modules.values()):
            raise ValueError(f"this {kind} is already quantised by OFQ; start from the model of full precision")
        self._refuse_useless_patterns()
        for name, module in self.modules.items():
            self._refuse_attention(name, module)
        if not any(type(module) in self.families for module in self.modules.values()):
            known = ", ".join(sorted(f"{family.__module__}.{family.__qualname__}" for family in self.families))
            raise ValueError(
                f"{kind} has no attention that OFQ can quantise; "
                + (f"it knows {known}" if known else "it takes vision transformers of timm and transformers")
            )
        self._refuse_varying_tokens()

    def refuse_empty(self) -> None:
        """Raise where all layers and attentions stay as they are."""
        if not (self.plan.attentions or self.plan.low_bit or self.plan.boundary):
            raise ValueError(
                f"skip_modules={list(self.config.skip_modules)!r} leaves nothing to quantise of this "
                f"{type(self.model).__name__}; take patterns out, or use the model as it is"
            )

    def _refuse_useless_patterns(self) -> None:
        kind = type(self.model).__name__
        for pattern in self.config.skip_modules:
            matched = [name for name in self.modules if fnmatchcase(name, pattern)]
            if not matched:
                raise ValueError(f"skip_modules: {pattern!r} matches no module of this {kind}")
            if not any(_has_layer(self.modules[name]) for name in matched if name):
                raise ValueError(
                    f"skip_modules: {pattern!r} matches {matched[0]!r}, and no module of this {kind} that has a linear "
                    "layer or a convolution; name what is to stay as it is"
                )

    def _refuse_attention(self, name: str, module: nn.Module) -> None:
        kind = type(module)
        reason = self.refused.get(kind)
        if reason is None and kind not in self.families and kind not in self.left_alone and _computes_attention(module):
            inside = any(type(child) in self.families for child in module.modules())
            reason = None if inside else "there is no adapter for it"
        if reason is not None:
            name = name or "the model"
            raise ValueError(f"{name} is a {kind.__module__}.{kind.__qualname__}, which OFQ cannot quantise: {reason}")

    def _refuse_varying_tokens(self) -> None:
        host = timm_model(self.model)
        if self.config.activation_scale != "token" or host is None:
            return
        host = backbone(host)
        for what, varies in (
            ("dynamic_img_size", getattr(host, "dynamic_img_size", False)),
            ("dynamic_img_pad", getattr(getattr(host, "patch_embed", None), "dynamic_img_pad", False)),
            ("patch dropout", getattr(getattr(host, "patch_drop", None), "prob", 0) > 0),
        ):
            if varies:
                raise ValueError(
                    f"{what} changes the number of tokens, and activation_scale='token' has a scale for each; use "
                    'activation_scale="tensor"'
                )

    def place_attention(self, name: str, module: nn.Module) -> None:
        """Plan an attention and the layers that project to its queries, keys and values."""
        adapter = self.families[type(module)]
        layers = adapter.projections.fget(module)
        names = [child for child, layer in self.modules.items() if any(layer is one for one in layers)]
        if self.config.qk_reparam:
            problem = adapter.reparam_problem(module)
            if problem is None and any(self.skipped(child) for child in names):
                problem = "skip_modules takes out a factor of the product; take out the whole attention"
            if problem is not None:
                raise ValueError(f"qk_reparam is not defined for {name}, a {type(module).__qualname__}: {problem}")
        tokens = self.tokens(name, module)
        self.plan.attentions[name] = (adapter, tokens)
        shared = self.config.qk_reparam or len(layers) > 1
        for child in names:
            if not self.skipped(child):
                self.plan.low_bit[child] = (None if shared else tokens, False)
        self.subtrees |= {f"{name}.{child}": reason for child, reason in adapter.left_alone.items()}

    def place_layer(self, name: str, module: nn.Linear | nn.Conv2d) -> None:
        """Plan a layer that no attention has claimed."""
        if name in self.plan.low_bit:
            return
        why = self._reason_to_leave(name, module)
        if why is not None:
            self.plan.left[name] = why
        elif isinstance(module, nn.Conv2d) or any(module is head for head in self.heads):
            self.plan.boundary.append(name)
        else:
            self.plan.low_bit[name] = (self.tokens(name, module), name in self.seen.unsigned)

    def _reason_to_leave(self, name: str, module: nn.Linear | nn.Conv2d) -> tuple[str, str] | None:
        if self.skipped(name):
            return SKIPPED, "matches skip_modules"
        for parent in _parents(name):
            reason = self.subtrees.get(parent) or self.left_alone.get(type(self.modules[parent]))
            if reason is not None:
                return FULL_PRECISION, reason
        if type(module) not in (nn.Linear, nn.Conv2d):
            return FULL_PRECISION, f"a {type(module).__qualname__} may do more than its base class"
        if name not in self.seen.shapes:
            return FULL_PRECISION, "not called in the forward pass of one image"
        if isinstance(module, nn.Conv2d) and not _is_patch_embedding(module):
            return (
                FULL_PRECISION,
                "a convolution of single pixels, or with overlap, padding or groups, is no patch embedding",
            )
        boundary = isinstance(module, nn.Conv2d) or any(module is head for head in self.heads)
        return (FULL_PRECISION, "boundary_bits=None") if boundary and self.config.boundary_bits is None else None


def _parents(name: str) -> list[str]:
    """The names of the modules that a module is in, and its own."""
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


def _has_layer(module: nn.Module) -> bool:
    return any(isinstance(part, nn.Linear | nn.Conv2d) for part in module.modules())


def _computes_attention(module: nn.Module) -> bool:
    name = type(module).__name__.lower()
    return ("attn" in name or "attention" in name) and any(
        isinstance(child, nn.Linear | nn.Conv2d) for child in module.children()
    )


def _is_patch_embedding(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == conv.stride != (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
        and conv.dilation == (1, 1)
    )
