"""The ranking of neurons by the paper's lens, for comparison: it applies the final norm to each neuron alone.

A neuron's size is lost that way (a thousand times as large, it ranks the same), and each neuron is given the whole bias
of its MLP. Neither is true of the model; the terms of `BiasAttribution` are.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hf_ext.mcq_bias.families import Family, at_least_float32
from hf_ext.modes import no_autocast


@dataclass(frozen=True, eq=False)
class LensWeights:
    """What the lens needs of the weights. v are the value vectors, b the MLP's bias, each minus its mean over d.

    norms: (L, F) |v|. with_bias: (L, F) v . b. means: (L, F) of the value vectors over d. bias_norms: (L,) |b|.
    bias_means: (L,). epsilon: of the final norm. width: d.
    """

    norms: np.ndarray
    with_bias: np.ndarray
    means: np.ndarray
    bias_norms: np.ndarray
    bias_means: np.ndarray
    epsilon: float
    width: int


@torch.no_grad()
def lens_weights(family: Family, model: nn.Module) -> LensWeights:
    columns: dict[str, list[np.ndarray]] = {}
    for block in family.blocks(model):
        values = at_least_float32(family.value_vectors(block))
        bias = family.mlp_projection(block).bias
        bias = values.new_zeros(values.shape[1]) if bias is None else at_least_float32(bias)
        centred = bias - bias.mean()
        means = values.mean(1)
        squares = torch.linalg.vector_norm(values, dim=1).square() - len(bias) * means.square()
        with no_autocast(values):
            with_bias = values @ centred
        parts = {
            "norms": squares.clamp(min=0).sqrt(),
            "with_bias": with_bias,
            "means": means,
            "bias_norms": centred.norm(),
            "bias_means": bias.mean(),
        }
        for name, part in parts.items():
            columns.setdefault(name, []).append(part.cpu().numpy())
    stacked = {name: np.stack(parts) for name, parts in columns.items()}
    return LensWeights(**stacked, epsilon=family.norm_epsilon(model), width=len(bias))


@dataclass(frozen=True, eq=False)
class LensRows:
    """One row each: activations (n, L, F); along U[anchor] - U[target], not divided by the norm of the input, what
    each neuron writes, toward (n, L, F), and each bias, bias_toward (n, L); the sum of that direction (n,)."""

    activations: np.ndarray
    toward: np.ndarray
    bias_toward: np.ndarray
    direction_sum: np.ndarray


def rank_by_lens(rows: LensRows, weights: LensWeights, top_k: int, threshold: float) -> Counter[tuple[int, int]]:
    """How often each (layer, neuron) is the first of its layer's `top_k` largest whose lens gap is above `threshold`.

    Size of neuron i: |m_i| |v_i|. Lens gap: LN(m_i v_i + b) . (U[anchor] - U[target]), LN without gain, where centring
    U over the vocabulary makes no difference.
    """
    counts: Counter[tuple[int, int]] = Counter()
    for row, activations in enumerate(rows.activations):
        largest = _largest(np.abs(activations) * weights.norms, top_k)
        for layer, neurons in enumerate(largest):
            above = _gaps(rows, weights, row, layer, neurons) > threshold
            if above.any():
                counts[layer, int(neurons[above.argmax()])] += 1
    return counts


def _largest(sizes: np.ndarray, top_k: int) -> np.ndarray:
    """(L, top_k) indices of the largest sizes (L, F), the largest first."""
    top_k = min(top_k, sizes.shape[1])
    some = np.argpartition(-sizes, top_k - 1, axis=1)[:, :top_k]
    order = np.argsort(-np.take_along_axis(sizes, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)


def _gaps(rows: LensRows, weights: LensWeights, row: int, layer: int, neurons: np.ndarray) -> np.ndarray:
    m = rows.activations[row, layer, neurons]
    means = m * weights.means[layer, neurons] + weights.bias_means[layer]
    # Centring a vector takes its mean times the sum of the direction from its product with the direction.
    toward = rows.toward[row, layer, neurons] + rows.bias_toward[row, layer] - means * rows.direction_sum[row]
    squares = (
        (m * weights.norms[layer, neurons]) ** 2
        + 2 * m * weights.with_bias[layer, neurons]
        + weights.bias_norms[layer] ** 2
    )
    return toward / np.sqrt(np.maximum(squares, 0) / weights.width + weights.epsilon)
