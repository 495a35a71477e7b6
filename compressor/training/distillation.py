"""Losses that go with every scheme."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from compressor.formats.errors import UsageError

__all__ = ["distillation", "frozen_copy", "with_distillation"]


def distillation(output: Tensor, teacher_output: Tensor, temperature: float) -> Tensor:
    """Give ``T^2 KL(softmax(teacher / T) || softmax(output / T))``, the mean over the batch.

    Args:
        output, teacher_output: float[batch, classes], logits.
        temperature: T; the factor T^2 keeps the gradient's size independent of it.

    Raises UsageError where the teacher tells other classes apart.

    Example:
        >>> import torch
        >>> float(distillation(torch.ones(2, 3), torch.zeros(2, 3), temperature=2.0))
        0.0

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    if output.shape != teacher_output.shape:
        got, expected = tuple(teacher_output.shape), tuple(output.shape)
        raise UsageError(f"the teacher's output is {got}, expected {expected}: it needs the classes of its student")
    student = functional.log_softmax(output / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_output / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


def with_distillation(
    task: Tensor, output: Tensor, inputs: Tensor | None, teacher: nn.Module, weight: float, temperature: float
) -> Tensor:
    """Mix the task's loss with distillation from a teacher, whose share is ``weight``.

    Raises UsageError without the inputs to ask the teacher with.
    """
    if inputs is None:
        raise UsageError("distillation needs the inputs: loss(output, target, inputs=x), or teacher=None")
    with torch.no_grad():
        wanted = teacher.to(inputs.device)(inputs).to(output.dtype)
    return (1 - weight) * task + weight * distillation(output, wanted, temperature)


def frozen_copy(teacher: nn.Module | str | None) -> nn.Module | None:
    """Copy the teacher, for it may be the very model that is trained, or one that its owner goes on training.

    Raises UsageError for another word than the caller knows.
    """
    if isinstance(teacher, str):
        raise UsageError(f"teacher must be 'dense', a module or None, got {teacher!r}")
    return copy.deepcopy(teacher).eval().requires_grad_(False) if teacher is not None else None
