"""Models that multiply integers: int8 weights, int8 activations, also inside the attention.

Every operation is that of the quantised model, in the same order; the sums of products, which that takes exactly in
float32, are taken in int32. Between two products lie loops of `integer_kernels` or, for a compiler, tensor operations
of `integer_graph`.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_ext.modes import no_autocast
from hf_ext.ofq_quantizer import integer_graph, ops
from hf_ext.ofq_quantizer import integer_kernels as kernels
from hf_ext.ofq_quantizer.convert import quantized_switches
from hf_ext.ofq_quantizer.freezing import frozen_copy
from hf_ext.ofq_quantizer.frozen import FrozenConv2d, FrozenLinear, FrozenWeight
from hf_ext.ofq_quantizer.integer_products import multiply, multiply_heads
from hf_ext.ofq_quantizer.ops import code_range, integer_sums_fit
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer, Switches


def _compiling() -> bool:
    """Whether a compiler asks for tensor operations.

    Raises:
        ValueError: the graph is to leave this process.
    """
    if torch.compiler.is_compiling() and getattr(torch.compiler, "is_exporting", bool)():  # came with torch 2.7
        raise ValueError(
            "a model of to_int8 multiplies by operations that only a process with hf_ext has, and cannot be exported; "
            "export the model it was made from (export_onnx keeps its integers)"
        )
    return torch.compiler.is_compiling()


@torch.no_grad()
def to_int8(model: nn.Module) -> nn.Module:
    """A copy of a calibrated model that multiplies integers, for inference on the CPU.

    In float32 equal to `model` in evaluation mode, bit for bit; in other dtypes, and where a sum of products could
    exceed 2^24, only close to it, of which the first such forward warns. NaN in the input counts as the lowest code.
    torch.compile makes one graph of it, of the same operations and without warnings.

    It follows `load_state_dict` and casts; edits in place of its scales, shifts and biases it need not see.

    Raises:
        ValueError: the model is not on the CPU, not quantised, not calibrated, or a weight has NaN or inf.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        raise ValueError(f"to_int8 makes a model for the CPU, and this one is on {device}; move it with model.cpu()")
    keep_freed_memory()
    integer = frozen_copy(model)
    for switches in quantized_switches(integer):
        switches.integer = True
    for module in integer.modules():
        if isinstance(module, ActivationQuantizer):
            module.__class__ = Int8Quantizer
        elif isinstance(module, FrozenWeight):
            module.__class__ = Int8Linear if isinstance(module, FrozenLinear) else Int8Conv2d
    for name, module in integer.named_modules():
        if isinstance(module, Int8Weight):
            attention = integer.get_submodule(name.rpartition(".")[0])
            module.prepare(module.input_quantizer or attention.input_quantizer)
    return integer


class Int8Quantizer(ActivationQuantizer):
    """A quantiser whose scales and shifts are read once, and again after they were loaded or moved."""

    @property
    def limits(self) -> tuple[int, int, int]:
        """Lowest and highest code, and what is subtracted to hold them in int8."""
        low, high = code_range(self.bits, self.positive)
        return low, high, 128 if high > 127 else 0

    @cached_property
    def factors(self) -> np.ndarray:
        """The scales (H, N) or, where each channel has one, (H, D); H and N may be 1."""
        scale = self.scale.detach().clamp(min=ops.SMALLEST_SCALE)
        if self.axis == -1:
            scale = scale.view(self.heads, -1)
        else:
            scale = scale.view(-1, self.heads).t() if self.per_head and self.axis == -2 else scale[None]
        return scale.contiguous().numpy()

    @cached_property
    def _before(self) -> np.ndarray:
        return _array(self.bias_in)

    @cached_property
    def _after(self) -> np.ndarray:
        return _array(self.bias_out)

    def synchronize(self) -> None:
        super().synchronize()
        for name in ("factors", "_before", "_after"):
            vars(self).pop(name, None)

    def shift_before(self, width: int) -> np.ndarray:
        """`bias_in` (H, width)."""
        return self._before.reshape(-1, width) if self._before.size else np.zeros((1, width), np.float32)

    def shift_after(self, width: int) -> np.ndarray:
        """`bias_out` (H, width)."""
        return self._after.reshape(-1, width) if self._after.size else np.zeros((1, width), np.float32)

    def codes(self, x: Tensor) -> Tensor:
        """x (B, H, N, D) or (B, N, D) -> int8 of the same shape."""
        if self.axis == -2 and x.shape[-2] != self.factors.shape[1]:
            self.activation(x)  # raises
        out = torch.empty(x.shape, dtype=torch.int8)
        codes = out.numpy() if x.dim() == 4 else out.numpy()[:, None]
        quantize = kernels.quantize_by_channel if self.axis == -1 else kernels.quantize_by_row
        quantize(*_flat(x), self.factors, self.shift_before(x.shape[-1]), *self.limits, codes)
        return out


