"""Data importance for retrieval augmentation (arXiv 2307.03027): which sources of a corpus help, which hurt."""

from hf_ext.importance_weights.config import ImportanceConfig
from hf_ext.importance_weights.functions import group_gradient, multilinear_gradient, shapley_values
from hf_ext.importance_weights.retrieval import retrieve
from hf_ext.importance_weights.weights import ImportanceWeights

__all__ = [
    "ImportanceConfig",
    "ImportanceWeights",
    "group_gradient",
    "multilinear_gradient",
    "retrieve",
    "shapley_values",
]
