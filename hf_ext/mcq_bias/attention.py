"""An attention function that shows, and lets one alter, the weights with which the last token looks back."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from threading import RLock
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.utils import logging

from hf_ext import compat

NAME = "mcq_recalibrated"

# In `generate`: the layers whose first forward is over.
_DONE: ContextVar[set[int] | None] = ContextVar("done", default=None)

_log = logging.get_logger(__name__)


class LastQuery(NamedTuple):
    """How the last token of each row looks back, in one layer of a forward over whole prompts.

    weights: (B, H, T), rows of the softmax, before dropout. values: (B, H, T, D), grouped heads repeated. hidden:
    (B, T) or (1, T) bool, True where the mask hides a position (padding, or beyond the window); None without a mask.
    """

    layer: int
    weights: Tensor
    values: Tensor
    hidden: Tensor | None


Watcher = Callable[[LastQuery], Tensor | None]


@dataclass(frozen=True)
class _FirstForward:
    """`generate` that is watched in its first forward only: without a cache, the others are over whole texts, too.

    A bound method inside a dataclass, since copying a model binds it to the copy.
    """

    generate: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        token = _DONE.set(set())
        try:
            return self.generate(*args, **kwargs)
        finally:
            _DONE.reset(token)


@contextmanager
def watched_attention(model: nn.Module, watcher: Watcher) -> Iterator[None]:
    """Inside, `watcher` sees every layer's `LastQuery`; weights (B, H, T) that it returns are used in place of its own.

    Forwards over whole prompts only, in `generate` the first: what stands behind a cache has no watcher. The model
    computes attention eagerly, its softmax in at least float32. Its engine is found as it was afterwards, and what was
    written into its config meanwhile stays there. Watchers of several contexts follow each other, which may end in any
    order; copies of the model have none. `model` is of a family whose attention is plain: no sinks, no soft cap.

    Raises:
        RuntimeError: `hf_ext.unregister()` was called: the name of the attention function is gone.
    """
    for table in compat.attention_tables():
        if NAME not in table:
            raise RuntimeError(f"transformers has no attention {NAME!r}; call hf_ext.register() first")
    watch = _Watch(watcher)
    try:
        with _LOCK:
            watch.begin(model)
        yield
    finally:
        with _LOCK:
            watch.end()


@dataclass
class _Replaced:
    """An attribute of a module: `before` is empty where the module had none of its own."""

    module: nn.Module
    name: str
    before: tuple[Any, ...]
    value: Any


@dataclass(eq=False)
class _Watch:
    """One context, and what it replaced: {(id of the module, name of the attribute): ...}."""

    watcher: Watcher
    modules: set[int] = field(default_factory=set)
    replaced: dict[tuple[int, str], _Replaced] = field(default_factory=dict)
    configs: dict[int, dict[str, Any]] = field(default_factory=dict)  # {id: as it was put in}

    def begin(self, model: nn.Module) -> None:
        from transformers import GenerationMixin  # of which the registration of the name has no need

        _open.append(self)
        # Copies, since a config may be shared with other models, which keep their engine.
        copies: dict[int, Any] = {}
        for module in model.modules():
            config = vars(module).get("config")
            if hasattr(config, "_attn_implementation"):
                if id(config) not in copies:
                    ours = copies[id(config)] = copy.copy(config)
                    ours._attn_implementation = NAME
                    self.configs[id(ours)] = dict(vars(ours))
                self._replace(module, "config", copies[id(config)])
            if hasattr(module, "layer_idx"):
                self.modules.add(id(module))
            if isinstance(module, GenerationMixin):
                self._replace(module, "generate", _FirstForward(module.generate))

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:
        before = (vars(module)[name],) if name in vars(module) else ()
        self.replaced[id(module), name] = _Replaced(module, name, before, value)
        setattr(module, name, value)

    def end(self) -> None:
        later = _open[_open.index(self) + 1 :]
        _open.remove(self)
        for key, mine in self.replaced.items():
            above = next((watch.replaced[key] for watch in later if key in watch.replaced), None)
            if above is not None:  # it stands on what is removed here
                above.before = mine.before
            elif mine.before:
                setattr(mine.module, mine.name, *mine.before)
            else:
                delattr(mine.module, mine.name)
        self._write_back()

    def _write_back(self) -> None:
        pairs = {id(mine.value): (*mine.before, mine.value) for mine in self.replaced.values() if mine.name == "config"}
        for key, (config, ours) in pairs.items():
            found = self.configs[key]
            for name, value in vars(ours).items():
                if name not in found or found[name] is not value:
                    setattr(config, name, value)


_LOCK = RLock()  # of beginning and ending
_open: list[_Watch] = []  # in the order in which they began


def _watchers(module: nn.Module) -> tuple[Watcher, ...]:
    return tuple(watch.watcher for watch in tuple(_open) if id(module) in watch.modules)


def recalibrated_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """The function behind `attn_implementation="mcq_recalibrated"`; the model's own eager one where nobody watches.

    query (B, H, L, D), key and value (B, Hkv, T, D), where Hkv divides H; attention_mask (B or 1, 1, L, T), added to
    the scores. Returns ((B, L, H, D), weights (B, H, L, T)).
    """
    if not torch.compiler.is_compiling():
        compat.announce(NAME)
    watchers = _watchers(module)
    if not watchers:
        return compat.eager_attention(module)(module, query, key, value, attention_mask, **options)
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * compat.attention_scaling(module, options.get("scaling"), query.shape[-1])
    if attention_mask is not None:
        attention_mask = attention_mask[..., : key.shape[2]]
        scores = scores + attention_mask
    weights = scores.softmax(-1, dtype=torch.promote_types(torch.float32, scores.dtype)).to(value.dtype)
    if query.shape[2] == key.shape[2]:
        watchers = () if _is_done(module.layer_idx) else watchers
        weights = _as_watched(module.layer_idx, weights, value, attention_mask, watchers)
    elif query.shape[2] > 1:
        _log.warning_once(
            f"the {query.shape[2]} tokens of this forward stand behind a cache, or in a static one: their attention is "
            "neither shown nor altered"
        )
    weights = nn.functional.dropout(weights, options.get("dropout", 0.0), module.training)
    weights = compat.heads_masked(weights, options)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def _is_done(layer: int) -> bool:
    """Whether this is inside `generate`, and the layer had a forward in it."""
    done = _DONE.get()
    if done is None:
        return False
    was_done = layer in done
    done.add(layer)
    return was_done


def _as_watched(
    layer: int, weights: Tensor, values: Tensor, mask: Tensor | None, watchers: tuple[Watcher, ...]
) -> Tensor:
    hidden = None if mask is None else mask[:, 0, -1] <= torch.finfo(mask.dtype).min / 2
    for watcher in watchers:
        altered = watcher(LastQuery(layer, weights[:, :, -1], values, hidden))
        if altered is not None:
            weights = torch.cat([weights[:, :, :-1], altered[:, :, None]], dim=2)
    return weights
