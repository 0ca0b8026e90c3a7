"""One adapted linear layer: which adapters are on it, its forward pass, and its merge."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_ext import compat
from hf_ext.bone_adapter import ops
from hf_ext.bone_adapter.config import BoneConfig

SUPPORTED = "torch.nn.Linear, transformers' Conv1D, and quantised linear layers that PEFT can read"


class BoneLayer(BaseTunerLayer):
    """What PEFT knows of an adapted layer.

    Attributes:
        bone_block: {adapter: Parameter}, `(r, out)` in the tile form, `(out/r, r, r)` in "bat", `(in/r, r, r)` in
            "bat_row".
        bone_r, bone_form: {adapter: block size}, {adapter: "tile" | "bat" | "bat_row"}.
        keep_base_on_merge: whether a merged layer keeps a copy of its base weight (in host memory), so that unmerging
            restores every bit. Set it to False, on the class or on a layer, where that memory is not there; unmerging
            then computes the inverse, which drifts by rounding and fails where I + b is singular.
    """

    adapter_layer_names = ("bone_block",)
    other_param_names = ("bone_r", "bone_form")
    keep_base_on_merge = True

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        self.base_layer = base_layer
        self.bone_block = nn.ParameterDict({})
        self.bone_r: dict[str, int] = {}
        self.bone_form: dict[str, str] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.kwargs = kwargs
        self.cast_input_dtype_enabled = True  # peft.helpers switches it; sums are formed in float32 either way
        self._kept: Any = None  # the base weight as it was, while merged
        self._written: int | None = None  # its version when it was merged
        self.quantization_backend = compat.quantization_backend(self.get_base_layer(), **kwargs)
        self.in_features, self.out_features = compat.in_out_features(self.get_base_layer())

    def update_layer(self, adapter_name: str, config: BoneConfig, inference_mode: bool = False, **kwargs: Any) -> None:
        """Put a new adapter on this layer, in its starting state.

        Raises:
            ValueError: the form does not fit this layer.
        """
        self._check_form(config.form)
        shape = ops.block_shape(config.form, config.r, self.in_features, self.out_features)
        compat.keep_weight_readable(self.get_base_layer())
        block = torch.zeros(shape)
        if config.init_weights is False:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        self.bone_r[adapter_name], self.bone_form[adapter_name] = config.r, config.form
        self.bone_block[adapter_name] = nn.Parameter(block)
        super()._move_adapter_to_device_of_base_layer(adapter_name, compat.device_of(self.get_base_layer()))
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def change_form(self, adapter_name: str, form: str) -> None:
        """Give an adapter another form, with blocks of zeros on the same device: what its file holds comes next."""
        old = self.bone_block[adapter_name]
        self._check_form(form)
        shape = ops.block_shape(form, self.bone_r[adapter_name], self.in_features, self.out_features)
        self.bone_form[adapter_name] = form
        self.bone_block[adapter_name] = nn.Parameter(old.new_zeros(shape), requires_grad=old.requires_grad)

    def _check_form(self, form: str) -> None:
        """The block-affine column form works on the weight itself, and so needs one that can be read."""
        base, backend = self.get_base_layer(), self.quantization_backend
        if form != "bat":
            return
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f'init_weights="bat" computes with the weight, which {backend.backend_name} layers do not give back. '
                "Use the tile form (init_weights=True)."
            )
        if backend is None and not _has_plain_forward(base):
            raise ValueError(
                f'init_weights="bat" replaces the forward pass of the layer, and {type(base).__name__} has one of its '
                "own. Use the tile form (init_weights=True)."
            )
        if base._forward_hooks or base._forward_pre_hooks:
            warnings.warn(
                'init_weights="bat" replaces the forward pass of a layer with hooks: they do not run.', stacklevel=2
            )
        compat.require_readable(base, 'init_weights="bat" computes with the weight')

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device only: PEFT calls this after loading, and its cast to the base's dtype would cost the file's bits."""
        block = self.bone_block.get(adapter_name)
        target = device or compat.device_of(self.get_base_layer())
        if block is not None and not block.is_meta and target is not None and block.device != target:
            self.bone_block[adapter_name] = nn.Parameter(block.data.to(target), requires_grad=block.requires_grad)

    def scale_layer(self, scale: float) -> None:
        if scale != 1 and self._has_active():
            warnings.warn("Bone adapters have no scaling; the scale stays 1.", stacklevel=2)

    def unscale_layer(self, scale: float | None = None) -> None:
        if scale != 1 and self._has_active():
            warnings.warn("Bone adapters have no scaling; the scale stays 1.", stacklevel=2)

    def _has_active(self) -> bool:
        return any(name in self.bone_block for name in self.active_adapters)


