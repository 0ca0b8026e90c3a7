"""AnchorAttention (arXiv 2411.13476): packed documents that share one anchor token and nothing else.

`attn_implementation="anchor"` in transformers, on rows made by `AnchorPacking`. Not the inference method of the same
name (arXiv 2505.23520).

Reading order: `reference` (the definition), `segments`, `engines` and `choice` (the operation, and who computes it:
`sdpa`, `varlen`, `flex`, `dense`), `mask`, `backend`, `decoding`, `hooks`, `compiled` (what transformers calls),
`packing`, `collator`, `continuous` (rows and positions), `support`, `models`, `check` (which models), `rope` and
`drift` (how precisely).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_ext.anchor_attention.choice import EngineStatus, available_engines, use_engine
from hf_ext.anchor_attention.collator import AnchorCollator
from hf_ext.anchor_attention.engines import anchor_attention
from hf_ext.anchor_attention.packing import AnchorPacking
from hf_ext.anchor_attention.support import AnchorUnsupportedError

if TYPE_CHECKING:
    from hf_ext.anchor_attention.check import ModelReport, check_model
    from hf_ext.anchor_attention.drift import RopeDrift, rope_drift
    from hf_ext.anchor_attention.rope import RopeFinding, RopePrecision, check_rope_precision

__all__ = [
    "AnchorCollator",
    "AnchorPacking",
    "AnchorUnsupportedError",
    "EngineStatus",
    "ModelReport",
    "RopeDrift",
    "RopeFinding",
    "RopePrecision",
    "anchor_attention",
    "available_engines",
    "check_model",
    "check_rope_precision",
    "rope_drift",
    "use_engine",
]

# These look at models, and so import transformers; what stands above needs torch alone.
_OF_MODELS = {
    "ModelReport": "check",
    "RopeDrift": "drift",
    "RopeFinding": "rope",
    "RopePrecision": "rope",
    "check_model": "check",
    "check_rope_precision": "rope",
    "rope_drift": "drift",
}


def __getattr__(name: str) -> Any:
    if name in _OF_MODELS:
        return getattr(import_module(f"{__name__}.{_OF_MODELS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
