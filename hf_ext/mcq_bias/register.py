"""What the tools for multiple-choice bias add to their hosts, and its undo."""

from hf_ext import compat
from hf_ext.mcq_bias import METRIC


def add_to_evaluate() -> None:
    """The metric "anchored_mcq_bias"."""
    compat.wrap_evaluate_factory(METRIC, f"hf_ext.mcq_bias.{METRIC}.{METRIC}")


def remove_from_evaluate() -> None:
    compat.unwrap_evaluate_factory()


def add_to_transformers() -> None:
    """The attention "mcq_recalibrated", and the host's eager mask under the same name: without it, causality is lost.

    Raises:
        RegistrationError: somebody else holds the name; then nothing is added.
    """
    compat.claim_all(_attention_entries(), host="transformers")


def remove_from_transformers() -> None:
    compat.release_all(_attention_entries(), host="transformers")


def _attention_entries() -> list[compat.Entry]:
    from transformers.masking_utils import eager_mask

    from hf_ext.mcq_bias.attention import NAME, recalibrated_attention_forward

    functions = (recalibrated_attention_forward, eager_mask)
    return [(table, NAME, function) for table, function in zip(compat.attention_tables(), functions, strict=True)]
