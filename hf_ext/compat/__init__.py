"""Every version branch and every host workaround, each with the range it serves and when it may go.

Imports none of our other packages, and the hosts only inside functions.
"""

import os
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from hf_ext.compat.datasets import stream_is_arrow
from hf_ext.compat.evaluate import unwrap_evaluate_factory, wrap_evaluate_factory
from hf_ext.compat.hub import (
    HERE,
    folder_of,
    front_matter,
    known_model,
    may_write_card,
    push_folder,
    write_card,
)
from hf_ext.compat.names import Entry, RegistrationError, claim_all, release_all
from hf_ext.compat.peft import (
    add_peft_method,
    dequantized,
    device_of,
    fused_experts,
    has_native_bone,
    in_out_features,
    is_plain,
    keep_base,
    keep_weight_readable,
    kept_weight,
    peft_type,
    quantization_arguments,
    quantization_backend,
    quantization_repr,
    remove_peft_method,
    require_readable,
    require_whole_weight,
    resolve_all_linear,
    restore_base,
    version_of,
    warn_of_lost_biases,
)
from hf_ext.compat.quantizers import (
    QuantizerHooks,
    add_quantizer,
    attention_owns_output,
    disk_names,
    leave_card,
    remove_quantizer,
    renamings,
    use_disk_names,
    vision_attention,
)
from hf_ext.compat.timm import (
    add_timm_models,
    create_timm_model,
    load_timm_weights,
    remove_timm_models,
    save_timm_model,
    timm_base,
    timm_classes,
    timm_model_args,
)
from hf_ext.compat.torch import (
    add_torchvision_schemas,
    context_parallelism_is_on,
    drop_gathered_copies,
    recording_inside_an_operator,
    remove_torchvision_schemas,
    tf32_on,
)
from hf_ext.compat.transformers import (
    attention_scaling,
    attention_tables,
    eager_attention,
    enable_checkpointing,
    hands_no_positions,
    heads_masked,
    is_causal_by_construction,
    query_span,
    reads_attention_from_config,
    unwrap_load_check,
    wrap_load_check,
)

# The lanes run the lowest and the newest release of each; of torch and torchvision the newest only, as the index has no
# older CPU builds. Outside, names are still added where the interfaces exist, and doctor says "untested".
TESTED = {
    "torch": ">=2.6,<3",
    "transformers": ">=4.56,!=5.24.*,<6",
    "peft": ">=0.17,<1",
    "timm": ">=1.0.15,<2",
    "evaluate": ">=0.4.3,<1",
    "datasets": ">=3.0,<6",
    "accelerate": ">=1.10,<2",
    "torchvision": ">=0.21,<1",
}


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


def import_cure(library: str, error: BaseException) -> str:
    """What to do when `library` is installed but does not import."""
    if "torchvision::nms" in str(error):
        return (
            "torchvision's operators do not load on this build of torch. `import hf_ext` first cures it; so does "
            "installing both from one index, `pip install --force-reinstall torch torchvision`."
        )
    return f"Try `pip install --force-reinstall {library}`."


# --- what is really executed, for people who debug a string


_ANNOUNCED: set[str] = set()


def announce(name: str, **details: Any) -> None:
    """With HF_EXT_DEBUG=1: one line on stderr the first time `name` is executed in this process."""
    if name in _ANNOUNCED or os.environ.get("HF_EXT_DEBUG") != "1":
        return
    _ANNOUNCED.add(name)
    details |= {"pid": os.getpid(), "rank": os.environ.get("RANK", "0")}
    print(f"hf_ext: using {name} ({', '.join(f'{k}={v}' for k, v in details.items())})", file=sys.stderr, flush=True)
