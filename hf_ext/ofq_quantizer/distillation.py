"""The loss with which arXiv 2302.02210 trains: the labels and a full-precision teacher, half and half.

`Trainer` takes `compute_loss_func=distillation_loss_func(model, teacher)`, a loop of one's own `distillation_loss`.
timm 1.0.31 has tasks with the same gradient; their value lies lower by the entropy of the teacher:

    weights = dict(task_loss_weight=1.0, distill_loss_weight=1.0, temperature=1.0)
    task = timm.task.LogitDistillationTask(model, teacher, criterion, **weights)
    task(images, labels)["loss"].backward()

with `criterion` nn.CrossEntropyLoss() or, for mixed labels, timm.loss.SoftTargetCrossEntropy(). A distilled DeiT takes
`TokenDistillationTask` with the same weights and distill_type="soft". The teacher has to be a model of its own: a copy
made before `quantize`, which works in place.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # the label that cross_entropy and Trainer leave out


def distillation_loss(student_logits: Tensor | tuple[Tensor, Tensor], labels: Tensor, teacher_logits: Tensor) -> Tensor:
    """CE(student, labels) + mean over the batch of -sum p_teacher log p_student, at temperature 1, in float32.

    Args:
        student_logits: (batch, classes), or the pair (class token, distillation token) of a distilled DeiT in training,
            whose first learns from the labels and whose second from the teacher.
        labels: indices (batch,) of an integer dtype, or probabilities (batch, classes), as mixup makes them.
        teacher_logits: (batch, classes); no gradient goes there.

    Raises:
        TypeError: logits of the teacher that are no tensor.
        ValueError: shapes that do not fit each other, with both; another number of outputs than two.
    """
    if not isinstance(teacher_logits, Tensor):
        raise TypeError(
            f"teacher_logits are a tensor (batch, classes), not a {type(teacher_logits).__name__}; of the outputs of a "
            "distilled DeiT in training give one, or put the teacher into evaluation mode"
        )
    of_class, of_distillation = _pair(student_logits)
    if labels.is_floating_point() and labels.dim() == 1:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} are indices of classes and need an integer dtype, not "
            f"{labels.dtype}: labels.long()"
        )
    target = labels.float() if labels.is_floating_point() else labels.long()
    _check_shape("labels", target, of_class.shape if labels.is_floating_point() else of_class.shape[:1], of_class)
    _check_shape("teacher_logits", teacher_logits, of_distillation.shape, of_distillation)
    taught = teacher_logits.detach().float().softmax(-1)
    return F.cross_entropy(of_class, target) + F.cross_entropy(of_distillation, taught)


def _pair(logits: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """What learns from the labels and what from the teacher, in float32."""
    if isinstance(logits, Tensor):
        return [logits.float()] * 2
    if len(logits) != 2:
        raise ValueError(f"student_logits are one tensor, or two (class token, distillation token), not {len(logits)}")
    return [part.float() for part in logits]


def _check_shape(name: str, given: Tensor, wanted: torch.Size, logits: Tensor) -> None:
    if given.shape != wanted:
        raise ValueError(
            f"{name} of shape {tuple(given.shape)} do not fit student logits of shape {tuple(logits.shape)}: "
            f"{tuple(wanted)} is needed"
        )


def distillation_loss_func(model: nn.Module, teacher: nn.Module) -> Callable[..., Tensor]:
    """`distillation_loss` as `Trainer(compute_loss_func=...)` calls it.

    Trainer hands over outputs and labels only, so a hook on `model` keeps the images of its last forward. The teacher
    gets the same images, normalised as the student's are. It follows them to their device, is put into eval mode, runs
    without gradients, and is no part of the model. Gradient accumulation weighs the batches as Trainer does.

    Args:
        model: the student, the one that Trainer gets; may be wrapped or compiled afterwards.
        teacher: maps images to logits, a tensor or an output with `.logits`; of timm or transformers.

    Raises:
        ValueError: the teacher is the model; batches without labels; shapes as for `distillation_loss`.
        RuntimeError: Trainer runs another model than this one.

    Returns:
        The function; its `remove()` takes the hook off the model again.
    """
    if teacher is model:
        raise ValueError("the teacher is the model that learns; quantize() works in place: deepcopy the teacher before")
    teacher.eval()
    seen = _Images()
    handle = model.register_forward_pre_hook(seen, with_kwargs=True)

    def loss_func(outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        images = seen.take()
        if labels is None:
            raise ValueError('the batch has no "labels"; distillation_loss takes labels and teacher')
        loss = distillation_loss(_logits(outputs), labels, _teach(teacher, images))
        if num_items_in_batch is None:
            return loss
        return loss * (labels.ne(IGNORED).sum() / num_items_in_batch)  # counted as Trainer counts, soft labels too

    loss_func.remove = handle.remove
    return loss_func


class _Images:
    """A forward pre-hook that keeps the images until they are taken; a copied model gets a hook of its own."""

    def __init__(self) -> None:
        self.images: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = (*args, *kwargs.values())
        self.images = next((value for value in values if isinstance(value, Tensor) and value.dim() == 4), None)

    def take(self) -> Tensor:
        images, self.images = self.images, None
        if images is None:
            raise RuntimeError(
                "no images (batch, channels, height, width) went through the model that distillation_loss_func got: "
                "give it the model that Trainer trains"
            )
        return images


def _teach(teacher: nn.Module, images: Tensor) -> Tensor:
    if any(parameter.device != images.device for parameter in teacher.parameters()):
        teacher.to(images.device)
    with torch.no_grad():
        return _logits(teacher(images))


def _logits(output: Any) -> Any:
    if isinstance(output, Tensor | tuple | list):
        return output
    return output["logits"]
