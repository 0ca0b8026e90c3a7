"""The loss against its definition in float64, and inside the loops that use it: Trainer and the tasks of timm."""

import copy
from typing import Any

import pytest
import torch
from ofq_training import CLASSES, Classifier, images, labels, quantized_vit, small_vit, trainer
from torch import Tensor, nn

from hf_ext.ofq_quantizer.distillation import distillation_loss, distillation_loss_func

STUDENT, OTHER, TEACHER = torch.randn(3, 6, CLASSES, generator=torch.Generator().manual_seed(1)).unbind()
MIXED = torch.rand(6, CLASSES, generator=torch.Generator().manual_seed(2)).softmax(-1)


def written_out(of_class: Tensor, of_distillation: Tensor, target: Tensor, teacher: Tensor) -> Tensor:
    def entropy(p: Tensor, logits: Tensor) -> Tensor:
        q = logits.double().exp() / logits.double().exp().sum(1, keepdim=True)
        return -(p * q.log()).sum() / len(p)

    taught = teacher.double().exp() / teacher.double().exp().sum(1, keepdim=True)
    return entropy(target.double(), of_class) + entropy(taught, of_distillation)


@pytest.mark.parametrize("target", ["indices", "probabilities"])
@pytest.mark.parametrize("heads", ["one head", "two heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_are_those_of_the_definition(target: str, heads: str, dtype: torch.dtype):
    two = heads == "two heads"
    logits = [x.to(dtype, copy=True).requires_grad_() for x in (STUDENT, OTHER)[: 1 + two]]
    exact = [x.detach().double().requires_grad_() for x in logits]
    given = labels(6) if target == "indices" else MIXED
    one_hot = torch.eye(CLASSES)[labels(6)] if target == "indices" else MIXED
    teacher = TEACHER.to(dtype, copy=True).requires_grad_()

    loss = distillation_loss(tuple(logits) if two else logits[0], given, teacher)
    wanted = written_out(exact[0], exact[-1], one_hot, teacher.detach())
    loss.backward()
    wanted.backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(logits, exact, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("given", "teacher", "shapes"),
    [
        (torch.full((6, 7), 1 / 7), TEACHER, [(6, 7), (6, CLASSES)]),
        (labels(4), TEACHER, [(4,), (6, CLASSES)]),
        (labels(6), TEACHER[:, :3], [(6, 3), (6, CLASSES)]),
        (labels(6), TEACHER[:1], [(1, CLASSES), (6, CLASSES)]),
    ],
    ids=["soft labels of another width", "fewer labels", "teacher of other classes", "teacher of one image"],
)
def test_shapes_that_do_not_fit_are_both_named(given: Tensor, teacher: Tensor, shapes: list[tuple[int, ...]]):
    with pytest.raises(ValueError, match="do not fit") as caught:
        distillation_loss(STUDENT, given, teacher)
    assert all(str(shape) in str(caught.value) for shape in shapes)


class Careless(nn.Module):
    """A teacher in training mode, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 16 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(x.flatten(1))
        self.kept_a_graph = logits.requires_grad
        return nn.functional.dropout(logits, 0.5, self.training)


@pytest.mark.smoke
@pytest.mark.parametrize("case", ["indices", "probabilities", "compiled"])
def test_trainer_takes_the_step_of_the_whole_batch(case: str, tmp_path: Any):
    """Batches of 4 and 1, accumulated: a mean of their means would weigh the last image four times."""
    torch.manual_seed(0)
    model, teacher = Classifier(small_vit()), Careless()
    target = torch.rand(5, CLASSES).softmax(-1) if case == "probabilities" else labels(5)
    one_hot = target if case == "probabilities" else torch.eye(CLASSES)[target]

    wanted = copy.deepcopy(model)
    logits = wanted(images(5))["logits"]
    written_out(logits, logits, one_hot, teacher.eval()(images(5)).detach()).backward()
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter -= 0.1 * parameter.grad

    teacher.train()
    names = set(model.state_dict())
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images(5), target, strict=True)]
    options = {"torch_compile": True, "torch_compile_backend": "eager"} if case == "compiled" else {}
    trainer(
        model,
        tmp_path,
        rows,
        compute_loss_func=distillation_loss_func(model, teacher),
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **options,
    ).train()
    assert set(model.state_dict()) == names
    assert not teacher.kept_a_graph
    for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_misuse_in_trainer_is_named():
    model, teacher = Classifier(small_vit()), Careless()
    with pytest.raises(ValueError, match="deepcopy"):
        distillation_loss_func(model, model)
    loss_func = distillation_loss_func(model, teacher)
    with pytest.raises(RuntimeError, match="the model that Trainer trains"):
        loss_func(copy.deepcopy(model)(images(2)), labels(2))
    with pytest.raises(ValueError, match="labels"):
        loss_func(model(images(2)), None)
    loss_func(model(images(2)), labels(2))
    with pytest.raises(RuntimeError, match="the model that Trainer trains"):
        loss_func({"logits": torch.randn(2, CLASSES)}, labels(2))  # no forward since: these images are used up


@pytest.mark.parametrize(
    ("kind", "architecture", "options"),
    [
        ("LogitDistillationTask", "deit_tiny_patch16_224", {}),
        ("TokenDistillationTask", "deit_tiny_distilled_patch16_224", {"distill_type": "soft"}),
    ],
    ids=["logits", "token"],
)
def test_task_of_timm_has_the_same_gradient(kind: str, architecture: str, options: dict[str, str]):
    """As the module's docstring says it is set up; on a quantised student."""
    tasks = pytest.importorskip("timm.task", reason="this timm has no tasks")
    student = quantized_vit(architecture=architecture)
    teacher = small_vit(seed=1, architecture="deit_tiny_patch16_224")
    weights = {"task_loss_weight": 1.0, "distill_loss_weight": 1.0, "temperature": 1.0}
    task = getattr(tasks, kind)(student, teacher, nn.CrossEntropyLoss(), verbose=False, **weights, **options).train()

    task(images(6), labels(6))["loss"].backward()
    theirs = {name: x.grad for name, x in student.named_parameters() if x.grad is not None}
    student.zero_grad()
    distillation_loss(student(images(6)), labels(6), teacher(images(6))).backward()
    ours = {name: x.grad for name, x in student.named_parameters() if x.grad is not None}
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=name)
