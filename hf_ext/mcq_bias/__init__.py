"""Anchored answers (arXiv 2405.03205): measure, locate and repair a model's bias for an option's position."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_ext.mcq_bias.attribution import attribute
    from hf_ext.mcq_bias.bias import bias_metrics
    from hf_ext.mcq_bias.contributions import BiasAttribution
    from hf_ext.mcq_bias.examples import format_mcq, option_positions
    from hf_ext.mcq_bias.metric import AnchoredMCQBias
    from hf_ext.mcq_bias.mitigation import mitigate
    from hf_ext.mcq_bias.recalibration import RecalibrationConfig, recalibrate_attention
    from hf_ext.mcq_bias.report import MitigationReport, mitigation_report
    from hf_ext.mcq_bias.saving import load_mitigation, push_to_hub, save_mitigation
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
    "load_mitigation",
    "metric_path",
    "mitigate",
    "mitigation_report",
    "option_positions",
    "push_to_hub",
    "recalibrate_attention",
    "save_mitigation",
    "score_choices",
]

METRIC = "anchored_mcq_bias"

# Read on first use: the metric needs numpy alone, the rest needs torch.
_HOME = {
    "AnchoredMCQBias": "metric",
    "BiasAttribution": "contributions",
    "ChoiceScores": "scoring",
    "MitigationReport": "report",
    "RecalibrationConfig": "recalibration",
    "attribute": "attribution",
    "bias_metrics": "bias",
    "format_mcq": "examples",
    "load_mitigation": "saving",
    "mitigate": "mitigation",
    "mitigation_report": "report",
    "option_positions": "examples",
    "push_to_hub": "saving",
    "recalibrate_attention": "recalibration",
    "save_mitigation": "saving",
    "score_choices": "scoring",
}


def metric_path(name: str) -> str:
    """The folder of a metric of this package, for `evaluate.load(metric_path(name))`: it needs no registration.

    Raises:
        ValueError: there is no such metric, with the nearest one.
    """
    from pathlib import Path

    from hf_ext.checks import check_word

    check_word("name", name, [METRIC])
    return str(Path(__file__).parent / name)


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _HOME:
        return getattr(import_module(f"hf_ext.mcq_bias.{_HOME[name]}"), name)
    raise AttributeError(f"module 'hf_ext.mcq_bias' has no attribute {name!r}; it offers {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
