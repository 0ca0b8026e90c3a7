"""The pure functions of data importance against every subset, every order and 60-digit decimals."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from importance_oracle import by_decimals, by_orders, by_subsets, slots

from hf_ext.importance_weights import group_gradient, multilinear_gradient, reference, shapley_values

KS = [1, 2, 3, 5, 12]
EXACT = 1e-14  # against rationals
LONG = {"float64": 2e-15, "float32": 4e-7}  # against decimals, utilities of size 1
both_dtypes = pytest.mark.parametrize("dtype", ["float64", "float32"])
each_k = pytest.mark.parametrize("k", KS, ids=lambda k: f"k{k}")


def from_numpy(x):
    return np.asarray(x)


def from_torch(x):
    return torch.from_numpy(np.array(x))


both_kinds = pytest.mark.parametrize("kind", [from_numpy, from_torch], ids=["numpy", "torch"])


def some(length, seed=0, ends=False, kind="real"):
    """(utilities, probabilities): multiples of 1/1024, which every dtype holds and rationals are fast with."""
    generator = np.random.default_rng(seed)
    u = {
        "real": generator.integers(-2000, 3000, length) / 1024,
        "binary": generator.integers(0, 2, length).astype(float),
        "negative": -generator.integers(1, 2000, length) / 1024,
        "huge": generator.integers(-2000, 3000, length) * 2.0**90,
    }[kind]
    p = generator.integers(0, 1025, length) / 1024
    return u, np.where(generator.random(length) < 0.5, p > 0.5, p) if ends else p


def gap(found, exact):
    found = np.asarray(found, dtype=float)
    exact = np.array([float(x) for x in np.atleast_1d(np.asarray(exact, dtype=object)).ravel()])
    assert found.size == exact.size
    return np.abs(found.ravel() - exact).max(initial=0)


# ---------------------------------------------------------------- every subset


@each_k
@pytest.mark.parametrize("ends", [False, True], ids=["inner", "some_0_or_1"])
@pytest.mark.parametrize("length", [1, 2, 3, pytest.param(5, marks=pytest.mark.smoke), 6, 7])
@both_kinds
def test_value_and_gradient_are_those_over_all_subsets(kind, length, ends, k):
    u, p = some(length, seed=length, ends=ends)
    value, gradient = by_subsets(u, p, k)
    found = multilinear_gradient(kind(u), kind(p), k, return_value=True)
    assert gap(found[0], value) <= EXACT
    assert gap(found[1], gradient) <= EXACT
    assert gap(multilinear_gradient(kind(u), kind(p), k), gradient) <= EXACT


@each_k
def test_eight_items(k):
    u, p = some(8, seed=3, ends=True)
    assert gap(multilinear_gradient(u, p, k), by_subsets(u, p, k)[1]) <= EXACT


@pytest.mark.parametrize("utilities", ["binary", "negative", "huge"])
@each_k
def test_kinds_of_utilities(k, utilities):
    u, p = some(6, seed=8, kind=utilities)
    value, gradient = by_subsets(u, p, k)
    found = multilinear_gradient(u, p, k, return_value=True)
    size = max(1.0, np.abs(u).max())
    assert gap(found[0], value) <= EXACT * size
    assert gap(found[1], gradient) <= EXACT * size


@both_kinds
@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8", "bool"])
def test_utilities_of_other_types_are_the_numbers_that_they_are(kind, dtype):
    u, p = some(9, seed=2, kind="binary")
    expected = multilinear_gradient(kind(u), kind(p), 3, return_value=True)
    found = multilinear_gradient(kind(u.astype(dtype)), kind(p), 3, return_value=True)
    assert np.array_equal(found[1], expected[1])
    assert np.array_equal(found[0], expected[0])


@each_k
def test_when_nobody_is_in(k):
    """Who comes in is seen, at u/K."""
    u, _ = some(9)
    value, gradient = multilinear_gradient(u, np.zeros(9), k, return_value=True)
    assert value == 0
    assert gap(gradient, u / k) <= 1e-16


@pytest.mark.parametrize("length", [1, 4, 9, 40])
@each_k
def test_when_everybody_is_in(k, length):
    """Who leaves one of the first K places is replaced by item K+1; the others are not seen."""
    u, _ = some(length)
    value, gradient = multilinear_gradient(u, np.ones(length), k, return_value=True)
    next_one = u[k] if length > k else 0.0
    assert gap(value, u[:k].sum() / k) <= 1e-15
    assert gap(gradient, np.where(np.arange(length) < k, (u - next_one) / k, 0)) <= 1e-15


def test_the_gradient_is_linear_in_the_utilities_and_the_value_in_each_probability():
    (u, p), (v, _) = some(30, seed=1), some(30, seed=2)
    both = multilinear_gradient(3 * u - 2 * v, p, 7)
    assert gap(both, 3 * multilinear_gradient(u, p, 7) - 2 * multilinear_gradient(v, p, 7)) <= EXACT
    value, gradient = multilinear_gradient(u, p, 7, return_value=True)
    for i in (0, 11, 29):
        q = p.copy()
        q[i] = 0.0
        assert gap(multilinear_gradient(u, q, 7, return_value=True)[0] + p[i] * gradient[i], value) <= EXACT


# ---------------------------------------------------------------- 60 digits


@both_dtypes
@both_kinds
@pytest.mark.parametrize("length, k", [(400, 25), (90, 1), (60, 90)], ids=["long", "k1", "k_beyond"])
def test_against_decimals(length, k, kind, dtype):
    generator = np.random.default_rng(length)
    # Both dtypes are given the same numbers, which float32 holds.
    u = generator.uniform(-1, 1, length).astype(np.float32)
    p = generator.uniform(0, 1, length).astype(np.float32)
    value, gradient = by_decimals(u, p, k)
    u, p = kind(u.astype(dtype)), kind(p.astype(dtype))
    found = multilinear_gradient(u, p, k, dtype=dtype, return_value=True)
    assert gap(found[1], gradient) <= LONG[dtype]
    assert gap(found[0], value) <= LONG[dtype]


# ---------------------------------------------------------------- against the reference


@both_dtypes
@both_kinds
@pytest.mark.parametrize("count", [1, 5, 31, 32, 33, 70])
def test_fast_is_the_reference(count, kind, dtype):
    """Also where the lists of a block have every length, and the last block has not all of its lanes."""
    k = 6
    lists = [some(int(n), seed=i) for i, n in enumerate(np.random.default_rng(count).integers(0, 41, count))]
    u, p = np.zeros((2, count, 40), dtype)
    for row, (a, b) in enumerate(lists):
        u[row, : len(a)], p[row, : len(b)] = a, b
    values, gradients = multilinear_gradient(kind(u), kind(p), k, dtype=dtype, return_value=True)
    assert np.asarray(gradients).shape == (count, 40)
    assert np.asarray(values).shape == (count,)
    for row, (a, b) in enumerate(lists):
        value, gradient = reference.multilinear(a.astype(dtype), b.astype(dtype), k)
        assert gap(values[row], value) <= 3 * LONG[dtype]
        assert gap(gradients[row, : len(a)], gradient) <= 3 * LONG[dtype]


@each_k
def test_the_reference_itself(k):
    u, p = some(6, seed=4, ends=True)
    value, gradient = by_subsets(u, p, k)
    found = reference.multilinear(u, p, k)
    assert gap(found[0], value) <= EXACT
    assert gap(found[1], gradient) <= EXACT


# ---------------------------------------------------------------- shapes, types, lanes


@both_dtypes
@both_kinds
@pytest.mark.parametrize("shape", [(0,), (7,), (0, 4), (1, 7), (3, 0), (3, 7)], ids=str)
def test_shapes_and_types(shape, kind, dtype):
    u, p = kind(np.ones(shape, dtype)), kind(np.full(shape, 0.5, dtype))
    value, gradient = multilinear_gradient(u, p, 2, dtype=dtype, return_value=True)
    assert type(gradient) is type(u)
    assert gradient.dtype == u.dtype
    assert tuple(gradient.shape) == shape
    assert np.shape(np.asarray(value)) == shape[:-1]
    if shape[-1] == 0:
        assert np.all(np.asarray(value) == 0)
    assert tuple(multilinear_gradient(u, p, 2, dtype=dtype).shape) == shape


@both_dtypes
def test_a_tensor_keeps_its_dtype_and_device(dtype):
    u, p = torch.ones(5, dtype=getattr(torch, dtype)), torch.full((5,), 0.5, dtype=getattr(torch, dtype))
    for found in (
        multilinear_gradient(u, p, 2),
        shapley_values(u, 2),
        group_gradient(u, torch.tensor([0, 1, 0, 2, 1]), p[:3], 2),
    ):
        assert isinstance(found, torch.Tensor)
        assert found.dtype == u.dtype
        assert found.device == u.device


def test_arguments_are_left_as_they_are():
    u, p = some(20)
    before = u.copy(), p.copy()
    multilinear_gradient(u, p, 3)
    multilinear_gradient(u, p, 3, epsilon=0.1)
    group_gradient(u, np.arange(20) % 4, p[:4], 3)
    shapley_values(u, 3)
    assert np.array_equal(u, before[0])
    assert np.array_equal(p, before[1])


@pytest.mark.parametrize("view", ["strided", "reversed", "transposed", "read_only"])
def test_arrays_of_any_layout(view):
    u, p = (x.reshape(6, 5) for x in some(30, seed=6))
    change = {
        "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        "reversed": lambda x: x[:, ::-1].copy()[:, ::-1],
        "transposed": lambda x: x.T.copy().T,
        "read_only": lambda x: np.frombuffer(x.tobytes()).reshape(x.shape),
    }[view]
    expected = multilinear_gradient(u, p, 2)
    assert np.array_equal(multilinear_gradient(change(u), change(p), 2), expected)


@both_dtypes
@pytest.mark.parametrize("epsilon", [0.0, 0.02], ids=["exact", "truncated"])
@pytest.mark.parametrize("company", [1, 2, 7, 31, 32, 33, 64, 100])
def test_a_list_does_not_see_its_company(company, epsilon, dtype):
    """To the last bit: alone, among others, at any place, and beside longer lists."""
    generator = np.random.default_rng(company)
    u, p = generator.uniform(-1, 1, (2, company, 50)).astype(dtype)
    p = np.abs(p)
    lengths = generator.integers(2, 51, company)
    u[:, :2] = 1, -1  # the range of every list
    for row, length in enumerate(lengths):
        u[row, length:] = p[row, length:] = 0
    options = {"epsilon": epsilon, "dtype": dtype, "return_value": True}
    values, gradients = multilinear_gradient(u, p, 4, **options)
    for row in {0, 1, company // 2, company - 1} & set(range(company)):
        length = lengths[row]
        value, gradient = multilinear_gradient(u[row, :length], p[row, :length], 4, **options)
        assert gradient.tobytes() == gradients[row, :length].tobytes()
        assert float(value) == float(values[row])
        again = multilinear_gradient(u[row : row + 1], p[row : row + 1], 4, **options)
        assert again[1].tobytes() == gradients[row].tobytes()


def test_a_list_is_not_cut_by_the_range_of_another():
    """The depth is that of the list itself, also beside one of utilities a thousand times as large."""
    u, p = np.ones((2, 200)), np.full((2, 200), 0.5)
    u[1] = 1000
    alone = multilinear_gradient(u[0], p[0], 5, epsilon=0.01)
    assert np.array_equal(multilinear_gradient(u, p, 5, epsilon=0.01)[0], alone)


def test_any_batch_gives_the_same_bits():
    generator = np.random.default_rng(3)
    u, p = generator.normal(size=(90, 30)), generator.random((90, 30))
    expected = multilinear_gradient(u, p, 5)
    order = generator.permutation(90)
    assert np.array_equal(multilinear_gradient(u[order], p[order], 5), expected[order])
    for size in (1, 8, 37):
        parts = [multilinear_gradient(u[i : i + size], p[i : i + size], 5) for i in range(0, 90, size)]
        assert np.array_equal(np.concatenate(parts), expected)


# ---------------------------------------------------------------- truncation


@both_kinds
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    length=st.integers(1, 80),
    k=st.integers(1, 12),
    epsilon=st.sampled_from([1e-6, 1e-3, 0.01, 0.05, 0.2, 1.0, 10.0]),
    seed=st.integers(0, 10**6),
    power=st.sampled_from([0.2, 1.0, 4.0]),
)
def test_truncation_stays_within_its_bounds(kind, length, k, epsilon, seed, power):
    """Every slot within epsilon; the value within max|u| P(X <= K-1), which is at most K epsilon."""
    generator = np.random.default_rng(seed)
    u, p = generator.normal(generator.normal(), 1, length), generator.random(length) ** power
    value, gradient = multilinear_gradient(u, p, k, return_value=True)
    rough = multilinear_gradient(kind(u), kind(p), k, epsilon=epsilon, return_value=True)
    assert gap(rough[1], gradient) <= epsilon + 1e-15
    assert gap(rough[0], value) <= k * epsilon + 1e-15


def last_used(gradient):
    return int(np.flatnonzero(gradient).max(initial=-1))


@both_dtypes
@both_kinds
def test_truncation_ends_early_and_later_for_less(kind, dtype):
    """Half of 600 items are in, ten are seen: all is decided long before the end."""
    u, p = kind(np.ones(600, dtype)), kind(np.full(600, 0.5, dtype))
    depths = [
        last_used(np.asarray(multilinear_gradient(u, p, 10, dtype=dtype, epsilon=epsilon)))
        for epsilon in (0.01, 1e-3, 1e-9)
    ]
    assert 10 < depths[0] <= depths[1] < depths[2] < 200


def test_every_list_of_a_batch_is_cut_where_it_would_be_alone():
    """Low probabilities need depth: a depth for the whole block would be wrong for one or slow for the other."""
    p = np.stack([np.full(400, 0.9), np.full(400, 0.03), np.full(400, 0.3)])
    u = np.ones_like(p)
    together = multilinear_gradient(u, p, 5, epsilon=1e-3)
    depths = [last_used(row) for row in together]
    assert depths[0] < depths[2] < depths[1]
    for row in range(3):
        assert np.array_equal(multilinear_gradient(u[row], p[row], 5, epsilon=1e-3), together[row])


def test_the_bound_of_truncation_is_of_the_range_of_utilities():
    """A list with nothing to win is cut at once, one with much to win later."""
    p = np.full(300, 0.5)
    depths = [last_used(multilinear_gradient(scale * np.ones(300), p, 5, epsilon=0.01)) for scale in (0.1, 1.0, 1e6)]
    assert depths[0] <= depths[1] < depths[2]


def test_both_claims_by_subsets():
    """What is cut off after M' changes a slot by at most (R/K) P(X <= K), the value by max|u| P(X <= K-1)."""
    for seed, k in enumerate([1, 2, 3]):
        u, p = some(7, seed=seed)
        value, gradient = by_subsets(u, p, k)
        spread = Fraction(max(0.0, u.max()) - min(0.0, u.min()))
        for depth in range(1, 7):
            short_value, short = by_subsets(u[:depth], p[:depth], k)
            seen = [Fraction(1)]
            for x in map(Fraction, p[:depth]):
                seen = [a * (1 - x) + b * x for a, b in zip([*seen, 0], [0, *seen], strict=True)]
            worst = max(abs(a - b) for a, b in zip(short + [0] * (7 - depth), gradient, strict=True))
            assert worst <= spread / k * sum(seen[: k + 1])
            assert abs(value - short_value) <= Fraction(np.abs(u).max()) * sum(seen[:k])


