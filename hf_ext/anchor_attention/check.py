"""Does this very model carry AnchorAttention? Asked of its class, and of its weights by running them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ext import compat
from hf_ext.anchor_attention.backend import anchor_attention_forward
from hf_ext.anchor_attention.mask import anchor_mask
from hf_ext.anchor_attention.support import AnchorUnsupportedError, refusal, who, why_unsupported
from hf_ext.modes import evaluating

# Never one of the user's names: what is lent for a probe must not meet what is registered.
_LENT = "hf_ext_probe"

# The probe's row: two documents, numbered as AnchorPacking numbers them.
_FIRST, _SECOND = 6, 7
_POSITIONS = [*range(_FIRST), 0, *range(_FIRST + 1, _FIRST + _SECOND)]
_CHANGED = _FIRST + 3  # the one token of the second document that is exchanged


@dataclass
class ModelReport:
    """What `check_model` found.

    Args:
        supported: nothing speaks against `attn_implementation="anchor"`, in the class or, if probed, in its results.
        reasons: what speaks against it; empty if supported.
        model_type: of the config.
        windows: index of each layer with a sliding window -> its width, which counts columns of the row.
        softcap: c in c * tanh(score / c), or None.
        sinks: whether the softmax has a learned extra column.
        bypassing: names of the decoder layers that did not call the attention function; known only after a probe.

    windows, softcap and sinks are those the layers asked the attention function for if the probe ran, else those the
    config and the parameters speak of.
    """

    supported: bool
    reasons: list[str]
    model_type: str | None
    windows: dict[int, int] = field(default_factory=dict)
    softcap: float | None = None
    sinks: bool = False
    bypassing: list[str] = field(default_factory=list)


@dataclass
class _Call:
    """One call of the attention function."""

    module: nn.Module
    window: int | None
    softcap: float | None
    sinks: bool
    position_ids: Tensor | None


def check_model(model: nn.Module, *, probe: bool = True, strict: bool = False) -> ModelReport:
    """Can `model` be trained with `attn_implementation="anchor"` (arXiv 2411.13476, section 4)?

    The class and the config are asked first. With `probe`, the model's own weights then compute a small batch twice
    under AnchorAttention, in evaluation mode and without gradients: the tokens of one document are exchanged, and
    nothing of the other may move; one token is exchanged, and nothing before it may move, but something behind it
    must; and every decoder layer must have called the attention function. What a row without any change moves by is
    rounding (experts are computed in other batches) and is allowed for. Implementation, modes and the host's tables
    are put back afterwards, also after an error.

    Args:
        model: a PreTrainedModel, or whatever wraps one (PEFT, DistributedDataParallel).
        probe: False asks the class and the config only, for models without weights (meta device).
        strict: raise instead of reporting.

    Raises:
        AnchorUnsupportedError: with `strict`, when anything speaks against it; the text has all reasons.
        ValueError: there is no PreTrainedModel in `model`.
    """
    inner = hosted_model(model)
    config = inner.config
    report = ModelReport(False, [], getattr(config, "model_type", None), *_announced(inner))
    reason = why_unsupported(type(inner), config)
    if reason:
        report.reasons.append(reason)
    elif probe and inner.device.type == "meta":
        report.reasons.append("its weights are on the meta device and cannot be run; load them, or pass probe=False")
    elif probe:
        _probe(model, inner, report)
    report.supported = not report.reasons
    if strict and report.reasons:
        raise AnchorUnsupportedError(refusal(who(type(inner).__name__, config), "; ".join(report.reasons)))
    return report


def hosted_model(model: nn.Module) -> PreTrainedModel:
    """`model` itself, or the first PreTrainedModel inside its wrappers.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules() if isinstance(model, nn.Module) else ():
        if isinstance(module, PreTrainedModel):
            return module
    raise ValueError(f"model must be a transformers PreTrainedModel or hold one; a {type(model).__name__} does not")


@contextmanager
def lent(model: nn.Module, attention: Callable, mask: Callable) -> Iterator[None]:
    """Inside, `model` calls `attention` and `mask`, in evaluation mode and without gradients; then all is as before."""
    configs = (getattr(module, "config", None) for module in model.modules())
    configs = {id(config): config for config in configs if hasattr(config, "_attn_implementation")}
    # The property would set the sub-configs as well, and these may differ from it.
    names = {key: config._attn_implementation_internal for key, config in configs.items()}
    attentions, masks = compat.attention_tables()
    try:
        attentions[_LENT], masks[_LENT] = attention, mask
        for config in configs.values():
            config._attn_implementation_internal = _LENT
        with evaluating(model):
            yield
    finally:
        for key, config in configs.items():
            config._attn_implementation_internal = names[key]
        attentions.pop(_LENT, None)
        masks.pop(_LENT, None)


