"""Codes as a stream of bits: against the integer of arbitrary length that a row is."""

import pytest
import torch

from hf_ext.ofq_quantizer import pack_codes, unpack_codes


def codes(rows, columns, bits):
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator).to(torch.int8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "shape", [(4, 16), (3, 13), (1, 1), (5, 0), (0, 7)], ids=lambda shape: "x".join(map(str, shape))
)
def test_a_row_is_one_little_endian_number(shape, bits):
    rows, columns = shape
    original = codes(rows, columns, bits)
    packed = pack_codes(original, bits)
    assert (packed.dtype, packed.shape) == (torch.uint8, (rows, -(-columns * bits // 8)))
    for row, stored in zip(original.tolist(), packed, strict=True):
        number = sum((code + 2 ** (bits - 1)) << (bits * place) for place, code in enumerate(row))
        assert int.from_bytes(bytes(stored.tolist()), "little") == number
    unpacked = unpack_codes(packed, bits, columns)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, original)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: pack_codes(torch.tensor([[0, 2]], dtype=torch.int8), 2), "-2 .. 1, and these are 0 .. 2"),
        (lambda: pack_codes(torch.tensor([[-3, 0]], dtype=torch.int8), 2), "-2 .. 1, and these are -3 .. 0"),
        (lambda: pack_codes(torch.zeros(3, dtype=torch.int8), 2), r"\(rows, columns\), not \(3,\)"),
        (lambda: pack_codes(codes(2, 4, 2), 9), "bits=9"),
        (lambda: pack_codes(codes(2, 4, 2), True), "bits=True"),
        (lambda: unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 2, 9), r"9 codes of 2 bits take 3 .*\(2, 4\)"),
        (lambda: unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 0, 9), "bits=0"),
    ],
    ids=["above", "below", "vector", "too_many_bits", "flag", "other_columns", "no_bits"],
)
def test_refusals(call, said):
    with pytest.raises(ValueError, match=said):
        call()
