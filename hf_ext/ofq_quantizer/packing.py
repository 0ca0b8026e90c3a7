"""Codes of b bits as bytes: each row a little-endian stream of bits, padded to whole bytes."""

import torch
from torch import Tensor

_WEIGHT_OF_BIT = tuple(2**bit for bit in range(8))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes in [-2^(bits-1), 2^(bits-1) - 1] (rows, columns) -> uint8 (rows, ceil(columns bits / 8)).

    The lowest bit of a row's first code is the lowest bit of its first byte; codes are stored plus 2^(bits-1).

    Raises:
        ValueError: bits outside 1 .. 8, a code that is no integer or outside its range, or no matrix.
    """
    _check_bits(bits)
    n = 2 ** (bits - 1)
    if codes.dim() != 2:
        raise ValueError(f"codes must be (rows, columns), not {tuple(codes.shape)}")
    if codes.is_floating_point() and (fractions := codes.remainder(1) != 0).any():
        raise ValueError(f"codes are integers, and {codes[fractions][0].item()} is none")
    if codes.numel() and not -n <= int(codes.min()) <= int(codes.max()) < n:
        raise ValueError(f"codes of {bits} bits are {-n} .. {n - 1}, and these are {codes.min()} .. {codes.max()}")
    stream = _bits(codes.to(torch.int16) + n, bits).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 8))
    return (stream.unflatten(1, (-1, 8)) * stream.new_tensor(_WEIGHT_OF_BIT)).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The undo of `pack_codes`: uint8 (rows, ceil(columns bits / 8)) -> int8 codes (rows, columns).

    Raises:
        ValueError: bits outside 1 .. 8, or another number of bytes than so many columns take.
    """
    _check_bits(bits)
    if packed.dim() != 2 or packed.shape[1] != -(-columns * bits // 8):
        raise ValueError(
            f"{columns} codes of {bits} bits take {-(-columns * bits // 8)} bytes a row, and this is a tensor "
            f"{tuple(packed.shape)}"
        )
    stream = _bits(packed.to(torch.int16), 8).flatten(1)[:, : columns * bits].unflatten(1, (columns, bits))
    codes = (stream * stream.new_tensor(_WEIGHT_OF_BIT[:bits])).sum(-1, dtype=torch.int16)
    return (codes - 2 ** (bits - 1)).to(torch.int8)


def _bits(values: Tensor, count: int) -> Tensor:
    """(..., n) -> (..., n, count), the lowest bit first."""
    return (
        values.unsqueeze(-1)
        .bitwise_right_shift(torch.arange(count, dtype=values.dtype, device=values.device))
        .bitwise_and(1)
    )


def _check_bits(bits: int) -> None:
    if type(bits) is not int or not 1 <= bits <= 8:
        raise ValueError(f"bits={bits!r} is no integer from 1 to 8")
