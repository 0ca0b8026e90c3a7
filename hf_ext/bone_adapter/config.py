"""What a Bone adapter is: its size, its form, and where it goes."""

from dataclasses import InitVar, dataclass, fields
from typing import Any, Literal

from peft.config import PeftConfig

from hf_ext import compat
from hf_ext.bone_adapter.checkpoint import BIAS, form_of, meant_options, option_problems
from hf_ext.checks import check_word, listed

INIT_WEIGHTS = (True, False, "bat", "bat_row")


@dataclass
class BoneConfig(PeftConfig):
    """Configuration of a `BoneModel` (arXiv 2409.15371); written as `"peft_type": "BONE"`.

    Args:
        r: block size, which is also the rank of the tile form. Any value for the tile form; for "bat" and "bat_row" it
            has to divide in_features and out_features of every target.
        target_modules: names, or the end of names, of the layers to adapt; a string is a regular expression, and
            "all-linear" means all but the output layer. None: PEFT's choice for LoRA by model type.
        exclude_modules: names, or a regular expression, of layers to leave alone.
        init_weights: the form, and how it starts. True: tile form ("Bone" from version 4 of the paper on), zeros.
            False: tile form, Kaiming-uniform, so that the adapter changes the model from the start (for tests).
            "bat": block-affine, one block per block of outputs (versions 1 to 3 of the paper; "Bat-Col" there), zeros.
            "bat_row": block-affine, one block per block of inputs ("Bat-Row"), zeros.
        bias: which biases are trained and saved: "none", "all" of the model, or "bone_only", those of the targets.
        layers_to_transform: indices of the layers that are adapted; needs a list of target_modules.
        layers_pattern: name of the list that holds those layers, where PEFT does not find it by itself.
        modules_to_save: other modules that are trained and saved whole, such as a new head.
        target_parameters: always refused; Bone adapts layers, not bare parameters such as fused experts.

    There is no alpha, no dropout and no scaling in this method.

    Raises:
        ValueError: naming the value, what is allowed and the nearest match.
        TypeError: an option that there is not, with the nearest one.
    """

    r: int = 64
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    init_weights: bool | Literal["bat", "bat_row"] = True
    bias: Literal["none", "all", "bone_only"] = "none"
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    # Not a field, so that it never reaches a file; the host itself sets the attribute for models with fused experts.
    target_parameters: InitVar[Any] = None

    def __new__(cls, *_: Any, **options: Any) -> "BoneConfig":
        # From a file, PEFT drops options that raise Python's own TypeError, and warns of a newer version.
        for name, near in meant_options(options).items():
            if near is not None:
                raise TypeError(f"BoneConfig has no option {name!r}; did you mean {near!r}?")
        return super().__new__(cls)

    def __post_init__(self, target_parameters: Any) -> None:
        super().__post_init__()
        self.peft_type = compat.peft_type("BONE")
        self._check_values()
        self._check_options(target_parameters)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))

    @property
    def form(self) -> Literal["tile", "bat", "bat_row"]:
        """Which of the three update rules the blocks follow."""
        return form_of(self.init_weights)

    def _check_values(self) -> None:
        if not (type(self.r) is int and self.r >= 1):
            raise ValueError(f"r must be an integer of at least 1, not {self.r!r}")
        # By type as well: 1 == True, and a file that says 1 was not written by PEFT.
        if not any(type(self.init_weights) is type(value) and self.init_weights == value for value in INIT_WEIGHTS):
            raise ValueError(f"init_weights={self.init_weights!r} is none of {listed(self.init_weights, INIT_WEIGHTS)}")
        check_word("bias", self.bias, BIAS)

    def _check_options(self, target_parameters: Any) -> None:
        options = {option.name: getattr(self, option.name) for option in fields(self)}
        if problems := option_problems(options | {"target_parameters": target_parameters}):
            raise ValueError("; ".join(problems))
