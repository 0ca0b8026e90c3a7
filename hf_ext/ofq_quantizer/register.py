"""What OFQ adds to timm and to transformers, and its undo."""

from hf_ext import compat
from hf_ext.ofq_quantizer.timm_models import entry_points


def add_to_timm() -> None:
    """The 24 recipes.

    Raises:
        RegistrationError: somebody else holds a name; then nothing is added.
    """
    compat.add_timm_models(entry_points())


def remove_from_timm() -> None:
    compat.remove_timm_models(entry_points())
