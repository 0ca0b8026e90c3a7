"""PEFT 0.14 to 0.18 carry a Bone of their own, and hf_ext leaves it alone: what tests of ours skip there, and why."""

from collections.abc import Iterable

import pytest

from hf_ext import compat

OURS = pytest.mark.skipif(compat.has_native_bone(), reason="this peft has Bone itself")


def ours_only(why: str) -> pytest.MarkDecorator:
    """why: what PEFT's own Bone is that ours is not, behind a comma."""
    return pytest.mark.skipif(compat.has_native_bone(), reason=f"this peft has Bone itself, {why}")


ROW_FORM = ours_only("without the row form")  # "bat_row" is another word for True there, and trains the tile form
TWO_FORMS = ours_only("which takes no two forms on one layer")


def by_form(forms: Iterable[str]) -> list:
    """Parameters of a test: those that PEFT's own Bone does not have are marked."""
    marks = {"bat_row": ROW_FORM, "mixed": TWO_FORMS}
    return [pytest.param(form, marks=marks.get(form, ())) for form in forms]
