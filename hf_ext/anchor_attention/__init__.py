"""AnchorAttention (arXiv 2411.13476): packed documents that share one anchor token and nothing else.

`attn_implementation="anchor"` in transformers, on rows made by `AnchorPacking`. Not the inference method of the same
name (arXiv 2505.23520).
"""

from hf_ext.anchor_attention.choice import EngineStatus, available_engines, use_engine
from hf_ext.anchor_attention.engines import anchor_attention
from hf_ext.anchor_attention.packing import AnchorPacking
from hf_ext.anchor_attention.support import AnchorUnsupportedError

__all__ = [
    "AnchorPacking",
    "AnchorUnsupportedError",
    "EngineStatus",
    "anchor_attention",
    "available_engines",
    "use_engine",
]
