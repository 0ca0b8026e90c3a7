"""The recursions of reference.py on many lists at once, and the sums over all of them as integers: numba, no host.

A block is as many lists as a row has lanes. Its items are read in chunks; f is kept at the start of each chunk and
computed a second time, so that what the way back needs stays in the processor's caches. Scratch space comes from
`scratch`. Lists are rows `offsets[r]:offsets[r + 1]` of `items` and `utilities`.

Sums over lists are sums of integers, rint(number * 2^s): their order does not matter.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import config, njit

from hf_ext.importance_weights.lanes import above, add_atomically, load, rows, store, zero_row

CHUNK = 16

# Below it a probability counts as none. Numbers that are smaller than normal ones cost a hundred times as much.
NEGLIGIBLE = {np.dtype(np.float64): 1e-200, np.dtype(np.float32): 1e-20}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without the interpreter's lock; kept on disk where there is a place that can be written to."""
    if config.DISABLE_JIT:
        raise ImportError("importance weights are computed by kernels that numba compiles: unset NUMBA_DISABLE_JIT")
    options = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no such place: compiled anew in each process
        return njit(**options)(function)


def scratch(length: int, k: int, dtype: Any) -> tuple[np.ndarray, ...]:
    """Room for a block of lists of at most `length` items: p, u, g, f within a chunk, f at its start, V.

    k: at most `length`, for more are never read.
    """
    items = -(-max(length, 1) // CHUNK) * CHUNK
    counts = (items, items, items, (CHUNK + 1) * (k + 1), items // CHUNK * (k + 1), k + 1)
    return tuple(rows(count, dtype) for count in counts)


@compiled
def forward(f, source, target, p, width, columns):
    """Row `target` of f from row `source`: one item more, in with probability p. Columns from `width` on are 0."""
    before = load(f, source)
    store(f, target, before - p * before)
    for j in range(1, width):
        here = load(f, source + j)
        store(f, target + j, here + p * (before - here))
        before = here
    if width < columns:
        store(f, target + width, p * before)
        for j in range(width + 1, columns):
            store(f, target + j, zero_row(f))


@compiled
def backward(V, f, source, p, u, width):
    """V of an item from V of the next one, in place; returns the item's gradient, times k."""
    gradient = zero_row(V)
    here = load(V, 0)
    for j in range(width):
        after = load(V, j + 1)
        D = u + (after - here)
        gradient = gradient + load(f, source + j) * D
        store(V, j, here + p * D)
        here = after
    return gradient


@compiled
def drop_negligible(f, source, columns, bound):
    for j in range(columns):
        store(f, source + j, above(load(f, source + j), bound))


@compiled
def copy_rows(target, target_start, source, source_start, count):
    for j in range(count):
        store(target, target_start + j, load(source, source_start + j))


@compiled
def run_chunk(f, p, first, count, columns):
    """f of `count` items of the chunk that begins with item `first`, from f at its start in row 0."""
    for i in range(count):
        forward(f, i * columns, (i + 1) * columns, load(p, first + i), min(first + i + 1, columns), columns)


@compiled
def few_are_in(f, source, columns, lane):
    """P(X <= K) of a lane: the sum of a row of f with K + 1 columns."""
    total = 0.0
    for j in range(columns):
        total += f[source + j, lane]
    return total


@compiled
def fill(p, u, start, lane, begin, stop, items, utilities, weights):
    """Probabilities and utilities of slots begin..stop into a lane, from row `start` on.

    Indices are unsigned here and below: numba asks of all others whether they count from the end.
    """
    lane = np.uint64(lane)
    for i in range(stop - begin):
        slot, row = np.uint64(begin + i), np.uint64(start + i)
        p[row, lane] = weights[np.uint64(items[slot])]
        u[row, lane] = utilities[slot]


@compiled
def spread(sums, items, begin, count, g, lane, scale, shared):
    """Adds a lane's gradients to the sums of its items, as integers."""
    lane = np.uint64(lane)
    for i in range(count):
        item = np.uint64(items[np.uint64(begin + i)])
        amount = np.int64(np.rint(np.float64(g[np.uint64(i), lane]) * scale))
        if shared:
            add_atomically(sums, np.intp(item), amount)
        else:
            sums[item] += amount


@compiled
def block(order, first, offsets, items, utilities, weights, k, tail, tiny, depths, space):
    """Gradients (times k) of the lists `order[first:first + lanes]` into g, their values (times k) into row 0 of V.

    tail > 0: a list is cut after the first chunk at whose end P(X <= K) <= tail. `depths (lanes,)` receives how many
    items of each list were used. Returns the largest P(X <= K) at a cut.
    """
    p, u, g, f, starts, V = space
    lane_count = p.shape[1]
    here = min(lane_count, len(order) - first)
    columns = k + 1 if tail > 0 else k
    for j in range(columns):
        store(f, j, zero_row(f))
    for lane in range(lane_count):
        f[0, lane] = 1.0
        depths[lane] = -1  # not cut so far
    longest = 0
    for lane in range(here):
        row = order[first + lane]
        longest = max(longest, offsets[row + 1] - offsets[row])

    largest = 0.0
    chunks = 0
    while chunks * CHUNK < longest:
        start = chunks * CHUNK
        for i in range(start, min(start + CHUNK, longest)):
            store(p, i, zero_row(p))
            store(u, i, zero_row(u))
        for lane in range(here):
            row = order[first + lane]
            begin, stop = offsets[row] + start, min(offsets[row] + start + CHUNK, offsets[row + 1])
            if depths[lane] < 0 and begin < stop:
                fill(p, u, start, lane, begin, stop, items, utilities, weights)
        copy_rows(starts, chunks * columns, f, 0, columns)
        count = min(CHUNK, longest - start)
        run_chunk(f, p, start, count, columns)
        chunks += 1
        end = count * columns
        drop_negligible(f, end, columns, tiny)
        if tail > 0:
            open_lanes = 0
            for lane in range(here):
                row = order[first + lane]
                if depths[lane] < 0 and offsets[row + 1] - offsets[row] > chunks * CHUNK:
                    chance = few_are_in(f, end, columns, lane)
                    if chance <= tail:
                        depths[lane] = chunks * CHUNK
                        largest = max(largest, chance)
                    else:
                        open_lanes += 1
            if open_lanes == 0:
                longest = start + count
        copy_rows(f, 0, f, end, columns)

    for j in range(k + 1):
        store(V, j, zero_row(V))
    for chunk in range(chunks - 1, -1, -1):
        start = chunk * CHUNK
        copy_rows(f, 0, starts, chunk * columns, columns)
        count = min(CHUNK, longest - start)
        run_chunk(f, p, start, count, columns)
        for i in range(count - 1, -1, -1):
            at = start + i
            store(g, at, backward(V, f, i * columns, load(p, at), load(u, at), min(at + 1, k)))
    for lane in range(here):
        row = order[first + lane]
        if depths[lane] < 0:
            depths[lane] = offsets[row + 1] - offsets[row]
    return largest


@compiled
def sum_of_gradients(order, offsets, items, utilities, weights, k, tail, tiny, scales, sums, shared, depths, space):
    """Adds the gradients of these lists to `sums (items,)`, as integers.

    scales: what a gradient and a value, both times k, are multiplied by before they are rounded. shared: other threads
    add to the same sums. Returns the sum of the values as an integer, and the largest P(X <= K) at a cut.
    """
    g, V = space[2], space[5]
    value, largest = np.int64(0), 0.0
    gradient_scale, value_scale = scales[0], scales[1]
    for first in range(0, len(order), g.shape[1]):
        cut = block(order, first, offsets, items, utilities, weights, k, tail, tiny, depths, space)
        largest = max(largest, cut)
        for lane in range(min(g.shape[1], len(order) - first)):
            begin = offsets[order[first + lane]]
            spread(sums, items, begin, depths[lane], g, lane, gradient_scale, shared)
            value += np.int64(np.rint(np.float64(V[0, lane]) * value_scale))
    return value, largest


@compiled
def gradients(order, offsets, items, utilities, weights, k, tail, tiny, gradient, values, depths, space):
    """The gradient of every slot into `gradient`, the value of each list into `values`, both times k."""
    g, V = space[2], space[5]
    for first in range(0, len(order), g.shape[1]):
        block(order, first, offsets, items, utilities, weights, k, tail, tiny, depths, space)
        for lane in range(min(g.shape[1], len(order) - first)):
            row = order[first + lane]
            for i in range(depths[lane]):
                gradient[offsets[row] + i] = g[i, lane]
            values[row] = V[0, lane]
