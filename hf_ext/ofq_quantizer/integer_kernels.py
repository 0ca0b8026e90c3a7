"""What lies between two integer products, each step as one pass over its tensor (numba, one thread, CPU).

The arithmetic is float32 and in the order of `ops` and `attention_ops`, without contraction or reassociation, so that
results are equal bit for bit. Results of products are overwritten by what becomes of them, a row at a time.

Arrays are contiguous, but for those that come with strides: they are the flat memory from a tensor's first element on,
and the strides are those of all dimensions but the last, whose stride is 1. Scales and shifts of one head or token hold
for all.
"""

import numpy as np

from hf_ext.ofq_quantizer.loops import added, compiled


@compiled
def _code(ratio, low, high, zero) -> np.int8:
    ratio = ratio if ratio > low else low
    ratio = ratio if ratio < high else high
    return np.int8(np.rint(ratio) - zero)


@compiled
def quantize_by_row(x, strides, scale, shift, low, high, zero, codes) -> None:
    """x (B, H, N, D), scale (H, N), shift (H, D) -> codes int8 (B, H, N, D), less `zero`."""
    low, high, zero = np.float32(low), np.float32(high), np.float32(zero)
    batch, heads, tokens, width = codes.shape
    for b in range(batch):
        for n in range(tokens):
            for h in range(heads):
                start = b * strides[0] + h * strides[1] + n * strides[2]
                row, add, out = x[start : start + width], shift[min(h, len(shift) - 1)], codes[b, h, n]
                divisor = scale[min(h, len(scale) - 1), min(n, scale.shape[1] - 1)]
                for c in range(width):
                    out[c] = _code((row[c] + add[c]) / divisor, low, high, zero)


@compiled
def quantize_by_channel(x, strides, scale, shift, low, high, zero, codes) -> None:
    """The same with scale (H, D)."""
    low, high, zero = np.float32(low), np.float32(high), np.float32(zero)
    batch, heads, tokens, width = codes.shape
    for b in range(batch):
        for n in range(tokens):
            for h in range(heads):
                start = b * strides[0] + h * strides[1] + n * strides[2]
                row, add, out, divisor = (
                    x[start : start + width],
                    shift[min(h, len(shift) - 1)],
                    codes[b, h, n],
                    scale[min(h, len(scale) - 1)],
                )
                for c in range(width):
                    out[c] = _code((row[c] + add[c]) / divisor[c], low, high, zero)


@compiled
def quantize_patches(x, scale, shift, tall, wide, low, high, codes) -> None:
    """x (B, C, H, W), scale (1, 1), shift (1, C) -> codes int8 (B, rows * columns, C * tall * wide) of the patches."""
    low, high, zero = np.float32(low), np.float32(high), np.float32(0)
    batch, channels, _, width = x.shape
    columns, divisor = width // wide, scale[0, 0]
    for b in range(batch):
        for n in range(codes.shape[1]):
            top, left = n // columns * tall, n % columns * wide
            for c in range(channels):
                add = shift[0, c]
                for i in range(tall):
                    row, start = x[b, c, top + i, left : left + wide], (c * tall + i) * wide
                    out = codes[b, n, start : start + wide]
                    for j in range(wide):
                        out[j] = _code((row[j] + add) / divisor, low, high, zero)


@compiled
def quantize_probabilities(probs, scale, high, zero, codes, sums) -> None:
    """probs (B, H, N, M), scale (H, N) -> codes int8 (B, H, N, M), less `zero`, and their sums (B, H, N), with it."""
    low, high, offset = np.float32(0), np.float32(high), np.float32(zero)
    batch, heads, tokens, width = codes.shape
    for b in range(batch):
        for h in range(heads):
            for n in range(tokens):
                row, out = probs[b, h, n], codes[b, h, n]
                divisor = scale[min(h, len(scale) - 1), min(n, scale.shape[1] - 1)]
                total = np.int32(width * zero)
                for c in range(width):
                    code = _code(row[c] / divisor, low, high, offset)
                    out[c] = code
                    total += np.int32(code)
                sums[b, h, n] = total


@compiled
def add_tokens(codes, times, sums) -> None:
    """sums int32 (B, H, D) plus `times` codes int8 (B, H, N, D)."""
    batch, heads, tokens, width = codes.shape
    total = np.empty(width, np.int32)
    for b in range(batch):
        for h in range(heads):
            total[:] = 0
            for n in range(tokens):
                row = codes[b, h, n]
                for c in range(width):
                    total[c] += np.int32(row[c])
            for c in range(width):
                sums[b, h, c] += total[c] * np.int32(times)


@compiled
def dots(codes, vector, out) -> None:
    """Products of codes int8 (B, H, N, D) and vector (H, D) -> (B, H, N), summed in float64 and rounded once."""
    batch, heads, tokens, width = codes.shape
    for b in range(batch):
        for h in range(heads):
            by = vector[min(h, len(vector) - 1)]
            for n in range(tokens):
                row, total = codes[b, h, n], 0.0
                for c in range(width):
                    total = added(total, np.float64(np.float32(row[c]) * by[c]))
                out[b, h, n] = total


@compiled
def rescale(acc, correction, scale, step, offset, out) -> None:
    """(acc + correction) * scale * step + offset: acc (B, N, C), correction, step, offset (C,), scale (1, N).

    `out` is the memory of acc as float32, here and below.
    """
    batch, tokens, width = acc.shape
    new = np.empty(width, np.float32)  # memory known to be another one, without which no loop would be vectorised
    for b in range(batch):
        for n in range(tokens):
            row, to, factor = acc[b, n], out[b, n], scale[0, min(n, scale.shape[1] - 1)]
            for c in range(width):
                new[c] = np.float32(row[c] + correction[c]) * factor * step[c] + offset[c]
            for c in range(width):
                to[c] = new[c]


@compiled
def rescale_logits(acc, left, shift, right, bias, strides, out) -> None:
    """(acc * left + shift) * right + bias: acc (B, H, N, M), left (H, N), shift (B, H, M), right (H, M)."""
    batch, heads, tokens, width = acc.shape
    new = np.empty(width, np.float32)
    for b in range(batch):
        for h in range(heads):
            add, by = shift[b, h], right[min(h, len(right) - 1)]
            for n in range(tokens):
                start = b * strides[0] + h * strides[1] + n * strides[2]
                row, to, term = acc[b, h, n], out[b, h, n], bias[start : start + width]
                factor = left[min(h, len(left) - 1), min(n, left.shape[1] - 1)]
                for m in range(width):
                    new[m] = (np.float32(row[m]) * factor + add[m]) * by[m] + term[m]
                for m in range(width):
                    to[m] = new[m]


@compiled
def rescale_values(acc, correction, scale, shift, sums, probs_scale, out) -> None:
    """((acc + correction) * scale + shift * sums) * probs_scale, with the heads of a token side by side.

    acc (B, H, N, D), correction (B, H, D), scale and shift (H, D), sums (B, H, N), probs_scale (H, N);
    out (B, N, H, D), memory of its own.
    """
    batch, heads, tokens, width = acc.shape
    for b in range(batch):
        for h in range(heads):
            add, by, extra = shift[min(h, len(shift) - 1)], scale[min(h, len(scale) - 1)], correction[b, h]
            for n in range(tokens):
                row, to, total = acc[b, h, n], out[b, n, h], np.float32(sums[b, h, n])
                factor = probs_scale[min(h, len(probs_scale) - 1), min(n, probs_scale.shape[1] - 1)]
                for c in range(width):
                    to[c] = (np.float32(row[c] + extra[c]) * by[c] + add[c] * total) * factor
