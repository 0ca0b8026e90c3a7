"""The attention of transformers' ViT, DeiT and Swin: separate layers for queries, keys and values share one input."""

from typing import Any

from torch import Tensor, nn
from transformers.models.deit.modeling_deit import DeiTPooler
from transformers.models.vit.modeling_vit import ViTPooler

from hf_ext import compat
from hf_ext.ofq_quantizer.attention import QuantAttention, additive, windowed
from hf_ext.ofq_quantizer.layers import QuantLinear
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer


class HostAttention(QuantAttention):
    """What all of them have in common."""

    wants_weights: bool = False
    weights: Tensor | None = None

    def head_count(self) -> int:
        return self.num_attention_heads

    @property
    def scaling_of_logits(self) -> float:
        return self.head_dim**-0.5

    def mix(self, x: Tensor, bias: Tensor | None, dropout: float, wants_weights: bool) -> tuple[Tensor, Tensor | None]:
        """softmax(q k^T / sqrt(d) + bias) v, and the rounded probabilities (batch, heads, tokens, tokens) if wanted.

        x (batch, tokens, width) -> (batch, tokens, heads * d). The probabilities are computed once more for this, and
        come before dropout.
        """
        scaling = self.scaling_of_logits
        self.wants_weights = wants_weights
        if self.reparametrized:
            y = self.reparam_attend(x, scaling, bias, dropout)
        else:
            y = self.attend(*(self.split(self.project(layer, x)) for layer in self.projections), scaling, bias, dropout)
        weights, self.weights = self.weights, None
        return y, weights

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        left: ActivationQuantizer,
        right: ActivationQuantizer,
        scaling: float,
        logit_bias: Tensor | None,
        dropout: float,
    ) -> Tensor:
        y = super()._attend(q, k, v, left, right, scaling, logit_bias, dropout)
        if self.wants_weights:
            logits = left(q) @ right(k).transpose(-2, -1) * scaling
            self.weights = self.probs_quantizer((logits if logit_bias is None else logits + logit_bias).softmax(-1))
        return y


class SplitAttention(HostAttention):
    """ViT and DeiT whose output projection is in a module after this one."""

    @property
    def projections(self) -> tuple[QuantLinear, ...]:
        return self.query, self.key, self.value

    @property
    def scaling_of_logits(self) -> float:
        return self.attention_head_size**-0.5

    def forward(
        self, hidden_states: Tensor, head_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        _refuse(head_mask)
        # The host does not pass on that weights are wanted; it asks for "eager" where they are.
        wanted = self.config._attn_implementation == "eager" or bool(kwargs.get("output_attentions"))
        return self.mix(hidden_states, None, self.dropout_prob, wanted)


class SplitSwinAttention(SplitAttention):
    """Swin, the same; transformers 4 has a head mask before its last argument."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *head_mask_and_output_attentions: Any
    ) -> tuple[Tensor, ...]:
        *head_mask, wanted = head_mask_and_output_attentions or (False,)
        _refuse(*head_mask)
        tokens = self.window_size[0] * self.window_size[1]
        table = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = windowed(table.view(tokens, tokens, -1).permute(2, 0, 1).unsqueeze(0), attention_mask, hidden_states)
        y, weights = self.mix(hidden_states, bias, self.dropout.p, bool(wanted))
        return (y, weights) if wanted else (y,)


class WholeAttention(HostAttention):
    """ViT and DeiT with an output projection of their own."""

    @property
    def projections(self) -> tuple[QuantLinear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        wanted = kwargs.get("output_attentions", self.config.output_attentions)
        bias = self.logit_bias(hidden_states, attention_mask)
        y, weights = self.mix(hidden_states, bias, self.attention_dropout, bool(wanted))
        return self.o_proj(y), weights

    def logit_bias(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        """What is added to the logits."""
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() != 4:
            raise ValueError(
                f"an OFQ attention takes masks (batch, 1, tokens, tokens), not the {type(mask).__name__} that "
                f'attn_implementation="{self.config._attn_implementation}" makes; load the model with "sdpa" or "eager"'
            )
        return additive(mask, x)


class WholeSwinAttention(WholeAttention):
    """Swin, the same."""

    def logit_bias(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return windowed(self.relative_position_bias(), mask, x)


_PLAIN, _SWIN = (
    (WholeAttention, WholeSwinAttention) if compat.attention_owns_output() else (SplitAttention, SplitSwinAttention)
)


class QuantViTAttention(_PLAIN, compat.vision_attention("vit")):
    """ViT."""


class QuantDeiTAttention(_PLAIN, compat.vision_attention("deit")):
    """DeiT, with or without a distillation token."""


class QuantSwinAttention(_SWIN, compat.vision_attention("swin")):
    """Swin."""


FAMILIES: dict[type[nn.Module], type[QuantAttention]] = {
    compat.vision_attention("vit"): QuantViTAttention,
    compat.vision_attention("deit"): QuantDeiTAttention,
    compat.vision_attention("swin"): QuantSwinAttention,
}

REFUSED: dict[type[nn.Module], str] = {}

# Modules whose layers stay as they are.
LEFT_ALONE: dict[type[nn.Module], str] = {ViTPooler: "pooling head", DeiTPooler: "pooling head"}


def _refuse(*head_masks: Any) -> None:
    if any(mask is not None for mask in head_masks):
        raise ValueError("an OFQ attention takes no head_mask: it would multiply probabilities after their rounding")