# ---------------------------------------------------------------- Shapley


@each_k
@both_kinds
@pytest.mark.parametrize("length", range(1, 7))
def test_shapley_over_all_orders(length, kind, k):
    u, _ = some(length, seed=20 + length)
    assert gap(shapley_values(kind(u), k), by_orders(u, k)) <= EXACT


@each_k
@pytest.mark.parametrize("kind", ["real", "binary", "negative"])
def test_shapley_shares_out_the_whole(k, kind):
    for length in (1, 5, 12, 200):
        u, _ = some(length, kind=kind)
        assert shapley_values(u, k).sum() == pytest.approx(u[:k].sum() / k, abs=1e-13)


@both_kinds
def test_shapley_of_nothing_and_of_integers(kind):
    assert tuple(shapley_values(kind(np.zeros(0)), 3).shape) == (0,)
    u, _ = some(9, kind="binary")
    for dtype in (int, bool):
        assert np.array_equal(shapley_values(u.astype(dtype), 3), shapley_values(u, 3))


def test_shapley_is_the_mean_of_the_gradient_along_the_diagonal():
    u, _ = some(12, seed=1)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    mean = sum(
        w / 2 * multilinear_gradient(u, np.full(12, (1 + x) / 2), 4) for x, w in zip(nodes, weights, strict=True)
    )
    assert gap(shapley_values(u, 4), mean) <= EXACT


