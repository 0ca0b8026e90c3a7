"""What is not a recursion over lanes, list by list: whole groups in or out, Shapley values, plain sums. numba, no host.

As in kernels.py, lists are rows of `players` and `utilities`, and sums over lists are sums of integers of unit 2^-s.
"""

import numpy as np

from hf_ext.importance_weights.kernels import compiled
from hf_ext.importance_weights.lanes import add_atomically


@compiled
def group_list(players, utilities, weights, k, factor, gradient, members, products, adjoint):
    """Gradient and value (both times k and `factor`) of one list whose groups are in or out as a whole.

    players (M,): the list's groups, numbered 0..G-1 in it; weights (G,). Item i of group h, with c members of h before
    it, is read iff h is in and c + (earlier members of the other groups that are in) < k: the coefficients below z^k of
    z^c times the product over the other groups g of 1 - w_g + w_g z^(members of g before i). `products` holds that
    product group by group, `adjoint` the derivative of the coefficients' sum by its factors, so that nothing is
    divided out. gradient (G,) is added to; members (G,), products (G + 1, k) and adjoint (k,) are scratch.
    """
    members[: len(weights)] = 0
    value = 0.0
    for i in range(len(players)):
        own = players[i]
        if members[own] < k:
            products[0, :] = 0.0
            products[0, members[own]] = 1.0
            last = 0
            for g in range(len(weights)):
                if g != own and members[g] > 0:
                    multiply(products, last, weights[g], members[g])
                    last += 1
            read = products[last].sum()
            worth = utilities[i] * factor
            value += worth * weights[own] * read
            gradient[own] += worth * read

            adjoint[:] = 1.0
            for g in range(len(weights) - 1, -1, -1):
                if g != own and members[g] > 0:
                    last -= 1
                    gradient[g] += worth * weights[own] * unmultiply(products, last, adjoint, weights[g], members[g])
        members[own] += 1
    return value


@compiled
def multiply(products, last, w, count):
    """Row last + 1 is row `last` times 1 - w + w z^count, below z^k."""
    k = products.shape[1]
    for j in range(k):
        products[last + 1, j] = (1.0 - w) * products[last, j]
    for j in range(count, k):
        products[last + 1, j] += w * products[last, j - count]


@compiled
def unmultiply(products, last, adjoint, w, count):
    """Derivative by w of what `multiply` did, given `adjoint` of its result, which becomes that of row `last`."""
    k = products.shape[1]
    slope = 0.0
    for j in range(k):
        slope -= adjoint[j] * products[last, j]
    for j in range(count, k):
        slope += adjoint[j] * products[last, j - count]
    for j in range(k):
        below = adjoint[j + count] if j + count < k else 0.0
        adjoint[j] = (1.0 - w) * adjoint[j] + w * below
    return slope


@compiled
def number_groups(players, local, seen):
    """Groups of a list by their first appearance: `local (M,)` numbers them, `seen` names them; returns how many."""
    count = 0
    for i in range(len(players)):
        at = 0
        while at < count and seen[at] != players[i]:
            at += 1
        if at == count:
            seen[count] = players[i]
            count += 1
        local[i] = at
    return count


@compiled
def group_counts(offsets, players, local, seen):
    """How many groups each list has, (N,)."""
    counts = np.zeros(len(offsets) - 1, np.int64)
    for row in range(len(counts)):
        counts[row] = number_groups(players[offsets[row] : offsets[row + 1]], local, seen)
    return counts


@compiled
def repeats(offsets, players, times, holders):
    """The largest number of times a player stands in one list; holders (players,) counts the lists that hold it.

    times (players,) of zeros is scratch, and zeros again afterwards.
    """
    most = 0
    for row in range(len(offsets) - 1):
        for slot in range(offsets[row], offsets[row + 1]):
            times[players[slot]] += 1
            if times[players[slot]] == 1:
                holders[players[slot]] += 1
            most = max(most, times[players[slot]])
        for slot in range(offsets[row], offsets[row + 1]):
            times[players[slot]] = 0
    return most


