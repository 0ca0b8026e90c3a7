"""The adapted model: how PEFT puts the layers in, loads them, mixes them in a batch, and merges them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_ext import compat
from hf_ext.bone_adapter import loading, weighted
from hf_ext.bone_adapter.config import BoneConfig
from hf_ext.bone_adapter.layer import SUPPORTED, BoneLayer, BoneLinear


class BoneModel(BaseTuner):
    """A model with Bone adapters (arXiv 2409.15371) on some of its linear layers; what `get_peft_model` wraps.

    Args:
        model: any `torch.nn.Module` with linear layers.
        config: a `BoneConfig`.
        adapter_name: name of the first adapter.
        low_cpu_mem_usage: build the blocks on the meta device, for values that come from a file.

    Raises:
        ValueError: a form that does not fit a target, an unsupported target; the model is left as it was.
    """

    prefix = "bone_"
    tuner_layer_cls = BoneLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    # --- putting adapters in

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = self.peft_config[adapter_name]
        compat.resolve_all_linear(config, model)
        experts = compat.fused_experts(config, model)
        if experts:
            raise ValueError(
                f"{', '.join(experts)}: this version of transformers keeps these experts as one 3-D parameter, and "
                "Bone adapts linear layers. Take them out of target_modules, or use LoRA with target_parameters."
            )
        compat.warn_of_lost_biases(config)
        if not config.inference_mode:
            for module in model.modules():  # gradients pass through layers without an adapter too
                compat.keep_weight_readable(module)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:
            _withdraw(model, adapter_name)
            raise

    def _create_and_replace(
        self,
        config: BoneConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        try:
            if isinstance(target, BoneLayer):
                target.update_layer(adapter_name, config, inference_mode=config.inference_mode)
                return
            new = self._create_new_module(config, adapter_name, target, parent)
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from error
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)  # an additional adapter is not trained until it is activated
        self._replace_module(parent, target_name, new, target)

    def _create_new_module(
        self, config: BoneConfig, adapter_name: str, target: nn.Module, parent: nn.Module
    ) -> BoneLinear:
        if isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"the layer carries an adapter of another method, {type(target).__name__}: take it off first."
            )
        arguments = compat.quantization_arguments(self)
        backend = compat.quantization_backend(target, **arguments)
        linear = isinstance(target, (nn.Linear, Conv1D)) or (backend is not None and backend.layer_type == "linear")
        if not linear:
            raise ValueError(f"{type(target).__name__} is not supported. Bone adapts {SUPPORTED}.")
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            raise ValueError(f"torch.nn.{type(parent).__name__} reads this weight itself, past the adapter.")
        return BoneLinear(target, adapter_name, config, **arguments)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:  # as low_cpu_mem_usage leaves them, the blocks have the dtype of their file
            for layer in self._layers():
                if adapter_name in layer.bone_block:
                    BaseTunerLayer._move_adapter_to_device_of_base_layer(layer, adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Nothing else: the host would copy a weight that HQQ has not, and send blocks after an offloaded one."""
        setattr(parent, child_name, new_module)

    def _layers(self) -> Iterator[BoneLayer]:
        return (module for module in self.model.modules() if isinstance(module, BoneLayer))

    # --- loading

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BoneConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = loading.own_tensors(state_dict, adapter_name)
        loading.adopt_development_form(model, config, adapter_name, own)
        own = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, own)
        loading.check_tensors(model, adapter_name, own)
        return own

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """PEFT before 0.21 has no hook like the one above; there, the same checks come as torch walks the modules."""
        for adapter_name, config in self.peft_config.items():
            tail = f".bone_block.{adapter_name}"
            tensors = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.endswith(tail)}
            blocks = {key.removesuffix(f".{adapter_name}"): tensor for key, tensor in tensors.items()}
            loading.adopt_development_form(self, config, adapter_name, blocks)
            loading.check_tensors(self, adapter_name, tensors)
            loading.warn_of_foreign([key.replace(tail, ".bone_block") for key in state_dict if f"{tail}." in key])
        super()._load_from_state_dict(state_dict, prefix, *args)

    # --- batches with several adapters

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        """Hand `adapter_names` of one forward or generate call to every layer.

        Raises:
            ValueError: in training mode, or a name that no layer has.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode: call model.eval() first.")
        known = {"__base__"}.union(*(layer.bone_block for layer in self._layers()))
        if unknown := sorted(set(names) - known):
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}; adapter_names may hold "
                f"{', '.join(sorted(known))}."
            )
        beams = kwargs.get("num_beams") or 1
        # A model without an encoder answers with itself.
        encoder = self.model.get_encoder() if beams > 1 and hasattr(self.model, "get_encoder") else self.model
        unrepeated = set() if encoder in (None, self.model) else set(encoder.modules())
        handles = []
        for module in self.model.modules():
            if isinstance(module, (BoneLayer, AuxiliaryTrainingWrapper)):
                # Beam search repeats every row for its beams, but not before the encoder.
                of_rows = list(names) if module in unrepeated else [name for name in names for _ in range(beams)]
                if isinstance(module, ModulesToSaveWrapper):  # where an adapter has no copy, the base's own serves
                    of_rows = [name if name in module.modules_to_save else "__base__" for name in of_rows]
                hook = partial(_pass_adapter_names, of_rows)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # --- merging

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the base weights, all or none: every layer is checked before one is written.

        Args:
            adapter_names: which, in this order; None: the active ones.
            safe_merge: also compute every merged weight first, and refuse NaN and infinity.

        Raises:
            ValueError: NaN or infinity; a tied weight; an unknown name; a layer that cannot be merged into.
            RuntimeError: a weight that is sharded, or not there. TypeError: adapter_names is no list.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the base weights, all or none.

        Raises:
            ValueError: where the base weights were not kept, and the adapter of a layer has no inverse.
        """
        for layer in self._layers():
            if layer.merged and not layer.keeps_base:
                layer.inverse_weight()
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        for layer in self._layers():
            if merge:
                layer.keep_base_on_merge = False  # nobody can unmerge a layer that is gone
            elif layer.merged:
                layer.unmerge()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: Sequence[str] | None, safe_merge: bool) -> None:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        names = self.active_adapters if adapter_names is None else adapter_names
        if unknown := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"No adapter {', '.join(unknown)} to merge; there are {', '.join(self.peft_config)}.")
        for path, layer in self.model.named_modules():
            if not isinstance(layer, BoneLayer):
                continue
            new = [name for name in names if name in layer.bone_block and name not in layer.merged_adapters]
            if not new:
                continue
            with onload_layer(layer):
                try:
                    layer.check_merge()
                    self._refuse_tied(path, layer)
                    if safe_merge:
                        layer.merged_weight([*layer.merged_adapters, *new] if layer.keeps_base else new, safe_merge)
                except (ValueError, RuntimeError) as error:
                    raise type(error)(f"{error} ({path}; no weight of the model was changed)") from error

    def _refuse_tied(self, path: str, layer: BoneLayer) -> None:
        weight = getattr(layer.get_base_layer(), "weight", None)  # HQQ and GPTQ have their parts under other names
        for name, other in self.model.named_parameters(remove_duplicate=False):
            if weight is not None and not name.startswith(f"{path}.") and _overlap(weight, other):
                raise ValueError(
                    f"{path} shares its weight with {name.removesuffix('.weight')}: merging would change both. Load "
                    "the model with tie_word_embeddings=False and copy the weight, or serve the adapter unmerged, "
                    "for instance as LoRA (hf_ext.bone_adapter.convert_to_lora)."
                )

    # --- arithmetic with adapters

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str | None = None,
    ) -> None:
        """Build a new adapter from existing ones, exactly.

        Args:
            adapters: names; of one form, block-affine ones also of one r.
            weights: one factor each.
            adapter_name: name of the new adapter, which is not activated.
            combination_type: "linear": dW is the weighted sum (tile forms of different r become one of their least
                common multiple). "compose": I + b = (I + w1 b1)(I + w2 b2)..., which for weights of 1 is what
                activating the list does; block-affine forms only. None: "linear" for the tile form, else "compose".

        Raises:
            ValueError: unknown or mixed adapters, unequal lengths, a name that is taken, another combination_type.
        """
        targets = {
            path
            for path, layer in self.model.named_modules()
            if isinstance(layer, BoneLayer) and any(name in layer.bone_block for name in adapters)
        }
        plan = weighted.plan(self.peft_config, targets, adapters, weights, adapter_name, combination_type)
        self.peft_config[adapter_name] = plan.config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for layer in self._layers():
            present = {name: layer.bone_block[name].data for name in adapters if name in layer.bone_block}
            if present:
                layer.bone_block[adapter_name].data = plan.block(plan.config.r, present)


def _pass_adapter_names(names: list[str], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
    return args, {**kwargs, "adapter_names": names}


def _withdraw(model: nn.Module, adapter_name: str) -> None:
    """Take out what a failed injection has put in already."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, BoneLayer) and adapter_name in layer.bone_block:
            for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
                getattr(layer, attribute).pop(adapter_name)
            if not layer.bone_block:
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, layer.base_layer)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in the same memory, at least in part."""
    if a is b or not all(type(t.data) is Tensor and not t.is_meta for t in (a, b)) or a.device != b.device:
        return a is b  # other kinds of tensors have no address
    (start, end), (other, other_end) = ((t.data_ptr(), t.data_ptr() + t.nbytes) for t in (a, b))
    return start < other_end and other < end
