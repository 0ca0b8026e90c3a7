"""Attention with every factor rounded: queries, keys, probabilities and values, or QKR instead of the first two."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_ext.modes import no_autocast
from hf_ext.ofq_quantizer import ops
from hf_ext.ofq_quantizer.attention_ops import quantized_attention
from hf_ext.ofq_quantizer.layers import QuantLinear, linear
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer, Switches


class QuantAttention(nn.Module):
    """Goes before a host's attention class; the subclass overrides `forward` with the host's signature.

    Adds `q_quantizer`, `k_quantizer`, `v_quantizer` and `probs_quantizer`, or with QKR `input_quantizer`,
    `qkx_quantizer`, `v_quantizer` and `probs_quantizer`. `input_quantizer` exists without QKR as well where several
    layers read the same input.
    """

    switches: Switches
    heads: int
    executed: bool
    reparametrized: bool
    left_alone: ClassVar[dict[str, str]] = {}  # children with layers that stay as they are -> why

    def reparam_problem(self) -> str | None:
        """Why QKR is not defined for this module; None where it is."""
        return None

    @property
    def projections(self) -> tuple[QuantLinear, ...]:
        """(qkv,) or (query, key, value)."""
        return (self.qkv,)

    def factor(self, index: int) -> tuple[Tensor, Tensor | None]:
        """Weight (heads * head_dim, width) and bias of the query (0), key (1) or value (2)."""
        bias = self.joint_bias()
        return self._weight(index), None if bias is None else bias.chunk(3)[index]

    def _weight(self, index: int) -> Tensor:
        layers = self.projections
        return layers[index].weight if len(layers) == 3 else layers[0].weight.chunk(3)[index]

    def joint_bias(self) -> Tensor | None:
        """Biases of query, key and value as one (3 * heads * head_dim).

        A part of it has gradients for all of them, zeros where it does not depend on them: QKR has no use for the
        key's, and DistributedDataParallel waits for a gradient of every parameter.
        """
        biases = [layer.bias for layer in self.projections]
        return biases[0] if len(biases) == 1 or biases[0] is None else torch.cat(biases)

    def project(self, layer: nn.Linear, x: Tensor) -> Tensor:
        """One of `projections` of x (batch, tokens, width); as it is where skip_modules left it so."""
        joint, quantized = len(self.projections) == 1, isinstance(layer, QuantLinear)
        if not joint:
            return layer.product(x, self.input_quantizer, layer.bias) if quantized else layer(x)
        _require_linear(layer)
        bias = self.joint_bias()
        return layer.product(x, layer.input_quantizer, bias) if quantized else F.linear(x, layer.weight, bias)

    @property
    def query_weight(self) -> Tensor:
        return self._weight(0)

    @property
    def value_weight(self) -> Tensor:
        return self._weight(2)

    def set_up(self, switches: Switches, tokens: int) -> None:
        """Turn a host's attention, whose class has just been changed, into a quantised one.

        tokens: number of tokens a sequence, as the probing forward saw it.
        """
        self.switches, self.executed = switches, False
        self.heads, self.reparametrized = self.head_count(), switches.config.qk_reparam
        inner, width = self.query_weight.shape
        if self.reparametrized:
            self.input_quantizer = self._quantizer(tokens, width, width)
            self.qkx_quantizer = self._quantizer(tokens * self.heads, self.heads * width, per_head=True)
            for layer in self.projections if len(self.projections) == 1 else self.projections[:2]:
                layer.reparametrized = True
        else:
            if len(self.projections) == 3 and any(isinstance(layer, QuantLinear) for layer in self.projections):
                self.input_quantizer = self._quantizer(tokens, width, width)
            self.q_quantizer = self._quantizer(tokens, inner, inner)
            self.k_quantizer = self._quantizer(tokens, inner)
        self.v_quantizer = self._quantizer(inner, inner, inner, axis=-1)
        self.probs_quantizer = self._quantizer(tokens, positive=True)
        for child in ("qk", "v"):  # QKR once the latent weights are gone: what is left of them, and u
            self.register_module(child, None)
        self.register_buffer("u", None)

    def head_count(self) -> int:
        """Number of heads."""
        return self.num_heads

    def _quantizer(
        self, size: int, bias_in: int = 0, bias_out: int = 0, axis: int | None = -2, **options: bool
    ) -> ActivationQuantizer:
        config = self.switches.config
        if axis == -2 and config.activation_scale == "tensor":
            size, axis = 1, None
        return ActivationQuantizer(
            config.a_bits,
            axis=axis,
            size=size,
            bias_in=bias_in,
            bias_out=bias_out,
            heads=self.heads,
            switches=self.switches,
            like=self.query_weight,
            **options,
        ).train(self.training)

    def split(self, x: Tensor) -> Tensor:
        """(batch, tokens, heads * d) -> (batch, heads, tokens, d)."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scaling: float, logit_bias: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """softmax(q k^T scaling + logit_bias) v with all four factors rounded.

        q, k, v: (batch, heads, tokens, head_dim); logit_bias broadcasts against (batch, heads, tokens, tokens).
        Returns (batch, tokens, heads * head_dim).
        """
        return self._attend(q, k, v, self.q_quantizer, self.k_quantizer, scaling, logit_bias, dropout)

    def reparam_attend(
        self, x: Tensor, scaling: float, logit_bias: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """The same from the input x (batch, tokens, width), with the product W_q^T W_k rounded as one (QKR)."""
        _require_linear(*self.projections)
        t, v = map(self.split, self._latent_products(x) if self.qk is None else self._frozen_products(x))
        u = self._query_bias_term(x)
        if u is not None:
            logit_bias = u * scaling if logit_bias is None else logit_bias + u * scaling
        for layer in self.projections:
            layer.ran()
        return self._attend(
            x.unsqueeze(1), t, v, self.input_quantizer, self.qkx_quantizer, scaling, logit_bias, dropout
        )

    def _latent_products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        product = self.qk_product()
        if self.switches.boundary_range is not None and not self.switches.config.reference_compat:
            product = ops.mask_gradient(product, self._trainable(product))
        weights = self.projections[-1].weight_quantizer()
        return tuple(linear(x, *factor, self.input_quantizer, weights) for factor in ((product, None), self.factor(2)))

    def _frozen_products(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layers = self.qk, self.projections[-1] if self.v is None else self.v
        return tuple(layer.product(x, self.input_quantizer, layer.bias) for layer in layers)

    def qk_product(self) -> Tensor:
        """A, (heads * width, width) float32: W_q,h^T W_k,h of every head."""
        with no_autocast(self.query_weight):
            q, k = (self._weight(index).float().unflatten(0, (self.heads, -1)) for index in (0, 1))
            return (q.transpose(1, 2) @ k).flatten(0, 1)

    def low_bit_weights(self) -> dict[str, Tensor]:
        """The weights that StatsQ rounds and that are no layer of their own, by the last part of their name."""
        if not self.reparametrized or self.qk is not None:
            return {}
        joint = len(self.projections) == 1
        return {"qk": self.qk_product()} | ({"v": self.value_weight} if joint else {})

    def _trainable(self, product: Tensor) -> Tensor:
        config = self.switches.config
        return ops.low_confidence(
            product.detach(), config.w_bits, self.switches.boundary_range, config.weight_scale_coefficient
        )

    def _query_bias_term(self, x: Tensor) -> Tensor | None:
        """x^ u of every key, (batch, heads, 1, tokens)."""
        with no_autocast(x):
            u = self.query_bias_direction() if self.qk is None else self.u
            if u is None:
                return None
            return F.linear(self.input_quantizer(x).float(), u).transpose(1, 2).unsqueeze(2).to(x.dtype)

    def query_bias_direction(self) -> Tensor | None:
        """u (heads, width) float32, u_h = W_k,h^T b_q,h; None without a bias."""
        (key, _), (_, bias) = self.factor(1), self.factor(0)
        if bias is None or self.switches.config.reference_compat:
            return None
        key = (key if self.switches.boundary_range is None else key.detach()).float()
        return torch.einsum(
            "hdc,hd->hc", key.unflatten(0, (self.heads, -1)), bias.float().unflatten(0, (self.heads, -1))
        )

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
        if self.switches.rounding:
            self.executed = True
        self.switches.announce()
        quantizers = (left, right, self.v_quantizer, self.probs_quantizer)
        dropout = dropout if self.training else 0.0
        if self.switches.integer and self.switches.rounding:
            from hf_ext.ofq_quantizer.integer import integer_attention  # numba, which only such a model needs

            return integer_attention(q, k, v, *quantizers, scaling, logit_bias)
        factors = (q, k, v, left, right, scaling, logit_bias)
        at_once = self.switches.rounding and not self.switches.calibrating and not dropout
        ready = all(a.ready for a in quantizers)
        if not at_once or not (ready or self.training):
            return self._attend_in_steps(*factors, dropout)
        if not ready:
            with torch.no_grad():  # for the scales alone: the recomputation of a checkpoint, with them, saves the same
                self._attend_in_steps(*factors, dropout)
        self._tell_if_plain(q, v, *quantizers)
        read = [a.activation if ready else a.kept_activation for a in quantizers]
        operands = (a(x) for a, x in zip(read, (q, k, v, v), strict=True))  # probabilities have as many tokens as v
        return quantized_attention(q, k, v, *operands, scaling, logit_bias)

    def _tell_if_plain(self, q: Tensor, v: Tensor, *quantizers: ActivationQuantizer) -> None:
        left, right, values, probs = (a.largest for a in quantizers)
        self.switches.tell_if_plain(q, (q.shape[-1], left, right), (v.shape[-2], probs, values))

    def _attend_in_steps(
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
        """Scales of the probabilities need the probabilities themselves; dropout comes after their rounding."""
        q, k, v = left(q), right(k), self.v_quantizer(v)
        logits = q @ k.transpose(-2, -1) * scaling
        if logit_bias is not None:
            logits = logits + logit_bias
        probs = self.probs_quantizer(logits.softmax(-1))
        return (F.dropout(probs, dropout) @ v).transpose(1, 2).flatten(2)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """The bits leave no trace in names and shapes; the notes that torch keeps beside the tensors have them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        notes = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if notes is not None:
            notes["ofq"] = self.switches.config.to_dict()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *args: Any) -> None:
        own = self.switches.config.to_dict()
        saved = local_metadata.get("ofq", own)
        if others := [name for name in own if saved.get(name) != own[name]]:
            differences = ", ".join(f"{name}={saved.get(name)!r} and not {own[name]!r}" for name in others)
            self.switches.warn_once(
                f"these weights were learnt with {differences}: build the model so, or calibrate and train it"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _require_linear(*layers: nn.Module) -> None:
    """Raise where another module stands for a layer whose weight is read without a call."""
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise RuntimeError(
                f"a {type(layer).__module__}.{type(layer).__qualname__} stands where this attention reads the weight "
                "of a layer of its own; PEFT's LoRA has no effect there: leave queries, keys and values out of "
                "target_modules"
            )


def windowed(bias: Tensor, mask: Tensor | None, x: Tensor) -> Tensor:
    """bias (1, heads, n, n), and with a mask (windows, n, n) (batch * windows, heads, n, n)."""
    return bias if mask is None else (bias + mask.unsqueeze(1)).repeat(x.shape[0] // mask.shape[0], 1, 1, 1)


def additive(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask that adds, or that says where to look, as a term of the logits in the dtype of x."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, torch.finfo(x.dtype).min)
