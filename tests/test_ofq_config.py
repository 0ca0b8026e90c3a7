"""The configuration: what it takes, what it says of what it does not take, and its way through JSON."""

import json

import pytest
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_ext
from hf_ext.ofq_quantizer import OFQConfig, quantize

OTHERS = {
    "w_bits": 4,
    "a_bits": 8,
    "qk_reparam": True,
    "activation_scale": "tensor",
    "boundary_bits": None,
    "skip_modules": ["blocks.0.*"],
    "weight_scale_coefficient": 2.5,
    "reference_compat": True,
}
DEFAULTS = dict(zip(OTHERS, (2, 2, False, "token", 8, [], 2.0, False), strict=True))


def test_defaults_in_the_order_of_the_documentation():
    assert OFQConfig().to_dict() == {"quant_method": "ofq"} | DEFAULTS
    assert OFQConfig(3, 4, True, "tensor", None, ["a"], 3, True).to_dict() == {"quant_method": "ofq"} | dict(
        zip(DEFAULTS, (3, 4, True, "tensor", None, ["a"], 3, True), strict=True)
    )
    assert hf_ext.OFQConfig is OFQConfig
    assert issubclass(OFQConfig, QuantizationConfigMixin)


@pytest.mark.parametrize("values", [{}, OTHERS], ids=["defaults", "others"])
def test_round_trip_through_json(values):
    config = OFQConfig(**values)
    assert OFQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert OFQConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config
    changed = OFQConfig.from_dict({"quant_method": "ofq", "w_bits": 3}, w_bits=4)
    assert changed == OFQConfig(w_bits=4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_bits_of_activations(bits):
    assert OFQConfig(a_bits=bits).a_bits == bits


@pytest.mark.parametrize(
    "values, message",
    [
        ({"w_bits": 1}, "w_bits=1 .*2, 3, 4"),
        ({"w_bits": 5}, "w_bits=5 .*2, 3, 4.*3.6 ?%.*8"),
        ({"w_bits": 8}, "w_bits=8 "),
        ({"w_bits": "2"}, "w_bits='2' "),
        ({"w_bits": 2.5}, r"w_bits=2\.5 "),
        ({"w_bits": 2.0}, r"w_bits=2\.0 "),
        ({"w_bits": True}, "w_bits=True "),
        ({"w_bits": None}, "w_bits=None "),
        ({"a_bits": 0}, "a_bits=0 .*2 to 8"),
        ({"a_bits": 1}, "a_bits=1 .*2 to 8"),
        ({"a_bits": 9}, "a_bits=9 .*2 to 8"),
        ({"a_bits": "8"}, "a_bits='8' "),
        ({"a_bits": [2]}, r"a_bits=\[2\] "),
        ({"boundary_bits": 3.5}, r"boundary_bits=3\.5 .*8.*None"),
        ({"boundary_bits": 4}, "boundary_bits=4 .*8.*None"),
        ({"boundary_bits": False}, "boundary_bits=False "),
        ({"activation_scale": "tokn"}, "'tokn'.*'token'.*'tensor'.*did you mean 'token'"),
        ({"activation_scale": None}, "None.*'token'.*'tensor'"),
        ({"activation_scale": ["token"]}, "'token'.*'tensor'"),
        ({"weight_scale_coefficient": 0}, "weight_scale_coefficient .*positive.*0"),
        ({"weight_scale_coefficient": -1.0}, r"positive.*-1\.0"),
        ({"weight_scale_coefficient": float("nan")}, "positive.*nan"),
        ({"weight_scale_coefficient": float("inf")}, "positive.*inf"),
        ({"weight_scale_coefficient": True}, "positive.*True"),
        ({"weight_scale_coefficient": "2"}, "positive.*'2'"),
        ({"qk_reparam": 1}, "qk_reparam .*True or False.*1"),
        ({"reference_compat": "no"}, "reference_compat .*True or False.*'no'"),
        ({"skip_modules": "head"}, "skip_modules .*list.*'head'"),
        ({"skip_modules": [1]}, r"skip_modules .*list.*\[1\]"),
        ({"skip_modules": None}, "skip_modules .*list.*None"),
        ({"w_bit": 2}, "'w_bit'.*did you mean 'w_bits'"),
        ({"qk_reparametrization": True}, "'qk_reparametrization'.*did you mean 'qk_reparam'"),
        ({"zzz": 2}, "'zzz'.*'w_bits'"),
        ({"quant_method": "awq"}, "'awq'.*'ofq'"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{name}={x!r}" for name, x in value.items()),
)
def test_refused(values, message):
    with pytest.raises(ValueError, match=message):
        OFQConfig.from_dict(values)


@pytest.mark.parametrize("values", [{"w_bits": 3}, None, "ofq"])
def test_quantize_wants_a_config(values):
    with pytest.raises(TypeError, match=r"OFQConfig.*from_dict"):
        quantize(None, values)
