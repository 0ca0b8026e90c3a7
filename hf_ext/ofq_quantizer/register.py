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


def add_to_transformers() -> None:
    """The quantiser "ofq" and its configuration.

    Raises:
        RegistrationError: somebody else holds the name; then nothing is added.
    """
    compat.add_quantizer("ofq", *_classes())


def remove_from_transformers() -> None:
    compat.remove_quantizer("ofq", *_classes())


def _classes() -> tuple[type, type]:
    from hf_ext.ofq_quantizer.config import OFQConfig  # imports transformers, for which timm need not wait
    from hf_ext.ofq_quantizer.hf_quantizer import OFQHfQuantizer

    return OFQConfig, OFQHfQuantizer