# ---------------------------------------------------------------- groups


GROUPINGS = {
    "singletons": [0, 1, 2, 3, 4, 5],
    "one": [0] * 6,
    "blocks": [0, 0, 1, 1, 2, 2],
    "interleaved": [0, 1, 0, 2, 1, 0],
    "backwards": [3, 3, 2, 1, 0, 3],
    "some_without_members": [4, 1, 4, 4, 1, 4],
}


@both_kinds
@each_k
@pytest.mark.parametrize("ends", [False, True], ids=["inner", "some_0_or_1"])
@pytest.mark.parametrize("groups", GROUPINGS.values(), ids=GROUPINGS)
def test_groups_over_all_subsets_of_groups(groups, ends, k, kind):
    u, _ = some(6, seed=11)
    _, p = some(max(groups) + 1, seed=12, ends=ends)
    value, gradient = by_subsets(u, p, k, groups)
    found = group_gradient(kind(u), kind(np.array(groups)), kind(p), k, return_value=True)
    assert gap(found[0], value) <= EXACT
    assert gap(found[1], gradient) <= EXACT
    assert tuple(found[1].shape) == (len(p),)
    assert gap(group_gradient(kind(u), kind(np.array(groups)), kind(p), k), gradient) <= EXACT


@each_k
def test_groups_of_one_are_items(k):
    u, p = some(60, seed=13, ends=True)
    order = np.random.default_rng(0).permutation(60)
    expected = multilinear_gradient(u, p, k, return_value=True)
    q = np.empty(60)
    q[order] = p
    value, gradient = group_gradient(u, order, q, k, return_value=True)
    assert gap(value, expected[0]) <= EXACT
    assert gap(gradient[order], expected[1]) <= EXACT


