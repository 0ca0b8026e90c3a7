"""What Bone adds to peft, and its undo."""

from hf_ext import compat
from hf_ext.bone_adapter import BoneConfig, BoneModel

PUBLIC = {"BoneConfig": BoneConfig, "BoneModel": BoneModel}  # so that `from peft import BoneConfig` works as it did


def add() -> str | None:
    """The enum member, peft's tables and the two old names; "native" where peft has Bone itself.

    Raises:
        RegistrationError: somebody else holds a name; then nothing is added.
    """
    if compat.has_native_bone():
        return "native"
    compat.add_peft_method("bone", PUBLIC, BoneConfig, BoneModel)
    return None


def remove() -> None:
    compat.remove_peft_method("bone", PUBLIC, BoneConfig, BoneModel)
