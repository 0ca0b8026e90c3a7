"""Published methods behind the names that HuggingFace users already type.

Importing this package imports no torch and no host library. It arms the import hooks of `hf_ext._autoload`, so that
each host gets our names as soon as it is imported; hosts that are already there get them at once.
"""

from __future__ import annotations

import sys

from hf_ext import _autoload

TYPE_CHECKING = False  # importing typing would cost more than this whole package
if TYPE_CHECKING:
    from typing import Any

    from hf_ext import anchor_attention, bone_adapter, importance_weights, mcq_bias, ofq_quantizer
    from hf_ext.anchor_attention import AnchorCollator, AnchorPacking
    from hf_ext.bone_adapter import BoneConfig, BoneLinear, BoneModel
    from hf_ext.importance_weights import ImportanceWeights
    from hf_ext.mcq_bias import metric_path
    from hf_ext.ofq_quantizer import OFQConfig
    from hf_ext.registry import RegistrationError, register, status, unregister

__version__ = "0.1.0"

__all__ = [
    "AnchorCollator",
    "AnchorPacking",
    "BoneConfig",
    "BoneLinear",
    "BoneModel",
    "ImportanceWeights",
    "OFQConfig",
    "RegistrationError",
    "anchor_attention",
    "bone_adapter",
    "importance_weights",
    "mcq_bias",
    "metric_path",
    "ofq_quantizer",
    "register",
    "status",
    "unregister",
]

_HOME = {
    "AnchorCollator": "hf_ext.anchor_attention",
    "AnchorPacking": "hf_ext.anchor_attention",
    "BoneConfig": "hf_ext.bone_adapter",
    "BoneLinear": "hf_ext.bone_adapter",
    "BoneModel": "hf_ext.bone_adapter",
    "ImportanceWeights": "hf_ext.importance_weights",
    "OFQConfig": "hf_ext.ofq_quantizer",
    "RegistrationError": "hf_ext.registry",
    "metric_path": "hf_ext.mcq_bias",
    "register": "hf_ext.registry",
    "status": "hf_ext.registry",
    "unregister": "hf_ext.registry",
}
_PACKAGES = ("anchor_attention", "bone_adapter", "importance_weights", "mcq_bias", "ofq_quantizer")


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name in _PACKAGES:
        return import_module(f"hf_ext.{name}")
    raise AttributeError(f"module 'hf_ext' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _torch_is_importing_us() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and getattr(torch.__spec__, "_initializing", False)


# torch loads this package to reach the entry point; that call arms by itself, and HF_EXT_AUTOLOAD may forbid it.
if not _torch_is_importing_us():
    _autoload.arm("import")