def test_larger_groups_by_their_own_game():
    """50 items in 9 groups of very different sizes, K in the middle of some."""
    generator = np.random.default_rng(7)
    groups = np.minimum(generator.geometric(0.3, 50) - 1, 8)
    (u, _), (_, p) = some(50, seed=7), some(9, seed=8)
    found = group_gradient(u, groups, p, 10, return_value=True)
    value, gradient = by_subsets(u, p, 10, groups.tolist())
    assert gap(found[0], value) <= EXACT
    assert gap(found[1], gradient) <= EXACT


def test_two_slots_of_an_item_are_independent_until_they_are_a_group():
    u, p = np.array([1.0, 1.0]), np.array([0.5, 0.5])
    assert gap(multilinear_gradient(u, p, 1, return_value=True)[0], 0.75) == 0
    assert gap(group_gradient(u, np.array([0, 0]), p[:1], 1, return_value=True)[0], 0.5) == 0
    assert gap(multilinear_gradient(u, p, 1), [0.5, 0.5]) == 0
    assert gap(group_gradient(u, np.array([0, 0]), p[:1], 1), 1.0) == 0


@both_kinds
def test_groups_of_nothing(kind):
    value, gradient = group_gradient(kind(np.zeros(0)), kind(np.zeros(0, int)), kind(np.ones(3)), 2, return_value=True)
    assert float(value) == 0
    assert np.array_equal(gradient, np.zeros(3))
    assert group_gradient(kind(np.zeros(0)), kind(np.zeros(0, int)), kind(np.ones(0)), 2).shape == (0,)


