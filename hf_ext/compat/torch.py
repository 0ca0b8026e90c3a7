"""torch and torchvision: what they have no interface for, or not one that works everywhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


# --- torch: FSDP2, which keeps the gathered weights of its root group, and of others on request, after a forward. What
# --- is written into such a copy is lost; it cannot be told from a weight that is whole. Its state-dict hook drops it.


def drop_gathered_copies(module: Any) -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        module.state_dict(keep_vars=True)
