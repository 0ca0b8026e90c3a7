"""Every version branch and every host workaround, each with the range it serves and when it may go.

Imports none of our modules, and the hosts only inside functions.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import wraps
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

# The lanes run the lowest and the newest release of each; of torch and torchvision the newest only, as the index has no
# older CPU builds. Outside, names are still added where the interfaces exist, and doctor says "untested".
TESTED = {
    "torch": ">=2.6,<3",
    "transformers": ">=4.56,<6",
    "peft": ">=0.17,<1",
    "timm": ">=1.0.15,<2",
    "evaluate": ">=0.4.3,<1",
    "datasets": ">=3.0,<6",
    "accelerate": ">=1.10,<2",
    "torchvision": ">=0.21,<1",
}


class RegistrationError(RuntimeError):
    """A name of ours is in use by somebody else. The text names the host, the name and the holder."""


def supported(library: str) -> tuple[str | None, str, bool]:
    """(installed version or None, tested range, whether the one is inside the other) of a host library."""
    try:
        installed = metadata.version(library)
    except metadata.PackageNotFoundError:
        return None, TESTED[library], True
    return installed, TESTED[library], SpecifierSet(TESTED[library]).contains(installed, prereleases=True)


def pair_problems() -> list[str]:
    """Versions that are fine alone but not together, each with its cure."""
    transformers, peft = find_spec("transformers"), supported("peft")[0]
    if transformers is None or peft is None:
        return []
    # Read, not imported: the module pulls in half of transformers.
    source = Path(transformers.origin).with_name("integrations") / "peft.py"
    needed = re.search(r'MIN_PEFT_VERSION = "([\d.]+)"', source.read_text()) if source.exists() else None
    if needed is None or Version(peft) >= Version(needed[1]):
        return []
    return [
        f"transformers {supported('transformers')[0]} loads adapters only with peft >= {needed[1]}, and {peft} is "
        f"installed. `pip install -U 'peft>={needed[1]}'` (PeftModel.from_pretrained works as it is)."
    ]


def reads_attention_from_config() -> bool:
    """Whether `attn_implementation` in a config.json takes effect: from transformers 5.5 on; before, it is ignored."""
    return Version(metadata.version("transformers")) >= Version("5.5.0")


def import_cure(library: str, error: BaseException) -> str:
    """What to do when `library` is installed but does not import."""
    if "torchvision::nms" in str(error):
        return (
            "torchvision's operators do not load on this build of torch. `import hf_ext` first cures it; so does "
            "installing both from one index, `pip install --force-reinstall torch torchvision`."
        )
    return f"Try `pip install --force-reinstall {library}`."


Entry = tuple[MutableMapping[str, Any], str, Any]  # table of a host, name, ours


def claim_all(entries: Iterable[Entry], host: str) -> None:
    """Write `table[name] = ours` for all `entries`, or none if somebody else holds a name.

    Raises:
        RegistrationError: naming the host, the name, and the module and file of its holder.
    """
    entries = list(entries)
    _refuse_foreign(entries, host, "Uninstall or unregister one of the two.")
    for table, name, ours in entries:
        table[name] = ours


def release_all(entries: Iterable[Entry], host: str) -> None:
    """Delete `table[name]` wherever it is ours.

    Raises:
        RegistrationError: somebody put their own there meanwhile, which stays.
    """
    entries = list(entries)
    for table, name, ours in entries:
        if name in table and _same(table[name], ours):
            del table[name]
    _refuse_foreign(entries, host, "What hf_ext had there was replaced after it registered.")


def _refuse_foreign(entries: list[Entry], host: str, advice: str) -> None:
    for table, name, ours in entries:
        holder = table.get(name, ours)
        if not _same(holder, ours):
            raise RegistrationError(f"{host} already has {name!r}, from {_origin(holder)}; hf_ext leaves it. {advice}")


def _same(thing: Any, ours: Any) -> bool:
    """Also true of our twin from an earlier import of its module (sys.modules may have been purged)."""
    code = getattr(thing, "__code__", None)
    return thing is ours or (code is not None and code == getattr(ours, "__code__", None))


def _origin(thing: Any) -> str:
    module = getattr(thing, "__module__", type(thing).__module__)
    return f"{module} ({getattr(sys.modules.get(module), '__file__', None) or 'no file'})"


# --- torchvision on a CPU build of torch: the index's torchvision is built for CUDA, its operators do not load, and
# --- `import torchvision` dies of "operator torchvision::nms does not exist". Goes when torchvision guards its fakes.


def add_torchvision_schemas() -> str | None:
    import torch

    if torch.version.cuda or hasattr(torch.ops.torchvision, "nms"):
        return "not needed"
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return None


def remove_torchvision_schemas() -> None:
    """Nothing to undo: torchvision has bound its own code to the schemas by now, and they add no behaviour."""


# --- transformers >= 4.56: attention functions


def attention_tables() -> tuple[MutableMapping[str, Callable], MutableMapping[str, Callable]]:
    """The host's tables of attention functions and of mask functions, shared by all its model classes."""
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    return AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping


