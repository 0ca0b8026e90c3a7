"""Texts among sorted texts, in the buffers in which Arrow has them: numba, no host."""

from hf_ext.importance_weights.kernels import compiled


@compiled
def search_strings(key_offsets, key_bytes, offsets, letters, places):
    """Binary search by bytes, which is the order of UTF-8 texts."""
    for i in range(len(offsets) - 1):
        low, high = 0, len(key_offsets) - 1
        while low < high:
            middle = (low + high) // 2
            if comes_before(key_offsets, key_bytes, middle, offsets, letters, i):
                low = middle + 1
            else:
                high = middle
        if low < len(key_offsets) - 1:
            length = offsets[i + 1] - offsets[i]
            same = key_offsets[low + 1] - key_offsets[low] == length
            at = 0
            while same and at < length:
                same = key_bytes[key_offsets[low] + at] == letters[offsets[i] + at]
                at += 1
            if same:
                places[i] = low


@compiled
def comes_before(key_offsets, key_bytes, key, offsets, letters, i):
    mine, theirs = key_offsets[key + 1] - key_offsets[key], offsets[i + 1] - offsets[i]
    for at in range(min(mine, theirs)):
        a, b = key_bytes[key_offsets[key] + at], letters[offsets[i] + at]
        if a != b:
            return a < b
    return mine < theirs