@pytest.mark.parametrize("dtype", [int, bool], ids=["int", "bool"])
def test_group_utilities_of_other_types(dtype):
    (u, _), (_, p) = some(6, kind="binary"), some(3)
    groups = np.array(GROUPINGS["interleaved"])
    assert np.array_equal(group_gradient(u.astype(dtype), groups, p, 2), group_gradient(u, groups, p, 2))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("k", [0, -1, 2.0, True], ids=repr)
@pytest.mark.parametrize("function", ["multilinear", "shapley", "group"])
def test_no_such_k(function, k):
    u = p = np.ones(3)
    with pytest.raises(ValueError, match=r"\bk\b"):
        {
            "multilinear": lambda: multilinear_gradient(u, p, k),
            "shapley": lambda: shapley_values(u, k),
            "group": lambda: group_gradient(u, np.arange(3), p, k),
        }[function]()


def test_a_numpy_integer_is_a_k():
    u, p = some(5)
    assert np.array_equal(multilinear_gradient(u, p, np.int64(2)), multilinear_gradient(u, p, 2))


@pytest.mark.parametrize("options", [{"epsilon": -1.0}, {"epsilon": np.nan}, {"dtype": "float16"}], ids=str)
def test_no_such_option(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        multilinear_gradient(np.ones(3), np.ones(3), 2, **options)


@both_kinds
def test_shapes_that_do_not_fit(kind):
    with pytest.raises(ValueError):
        multilinear_gradient(kind(np.ones(3)), kind(np.ones(4)), 2)
    with pytest.raises(ValueError):
        group_gradient(kind(np.ones(3)), kind(np.zeros(2, int)), kind(np.ones(1)), 2)


@pytest.mark.parametrize("group", [-1, 2])
@both_kinds
def test_no_such_group(kind, group):
    with pytest.raises((ValueError, IndexError)):
        group_gradient(kind(np.ones(2)), kind(np.array([0, group])), kind(np.ones(2)), 1)


@given(seed=st.integers(0, 10**6), length=st.integers(1, 40), k=st.integers(1, 45))
@settings(deadline=None, max_examples=40, derandomize=True)
def test_torch_and_numpy_agree(seed, length, k):
    generator = np.random.default_rng(seed)
    u, p = generator.normal(size=length), generator.random(length)
    expected = slots(u, p, k)
    assert gap(multilinear_gradient(u, p, k), expected) <= 1e-14
    assert gap(multilinear_gradient(torch.from_numpy(u), torch.from_numpy(p), k), expected) <= 1e-14