class BoneLinear(nn.Module, BoneLayer):
    """An `nn.Linear`, `Conv1D` or quantised linear layer with Bone adapters.

    Forward takes x `(..., in)` and returns `(..., out)` in the dtype that the base layer returns. Active adapters are
    applied in their order, each to the weight that the one before it left.

    Raises:
        ValueError: a form that does not fit the layer; `adapter_names` that do not fit the batch or the state.
        RuntimeError: a block-affine form on a weight that is not there (partitioned by ZeRO-3, or offloaded).
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BoneConfig, **kwargs: Any) -> None:
        super().__init__()
        BoneLayer.__init__(self, base_layer, **kwargs)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def forward(self, x: Tensor, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self._adapted(x, self.active_adapters, *args, **kwargs)

    def _adapted(self, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
        """Tile and row form work on activations around the layer below; "bat" needs everything below it as a weight."""
        if not torch.compiler.is_compiling():
            compat.announce("BONE", forms=",".join(dict.fromkeys(self.bone_form.values())))
        steps = [
            (self.bone_form[name], self.bone_block[name]) for name in dict.fromkeys(names) if name in self.bone_block
        ]
        on_weight = max([0, *(i + 1 for i, (form, _) in enumerate(steps) if form == "bat")])
        later = []
        for form, block in reversed(steps[on_weight:]):
            if form == "tile":
                later.append((x, block))
            else:
                x, shared = ops.row_forward(x, block)
                later.append((shared, None))
        if on_weight:
            y = self._on_weight(x, steps[:on_weight])
        else:
            if x.requires_grad and torch.is_grad_enabled():
                compat.require_readable(self.get_base_layer(), "gradients have to pass through this layer")
            y = self.base_layer(x, *args, **kwargs)
        for inputs, block in later:
            y = ops.add_tiled(y, inputs) if block is None else ops.tile_forward(y, inputs, block)
        return y

    def _on_weight(self, x: Tensor, steps: list[tuple[str, Tensor]]) -> Tensor:
        base = self.get_base_layer()
        self._require_whole_weight("The bat form reads the weight of the layer", "Use the tile or row form")
        if self.quantization_backend is not None:
            return ops.affine_linear(x, self._weight_now, base.bias, steps)
        return ops.affine_linear(x, base.weight.T if isinstance(base, Conv1D) else base.weight, base.bias, steps)

    def _mixed_batch(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """Each row of the batch with the adapter that is named for it; "__base__" means none."""
        if len(names) != len(x):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged: {', '.join(self.merged_adapters)}."
            )
        if not names:
            return self.base_layer(x)
        rows = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
        parts = {name: self._adapted(x[index], [name]) for name, index in rows.items()}
        order = torch.tensor([i for index in rows.values() for i in index], device=x.device)
        return torch.cat(list(parts.values()))[order.argsort()]

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What this adapter alone adds to the base weight, laid out as that weight is, in the dtype of the blocks."""
        form, block = self.bone_form[adapter_name], self.bone_block[adapter_name].data
        if form == "tile":  # no need for a weight, which may be one that cannot be read
            weight = block.new_zeros(self.out_features, self.in_features)
        else:
            weight = self._unmerged_weight().to(block.dtype)
        delta = ops.updated_weight(form, weight, block) - weight
        return delta.T if isinstance(self.get_base_layer(), Conv1D) else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def _weight_now(self) -> Tensor:
        """(out, in), dequantised where it has to be."""
        base = self.get_base_layer()
        weight = compat.dequantized(self) if self.quantization_backend is not None else base.weight.detach()
        return weight.T if isinstance(base, Conv1D) else weight

    # --- merging

    @property
    def keeps_base(self) -> bool:
        """Whether the base weight is kept beside the merged one at this moment."""
        return self._kept is not None

    def check_merge(self) -> None:
        """Raise where this layer cannot be merged, before anything is written.

        Raises:
            ValueError: a quantised layer whose weight cannot be read or written back.
            RuntimeError: a weight that is not whole on this process.
        """
        base, backend = self.get_base_layer(), self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(
                f"{backend.backend_name} layers cannot be merged into: their weight cannot be read or written back. "
                "Serve the adapter unmerged, or merge it into the unquantised model."
            )
        if backend is None:
            compat.drop_gathered_copies(base)
        self._require_whole_weight("Merging writes the weight of the layer", "Merge where the model is whole")
        if backend is None and not compat.is_plain(base.weight):
            raise ValueError(
                f"{type(base).__name__} keeps its weight as {type(base.weight).__name__} of {base.weight.dtype}, which "
                "PEFT cannot read. Serve the adapter unmerged, or merge it into the unquantised model."
            )
        if backend is None and ("weight" not in base._parameters or not _has_plain_forward(base)):
            raise ValueError(
                f"{type(base).__name__} computes its weight (a parametrisation, pruning) or has a forward pass of its "
                "own, and would not give the same after a merge. Serve the adapter unmerged."
            )
        compat.require_readable(base, "merging reads the weight of the layer")

    def _require_whole_weight(self, why: str, instead: str) -> None:
        weight = getattr(self.get_base_layer(), "weight", None)
        if weight is not None:  # HQQ has its parts under other names
            compat.require_whole_weight(weight, why, instead)

    def merged_weight(self, names: Sequence[str], safe_merge: bool = False) -> Tensor:
        """The base weight `(out, in)` with `names` applied in their order, rounded once to its dtype.

        Raises:
            ValueError: safe_merge, and the result holds NaN or infinity.
        """
        weight = self._unmerged_weight()
        merged = weight
        for name in names:
            merged = ops.updated_weight(self.bone_form[name], merged, self.bone_block[name].data)
            # As it would be stored: what float32 still holds may be infinity in float16.
            if safe_merge and not torch.isfinite(merged.to(weight.dtype)).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return merged.to(weight.dtype)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the active adapters, or `adapter_names`, into the base weight.

        Adapters merged one after the other give what merging them together gives.

        Raises:
            ValueError: safe_merge, and the result holds NaN or infinity (nothing is written); see `check_merge`.
        """
        names = [
            name for name in dict.fromkeys(check_adapters_to_merge(self, adapter_names)) if name in self.bone_block
        ]
        if not names:
            return
        self.check_merge()
        kept = self._kept is not None
        merged = self.merged_weight([*self.merged_adapters, *names] if kept else names, safe_merge)
        if self.keep_base_on_merge and not self.merged:
            self._kept = compat.keep_base(self)
        self._write(merged)
        self._written = compat.version_of(self.get_base_layer())
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base weight bit for bit, or, without `keep_base_on_merge`, by the inverse of each form.

        Raises:
            ValueError: without the kept weight, where I + b has no inverse (nothing is written).
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._kept is not None:
            if compat.version_of(self.get_base_layer()) != self._written:
                warnings.warn("The merged weight was changed since; unmerging restores what was before.", stacklevel=2)
            compat.restore_base(self, self._kept)
        else:
            warnings.warn(
                "Unmerging without the kept base weight computes the inverse of the adapter: the weights drift by "
                "rounding. keep_base_on_merge=True restores them exactly.",
                stacklevel=2,
            )
            self._write(self.inverse_weight())
        self._kept, self._written, self.merged_adapters = None, None, []

    def inverse_weight(self) -> Tensor:
        """The base weight `(out, in)` from the merged one, by the inverse of each form.

        Raises:
            ValueError: I + b has no inverse.
        """
        weight = self._weight_now()
        for name in reversed(self.merged_adapters):
            weight = ops.restored_weight(self.bone_form[name], weight, self.bone_block[name].data)
        return weight

    def _unmerged_weight(self) -> Tensor:
        if self._kept is None:
            return self._weight_now()
        kept = compat.kept_weight(self, self._kept)
        return kept.T if isinstance(self.get_base_layer(), Conv1D) else kept

    def _write(self, weight: Tensor) -> None:
        base = self.get_base_layer()
        weight = weight.T if isinstance(base, Conv1D) else weight
        if self.quantization_backend is not None:
            self.set_base_weight(weight.contiguous())
        else:
            base.weight.data.copy_(weight)

    def __repr__(self) -> str:
        return "bone." + super().__repr__()

    def extra_repr(self) -> str:
        return compat.quantization_repr(self)


def _has_plain_forward(base: nn.Module) -> bool:
    return type(base).forward in (nn.Linear.forward, Conv1D.forward)
