"""Where the metric's folder lies."""

from pathlib import Path

from hf_ext.mcq_bias.words import check_word

METRICS = ("anchored_mcq_bias",)


def metric_path(name: str) -> str:
    """The folder of a metric of this package, for `evaluate.load(metric_path(name))`: it needs no registration.

    Raises:
        ValueError: there is no such metric, with the nearest one.
    """
    check_word("name", name, METRICS)
    return str(Path(__file__).parent / name)
