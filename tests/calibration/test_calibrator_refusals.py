"""What the calibrator refuses, in one line: inputs and answers that cannot be measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import Compressor
from compressor.formats.errors import UsageError
from tests.helpers.calibrators import calibrator, images, network


class Root(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.sqrt()


def test_inputs_that_are_not_finite_name_the_layer() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), Root(), nn.Linear(3, 2))
    with pytest.raises(UsageError, match=r"^calibration: the inputs of the layer of 2\.weight are not finite$"):
        calibrator(model, torch.randn(16, 3))


def test_answers_that_are_not_finite_are_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), Root())
    message = r"^calibration: the model's answers to images of shape \(3,\) are not finite$"
    with pytest.raises(UsageError, match=message):
        calibrator(model, torch.randn(16, 3))


def test_images_of_another_shape_are_refused() -> None:
    message = r"^calibration: the model does not take images of shape \(2, 6, 6\): mat1 and mat2 shapes cannot be multi"
    with pytest.raises(UsageError, match=message):
        calibrator(network(), images(size=6))


class Answers(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(3, 2), form

    def forward(self, inputs: Tensor) -> Any:
        logits = self.layer(inputs)
        forms = {"tuple": (logits,), "dict": {"logits": logits}, "Tensor": logits[:, 0]}
        return forms[self.form]


@pytest.mark.parametrize("form", ["tuple", "dict", "Tensor"])
def test_answers_that_are_no_logits_are_refused(form: str) -> None:
    message = rf"^calibration: the model answers with {form}, expected logits \[n, classes\]$"
    with pytest.raises(UsageError, match=message):
        calibrator(Answers(form), torch.randn(16, 3))


def test_no_memory_is_refused_before_the_model_is_run() -> None:
    def fails(*_: Any) -> None:
        raise AssertionError

    model: Any = nn.Sequential(nn.Linear(3, 2))
    model.register_forward_pre_hook(fails)
    job = Compressor(model, rate=1e-7, teacher=None)
    with pytest.raises(UsageError, match=r"^memory must be at least 1 byte, got 0$"):
        job.prepare(torch.randn(16, 3), memory=0)
