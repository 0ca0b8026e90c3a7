"""OFQ: oscillation-free quantisation of vision transformers to 2 to 4 bits (arXiv 2302.02210)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ext.ofq_quantizer.annealing import ConfidenceAnnealing, ConfidenceAnnealingCallback
    from hf_ext.ofq_quantizer.calibration import calibrate
    from hf_ext.ofq_quantizer.config import OFQConfig
    from hf_ext.ofq_quantizer.convert import activation_quantizers, full_precision, quantize
    from hf_ext.ofq_quantizer.distillation import distillation_loss, distillation_loss_func
    from hf_ext.ofq_quantizer.freezing import IntegerWeight, freeze
    from hf_ext.ofq_quantizer.integer import to_int8
    from hf_ext.ofq_quantizer.onnx_export import export_onnx
    from hf_ext.ofq_quantizer.ops import low_confidence, lsq, lsq_init, statsq, statsq_codes
    from hf_ext.ofq_quantizer.oscillation import OscillationCallback, OscillationTracker
    from hf_ext.ofq_quantizer.packed import export_fp, load_packed, push_to_hub, save_packed
    from hf_ext.ofq_quantizer.packing import pack_codes, unpack_codes
    from hf_ext.ofq_quantizer.reporting import OFQReport, report

__all__ = [
    "ConfidenceAnnealing",
    "ConfidenceAnnealingCallback",
    "IntegerWeight",
    "OFQConfig",
    "OFQReport",
    "OscillationCallback",
    "OscillationTracker",
    "activation_quantizers",
    "calibrate",
    "distillation_loss",
    "distillation_loss_func",
    "export_fp",
    "export_onnx",
    "freeze",
    "full_precision",
    "load_packed",
    "low_confidence",
    "lsq",
    "lsq_init",
    "pack_codes",
    "push_to_hub",
    "quantize",
    "report",
    "save_packed",
    "statsq",
    "statsq_codes",
    "to_int8",
    "unpack_codes",
]

# Read on first use: every `import timm` imports this package, and every model of transformers its configuration.
_HOME = {
    "ConfidenceAnnealing": "annealing",
    "ConfidenceAnnealingCallback": "annealing",
    "IntegerWeight": "freezing",
    "OFQConfig": "config",
    "OFQReport": "reporting",
    "OscillationCallback": "oscillation",
    "OscillationTracker": "oscillation",
    "activation_quantizers": "convert",
    "calibrate": "calibration",
    "distillation_loss": "distillation",
    "distillation_loss_func": "distillation",
    "export_fp": "packed",
    "export_onnx": "onnx_export",
    "freeze": "freezing",
    "full_precision": "convert",
    "load_packed": "packed",
    "low_confidence": "ops",
    "lsq": "ops",
    "lsq_init": "ops",
    "pack_codes": "packing",
    "push_to_hub": "packed",
    "quantize": "convert",
    "report": "reporting",
    "save_packed": "packed",
    "statsq": "ops",
    "statsq_codes": "ops",
    "to_int8": "integer",
    "unpack_codes": "packing",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"hf_ext.ofq_quantizer.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hf_ext.ofq_quantizer' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