def _announced(model: PreTrainedModel) -> tuple[dict[int, int], float | None, bool]:
    """Windows, softcap and sinks as config and parameters speak of them."""
    config = model.config.get_text_config()
    width = getattr(config, "sliding_window", None)
    layers = getattr(config, "num_hidden_layers", 0)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * layers
    windows = {i: width for i, kind in enumerate(kinds) if width and kind == "sliding_attention"}
    sinks = any(name.endswith("sinks") for name, _ in model.named_parameters())
    return windows, getattr(config, "attn_logit_softcapping", None), sinks


def _probe(model: nn.Module, inner: PreTrainedModel, report: ModelReport) -> None:
    """Run `model` and write what is seen into `report`."""
    calls: list[_Call] = []

    def attention(module: nn.Module, *tensors: Any, **keywords: Any) -> tuple[Tensor, None]:
        windows = (keywords.get("sliding_window"), getattr(tensors[3], "window", None))
        window = min((w for w in windows if w is not None), default=None)
        sinks = keywords.get("s_aux") is not None
        calls.append(_Call(module, window, keywords.get("softcap"), sinks, keywords.get("position_ids")))
        return anchor_attention_forward(module, *tensors, **keywords)

    before, after, positions = _rows(inner)
    try:
        with lent(model, attention, anchor_mask):
            outputs = [model(input_ids=ids, position_ids=positions)[0] for ids in (before, after)]
    except Exception as error:  # a report is asked for, whatever the model does with two documents in a row
        report.reasons.append(f"its forward of a packed row raised {type(error).__name__}: {error}")
        return
    _report_layers(inner, calls, report)
    moved = _movements(*outputs, before.shape, inner.dtype)
    if isinstance(moved, str):
        report.reasons.append(moved)
        return
    reasons = _what_moved(moved)
    if reasons and any(call.position_ids is None or not torch.equal(call.position_ids, positions) for call in calls):
        reasons.append("its attention function is given other position_ids than the model was")
    report.reasons += reasons


def _rows(model: PreTrainedModel) -> tuple[Tensor, Tensor, Tensor]:
    """(3, L) tokens before and after the change, and positions.

    Row 0 changes the first document behind its anchor, row 1 one token of the second, row 2 nothing.
    """
    vocabulary = min(model.get_input_embeddings().weight.shape[0], 256)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary // 2, (1, len(_POSITIONS)), generator=generator).repeat(3, 1)
    changed = ids.clone()
    changed[0, 1:_FIRST] += vocabulary // 2
    changed[1, _CHANGED] += vocabulary // 2
    positions = torch.tensor(_POSITIONS).expand(3, -1)
    return tuple(x.to(model.device) for x in (ids, changed, positions))


def _movements(before: Tensor, after: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor | str:
    """bool (3, L): which outputs moved by more than rounding; or why that cannot be said."""
    if before.shape[:2] != shape:
        return f"its output has {tuple(before.shape[:2])} (rows, tokens) where {tuple(shape)} went in"
    if not (before.isfinite().all() and after.isfinite().all()):
        return "its output is not finite"
    moved = (after.double() - before.double()).abs().amax(-1)
    epsilon = max(torch.finfo(dtype).eps, torch.finfo(before.dtype).eps)
    return moved > max(8 * moved[2].max().item(), epsilon * before.abs().max().item())


def _what_moved(moved: Tensor) -> list[str]:
    """What speaks against it in `moved` (3, L)."""
    reasons = []
    if moved[0, _FIRST:].any():
        reasons.append("documents leak into one another: exchanging one moved the output of the next")
    if moved[0, 0] or moved[1, :_CHANGED].any():
        reasons.append("a token sees later ones: exchanging it moved outputs before it")
    if not moved[1, _CHANGED + 1 :].any():
        reasons.append("no token sees those before it: exchanging one moved no output behind it")
    return reasons


def _report_layers(model: PreTrainedModel, calls: list[_Call], report: ModelReport) -> None:
    """Which layers called, and what they asked for."""
    called = {call.module: call for call in calls}
    report.windows = {}
    report.softcap = next((call.softcap for call in calls if call.softcap is not None), None)
    report.sinks = any(call.sinks for call in calls)
    layers = _decoder_layers(model, called)
    if not layers:
        report.reasons.append("no list of decoder layers was found in it, so nobody can say whether each one calls")
    for index, (name, layer) in enumerate(layers.items()):
        call = next((called[module] for module in layer.modules() if module in called), None)
        if call is None:
            report.bypassing.append(name)
        elif call.window is not None:
            report.windows[index] = call.window
    if report.bypassing:
        report.reasons.append(f"layers that do not call the attention function: {', '.join(report.bypassing)}")


def _decoder_layers(model: PreTrainedModel, called: dict[nn.Module, _Call]) -> dict[str, nn.Module]:
    """Name -> layer, of the module list as long as the config says; of several, the one that called."""
    number = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        {f"{name}.{i}": layer for i, layer in enumerate(module)}
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == number
    ]
    calling = [one for one in lists if any(module in called for layer in one.values() for module in layer.modules())]
    return next(iter(calling or lists), {})
