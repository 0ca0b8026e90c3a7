"""The multilinear extension of retrieval augmentation (arXiv 2307.03027), list by list: this package's specification.

A list i = 1..M of retrieved items in rank order, with utilities u_i; item i is in the corpus with probability p_i,
independently. The model reads the first K that are in: U(S) = (1/K) * sum of u_i over the first K of S. Of its expected
value F(p), and of dF/dp_i = E[U(S + i) - U(S - i)], no term divides by p or 1 - p, so that 0 and 1 are exact.
"""

import numpy as np


def multilinear(utilities: np.ndarray, probabilities: np.ndarray, k: int) -> tuple[float, np.ndarray]:
    """F and its gradient (M,). utilities and probabilities (M,), k: how many items are read."""
    u, p, length = utilities, probabilities, len(utilities)

    # f[i, j]: the chance that exactly j of the first i items are in, j < K
    f = np.zeros((length + 1, k))
    f[0, 0] = 1.0
    for i in range(1, length + 1):
        for j in range(k):
            before = f[i - 1, j - 1] if j > 0 else 0.0
            f[i, j] = f[i - 1, j] + p[i - 1] * (before - f[i - 1, j])

    # V[j]: the utility still expected from items i..M when j are taken; the K-th place is the last
    V = np.zeros(k + 1)
    gradient = np.zeros(length)
    for i in range(length, 0, -1):
        for j in range(k):  # ascending: V[j + 1] is still that of item i + 1
            D = u[i - 1] / k + V[j + 1] - V[j]
            gradient[i - 1] += f[i - 1, j] * D
            V[j] += p[i - 1] * D
    return V[0], gradient
