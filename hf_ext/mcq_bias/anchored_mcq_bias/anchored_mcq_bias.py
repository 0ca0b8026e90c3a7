"""Positional bias of multiple-choice answers: what evaluate loads."""

from hf_ext.mcq_bias.metric import AnchoredMCQBias  # noqa: F401
