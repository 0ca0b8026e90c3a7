"""The first values of the scales of a quantised model, and whether it has them."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from hf_ext.modes import evaluating
from hf_ext.ofq_quantizer.convert import activation_quantizers, quantized_switches
from hf_ext.ofq_quantizer.layers import QuantWeight
from hf_ext.ofq_quantizer.quantizer import ActivationQuantizer


def calibrate(model: nn.Module, batches: Iterable[Any]) -> nn.Module:
    """Give the scales of the activations their first values: the mean over the batches of LSQ's initial scales.

    Args:
        model: a quantised model, under DistributedDataParallel or not; every process takes part, and all get the mean.
        batches: tensors, tuples whose first element is the images, or dicts of the model's keywords. Each is run once,
            in evaluation mode and without gradient; a quantiser takes its scale from what those before it let through.

    The first time, 8-bit weights take their first scales again: hosts may have drawn them anew since the conversion.
    Returns the model, every module in the mode it was in.

    Raises:
        TypeError: one batch instead of a list, or a batch of another kind.
        ValueError: no batch, or one without images; a scale that is NaN or inf; the model is not quantised, or was made
            by `to_int8`. The model is as before.
    """
    switches = quantized_switches(model)
    if any(switch.integer for switch in switches):
        raise ValueError("this model was made by to_int8, which keeps the scales; calibrate the one it was made from")
    if isinstance(batches, Tensor | str | Mapping):
        raise TypeError(f"calibrate takes a list of batches, and got one {type(batches).__name__}: write [batch]")
    quantizers = activation_quantizers(model)
    ran = 0
    try:
        for switch in switches:
            switch.calibrating = True
        with evaluating(model), _first_weight_scales(model):
            for batch in batches:
                _run(model, batch)
                ran += 1
            if not ran:
                raise ValueError("calibrate needs at least one batch of images, and got none")
            _take_scales(quantizers)
    finally:
        for switch in switches:
            switch.calibrating = False
        for quantizer in quantizers.values():
            quantizer.forget_calibration()
    return model


def require_calibrated(model: nn.Module) -> None:
    """Raise where a scale has no value yet, or where one, or a shift, is NaN or inf.

    Raises:
        ValueError: naming the first such quantiser.
    """
    quantizers = activation_quantizers(model)
    missing = [name for name, quantizer in quantizers.items() if not quantizer.ready]
    if missing:
        raise ValueError(
            f"{len(missing)} quantisers have no scales yet, the first is {missing[0]}; call "
            "hf_ext.ofq_quantizer.calibrate(model, batches), or train, first"
        )
    broken = [name for name, quantizer in quantizers.items() if not quantizer.finite()]
    if broken:
        raise ValueError(
            f"scales or shifts of {len(broken)} quantisers are NaN or inf, the first is {broken[0]}; go back to a "
            "checkpoint without"
        )


@contextmanager
def _first_weight_scales(model: nn.Module) -> Iterator[None]:
    """Every 8-bit weight with its first scales, where its input has none yet; as before, if that is all in vain."""
    layers = [module for module in model.modules() if isinstance(module, QuantWeight)]
    before = {layer: layer.weight_scale_norm.clone() for layer in layers if layer.weight_scale_norm is not None}
    for layer in layers:
        layer.take_first_weight_scale()
    try:
        yield
    except BaseException:
        for layer, scale in before.items():
            layer.weight_scale_norm.copy_(scale)
        raise


def _take_scales(quantizers: dict[str, ActivationQuantizer]) -> None:
    """Keep what the calibration found, if all of it is finite: on all ranks, or on none."""
    found = {name: quantizer.calibrated_scale() for name, quantizer in quantizers.items()}
    found = {name: scale for name, scale in found.items() if scale is not None}
    broken = [name for name, scale in found.items() if not scale.isfinite().all()]
    if broken:
        raise ValueError(
            f"the scales of {len(broken)} quantisers would be NaN or inf, the first is {broken[0]}: look for such "
            "values in the images and in the weights"
        )
    for name, scale in found.items():
        quantizers[name].take(scale)


def _run(model: nn.Module, batch: Any) -> None:
    device = next(model.parameters()).device
    if isinstance(batch, Mapping):
        _check_keywords(model, batch)
        model(**{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()})
        return
    images = batch[0] if isinstance(batch, tuple | list) and batch else batch
    _check_images(images)
    model(images.to(device))


def _check_keywords(model: nn.Module, batch: Mapping[str, Any]) -> None:
    try:
        signature(model.forward).bind(**batch)
    except TypeError as error:
        raise TypeError(
            f"{type(model).__name__} takes no batch of {', '.join(map(repr, batch))} ({error}); give calibrate the "
            "images alone, or tuples that begin with them"
        ) from error


def _check_images(images: Any) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(
            f"a batch is a tensor of images, a tuple that begins with one, or a dict of the model's keywords, not "
            f"{type(images).__name__}"
        )
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images are floats (batch, channels, height, width), and this batch is {images.dtype} "
            f"{tuple(images.shape)}; of images and labels, make a list of one batch: [(images, labels)]"
        )
