"""transformers: its tables of quantisers, the hooks of one while a model is loaded or saved, and names of modules."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial, wraps
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from re import search
from typing import Any

from hf_ext.compat.hub import may_write_card, write_card
from hf_ext.compat.names import Entry, claim_all, is_from, release_all

_CLASSES = {"vit": "ViT", "deit": "DeiT", "swin": "Swin"}


def add_quantizer(name: str, config_class: type, quantizer_class: type) -> None:
    """Have `quantization_config={"quant_method": name}` lead to these two classes.

    Raises:
        RegistrationError: somebody else holds the name; then nothing is added.
    """
    claim_all(_entries(name, config_class, quantizer_class), host="transformers")


def remove_quantizer(name: str, config_class: type, quantizer_class: type) -> None:
    """The undo.

    Raises:
        RegistrationError: somebody put their own there meanwhile, which stays.
    """
    _check_shapes_no_more()
    release_all(_entries(name, config_class, quantizer_class), host="transformers")


def _entries(name: str, config_class: type, quantizer_class: type) -> list[Entry]:
    from transformers.quantizers import auto

    return [
        (auto.AUTO_QUANTIZATION_CONFIG_MAPPING, name, config_class),
        (auto.AUTO_QUANTIZER_MAPPING, name, quantizer_class),
    ]


# --- From 5.0 on (5.23 is cured) no shape is checked while a model with a quantiser is loaded: a head for 10 classes
# --- would become one for 1000. Goes when the cure is in the lowest version.


def _check_shapes() -> None:
    if find_spec("transformers.core_model_loading") is None:
        return  # transformers 4
    loading = import_module("transformers.core_model_loading")
    original = loading.set_param_for_module
    if is_from(original, __file__):
        return

    @wraps(original)
    def set_param_for_module(*args: Any, **kwargs: Any) -> Any:
        args = [None if isinstance(value, QuantizerHooks) else value for value in args]
        kwargs = {name: None if isinstance(value, QuantizerHooks) else value for name, value in kwargs.items()}
        return original(*args, **kwargs)

    loading.set_param_for_module = set_param_for_module


def _check_shapes_no_more() -> None:
    loading = sys.modules.get("transformers.core_model_loading")
    if loading is not None and is_from(loading.set_param_for_module, __file__):
        loading.set_param_for_module = loading.set_param_for_module.__wrapped__


# --- ViT, DeiT and Swin. Up to transformers 5.8 `<name>SelfAttention` has `query`, `key`, `value`, and a module after
# --- it the output projection; from 5.9 on `<name>Attention` has `q_proj`, `k_proj`, `v_proj`, `o_proj`. Files keep the
# --- old names of modules. Goes when 5.9 is the lowest version.


def vision_attention(model_type: str) -> type:
    """The class that computes the attention of a "vit", "deit" or "swin"."""
    module = import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    name = _CLASSES[model_type]
    return getattr(module, f"{name}SelfAttention", None) or getattr(module, f"{name}Attention")


def attention_owns_output() -> bool:
    """Whether those classes hold their output projection too."""
    return vision_attention("vit").__name__ == "ViTAttention"


def disk_names(model_type: str, children: Iterable[str]) -> list[tuple[str, str]]:
    """(part of a name in files, the same in the model) for what was added to such an attention under `children`.

    The host's own table covers its own layers only.
    """
    home = {"vit": "attention.attention", "deit": "attention.attention", "swin": "attention.self"}.get(model_type)
    if home is None or not attention_owns_output():
        return []
    return [(f"{home}.{child}", f"attention.{child}") for child in children]


def use_disk_names(model: Any, names: list[tuple[str, str]]) -> None:
    """Save `model` under names as in files, and accept them in `load_state_dict`.

    `Trainer` resumes through `load_state_dict`, which (seen in 5.23) knows the model's own names only: it warns of
    missing keys, and goes on with what the model had. Goes when that is cured.
    """
    if names and not getattr(model, "_hf_ext_disk_names", False):
        model._hf_ext_disk_names = True
        model.register_load_state_dict_pre_hook(_to_own_names)
    if names:
        model._weight_conversions = _with(_host_conversions(model), renamings(names))


def renamings(names: list[tuple[str, str]]) -> list[Any]:
    """The host's objects for `disk_names`."""
    if not names:
        return []
    from transformers.core_model_loading import WeightRenaming

    return [WeightRenaming(on_disk, own) for on_disk, own in names]


def _host_conversions(model: Any) -> list[Any]:
    """Those a load has left on the model, else those that a save would look up."""
    found = getattr(model, "_weight_conversions", None)
    if found is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        looked_up = get_model_conversion_mapping(model, add_legacy=False)
        found = [conversion for conversion in looked_up if type(conversion).__name__ != "PrefixChange"]
    return found


def _with(conversions: list[Any], more: list[Any]) -> list[Any]:
    have = [conversion.target_patterns for conversion in conversions]
    return [*conversions, *(conversion for conversion in more if conversion.target_patterns not in have)]


def leave_card(model: Any, card: Callable[[Any], str]) -> None:
    """Have `model.save_pretrained` write `card(model)` to README.md, unless somebody's own is there.

    Quantisers are not told the folder, and the host writes a card only on the way to the hub, from its own template.
    """
    model.save_pretrained = partial(_save_with_card, model, card)  # copies of the model, pickled ones too, get theirs


