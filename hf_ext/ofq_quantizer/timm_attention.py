"""The attention classes of timm, each with its own way to queries, keys, values and biases of the logits."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent, apply_rot_embed_cat
from timm.models import beit, cait, eva, swin_transformer, swin_transformer_v2, vision_transformer
from torch import Tensor, nn

from hf_ext import compat
from hf_ext.ofq_quantizer.attention import QuantAttention, additive, windowed
from hf_ext.ofq_quantizer.layers import QuantLinear


class QuantVitAttention(QuantAttention, vision_transformer.Attention):
    """vit, deit, deit3, dinov2, siglip."""

    def reparam_problem(self) -> str | None:
        normed = not (isinstance(self.q_norm, nn.Identity) and isinstance(self.k_norm, nn.Identity))
        return "q_norm and k_norm stand between W_q, W_k and their product" if normed else None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        bias = _additive(attn_mask, is_causal, x)
        gate = None if getattr(self, "gate", None) is None else self.gate(x).sigmoid()
        if self.reparametrized:
            y = self.reparam_attend(x, self.scale, bias, self.attn_drop.p)
        else:
            q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))
            y = self.attend(self.q_norm(q), self.k_norm(k), v, self.scale, bias, self.attn_drop.p)
        y = getattr(self, "norm", nn.Identity())(y)
        return self.proj_drop(self.proj(y if gate is None else y * gate))


class QuantSwinAttention(QuantAttention, swin_transformer.WindowAttention):
    """swin."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = windowed(self._get_rel_pos_bias(), mask, x)
        if self.reparametrized:
            y = self.reparam_attend(x, self.scale, bias, self.attn_drop.p)
        else:
            q, k, v = (self.split(part) for part in self.qkv(x).chunk(3, dim=-1))
            y = self.attend(q, k, v, self.scale, bias, self.attn_drop.p)
        return self.proj_drop(self.proj(y))


class QuantSwinV2Attention(QuantAttention, swin_transformer_v2.WindowAttention):
    """swinv2: the cosine's factors are rounded, the temperature in the query's."""

    left_alone: ClassVar[dict[str, str]] = {"cpb_mlp": "network over relative positions, which sees no image"}

    def reparam_problem(self) -> str | None:
        return "cosine attention normalises queries and keys, so that their product has no single weight"

    def joint_bias(self) -> Tensor | None:
        return _joined(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = windowed(self._position_bias(), mask, x)
        qkv = self.project(self.qkv, x)
        q, k, v = (self.split(part) for part in qkv.chunk(3, dim=-1))
        temperature = torch.clamp(self.logit_scale, max=math.log(1.0 / 0.01)).exp()
        q, k = F.normalize(q, dim=-1) * temperature, F.normalize(k, dim=-1)
        return self.proj_drop(self.proj(self.attend(q, k, v, 1.0, bias, self.attn_drop.p)))

    def _position_bias(self) -> Tensor:
        """(1, heads, tokens, tokens), from the small network over relative coordinates, as the host computes it."""
        tokens = self.window_size[0] * self.window_size[1]
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        bias = table[self.relative_position_index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias).unsqueeze(0)


class QuantBeitAttention(QuantAttention, beit.Attention):
    """beit: biases of query and value are parameters of their own, the relative position bias may be shared."""

    def joint_bias(self) -> Tensor | None:
        return _joined(self)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            own = self._get_rel_pos_bias()
            bias = own if bias is None else own + bias
        if self.reparametrized:
            y = self.reparam_attend(x, self.scale, bias, self.attn_drop.p)
        else:
            qkv = self.project(self.qkv, x)
            q, k, v = (self.split(part) for part in qkv.chunk(3, dim=-1))
            y = self.attend(q, k, v, self.scale, bias, self.attn_drop.p)
        return self.proj_drop(self.proj(y))


class QuantEvaAttention(QuantAttention, eva.EvaAttention):
    """eva02: rotary positions, one joint projection or three."""

    def reparam_problem(self) -> str | None:
        return "rotary positions stand between W_q, W_k and their product"

    @property
    def projections(self) -> tuple[QuantLinear, ...]:
        return (self.q_proj, self.k_proj, self.v_proj) if self.qkv is None else (self.qkv,)

    def joint_bias(self) -> Tensor | None:
        return _joined(self)

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        gate = None if getattr(self, "gate", None) is None else self.gate(x).sigmoid()
        q, k, v = (self.split(part) for part in self._project(x))
        if hasattr(self, "q_norm"):  # the oldest timm has none
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._rotate(part, rope).type_as(v) for part in (q, k))
        y = self.attend(q, k, v, self.scale, _additive(attn_mask, is_causal, x), self.attn_drop.p)
        y = self.norm(y)
        return self.proj_drop(self.proj(y if gate is None else y * gate))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is not None:
            return self.project(self.qkv, x).chunk(3, dim=-1)
        return tuple(self.project(layer, x) for layer in self.projections)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        kept, turned = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        half = {"half": True} if getattr(self, "rotate_half", False) else {}
        return torch.cat([kept, apply_rot_embed_cat(turned, rope, **half)], dim=2)


FAMILIES: dict[type[nn.Module], type[QuantAttention]] = {
    vision_transformer.Attention: QuantVitAttention,
    swin_transformer.WindowAttention: QuantSwinAttention,
    swin_transformer_v2.WindowAttention: QuantSwinV2Attention,
    beit.Attention: QuantBeitAttention,
    eva.EvaAttention: QuantEvaAttention,
}

REFUSED: dict[type[nn.Module], str] = {
    cait.TalkingHeadAttn: "it mixes the heads before and after the softmax, so that its probabilities have either sign",
    cait.ClassAttn: "its single query reads the class token alone, beside talking heads",
} | dict.fromkeys(
    compat.timm_classes("naflexvit", "NaFlexVit"),
    "its number of tokens varies from image to image, and it adds to outputs of its layers in place",
)

# Modules whose layers stay as they are.
LEFT_ALONE: dict[type[nn.Module], str] = {AttentionPoolLatent: "pooling head"}


def _joined(attention: Any) -> Tensor | None:
    """The biases of query, key (constant zeros) and value as one."""
    if attention.q_bias is None:
        return None
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def _additive(mask: Tensor | None, is_causal: bool, x: Tensor) -> Tensor | None:
    """A mask as scaled_dot_product_attention takes it, as a term of the logits."""
    return x.new_full((x.shape[1], x.shape[1]), -torch.inf).triu_(1) if is_causal else additive(mask, x)