def query_span(mask_arguments: Mapping[str, Any]) -> tuple[int, Any]:
    """(number of queries, index of the first one) from the keywords of a mask function.

    Up to transformers 5.0 they arrive as `cache_position`, from 5.5 on as `q_length` and `q_offset` (which may be a
    tensor). Goes when 5.5 is the lowest version.
    """
    if "cache_position" in mask_arguments:
        positions = mask_arguments["cache_position"]
        return positions.shape[0], positions[0]
    return mask_arguments["q_length"], mask_arguments["q_offset"]


def is_causal_by_construction(mask_function: Callable) -> bool:
    """Whether it is the host's causal mask, or an intersection with it: then no token can see a later one.

    Read off the function, as trying it out would wait for the device. While torch.compile traces, which reads no
    closures, only the causal mask itself is recognised.
    """
    import torch
    from transformers.masking_utils import and_masks, causal_mask_function

    if mask_function is causal_mask_function:
        return True
    if (
        torch.compiler.is_compiling()
        or getattr(mask_function, "__code__", None) is not and_masks(causal_mask_function).__code__
    ):
        return False
    [parts] = [cell.cell_contents for cell in mask_function.__closure__]
    return any(is_causal_by_construction(part) for part in parts)


_LOAD_CHECK = "get_correct_attn_implementation"
_wrapped: tuple[Callable, Callable] | None = None  # (the host's method, our wrapper), while ours is in place


def wrap_load_check(check: Callable[[Any, str], None]) -> None:
    """Have `check(model, name)` run whenever transformers has accepted an attention name for a model.

    `PreTrainedModel.__init__` and `set_attn_implementation` both pass through the wrapped method; `check` raises to
    refuse. Idempotent.
    """
    global _wrapped
    from transformers import PreTrainedModel

    original = getattr(PreTrainedModel, _LOAD_CHECK)
    if _wrapped is not None and original is not _wrapped[0]:
        return  # ours is in place, perhaps inside somebody's wrapper

    if getattr(getattr(original, "__code__", None), "co_filename", None) == __file__:
        original = original.__wrapped__  # left by an earlier import of this module

    @wraps(original)
    def get_correct_attn_implementation(self: Any, *args: Any, **kwargs: Any) -> str:
        name = original(self, *args, **kwargs)
        check(self, name)
        return name

    setattr(PreTrainedModel, _LOAD_CHECK, get_correct_attn_implementation)
    _wrapped = original, get_correct_attn_implementation


def unwrap_load_check() -> None:
    """Put the host's method back.

    Raises:
        RegistrationError: somebody wrapped ours in theirs, which stays.
    """
    global _wrapped
    from transformers import PreTrainedModel

    if _wrapped is None:
        return
    original, ours = _wrapped
    current = getattr(PreTrainedModel, _LOAD_CHECK)
    if current not in (ours, original):
        code = getattr(current, "__code__", None)  # functools.wraps lets a wrapper carry our module's name
        raise RegistrationError(
            f"PreTrainedModel.{_LOAD_CHECK} was replaced by {_origin(current)} "
            f"[{getattr(code, 'co_filename', 'no source')}] after hf_ext wrapped it; hf_ext leaves it. "
            "Undo that, then unregister again."
        )
    setattr(PreTrainedModel, _LOAD_CHECK, original)
    _wrapped = None


def enable_checkpointing(model: Any, use_reentrant: bool = False) -> None:
    """Recompute layers in backward. Older versions lack the first name, and transformers 6 will lack the second."""
    how = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


# --- torch: context parallelism, which cuts all rows and puts its own attention function in the place of torch's. A
# --- prototype that cannot be asked whether it is on; goes when it can.


def context_parallelism_is_on() -> bool:
    from torch.nn import functional as F

    return str(F.scaled_dot_product_attention.__module__).startswith("torch.distributed.tensor.experimental.")


# --- torch: autograd inside a custom operator, whose body runs below autograd. Private functions (used with 2.13); goes
# --- when torch.library offers operators that are differentiated through their Python body.


@contextmanager
def recording_inside_an_operator() -> Iterator[None]:
    import torch

    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradOther", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


# --- torch: TF32. Where it has the newer setting, reading the older flag raises once somebody used the newer.


def tf32_on(device: Any) -> bool:
    """Whether float32 matrix products on `device` are rounded to 11 bits."""
    import torch

    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    return device.type == "cuda" and (matmul.allow_tf32 if precision is None else precision == "tf32")


# --- what is really executed, for people who debug a string


_ANNOUNCED: set[str] = set()


def announce(name: str, **details: Any) -> None:
    """With HF_EXT_DEBUG=1: one line on stderr the first time `name` is executed in this process."""
    if name in _ANNOUNCED or os.environ.get("HF_EXT_DEBUG") != "1":
        return
    _ANNOUNCED.add(name)
    details |= {"pid": os.getpid(), "rank": os.environ.get("RANK", "0")}
    print(f"hf_ext: using {name} ({', '.join(f'{k}={v}' for k, v in details.items())})", file=sys.stderr, flush=True)
