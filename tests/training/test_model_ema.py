"""Averaged weights: against the sum written out, under every scheme, and in a training that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressor import SCHEMES
from compressor.checkpointing.manager import Checkpoints
from compressor.compressor import Compressor
from compressor.formats.errors import InterruptionError, UsageError
from compressor.training.evaluation import evaluate
from compressor.training.loop import Epoch
from compressor.training.model_ema import ModelEma
from tests.helpers.accidents import finetuned, job_of, loader

DECAY = 0.7


def weights_of(job: Compressor) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in job.model.named_parameters()}


def slow_average(seen: list[dict[str, Tensor]], name: str) -> Tensor:
    """Each step's weights times what is kept of them by all the steps after it."""
    kept = [0.0, *(min(DECAY, 1 - (1 + step) ** (-2 / 3)) for step in range(1, len(seen)))]
    total = torch.zeros_like(seen[0][name], dtype=torch.float64)
    for step, weights in enumerate(seen):
        share = 1 - kept[step]
        for later in kept[step + 1 :]:
            share *= later
        total += share * weights[name].double()
    return total.float()


def test_it_is_the_sum_written_out() -> None:
    job = job_of()
    seen = [weights_of(job)]
    on_step = lambda *_: seen.append(weights_of(job))  # noqa: E731
    job.finetune(loader(), epochs=2, lr=0.01, on_step=on_step, model_ema_decay=DECAY)
    assert len(seen) == 13
    for name, average in weights_of(job).items():
        torch.testing.assert_close(average, slow_average(seen, name), rtol=1e-5, atol=1e-6)
        assert not torch.equal(average, seen[-1][name])


def losses_and_accuracies(decay: float) -> tuple[list[float], list[bool]]:
    """Returns the loss at every step, and whether the top-1 told at the end of an epoch is the model's at that time."""
    losses: list[float] = []
    same: list[bool] = []
    job = job_of()

    def on_epoch(epoch: Epoch, top1: float | None) -> None:
        same.append(evaluate(job.model, loader()).top1 == top1)

    job.finetune(
        loader(), loader(), 3, lr=0.01, on_step=lambda *at: losses.append(float(at[2])), on_epoch=on_epoch,
        model_ema_decay=decay,
    )  # fmt: skip
    return losses, same


def test_the_training_itself_is_the_same() -> None:
    """What is evaluated after an epoch is the average; the next step goes on from the last weights."""
    losses, same = losses_and_accuracies(DECAY)
    assert losses == losses_and_accuracies(0.0)[0]
    assert same == [True] * 3


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_average_is_what_is_packed(scheme: str) -> None:
    settings = {"wfn": {"delta": 0.1}, "ttq": {}, "dense": {}}.get(scheme, {"bits": 2})
    last: list[Tensor] = []

    def on_epoch(epoch: Epoch, top1: float | None) -> None:
        job.model.eval()
        last.append(job.model(images))
        job.model.train()

    job = job_of(scheme, **settings)
    images = torch.randn(5, 12)
    job.finetune(loader(), epochs=2, lr=0.01, on_epoch=on_epoch, model_ema_decay=DECAY)
    job.model.eval()
    assert torch.equal(job.model(images), last[-1])
    job.finish()
    assert torch.equal(job.model(images), last[-1])


@pytest.mark.parametrize("scheme", ["learnt", "wfn"])
def test_it_goes_on(tmp_path: Path, scheme: str) -> None:
    settings: dict[str, Any] = {"model_ema_decay": DECAY}
    how = {"delta": 0.1} if scheme == "wfn" else {}
    whole = finetuned(job_of(scheme, **how), **settings)
    first = Checkpoints(tmp_path / "c")
    stop = lambda done, *_: setattr(first, "stop", done == 8)  # noqa: E731
    with pytest.raises(InterruptionError, match="after step 9"):
        job_of(scheme, **how).finetune(loader(), epochs=3, lr=0.01, checkpoints=first, on_step=stop, **settings)
    first.close()
    again = Checkpoints(tmp_path / "c", resume=True)
    with pytest.raises(UsageError, match=r"model_ema_decay was 0\.7, is 0\.8"):
        job_of(scheme, **how).finetune(loader(), epochs=3, lr=0.01, checkpoints=again, model_ema_decay=0.8)
    again.close()
    assert finetuned(job_of(scheme, **how), tmp_path / "c", resume=True, **settings) == whole


def test_statistics_are_averaged_and_counts_are_not() -> None:
    norm = nn.BatchNorm1d(1)
    average = ModelEma(norm, 0.5)
    norm.running_mean, norm.num_batches_tracked = torch.ones(1), torch.tensor(7)
    average.update()
    with average.in_place():
        assert 0 < float(norm.running_mean) < 1
        assert int(norm.num_batches_tracked) == 7


def test_a_tensor_of_another_shape_begins_anew() -> None:
    layer = nn.Linear(2, 1, bias=False)
    average = ModelEma(layer, 0.5)
    layer.weight = nn.Parameter(torch.full((1, 3), 4.0))
    average.update()
    with average.in_place():
        assert layer.weight.tolist() == [[4.0, 4.0, 4.0]]


@pytest.mark.parametrize("scheme", ["learnt", "wfn"])
def test_in_a_loop_of_ones_own(scheme: str) -> None:
    """As docs/own-loop.md says; the codebook of ``wfn`` grows in it."""
    job = job_of(scheme, **({"delta": 0.1} if scheme == "wfn" else {"bits": 2}))
    optimizer = torch.optim.AdamW(job.param_groups(lr=0.01))
    job.attach(optimizer, total_steps=12)
    average = ModelEma(job.model, 0.9)
    for _ in range(2):
        for inputs, labels in loader():
            optimizer.zero_grad()
            job.loss(job.model(inputs), labels, inputs=inputs).backward()
            optimizer.step()
            average.update()
    images = torch.randn(5, 12)
    job.model.eval()
    last = job.model(images)
    average.copy_to_model()
    averaged = job.model(images)
    job.finish()
    assert torch.equal(job.model(images), averaged)
    assert not torch.equal(averaged, last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_have_an_exact_average(dtype: torch.dtype) -> None:
    """A thousandth of the way from 1 to 2 is less than either can add to 1; seen in between, nothing is lost."""
    layer = nn.Linear(1, 1, bias=False).to(dtype)
    layer.weight.data.fill_(1.0)
    average = ModelEma(layer, 0.999)
    average.load_state_dict({**average.state_dict(), "steps": 1_000_000})  # past the warm-up
    layer.weight.data.fill_(2.0)
    for step in range(5000):
        average.update()
        if step % 1000 == 0:
            with average.in_place():
                assert layer.weight.dtype == dtype
            assert layer.weight.item() == 2
    average.copy_to_model()
    assert layer.weight.item() == pytest.approx(2 - 0.999**5000, abs=0.01)
