"""Quantised models as ONNX files that hold the integers of their weights."""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_ext.ofq_quantizer.freezing import frozen_copy
from hf_ext.ofq_quantizer.probe import image_shape

if TYPE_CHECKING:
    from onnxscript import ir


def export_onnx(model: nn.Module, path: str | Path) -> None:
    """Write a calibrated model as a graph of ONNX, which onnxruntime runs without torch and hf_ext.

    It maps "pixel_values" (batch, channels, height, width) to "logits", or to the outputs of a model of transformers
    under their names; the batch is any but an empty one, the size of the images that of the model. The weights of
    quantised layers are int8 with a float32 step a row, and products multiply integers, as those of the model do.

    It computes in float32, whatever the dtype of the model. An image's logits are those of the float32 model, bit for
    bit, unless an activation lies on a threshold: every runtime rounds normalisations, GELU and softmax differently,
    and such an activation may get the next code, which later layers spread. Of 32 images through a DeiT-T of random
    weights at W4A4, onnxruntime so moved 5, by up to a third of the largest logit, and 27 by nothing.

    Args:
        model: a quantised model of timm or transformers, in any mode and on any device.
        path: the file; its folder is made where it is missing.

    Raises:
        ImportError: onnx or onnxscript is missing.
        ValueError: the model is not quantised or not calibrated, was made by `to_int8`, or a weight has NaN or inf.
    """
    _require_exporter()
    frozen = frozen_copy(model).to("cpu", torch.float32)  # `float` is refused by transformers
    images = torch.zeros(2, *image_shape(frozen))
    program = torch.onnx.export(
        frozen,
        (images,),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["pixel_values"],
        output_names=list(_output_names(frozen, images)),
        optimize=False,  # it would store small weights dequantised, and `_optimize` does not
        verbose=False,
    )
    _optimize(program.model)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    program.save(path)


def _require_exporter() -> None:
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise ImportError(f"export_onnx needs {' and '.join(missing)}: pip install 'hf-ext[onnx]'")


def _output_names(model: nn.Module, images: Tensor) -> Iterator[str]:
    with torch.no_grad():
        output = model(images)
    for name, value in output.items() if isinstance(output, Mapping) else [("logits", output)]:
        yield from [name] if isinstance(value, Tensor) else (f"{name}_{index}" for index in range(len(value)))


def _optimize(model: "ir.Model") -> None:
    """Fold constants, and drop the source lines, with paths of this machine, that the exporter writes to each node."""
    from onnxscript import optimizer

    optimizer.optimize_ir(model, should_fold=_may_fold)
    for node in model.graph:
        node.metadata_props.clear()


def _may_fold(node: "ir.Node") -> bool | None:
    """No dequantised weight; the default rules (None) for the rest."""
    from onnxscript import ir

    integers = any(value is not None and value.dtype == ir.DataType.INT8 for value in node.inputs)
    return False if integers else None
