"""The result of an attribution: the terms of a difference of two logits, and what is read off them."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hf_ext.checks import check_count, check_word, is_number
from hf_ext.mcq_bias.lens import LensRows, LensWeights, rank_by_lens
from hf_ext.mcq_bias.letters import LETTERS
from hf_ext.mcq_bias.split import total_of

COMPONENTS = ("neuron", "head", "component")


class Term(NamedTuple):
    """A part of the model and its mean contribution in logits. layer, index: None where it has none."""

    component: str
    layer: int | None
    index: int | None
    mean: float


@dataclass(frozen=True, eq=False, repr=False)
class BiasAttribution:
    """logit[anchor] - logit[target] of n rows at the last position, split over what the model adds up.

    Arrays of numpy in the model's precision (float32 for half precision), L layers, F neurons, H heads, T positions:

    Args:
        anchor: index of the anchor's letter.
        target: "gold" or "runner_up".
        embedding: (n,) of the input of the first block.
        neurons: (n, L, F), m_i (v_i . u).
        heads: (n, L, H), z_h W_O,h . u.
        mlp_bias, attention_bias: (n, L) of the biases of the two projections.
        final_norm_bias, output_bias: (n,).
        logit_difference: (n,) of the model's logits.
        target_index: (n,) int64, the choice that the anchor is compared with.
        selected: (n,) bool, the rows over which means are taken: the model's best letter is the anchor alone and, for
            "gold", the label is another.
        activations: (n, L, F), m.
        norm_scale, direction_sum: (n,), what the final norm divides by; the sum over d of U[anchor] - U[target].
        lens: what `paper_ranking` needs of the weights.
        head_positions: (n, L, H, T), the heads' terms by source position, right-aligned, zero on padding; or None.
    """

    anchor: int
    target: str
    embedding: np.ndarray
    neurons: np.ndarray
    heads: np.ndarray
    mlp_bias: np.ndarray
    attention_bias: np.ndarray
    final_norm_bias: np.ndarray
    output_bias: np.ndarray
    logit_difference: np.ndarray
    target_index: np.ndarray
    selected: np.ndarray
    activations: np.ndarray
    norm_scale: np.ndarray
    direction_sum: np.ndarray
    lens: LensWeights
    head_positions: np.ndarray | None = None

    def __repr__(self) -> str:
        n, layers, neurons = self.neurons.shape
        return (
            f"BiasAttribution(anchor={LETTERS[self.anchor]!r}, target={self.target!r}, {n} rows of which "
            f"{self.selected.sum()} selected, {layers} layers of {neurons} neurons and {self.heads.shape[-1]} heads)"
        )

    def total(self) -> np.ndarray:
        """(n,): the sum of all terms of each row."""
        return total_of(vars(self))

    def residual(self) -> float:
        """The largest |total - logit_difference|: what rounding leaves."""
        return float(np.abs(self.total() - self.logit_difference).max())

    def mean(self, terms: np.ndarray) -> np.ndarray:
        """The mean over the selected rows of an array with a row for each, in float64.

        Raises:
            ValueError: no row is selected.
        """
        return terms[self._some_selected()].mean(0, dtype=np.float64)

    def to_pandas(self, component: str = "component") -> Any:
        """A DataFrame with the columns component, layer, index and mean, in the model's order.

        component: "neuron" or "head": a row each; "component": the sum of each kind in each layer, which add up to the
        mean logit difference. Where there is no layer or no index, it is missing (NA).

        Raises:
            ValueError: another component, or no row is selected.
        """
        import pandas

        frame = pandas.DataFrame(dict(zip(Term._fields, self._columns(component), strict=True)))
        return frame.astype({"layer": "Int64", "index": "Int64"})

    def top(self, n: int = 10, component: str = "neuron") -> list[Term]:
        """The n largest mean contributions, the largest first; component as in `to_pandas`.

        Raises:
            ValueError: n < 1, another component, or no row is selected.
        """
        check_count("n", n)
        names, layers, indices, means = self._columns(component)
        order = np.argsort(-means, kind="stable")[:n]
        return [Term(names[i], _int(layers[i]), _int(indices[i]), float(means[i])) for i in order]

    def plot(self) -> Any:
        """A matplotlib Figure: heat maps of the mean contributions of heads, and of the sums of each layer.

        Raises:
            ImportError: matplotlib is missing. ValueError: no row is selected.
        """
        heads = self.mean(self.heads)
        parts = {"neurons": self.neurons.sum(-1), "MLP bias": self.mlp_bias, "heads": self.heads.sum(-1)}
        parts["attention bias"] = self.attention_bias
        sums = np.stack([self.mean(part) for part in parts.values()], axis=1)
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise ImportError("BiasAttribution.plot needs matplotlib: pip install 'hf-ext[demo]'") from error
        size = (4 + 0.4 * heads.shape[1], 2 + 0.3 * len(heads))
        figure, axes = pyplot.subplots(1, 2, figsize=size, width_ratios=[2, 1], layout="constrained")
        for axis, terms in zip(axes, (heads, sums), strict=True):
            limit = np.abs(terms).max() or 1.0
            image = axis.imshow(terms, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
            figure.colorbar(image, ax=axis, label="mean contribution (logits)")
            axis.set(ylabel="layer", yticks=range(0, len(heads), 1 + len(heads) // 12))
        axes[0].set(xlabel="head", title=f"logit {LETTERS[self.anchor]} - logit {self.target.replace('_', ' ')}")
        axes[1].set_xticks(range(len(parts)), list(parts), rotation=45, ha="right")
        return figure

    def paper_ranking(self, top_k: int = 10, gap_threshold: float = 4.0) -> Counter[tuple[int, int]]:
        """How often each (layer, neuron) is found by the rule of the paper's notebook, over the selected rows.

        In each row and layer: of the `top_k` neurons with the largest |m| |v|, v centred, the first whose lens gap
        is above `gap_threshold`. The lens applies the norm to each neuron alone, with the MLP's whole bias; that is no
        part of the model's logit, and here for comparison only.

        Raises:
            ValueError: top_k < 1, or a threshold that is no number.
        """
        check_count("top_k", top_k)
        if not is_number(gap_threshold):
            raise ValueError(f"gap_threshold={gap_threshold!r} is no number")
        rows, scale = self.selected, self.norm_scale[self.selected]
        toward = self.neurons[rows] * scale[:, None, None]
        bias_toward = self.mlp_bias[rows] * scale[:, None]
        lens_rows = LensRows(self.activations[rows], toward, bias_toward, self.direction_sum[rows])
        return rank_by_lens(lens_rows, self.lens, top_k, gap_threshold)

    def _columns(self, component: str) -> tuple[list[str], Any, Any, np.ndarray]:
        check_word("component", component, COMPONENTS)
        if component == "component":
            return self._sums()
        means = self.mean(self.neurons if component == "neuron" else self.heads)
        layers, indices = np.indices(means.shape).reshape(2, -1)
        return [component] * means.size, layers, indices, means.ravel()

    def _sums(self) -> tuple[list[str], list[int | None], list[None], np.ndarray]:
        rows: list[tuple[str, int | None, np.ndarray]] = [("embedding", None, self.embedding)]
        neurons, heads = self.neurons.sum(-1), self.heads.sum(-1)
        for layer in range(self.neurons.shape[1]):
            rows += [("heads", layer, heads[:, layer]), ("attention_bias", layer, self.attention_bias[:, layer])]
            rows += [("neurons", layer, neurons[:, layer]), ("mlp_bias", layer, self.mlp_bias[:, layer])]
        rows += [("final_norm_bias", None, self.final_norm_bias), ("output_bias", None, self.output_bias)]
        names, layers, terms = zip(*rows, strict=True)
        return list(names), list(layers), [None] * len(rows), self.mean(np.stack(terms, axis=1))

    def _some_selected(self) -> np.ndarray:
        if not self.selected.any():
            also = " and wrong" if self.target == "gold" else ""
            raise ValueError(
                f"in none of the {len(self.selected)} rows the model's best letter is the anchor "
                f"{LETTERS[self.anchor]} alone{also}: there is nothing to take a mean of"
            )
        return self.selected


def _int(value: Any) -> int | None:
    return None if value is None else int(value)
