"""The forms of Bone at any size that they allow, in whole and by a few rows or tokens, against the loops."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_ext.bone_adapter import kernels, ops, reference

small = settings(max_examples=60, deadline=None, derandomize=True, database=None)
fewer = settings(small, max_examples=35)


@contextmanager
def at_most(entries: int) -> Iterator[None]:
    """A temporary of the forms holds no more entries."""
    former, kernels._CPU_CHUNK = kernels._CPU_CHUNK, entries
    try:
        yield
    finally:
        kernels._CPU_CHUNK = former


class Problem:
    """A weight, one to three forms with their blocks, inputs of any leading shape, and a gradient for the output."""

    def __init__(self, draw: st.DrawFn, forms: st.SearchStrategy) -> None:
        self.names = draw(st.lists(forms, min_size=1, max_size=3))
        unit = draw(st.sampled_from([1, 2, 3, 6]))  # every r of a block-affine form divides it, and it both features
        width, out = (unit * draw(st.integers(1, 3)) for _ in range(2))
        sizes = [self._size(draw, name, unit) for name in self.names]
        if set(self.names) == {"tile"}:
            width, out = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
        self.weight = self.normal(out, width)
        self.bias = self.normal(out) if draw(st.booleans()) else None
        shapes = [ops.block_shape(name, r, width, out) for name, r in zip(self.names, sizes, strict=True)]
        self.blocks = [self.normal(*shape).mul_(0.3) for shape in shapes]
        self.x = self.normal(*draw(st.sampled_from([(), (0,), (1,), (5,), (2, 3), (3, 1, 2)])), width)
        self.chunk = draw(st.sampled_from([1, 7, 60, 2**19]))

    def _size(self, draw: st.DrawFn, name: str, unit: int) -> int:
        if name == "tile":
            return draw(st.integers(1, 9))
        divisors = [r for r in range(1, unit + 1) if unit % r == 0]
        return draw(st.sampled_from(divisors))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @property
    def steps(self) -> list[tuple[str, torch.Tensor]]:
        return list(zip(self.names, self.blocks, strict=True))

    def results(self, function: Any) -> list[torch.Tensor]:
        """Output, and gradients of everything that goes in, for one and the same gradient of the output."""
        inputs = [tensor.clone().requires_grad_() for tensor in (self.x, self.weight, *self.blocks)]
        bias = None if self.bias is None else self.bias.clone().requires_grad_()
        x, weight, *blocks = inputs
        y = function(x, weight, bias, list(zip(self.names, blocks, strict=True)))
        g = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        wanted = inputs if bias is None else [*inputs, bias]
        return [y.detach(), *torch.autograd.grad(y, wanted, g)]


problems = st.composite(Problem)


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def around_the_layer(x: Any, weight: Any, bias: Any, steps: list[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """Tile and row form as an adapted layer uses them, the last step outermost."""
    later = []
    for form, block in reversed(steps):
        if form == "tile":
            later.append((x, block))
        else:
            x, shared = ops.row_forward(x, block)
            later.append((shared, None))
    y = F.linear(x, weight, bias)
    for value, block in later:
        y = ops.add_tiled(y, value) if block is None else ops.tile_forward(y, value, block)
    return y


@small
@given(problems(st.sampled_from(ops.FORMS)))
def test_forms_on_the_weight_are_the_loops(problem):
    with at_most(problem.chunk):
        same(problem.results(ops.affine_linear), problem.results(reference.linear))


@small
@given(problems(st.sampled_from(["tile", "bat_row"])))
def test_forms_around_the_layer_are_the_loops(problem):
    with at_most(problem.chunk):
        same(problem.results(around_the_layer), problem.results(reference.linear))


def test_gradient_through_a_row_form_of_size_one_onto_a_bat():
    x, weight = torch.randn(3, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    bat = torch.randn(1, 2, 2, dtype=torch.float64, requires_grad=True)
    row = torch.randn(4, 1, 1, dtype=torch.float64, requires_grad=True)
    steps = [("bat", bat), ("bat_row", row)]
    expected = torch.autograd.grad(reference.linear(x, weight, None, steps).sum(), [bat, row])
    same(list(torch.autograd.grad(ops.affine_linear(x, weight, None, steps).sum(), [bat, row])), list(expected))


@fewer
@given(problems(st.sampled_from(ops.FORMS)))
def test_weights_are_updated_as_in_the_loops_and_restored(problem):
    before = copy.deepcopy(problem)
    weight = problem.weight
    with at_most(problem.chunk):
        for form, block in problem.steps:
            expected = reference.FORMS[form](weight, block)
            new = ops.updated_weight(form, weight, block)
            same([new], [expected])
            if form == "tile" or torch.linalg.cond(torch.eye(block.shape[-1]) + block).max() < 1e4:
                same([ops.restored_weight(form, new, block)], [weight])
            weight = expected
    assert torch.equal(problem.weight, before.weight)
    assert all(map(torch.equal, problem.blocks, before.blocks))


@fewer
@given(problems(st.sampled_from(["bat", "bat_row"])))
def test_several_blocks_of_one_form_are_one(problem):
    form, r = problem.names[0], problem.blocks[0].shape[-1]
    blocks = [block for name, block in problem.steps if name == form and block.shape[-1] == r]
    one_by_one = problem.weight
    for block in blocks:
        one_by_one = ops.updated_weight(form, one_by_one, block)
    same([ops.updated_weight(form, problem.weight, ops.composed(blocks))], [one_by_one])


@small
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.sampled_from(["bat", "bat_row"]))
def test_an_r_is_refused_exactly_when_it_does_not_divide_and_what_is_named_does(r, width, out, form):
    if width % r == out % r == 0:
        assert ops.block_shape(form, r, width, out) == ((out if form == "bat" else width) // r, r, r)
        return
    with pytest.raises(ValueError, match=f"r={r} does not divide") as caught:
        ops.block_shape(form, r, width, out)
    named = str(caught.value).partition("near by, ")[2].partition(" would")[0].split(", ")
    assert all(width % int(near) == out % int(near) == 0 for near in named)
