"""Anchored answers (arXiv 2405.03205): measure, locate and repair a model's bias for an option's position."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ext.mcq_bias.attribution import attribute
    from hf_ext.mcq_bias.bias import bias_metrics
    from hf_ext.mcq_bias.contributions import BiasAttribution
    from hf_ext.mcq_bias.metric import AnchoredMCQBias
    from hf_ext.mcq_bias.mitigation import mitigate
    from hf_ext.mcq_bias.path import metric_path
    from hf_ext.mcq_bias.prompts import format_mcq
    from hf_ext.mcq_bias.recalibration import RecalibrationConfig, recalibrate_attention
    from hf_ext.mcq_bias.report import MitigationReport, mitigation_report
    from hf_ext.mcq_bias.saving import push_to_hub, save_mitigation
    from hf_ext.mcq_bias.scoring import ChoiceScores, score_choices

__all__ = [
    "AnchoredMCQBias",
    "BiasAttribution",
    "ChoiceScores",
    "MitigationReport",
    "RecalibrationConfig",
    "attribute",
    "bias_metrics",
    "format_mcq",
    "metric_path",
    "mitigate",
    "mitigation_report",
    "push_to_hub",
    "recalibrate_attention",
    "save_mitigation",
    "score_choices",
]

# Read on first use: the metric needs numpy alone, the rest needs torch.
_HOME = {
    "AnchoredMCQBias": "metric",
    "BiasAttribution": "contributions",
    "ChoiceScores": "scoring",
    "MitigationReport": "report",
    "RecalibrationConfig": "recalibration",
    "attribute": "attribution",
    "bias_metrics": "bias",
    "format_mcq": "prompts",
    "metric_path": "path",
    "mitigate": "mitigation",
    "mitigation_report": "report",
    "push_to_hub": "saving",
    "recalibrate_attention": "recalibration",
    "save_mitigation": "saving",
    "score_choices": "scoring",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"hf_ext.mcq_bias.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hf_ext.mcq_bias' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
