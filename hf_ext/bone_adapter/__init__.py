"""Bone: block-affine adapters (arXiv 2409.15371), which PEFT shipped from 0.14 to 0.18."""

from typing import TYPE_CHECKING, Any

from hf_ext import compat

if compat.has_native_bone():  # that PEFT's own classes; the functions on files work beside them
    from peft.tuners.bone import BoneConfig, BoneLayer, BoneLinear, BoneModel
else:
    from hf_ext.bone_adapter.config import BoneConfig
    from hf_ext.bone_adapter.layer import BoneLayer, BoneLinear
    from hf_ext.bone_adapter.model import BoneModel

if TYPE_CHECKING:
    from hf_ext.bone_adapter.check import CheckpointReport, check_checkpoint
    from hf_ext.bone_adapter.convert import convert_to_miss, from_miss, upgrade_checkpoint
    from hf_ext.bone_adapter.hotswap import hotswap_adapter
    from hf_ext.bone_adapter.hub import push_to_hub
    from hf_ext.bone_adapter.lora import LoraExport, convert_to_lora

__all__ = [
    "BoneConfig",
    "BoneLayer",
    "BoneLinear",
    "BoneModel",
    "CheckpointReport",
    "LoraExport",
    "check_checkpoint",
    "convert_to_lora",
    "convert_to_miss",
    "from_miss",
    "hotswap_adapter",
    "push_to_hub",
    "upgrade_checkpoint",
]

# Read on first use: every `import peft` imports this package.
_HOME = {
    "CheckpointReport": "check",
    "LoraExport": "lora",
    "check_checkpoint": "check",
    "convert_to_lora": "lora",
    "convert_to_miss": "convert",
    "from_miss": "convert",
    "hotswap_adapter": "hotswap",
    "push_to_hub": "hub",
    "upgrade_checkpoint": "convert",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"hf_ext.bone_adapter.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hf_ext.bone_adapter' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
