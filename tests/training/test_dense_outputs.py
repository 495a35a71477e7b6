"""Distillation: the softmax is over the classes, and the loss a mean over images and positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor, Policy, Rule
from compressor.training.distillation import distillation
from compressor.training.evaluation import evaluate

# Two classes: the teacher has 3/4 and 1/4, the student 1/2 and 1/2, at a temperature of 1.
EXPECTED = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)


@pytest.mark.parametrize("shape", [(2,), (5, 2), (5, 2, 3), (5, 2, 3, 4), (1, 2, 1, 7, 2)])
def test_the_softmax_is_over_the_classes(shape: tuple[int, ...]) -> None:
    logits = torch.tensor([math.log(3.0), 0.0])
    where = (2,) if len(shape) == 1 else (1, 2, *[1] * (len(shape) - 2))
    teacher = logits.view(where).expand(shape)
    assert float(distillation(torch.zeros(shape), teacher, 1.0)) == pytest.approx(EXPECTED, rel=1e-6)


def test_the_square_of_the_temperature_multiplies_it() -> None:
    teacher = torch.tensor([[2 * math.log(3.0), 0.0]])
    assert float(distillation(torch.zeros(1, 2), teacher, 2.0)) == pytest.approx(4 * EXPECTED, rel=1e-6)


def test_dense_predictions_are_trained_and_evaluated() -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 4, 4)
    data = DataLoader(TensorDataset(images, (images[:, 0] > 0).long()), 8)
    job = Compressor(nn.Conv2d(3, 2, 1), Policy([Rule("*", scheme="kmeans", codewords=3)]), distill=0.5).prepare()
    with torch.no_grad():
        output = job.model(images[:8]) * 1.5
        plain = nn.functional.cross_entropy(output, (images[:8, 0] > 0).long())
        teacher = job.teacher(images[:8]) if job.teacher is not None else output
        student, target = (t.div(2).permute(0, 2, 3, 1).reshape(-1, 2).log_softmax(1) for t in (output, teacher))
        distilled = 4 * (target.exp() * (target - student)).sum(1).mean()
        loss = job.loss(output, (images[:8, 0] > 0).long(), inputs=images[:8])
    assert float(loss) == pytest.approx(float(0.5 * plain + 0.5 * distilled), rel=1e-5)
    job.finetune(data, data, epochs=1)
    result = evaluate(job.model, data)
    assert result.n == 256
    right = (job.model(images).argmax(1) == (images[:, 0] > 0)).double().mean()
    assert result.top1 == pytest.approx(float(right))