class Int8Weight(FrozenWeight):
    """Goes before a frozen layer."""

    _made_for: np.ndarray | None = None  # the scales of the input, of which a quantiser makes new ones after a load

    @torch.no_grad()
    def prepare(self, quantizer: Int8Quantizer) -> None:
        """Compute all that stays until the next load, given the quantiser of the input."""
        x = torch.zeros(1, quantizer.factors.shape[1], self.integers.shape[1])
        a = quantizer.activation(x)
        x = x if a.bias_in is None else x - a.bias_in.float()  # its codes are 0
        with no_autocast(x):
            self._shift = ops.quantized_linear(x, self.operand, None, a, self.weight_quantizer())[0, 0]
        self._offset = self.bias, self._with(self.bias)
        self._correction = (self.integers.sum(1, dtype=torch.int32) * quantizer.limits[2]).numpy()
        self._right, self._step = self.integers.t(), self.step.numpy()
        self._largest = 2**self.weight_bits - 1 if self.method == "statsq" else 2 ** (self.weight_bits - 1)
        self._made_for = quantizer.factors

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._made_for = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Weight":
        super()._apply(fn, recurse)
        self._made_for = None
        return self

    def _with(self, bias: Tensor | None) -> np.ndarray:
        return (self._shift if bias is None else bias.detach().float() + self._shift).numpy()

    def rescaled(self, codes: Tensor, quantizer: Int8Quantizer, bias: Tensor | None) -> Tensor:
        """codes int8 (B, T, columns) -> (B, T, rows) float32."""
        if self._made_for is not quantizer.factors:
            self.prepare(quantizer)
        columns, rows = self._right.shape
        _tell_if_close(self.switches, columns, quantizer.largest, self._largest, self._like.dtype)
        acc = torch.empty(*codes.shape[:2], rows, dtype=torch.int32)
        multiply(codes.view(-1, columns), self._right, self.weight_bits, acc.view(-1, rows))
        own, offset = self._offset
        offset = offset if bias is own else self._with(bias)
        sums = acc.numpy()
        kernels.rescale(sums, self._correction, quantizer.factors, self._step, offset, sums.view(np.float32))
        return acc.view(torch.float32)

    def in_graph(self, x: Tensor, quantizer: Int8Quantizer, bias: Tensor | None) -> Tensor:
        """x (B, T, columns) -> (B, T, rows) of its dtype, by tensor operations."""
        a = quantizer.activation(x)
        return integer_graph.linear(x, a, self.integers, self.weight_bits, self.step, bias)


class Int8Linear(Int8Weight, FrozenLinear):
    """A linear layer that multiplies int8 by int8."""

    def product(self, x: Tensor, quantizer: Int8Quantizer, bias: Tensor | None) -> Tensor:
        if not self.switches.rounding:
            return super().product(x, quantizer, bias)
        self.executed = True
        tokens = x.unsqueeze(1) if x.dim() == 2 else x if x.dim() == 3 else x.flatten(1, -2)
        if _compiling():
            y = self.in_graph(tokens, quantizer, bias)
        else:
            y = self.rescaled(quantizer.codes(tokens), quantizer, bias)
        return (y if x.dim() == 3 else y.view(*x.shape[:-1], self.out_features)).to(x.dtype)


