"""What is quantised, and to how many bits."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_ext.checks import check_flag, check_word, is_number, refuse_unknown

WEIGHT_BITS = (2, 3, 4)
ACTIVATION_BITS = tuple(range(2, 9))
SCALES = ("token", "tensor")


@dataclass
class OFQConfig(QuantizationConfigMixin):
    """Configuration of the OFQ quantiser (arXiv 2302.02210); written as `"quant_method": "ofq"`.

    Args:
        w_bits: bits of the weights of the blocks, 2 to 4 (StatsQ: a scale a row from the row's mean).
        a_bits: bits of the activations, those inside the attention too, 2 to 8 (LSQ, a learnable scale).
        qk_reparam: quantise the product W_q^T W_k instead of its factors (QKR). It has C columns where W_k
            has head_dim: 1.2 times the multiplications of a DeiT-T block, 2 times those of a DeiT-B block.
        activation_scale: "token" learns a scale a token, which fixes the number of tokens; "tensor" a single one.
        boundary_bits: 8 quantises the patch embedding and the heads to 8 bits (LSQ, a learnable scale a row); None
            leaves them as they are.
        skip_modules: patterns (fnmatch) over the names of linear layers and convolutions to leave as they are.
        weight_scale_coefficient: scale of a row in units of its mean |w|. For Gaussian weights 2.5, 2.95 and 3.35 have
            the smallest error at 2, 3 and 4 bits (relative 0.119, 0.0375, 0.0116, against 0.137, 0.0705, 0.049 at 2).
        reference_compat: two habits of the published code: QKR without the term of the query's bias, and no annealing
            of W_q and W_k under QKR. For comparisons only.

    Raises:
        ValueError: naming the value, what is allowed and the nearest match.
    """

    quant_method: str = field(default="ofq", init=False)
    w_bits: int = 2
    a_bits: int = 2
    qk_reparam: bool = False
    activation_scale: Literal["token", "tensor"] = "token"
    boundary_bits: int | None = 8
    skip_modules: Sequence[str] = ()
    weight_scale_coefficient: float = 2.0
    reference_compat: bool = False

    def __post_init__(self) -> None:
        self._check_bits()
        for name in ("qk_reparam", "reference_compat"):
            check_flag(name, getattr(self, name))
        check_word("activation_scale", self.activation_scale, SCALES)
        coefficient = self.weight_scale_coefficient
        if not is_number(coefficient) or coefficient <= 0:
            raise ValueError(f"weight_scale_coefficient must be a positive number, not {coefficient!r}")
        patterns = self.skip_modules
        if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"skip_modules must be a list of patterns over module names, not {patterns!r}")
        self.skip_modules = tuple(patterns)

    def _check_bits(self) -> None:
        if type(self.w_bits) is not int or self.w_bits not in WEIGHT_BITS:
            raise ValueError(
                f"w_bits={self.w_bits!r} is none of 2, 3, 4: StatsQ is not defined for 1 bit, and from 5 bits on its "
                "scale limits it to an error of 3.6 %; leave such layers out with skip_modules, or quantise the model "
                "with a method for 8 bits"
            )
        if type(self.a_bits) is not int or self.a_bits not in ACTIVATION_BITS:
            raise ValueError(f"a_bits={self.a_bits!r} is no integer from 2 to 8")
        if self.boundary_bits is not None and (type(self.boundary_bits) is not int or self.boundary_bits != 8):
            raise ValueError(
                f"boundary_bits={self.boundary_bits!r} is neither 8 nor None (first and last layer as they are)"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON knows them."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return values | {"skip_modules": list(self.skip_modules)}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same, for `to_json_string`: transformers 4 leaves it to its subclasses."""
        return self.to_dict()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A configuration from its dict; keywords that are fields come on top.

        Raises:
            ValueError: a key that is no field, with the nearest one.
        """
        known = [option.name for option in fields(cls) if option.init]
        values = config_dict | {name: kwargs.pop(name) for name in known if name in kwargs}
        method = values.pop("quant_method", "ofq")
        if method != "ofq":
            raise ValueError(f"quant_method={method!r} is not 'ofq'")
        refuse_unknown(values, known, "OFQConfig", "field")
        config = cls(**values)
        return (config, kwargs) if return_unused_kwargs else config
