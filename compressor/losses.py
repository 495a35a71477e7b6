"""Losses that go with every scheme."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

__all__ = ["distillation"]


def distillation(output: Tensor, teacher_output: Tensor, temperature: float) -> Tensor:
    """Give ``T^2 KL(softmax(teacher / T) || softmax(output / T))``, the mean over the batch.

    Args:
        output, teacher_output: float[batch, classes], logits.
        temperature: T; the factor T^2 keeps the gradient's size independent of it.

    Example:
        >>> import torch
        >>> float(distillation(torch.ones(2, 3), torch.zeros(2, 3), temperature=2.0))
        0.0

    Reference: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    student = functional.log_softmax(output / temperature, dim=-1)
    teacher = functional.log_softmax(teacher_output / temperature, dim=-1)
    return functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
