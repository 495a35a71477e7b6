"""Memory that runs out in the middle of a training: it goes on with fewer images at a time, or ends in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from compressor import Compressor, Policy, Rule
from compressor.checkpointing.manager import Checkpoints
from compressor.formats.errors import InterruptionError, ResourceError
from compressor.training.evaluation import evaluate
from tests.helpers.accidents import _fast, close, finetuned, job_of, loader

__all__ = ["_fast"]  # the fixture


class Small:
    """Lets torch run out of memory for more than so many images at a time, as it would say it on CPU or GPU."""

    def __init__(self, job: Compressor, fits: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        self.fits, self.error, self.loss, self.seen = fits, error, job.loss, [0]
        job.loss = self  # type: ignore[method-assign, assignment]

    def __call__(self, output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        if len(inputs) > self.fits:
            raise self.error(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes."
            )
        self.seen.append(len(inputs))
        return self.loss(output, target, inputs)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_fewer_images_at_a_time_make_the_same_step(caplog: pytest.LogCaptureFixture, error: type[RuntimeError]) -> None:
    whole, job = job_of("dense", dropout=0), job_of("dense", dropout=0)
    small = Small(job, 1, error)
    for one in (whole, job):
        one.finetune(loader(), epochs=2, lr=0.01, opt="sgd")
    assert close(whole, job)
    assert max(small.seen) == 1
    assert caplog.messages == [
        f"out of memory with {one} images at a time: going on with {half}, whose gradients add up to the same step"
        for one, half in ((4, 2), (2, 1))
    ]


def test_batch_norm_keeps_two_images(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    job = Compressor(net, Policy([Rule("*", scheme="learnt", bits=2)]), teacher=None).prepare()
    Small(job, 3)
    job.finetune(loader(5), epochs=1)  # 4 batches of 5, and one of 4
    assert len(caplog.messages) == 1
    job = Compressor(net, Policy([Rule("*", scheme="learnt", bits=2)]), teacher=None).prepare()
    Small(job, 1)
    with pytest.raises(ResourceError, match="3 images of 12 at a time, the fewest there can be"):
        job.finetune(loader(5), epochs=1)


def test_memory_for_not_even_one_image(tmp_path: Path) -> None:
    """The state is kept, and with more memory the run ends as if it had had it from the start."""
    whole, job, again = (job_of("learnt") for _ in range(3))
    expected = finetuned(whole)
    small = Small(job, 4)
    first = Checkpoints(tmp_path / "c", minutes=0)

    def shrink(done: int, total: int, loss: Tensor) -> None:
        small.fits = 0 if done == 8 else small.fits

    with pytest.raises(ResourceError) as caught:
        job.finetune(loader(), epochs=3, lr=0.01, checkpoints=first, on_step=shrink)
    first.close()
    assert str(caught.value) == (
        "step 9: out of memory with 1 image of 12 at a time, the fewest there can be (you tried to allocate 7 bytes); "
        f"the state after step 8 is kept in {tmp_path / 'c'}: the same command with --resume (resume=True) goes on"
    )
    resumed = Checkpoints(tmp_path / "c", resume=True)
    steps: list[int] = []
    again.finetune(loader(), epochs=3, lr=0.01, checkpoints=resumed, on_step=lambda done, *_: steps.append(done))
    resumed.clear()
    assert steps[0] == 9
    assert len(again.finish().to_bytes()) == pytest.approx(len(expected), rel=0.05)


def test_a_resumed_run_keeps_the_reduced_batch(tmp_path: Path) -> None:
    given = [job_of("learnt") for _ in range(3)]
    for job in given[:2]:
        Small(job, 2)
    whole = finetuned(given[0])
    first = Checkpoints(tmp_path / "c")

    def on_step(done: int, total: int, loss: Tensor) -> None:
        first.stop = done == 8

    with pytest.raises(InterruptionError):
        given[1].finetune(loader(), epochs=3, lr=0.01, checkpoints=first, on_step=on_step)
    first.close()
    assert finetuned(given[2], tmp_path / "c", resume=True) == whole


def test_evaluation_halves_its_batch() -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > limit:
                raise torch.OutOfMemoryError("out of memory")
            return x

    data = [(torch.eye(7), torch.arange(7))]
    limit = 2
    assert evaluate(Narrow(), data).top1 == 1
    limit = 0
    with pytest.raises(ResourceError, match="out of memory in evaluation, with 1 image of 7"):
        evaluate(Narrow(), data)


def test_other_errors_pass() -> None:
    job = job_of()
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory")):
        job.loss = Mock(side_effect=error)  # type: ignore[method-assign]
        with pytest.raises(type(error), match=str(error)):
            job.finetune(loader(), epochs=1)
        assert job.loss.call_count == 1


REAL = """
import logging, resource, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from compressor import Compressor, Policy, Rule

logging.basicConfig(format="%(message)s")
torch.set_num_threads(1)
net = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 2))
job = Compressor(net, Policy([Rule("*", scheme="learnt", bits=2)]), teacher=None).prepare()

def finetune(batch, side):
    images, labels = torch.zeros(batch, 1, side, side), torch.zeros(batch, dtype=torch.int64)
    job.finetune(DataLoader(TensorDataset(images, labels), batch), epochs=1)

def room(size):
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + size, resource.RLIM_INFINITY))

finetune(1, 9)  # what is loaded late is loaded now
room(192 << 20)
finetune(32, 256)
print("done")
room(48 << 20)
finetune(2, 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_real_memory_runs_out() -> None:
    """A layer's output of 32 images takes 128 MB, and there is room for one and a half; then, of one image 64 MB."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    assert done.stderr.startswith("out of memory with 32 images at a time: going on with 16")
    assert "ResourceError: step 1: out of memory with 1 image of 1x1024x1024 at a time" in done.stderr
    assert "(you tried to allocate " in done.stderr
