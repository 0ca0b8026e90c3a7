"""Votes and utilities of what is kept of many lists at once: numba, no host."""

from hf_ext.importance_weights.kernels import compiled


@compiled
def winners(offsets, answers, weights, k, slots):
    """Of each list the slot where the winning answer is met first: the largest sum of weights over the first k slots of
    weight > 0, ties to the first met; -1 where there is none. slots (N,) receives them.
    """
    for row in range(len(offsets) - 1):
        best, best_weight = -1, 0.0
        begin, end = offsets[row], cut(offsets[row], offsets[row + 1], weights, k)
        for slot in range(begin, end):
            if weights[slot] > 0:
                total, first = 0.0, True
                for other in range(begin, end):
                    if weights[other] > 0 and answers[other] == answers[slot]:
                        first = first and other >= slot
                        total += weights[other]
                if first and total > best_weight:
                    best, best_weight = slot, total
        slots[row] = best


@compiled
def cut(begin, end, weights, k):
    """One behind the k-th slot of weight > 0."""
    taken = 0
    for slot in range(begin, end):
        if weights[slot] > 0:
            taken += 1
            if taken == k:
                return slot + 1
    return end


@compiled
def read_utility(offsets, utilities, kept, k):
    """(1/k) times the sum of the utilities of the first k kept slots, averaged over the lists."""
    total = 0.0
    for row in range(len(offsets) - 1):
        of_row = 0.0
        for slot in range(offsets[row], cut(offsets[row], offsets[row + 1], kept, k)):
            if kept[slot] > 0:
                of_row += utilities[slot]
        total += of_row / k
    return total / max(len(offsets) - 1, 1)
