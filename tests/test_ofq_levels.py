"""StatsQ without divisions: the levels are those of a division, for every divisor."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from numba import njit

from hf_ext.ofq_quantizer import kernels, loops, ops

REACH = 4  # float32 numbers on either side of a threshold


@njit(nogil=True, error_model="numpy")
def differing(n: int, stride: int, spoil: np.float32) -> int:
    """How many of the weights around all thresholds get another level, over all divisors in [1, 2) or some of them.

    A threshold is an integer times the divisor. About 0 it is where -t - 1/2 no longer rounds to -1/2.
    """
    width = 2 * REACH + 1
    row = np.empty(2 * n * width, np.float32)
    expected, got, bits = np.empty_like(row), np.empty_like(row), row.view(np.int32)
    count = 0
    n32, high = np.float32(n), np.float32(n * (1 - 1e-6))
    for i in range(0, 2**23, stride):
        divisor = np.float32(1 + i * 2.0**-23)
        for k in range(2 * n):
            row[k * width] = np.float32(k - n if k != n else -(2.0**-25)) * divisor
            middle = bits[k * width]
            for j in range(width):
                bits[k * width + j] = middle + j - REACH
        loops._levels(row, divisor, n32, high, loops.TWO, expected)
        loops._levels_by_product(row, divisor * spoil, n32, high, loops.TWO, got)
        for c in range(row.size):
            count += expected[c] != got[c]
    return count


@pytest.mark.parametrize(("n", "stride"), [(2, 1), (4, 1), (8, 1), (128, 16)])
def test_every_divisor_has_the_levels_of_a_division(n, stride):
    assert differing(n, stride, np.float32(1)) == 0


def test_a_divisor_that_is_off_by_one_bit_is_seen():
    assert differing(2, 2**10, np.float32(1 + 2**-23)) > 2**13


def test_nothing_has_to_be_compiled():
    """As under a debugger, or where coverage is measured."""
    weight = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    code = "import torch; from hf_ext.ofq_quantizer import statsq; g = torch.Generator().manual_seed(0); "
    code += "print(statsq(torch.randn(4, 50, generator=g), 2).tolist())"
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(ops.statsq(weight, 2).tolist())


@pytest.mark.parametrize("coefficient", [2.0, 1e-38, 1e25])
@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-20, 1.0, 1e20, 1e35])
def test_quotients_beyond_float32_have_the_levels_of_a_division(monkeypatch, size, coefficient):
    weight = torch.randn(8, 300, generator=torch.Generator().manual_seed(0)) * size
    weight[:, ::3] *= 1e-30
    weight[1, 0] = 1e38
    assert_as_by_division(monkeypatch, weight, coefficient)


@pytest.mark.parametrize("exponent", [-149, -130, -126, -110, -90, -61, -59, 0, 59, 61, 90, 110, 125])
def test_remainders_beyond_float32_have_the_levels_of_a_division(monkeypatch, exponent):
    """Rows of c and its neighbours: the mean is c, and with two bits the divisor is, so that all lie at a threshold."""
    middle = 1 + torch.rand(50_000, 1, generator=torch.Generator().manual_seed(0))
    weight = middle + torch.tensor([0, 0, 1, -1, 2, -2, 3, -3]) * 2**-23
    assert_as_by_division(monkeypatch, weight * 2.0**exponent, 2.0)


def assert_as_by_division(monkeypatch, weight, coefficient):
    got = ops.statsq(weight, 2, coefficient)
    monkeypatch.setattr(kernels, "accept", lambda *tensors: False)
    expected = ops.statsq(weight, 2, coefficient)
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