@compiled
def sum_of_group_gradients(order, offsets, players, utilities, weights, k, nodes, starts, scales, sums, shared, space):
    """Adds the groups' gradients of these lists to `sums (groups,)`; returns the sum of the values, as an integer.

    scales: what a gradient and a value, both times k, are multiplied by before they are rounded.

    nodes (Q, 2): rows of (probability, factor), for the mean over p of the gradients at (p, .., p), as Shapley values
    of groups are: ceil(G / 2) of them from starts[G] on for a list of G groups. None: the gradients at `weights`.
    """
    local, seen, chances, gradient, members, products, adjoint = space
    gradient_scale, value_scale = scales[0], scales[1]
    total = np.int64(0)
    for at in range(len(order)):
        begin, end = offsets[order[at]], offsets[order[at] + 1]
        count = number_groups(players[begin:end], local, seen)
        gradient[:count] = 0.0
        value = 0.0
        first = starts[count] if len(nodes) else 0
        last = first + (count + 1) // 2 if len(nodes) else 1
        for node in range(first, last):
            for g in range(count):
                chances[g] = nodes[node, 0] if len(nodes) else weights[seen[g]]
            value += group_list(
                local[: end - begin],
                utilities[begin:end],
                chances[:count],
                k,
                nodes[node, 1] if len(nodes) else 1.0,
                gradient,
                members,
                products,
                adjoint,
            )
        for g in range(count):
            amount = np.int64(np.rint(gradient[g] * gradient_scale))
            if shared:
                add_atomically(sums, np.intp(seen[g]), amount)
            else:
                sums[seen[g]] += amount
        total += np.int64(np.rint(value * value_scale))
    return total


@compiled
def shapley_list(utilities, k, values):
    """Exact Shapley values (times k) of one list, best rank first, into `values (M,)`."""
    length = len(utilities)
    if length:
        values[length - 1] = utilities[length - 1] * min(k, length) / length
    for i in range(length - 2, -1, -1):
        values[i] = values[i + 1] + (utilities[i] - utilities[i + 1]) * min(k, i + 1) / (i + 1)


@compiled
def sum_of_shapley_values(order, offsets, players, utilities, k, scale, sums, shared, values):
    for at in range(len(order)):
        begin, end = offsets[order[at]], offsets[order[at] + 1]
        shapley_list(utilities[begin:end], k, values)
        for i in range(end - begin):
            amount = np.int64(np.rint(values[i] * (scale / k)))
            if shared:
                add_atomically(sums, np.intp(players[begin + i]), amount)
            else:
                sums[players[begin + i]] += amount


@compiled
def sum_of_utilities(order, offsets, players, utilities, scale, sums, shared):
    for at in range(len(order)):
        for slot in range(offsets[order[at]], offsets[order[at] + 1]):
            amount = np.int64(np.rint(utilities[slot] * scale))
            if shared:
                add_atomically(sums, np.intp(players[slot]), amount)
            else:
                sums[players[slot]] += amount


@compiled
def mix_slots(offsets, items, utilities, first):
    """A 64-bit number of the items and utilities of all lists, each in its order; of the order of the lists, too, where
    `first`, the number of the first, is not negative.
    """
    words, step = utilities.view(np.uint64), np.uint64(0x9E3779B97F4A7C15)
    total = np.uint64(0)
    for row in range(len(offsets) - 1):
        mixed = step
        for slot in range(offsets[row], offsets[row + 1]):
            mixed = (mixed ^ (mixed >> np.uint64(29))) * step + np.uint64(items[slot])
            mixed = (mixed ^ (mixed >> np.uint64(31))) * step + words[slot]
        place = np.uint64(first + row) if first >= 0 else np.uint64(0)
        total += (mixed ^ (mixed >> np.uint64(32))) * (step + place + place)
    return total
