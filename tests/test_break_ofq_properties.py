"""Codes of any shape, width and memory layout, through bytes and back; any options through JSON."""

import json
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_ext.ofq_quantizer import OFQConfig, pack_codes, unpack_codes

small = settings(max_examples=60, deadline=None, derandomize=True, database=None)
BITS = st.integers(1, 8)
SIZE = st.integers(0, 37)


@st.composite
def codes(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """Any codes; of several integer types; whole tensors, transposed ones, every second column, and one row for all."""
    bits, rows, columns = draw(BITS), draw(SIZE), draw(SIZE)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    dtype = draw(st.sampled_from([torch.int8, torch.int16, torch.int64]))
    layout = draw(st.sampled_from(["whole", "transposed", "every second", "expanded"]))
    shape = {"transposed": (columns, rows), "every second": (rows, 2 * columns), "expanded": (1, columns)}
    values = torch.randint(low, high + 1, shape.get(layout, (rows, columns)), generator=generator).to(dtype)
    ends = draw(st.sampled_from([None, low, high]))
    values = values if ends is None else torch.full_like(values, ends)
    views = {
        "transposed": lambda: values.t(),
        "every second": lambda: values[:, ::2],
        "expanded": lambda: values.expand(rows, -1),
    }
    return views.get(layout, lambda: values)(), bits


@small
@given(codes())
@example((torch.zeros(0, 0, dtype=torch.int8), 3))
def test_codes_come_back_and_take_their_bits(problem):
    original, bits = problem
    before = original.clone()
    packed = pack_codes(original, bits)
    rows, columns = original.shape
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, math.ceil(columns * bits / 8)))
    assert packed.is_contiguous()
    again = unpack_codes(packed, bits, columns)
    assert again.dtype == torch.int8
    assert torch.equal(again.to(original.dtype), original)
    assert torch.equal(original, before)


@small
@given(codes(), st.integers(0, 10**6))
def test_a_row_is_packed_as_if_it_were_alone(problem, number):
    original, bits = problem
    if len(original):
        row = number % len(original)
        assert torch.equal(pack_codes(original, bits)[row], pack_codes(original[row : row + 1], bits)[0])


@small
@given(BITS, SIZE, st.integers(0, 6), st.integers(0, 10**6))
def test_any_bytes_are_codes_in_their_range(bits, columns, rows, seed):
    """Whatever a file holds: nothing is out of range, and only the padding of a row is not seen again."""
    width = math.ceil(columns * bits / 8)
    content = torch.randint(0, 256, (rows, width), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    found = unpack_codes(content, bits, columns)
    assert found.shape == (rows, columns)
    again = pack_codes(found, bits)  # which refuses what is out of range
    unseen = width * 8 - columns * bits
    if width:
        mask = torch.full((width,), 255, dtype=torch.uint8)
        mask[-1] = 255 >> unseen
        assert torch.equal(again, content & mask)


@small
@given(codes(), st.integers(0, 10**6), st.sampled_from(["above", "below"]))
def test_one_code_out_of_range_is_refused_with_the_range(problem, place, side):
    original, bits = problem
    if not original.numel():
        return
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    spoilt = original.to(torch.int64).contiguous().clone()
    spoilt.view(-1)[place % spoilt.numel()] = high + 1 + place if side == "above" else low - 1 - place
    with pytest.raises(ValueError, match=f"codes of {bits} bits are {low} .. {high}"):
        pack_codes(spoilt, bits)


@small
@given(BITS, st.integers(0, 40), st.integers(0, 40))
def test_other_numbers_of_bytes_are_refused(bits, width, columns):
    packed = torch.zeros(2, width, dtype=torch.uint8)
    if width == math.ceil(columns * bits / 8):
        assert unpack_codes(packed, bits, columns).shape == (2, columns)
    else:
        with pytest.raises(ValueError, match=f"^{columns} codes of {bits} bits take "):
            unpack_codes(packed, bits, columns)


def test_codes_that_are_no_integers_are_refused():
    with pytest.raises(ValueError, match=r"0\.5|float|integer"):
        pack_codes(torch.tensor([[0.5, -1.5]]), 3)


# --- options


@small
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "w_bits": st.sampled_from([2, 3, 4]),
            "a_bits": st.integers(2, 8),
            "qk_reparam": st.booleans(),
            "activation_scale": st.sampled_from(["token", "tensor"]),
            "boundary_bits": st.sampled_from([8, None]),
            "skip_modules": st.lists(st.text(max_size=5), max_size=3),
            "weight_scale_coefficient": st.floats(0.01, 1e3) | st.integers(1, 9),
            "reference_compat": st.booleans(),
        },
    )
)
def test_any_options_come_back_from_json(values):
    config = OFQConfig(**values)
    again = OFQConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert {name: config.to_dict()[name] for name in values} == values
    assert OFQConfig.from_dict(json.loads(config.to_json_string())).to_dict() == config.to_dict()
