"""Distillation: a loss that goes with every scheme."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.formats.errors import UsageError
from compressor.training.model_copy import checked_module, copy_module

__all__ = ["distillation", "frozen_copy", "make_teacher", "with_distillation"]


def distillation(output: Tensor, teacher_output: Tensor, temperature: float) -> Tensor:
    """Returns ``T^2 KL(softmax(teacher / T) || softmax(output / T))``, the mean over the batch and all positions.

    Args:
        output, teacher_output: float[batch, classes] or [batch, classes, ...], logits, as ``cross_entropy`` takes them.
        temperature: T; the factor T^2 keeps the size of the gradient independent of it.

    Raises:
        UsageError: the teacher has other classes.

    Example:
        >>> import torch
        >>> float(distillation(torch.ones(2, 3), torch.zeros(2, 3), temperature=2.0))
        0.0

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    if output.shape != teacher_output.shape:
        got, expected = tuple(teacher_output.shape), tuple(output.shape)
        raise UsageError(f"the teacher's output is {got}, expected {expected}: it needs the classes of its student")
    classes = min(1, output.ndim - 1)  # the dimension of the classes
    student = functional.log_softmax(output / temperature, dim=classes)
    teacher = functional.log_softmax(teacher_output / temperature, dim=classes)
    divergence = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    return divergence / (output.numel() // output.shape[classes]) * temperature**2


def with_distillation(
    task: Tensor, output: Tensor, inputs: Tensor | None, teacher: nn.Module, weight: float, temperature: float
) -> Tensor:
    """Returns ``(1 - weight) task + weight distillation(output, teacher(inputs), temperature)``.

    Args:
        task: the loss of the labels, a scalar.
        output: float[batch, classes], the student's logits.
        inputs: the batch that the student was given.
        weight: share of the distillation, 0 to 1.

    Raises:
        UsageError: there are no inputs to give the teacher, or the teacher has other classes.
    """
    if inputs is None:
        raise UsageError("distillation needs the inputs: loss(output, target, inputs=x), or teacher=None")
    with torch.no_grad():
        teacher_output = teacher.to(inputs.device)(inputs).to(output.dtype)
    return (1 - weight) * task + weight * distillation(output, teacher_output, temperature)


def frozen_copy(teacher: nn.Module) -> nn.Module:
    """Returns a copy of a teacher in eval mode, without gradients.

    A copy, because the teacher may be the very model that is trained, or one that its owner goes on training.

    Raises:
        UsageError: it cannot be copied, or has a part that cannot be frozen, as one of TorchScript.
    """
    try:
        return copy_module(checked_module(teacher)).eval().requires_grad_(False)
    except RuntimeError as exc:
        reason = " ".join(str(exc).split())[:150]
        raise UsageError(f"the teacher cannot be frozen ({reason}): teacher=None distils from none") from exc


def make_teacher(model: nn.Module, teacher: nn.Module | str | None, from_scratch: bool) -> nn.Module | None:
    """Returns a frozen copy of the teacher; None where there is none, or where "dense" weights would be random.

    Args:
        model: the model that is trained.
        teacher: another one, "dense" for the model as it is now, or None.
        from_scratch: whether the weights of the model are random.

    Raises:
        UsageError: the teacher is another word than "dense", or cannot be copied or frozen.
    """
    if teacher is None or (teacher == "dense" and from_scratch):
        return None
    if teacher == "dense":
        return frozen_copy(model)
    if isinstance(teacher, str):
        raise UsageError(f"teacher must be 'dense', a module or None, got {teacher!r}")
    return frozen_copy(teacher)
