"""Gradients by torch on a device: the sums of the CPU's kernels to rounding, and the same on every run.

The code runs on any device; here on the CPU, and on CUDA where there is one.
"""

from itertools import pairwise

import numpy as np
import pytest
import torch

from hf_ext import ImportanceWeights
from hf_ext.importance_weights import device_sums
from hf_ext.importance_weights.device_sums import DeviceSums
from hf_ext.importance_weights.sums import Sums

ITEMS = 50
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SCALES = (2.0**45, 2.0**40)


def ragged(seed=0, lists=120, longest=70):
    """offsets, items, utilities of lists of 0 to `longest` items."""
    draw = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(draw.integers(0, longest + 1, lists))])
    items = draw.integers(0, ITEMS, offsets[-1]).astype(np.int32)
    return offsets, items, draw.normal(size=offsets[-1])


def both(device, dtype="float64", k=5, threads=1):
    arguments = *ragged(), ITEMS, k, np.dtype(dtype), threads
    return DeviceSums(*arguments, torch.device(device)), Sums(*arguments)


def weights(seed=1):
    draw = np.random.default_rng(seed).random(ITEMS)
    draw[:3], draw[3:6] = 0, 1
    return draw


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-11), ("float32", 3e-5)])
@pytest.mark.parametrize("rows", [None, np.array([3, 70, 5, 119])], ids=["all", "some"])
@pytest.mark.parametrize("tail", [0.0, 0.02], ids=["whole", "cut"])
def test_sums_are_those_of_the_kernels(device, dtype, tolerance, rows, tail):
    mine, theirs = (sums.gradients(weights(), SCALES, tail, rows) for sums in both(device, dtype))
    assert np.abs(mine[0] - theirs[0]).max() / SCALES[0] <= tolerance
    assert abs(mine[1] - theirs[1]) / SCALES[1] <= 30 * tolerance
    assert mine[2] == pytest.approx(theirs[2], rel=1e-5)
    assert (mine[2] > 0) == (tail > 0)


@pytest.mark.parametrize("device", DEVICES)
def test_the_size_of_batches_changes_no_bit(device, monkeypatch):
    sums, _ = both(device)
    whole = sums.gradients(weights(), SCALES, 0.02)
    monkeypatch.setattr(device_sums, "BYTES_AT_ONCE", 1 << 14)
    pieces = sums.gradients(weights(), SCALES, 0.02)
    assert (whole[0] == pieces[0]).all()
    assert whole[1:] == pieces[1:]


def test_what_stays_on_the_cpu_is_told():
    mine, theirs = both("cpu")
    with pytest.warns(UserWarning, match="Shapley values are computed on the CPU"):
        assert (mine.shapley_values(SCALES[0]) == theirs.shapley_values(SCALES[0])).all()
    with pytest.warns(UserWarning, match="groups as a whole are computed on the CPU"):
        assert (mine.group_gradients(weights(), SCALES)[0] == theirs.group_gradients(weights(), SCALES)[0]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"epsilon": 0.02}, {"method": "banzhaf"}, {"group_column": "source"}], ids=str)
def test_a_fit_on_cuda_is_that_of_the_cpu(options):
    from accelerate import Accelerator

    offsets, items, utilities = ragged()
    pieces = [slice(a, b) for a, b in pairwise(offsets)]
    rows = {
        "retrieved": [items[piece].tolist() for piece in pieces],
        "utility": [utilities[piece].tolist() for piece in pieces],
        "source": [(items[piece] % 7).tolist() for piece in pieces],
    }
    accelerator = Accelerator()
    assert accelerator.device.type == "cuda"
    found = [
        ImportanceWeights(k=5, epochs=10, **options).fit(rows, where, progress=False).weights
        for where in (accelerator, accelerator, None)
    ]
    assert (found[0] == found[1]).all()
    assert np.abs(found[0] - found[2]).max() < 1e-10