class Int8Conv2d(Int8Weight, FrozenConv2d):
    """A patch embedding that multiplies int8 by int8."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.switches.rounding:
            return super().forward(x)
        self.executed = True
        if _compiling():
            patches, grid = self.patches(x)
            y = self.in_graph(patches, self.input_quantizer, self.bias)
            return y.transpose(1, 2).unflatten(2, grid)
        quantizer, (tall, wide) = self.input_quantizer, self.kernel_size
        rows, columns = x.shape[2] // tall, x.shape[3] // wide
        patches = torch.empty(len(x), rows * columns, self.integers.shape[1], dtype=torch.int8)
        image, shift = x.detach().float().contiguous().numpy(), quantizer.shift_before(x.shape[1])
        kernels.quantize_patches(image, quantizer.factors, shift, tall, wide, *quantizer.limits[:2], patches.numpy())
        y = self.rescaled(patches, quantizer, self.bias)
        return y.to(x.dtype).transpose(1, 2).unflatten(2, (rows, columns))


def integer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: Int8Quantizer,
    right: Int8Quantizer,
    values: Int8Quantizer,
    probs: Int8Quantizer,
    scaling: float,
    logit_bias: Tensor | None = None,
) -> Tensor:
    """What `quantized_attention` computes, by integer products; (B, N, h*d)."""
    if _compiling():
        read = (a.activation(x) for a, x in ((left, q), (right, k), (values, v), (probs, v)))  # of probs, tokens count
        return integer_graph.attention(q, k, v, *read, scaling, logit_bias)
    batch, heads, tokens, width = v.shape
    for columns, one, other in ((q.shape[3], left, right), (tokens, probs, values)):
        _tell_if_close(values.switches, columns, one.largest, other.largest, v.dtype)
    logits = _logits(left.codes(q), right.codes(k), left, right, scaling, logit_bias)
    torch.softmax(logits, -1, out=logits)
    p, sums = torch.empty(logits.shape, dtype=torch.int8), np.empty((batch, heads, tokens), np.int32)
    kernels.quantize_probabilities(logits.numpy(), probs.factors, *probs.limits[1:], p.numpy(), sums)
    v_codes = values.codes(v)
    acc = torch.empty(v.shape, dtype=torch.int32)
    multiply_heads(p, v_codes, values.bits, acc)
    correction = np.zeros((batch, heads, width), np.int32)
    if probs.limits[2]:
        kernels.add_tokens(v_codes.numpy(), probs.limits[2], correction)
    out = torch.empty(batch, tokens, heads, width)
    arrays = correction, values.factors, values.shift_after(width), sums, probs.factors
    kernels.rescale_values(acc.numpy(), *arrays, out.numpy())
    return out.view(batch, tokens, heads * width).to(v.dtype)


def _logits(
    q: Tensor, k: Tensor, left: Int8Quantizer, right: Int8Quantizer, scaling: float, logit_bias: Tensor | None
) -> Tensor:
    """(B, h, N, N) float32 from codes q (B, h or 1, N, d) and k (B, h, N, d)."""
    batch, heads, tokens, width = k.shape
    acc = torch.empty(batch, heads, tokens, tokens, dtype=torch.int32)
    multiply_heads(q, k.transpose(2, 3), right.bits, acc)
    shift = np.zeros((batch, heads, tokens), np.float32)
    if left.bias_out is not None:
        kernels.dots(k.numpy(), left.shift_after(width), shift)
    by = right.factors * np.float32(scaling)
    if by.shape[1] < tokens:
        by = by.repeat(tokens, 1)
    bias = np.zeros(tokens, np.float32), (0, 0, 0)
    if logit_bias is not None:
        bias = _flat(logit_bias.expand(acc.shape))
    sums = acc.numpy()
    kernels.rescale_logits(sums, left.factors, shift, by, *bias, sums.view(np.float32))
    return acc.view(torch.float32)


def _tell_if_close(switches: Switches, columns: int, left: int, right: int, dtype: torch.dtype) -> None:
    if dtype != torch.float32 or not integer_sums_fit(columns, left, right):
        switches.warn_once(
            "this model of to_int8 is close to the one it was made from, not equal bit for bit: that one is not of "
            "float32, or multiplies floats where a sum of products of integers can exceed 2^24. What lies on a "
            "threshold may get the next code"
        )


def keep_freed_memory() -> None:
    """Have glibc keep what a layer frees for the next: it does after one block as large as this was freed.

    Else it returns memory at the end of its heap to the system, and having it back costs a fifth of a forward.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def _array(tensor: Tensor | None) -> np.ndarray:
    return np.empty(0, np.float32) if tensor is None else tensor.detach().float().numpy()


def _flat(x: Tensor) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The memory of x (B, H, N, D) or (B, N, D) from its first element on, and the strides of B, H and N."""
    if x.requires_grad or x.dtype != torch.float32:
        x = x.detach().float()
    x = x if x.stride(-1) == 1 else x.contiguous()
    strides = x.stride()
    if x.is_contiguous():
        memory = x.numpy().reshape(-1)
    else:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, strides, strict=True))
        memory = x.as_strided((last + 1,), (1,)).numpy()
    return memory, strides[:3] if len(strides) == 4 else (strides[0], 0, strides[1])