def _save_with_card(
    model: Any,
    card: Callable[[Any], str],
    save_directory: Any,
    is_main_process: bool = True,
    *args: Any,
    **kwargs: Any,
) -> None:
    type(model).save_pretrained(model, save_directory, is_main_process, *args, **kwargs)
    folder = Path(save_directory)
    if is_main_process and folder.is_dir() and may_write_card(folder):
        write_card(folder, card(model))


def _to_own_names(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    table = [conversion for conversion in model._weight_conversions if isinstance(conversion, WeightRenaming)]
    own = {prefix + name for name in model.state_dict()}
    for key in [key for key in state_dict if key.startswith(prefix) and key not in own]:
        renamed = prefix + rename_source_key(key.removeprefix(prefix), table, [])[0]
        if renamed in own:
            state_dict.setdefault(renamed, state_dict.pop(key))


class QuantizerHooks(ABC):
    """What transformers calls on a quantiser, in whichever version, as five methods. Goes before `HfQuantizer`.

    Up to 4.57 the names in the checkpoint arrive in `update_expected_keys`, and every floating tensor is cast to one
    dtype; from 5.0 on the files are named before loading, and each tensor keeps the dtype that it has in the model.
    Tensors that no file gives are memory as it was found, in all versions. Goes in part when 5.0 is the lowest version.
    """

    added: str  # pattern of the names that a checkpoint of full precision cannot have

    _missing_before_loading: set[str] | None = None
    _model: Any = None

    @abstractmethod
    def convert(self, model: Any) -> None:
        """Turn a model without values (its parameters are on the meta device) into a quantised one."""

    @abstractmethod
    def owns(self, key: str) -> bool:
        """Whether only a checkpoint of this quantiser has a tensor of this name."""

    @abstractmethod
    def expect(self, model: Any) -> None:
        """Give the parameters the shapes of our own files, which are about to be loaded."""

    @abstractmethod
    def finish(self, model: Any, missing: set[str]) -> None:
        """Undo `expect`, and give values to our tensors among `missing`, which no file gave."""

    @abstractmethod
    def saved_state(self, model: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """What goes into the files, and their metadata."""

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        _check_shapes()
        self.convert(model)
        self._dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
        if kwargs.get("checkpoint_files"):
            self._meet(model, _keys(kwargs["checkpoint_files"]))

    def update_expected_keys(self, model: Any, expected_keys: list[str], loaded_keys: list[str]) -> list[str]:
        """Called twice up to 4.57: before tensors without a file get their memory, and after."""
        if self._model is None:
            self._model, self._dtype = model, model.config._pre_quantization_dtype
            self._meet(model, loaded_keys)
            if self.pre_quantized:
                import torch

                model.config._pre_quantization_dtype = torch.float32  # `_settle` rounds what has to be
        else:
            self._missing_before_loading = {name for name, tensor in _tensors(self._model) if not tensor.is_meta}
        return expected_keys

    def _meet(self, model: Any, keys: Iterable[str]) -> None:
        """A `quantization_config` beside weights of full precision makes the host believe that they are quantised."""
        self.pre_quantized = any(self.owns(key) for key in keys)
        if self.pre_quantized:
            self.expect(model)
        else:
            model._keys_to_ignore_on_load_missing = [*(model._keys_to_ignore_on_load_missing or ()), self.added]

    def update_missing_keys_after_loading(self, model: Any, missing_keys: list[str], *_: Any) -> list[str]:
        """What 4.56 warns of, which does not read `_keys_to_ignore_on_load_missing` off the model."""
        return [key for key in missing_keys if self.pre_quantized or not search(self.added, key)]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._settle(model)
        if not self.pre_quantized:
            missing = set(self._dtypes)
        elif self._missing_before_loading is not None:
            missing = self._missing_before_loading
        else:
            missing = {name for name, tensor in _tensors(model) if not getattr(tensor, "_is_hf_initialized", False)}
        self.finish(model, missing)
        vars(model).pop("_keys_to_ignore_on_load_missing", None)
        del self._dtypes

    def _settle(self, model: Any) -> None:
        """Give every tensor the dtype that `convert` left it, and a place where tensors usually are.

        Files are mapped, so that their tensors start anywhere in memory, and sums over such ones round differently: a
        reloaded model would not be equal to the saved one, by as much as a rounding to few bits makes of it.
        """
        for name, tensor in _tensors(model):
            tensor.data = tensor.data.to(self._dtypes[name])
            if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
                tensor.data = tensor.data.clone()
        if self._model is not None:
            model.config._pre_quantization_dtype = self._dtype
            self._model = None

    def get_state_dict(self, model: Any) -> dict[str, Any]:
        """4.56."""
        return self.saved_state(model)[0]

    def get_state_dict_and_metadata(self, model: Any, *_: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """From 4.57 on; there with a second argument."""
        return self.saved_state(model)


def _tensors(model: Any) -> Iterator[tuple[str, Any]]:
    persistent = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in persistent:
            yield name, tensor


def _keys(files: Iterable[Any]) -> Iterator[str]:
    """Names in the headers; a checkpoint that is no safetensors file is never one of ours."""
    from safetensors import safe_open

    for file in files:
        if str(file).endswith(".safetensors"):
            with safe_open(file, framework="pt") as opened:
                yield from opened.keys()
