"""A loss that is no number, and memory that runs out, in the middle of a training: it goes on, or ends in one line."""

from __future__ import annotations

import itertools
import logging
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import SCHEMES, Compressor, Policy, Rule, resuming
from compressor.checkpoint import Checkpoints
from compressor.evaluation import evaluate
from compressor.formats.errors import InterruptionError, QualityError, ResourceError, UsageError

STEPS = 6  # of an epoch


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here is freed by it, and among all that the tests have loaded it takes longer than a training."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


def loader(batch: int = 4) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(3)
    data = TensorDataset(torch.randn(4 * STEPS, 12, generator=random), torch.randint(3, (24,), generator=random))
    return DataLoader(data, batch, shuffle=True, generator=random)


def job_of(scheme: str = "learnt", dropout: float = 0.3, **settings: Any) -> Compressor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.Dropout(dropout), nn.ReLU(), nn.Linear(24, 3))
    return Compressor(net, Policy([Rule("*", scheme=scheme, **settings)]), seed=1).prepare()


class Accident:
    """Spoils the loss of a job at some calls, counted from 1."""

    def __init__(self, job: Compressor, at: set[int], value: float = math.nan) -> None:
        self.calls, self.at, self.value, self.loss = 0, at, value, job.loss
        job.loss = self  # type: ignore[method-assign, assignment]

    def __call__(self, output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        self.calls += 1
        loss = self.loss(output, target, inputs)
        return loss * self.value if self.calls in self.at else loss


def finetuned(job: Compressor, folder: Path | None = None, resume: bool = False, **options: Any) -> bytes:
    checkpoints = None if folder is None else Checkpoints(folder, resume=resume, steps=2)
    try:
        job.finetune(loader(), **{"epochs": 3, "lr": 0.01, **options}, checkpoints=checkpoints)
    finally:
        if checkpoints is not None:
            checkpoints.close()
    return job.finish().to_bytes()


def rates_of(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Note the learning rate of every step."""
    found: list[float] = []
    real = torch.optim.AdamW.step

    def step(self: Any, *given: Any) -> Any:
        found.append(self.param_groups[0]["lr"])
        return real(self, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return found


@pytest.mark.parametrize("kept", ["in memory", "in checkpoints"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_72_the_epoch_is_begun_anew_at_half_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kept: str, value: float
) -> None:
    rates = rates_of(monkeypatch)
    finetuned(job_of())
    whole = list(rates)
    rates.clear()
    job = job_of()
    Accident(job, {9}, value)
    finetuned(job, tmp_path / "c" if kept == "in checkpoints" else None)
    assert rates == whole[:8] + [rate / 2 for rate in whole[6:]]  # the step with that loss was not taken
    assert caplog.messages == [
        f"training has diverged: the loss is {value} at step 9: going back to the state after step 6, with half the "
        "learning rate (1 of 3 times)"
    ]


@pytest.mark.parametrize("settings", [{}, {"sparsity": 0.5, "sparsity_by": 0.7}], ids=["", "pruned"])
@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_72_any_scheme_goes_back(tmp_path: Path, scheme: str, settings: dict[str, Any]) -> None:
    """To the same state whether it was kept in memory or in a file, and whether or not the run was then resumed."""
    given = [job_of(scheme, **settings) for _ in range(3)]
    for job in given[:2]:
        Accident(job, {11, 20})
    whole = finetuned(given[0])
    assert finetuned(given[1], tmp_path / "a") == whole
    Accident(given[2], {11})
    first = Checkpoints(tmp_path / "b", steps=4)

    def on_step(done: int, total: int, loss: Tensor) -> None:
        first.stop = done == 13

    with pytest.raises(InterruptionError, match="after step 14 of 18"):
        given[2].finetune(loader(), epochs=3, lr=0.01, checkpoints=first, on_step=on_step)
    first.close()
    resumed = job_of(scheme, **settings)
    Accident(resumed, {1})
    assert finetuned(resumed, tmp_path / "b", resume=True) == whole


@pytest.mark.parametrize("kept", ["in memory", "in checkpoints"])
def test_72_given_up_after_three_times(tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: str) -> None:
    job, folder = job_of(), tmp_path / "c" if kept == "in checkpoints" else None
    Accident(job, {8, 9, 11, 15})
    with pytest.raises(QualityError) as caught:
        finetuned(job, folder)
    where = "in the model" if folder is None else f"in {folder}: the same command with --resume (resume=True) goes on"
    assert str(caught.value) == (
        "training has diverged: the loss is nan at step 10, with a learning rate of an 8th, too; try a lower --lr, or "
        f"look at the data. The state after step 6 is kept {where}, at a 16th"
    )
    assert len(caplog.messages) == 3
    good = job_of()
    with pytest.raises(StopIteration):
        good.finetune(loader(), epochs=3, lr=0.01, on_epoch=stop_at_first)
    state, expected = job.state_dict(), good.state_dict()
    assert state["steps"] == expected["steps"] == STEPS
    assert all(torch.equal(tensor, expected["model"][name]) for name, tensor in state["model"].items())


def stop_at_first(epoch: Any, top1: float | None) -> None:
    raise StopIteration


def test_72_what_was_given_up_goes_on_with_smaller_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = rates_of(monkeypatch)
    finetuned(job_of())
    whole = list(rates)
    job = job_of()
    Accident(job, set(range(9, 100)))
    with pytest.raises(QualityError):
        finetuned(job, tmp_path / "c")
    rates.clear()
    finetuned(job_of(), tmp_path / "c", resume=True)
    assert rates == [rate / 16 for rate in whole[6:]]


def test_72_a_weight_that_is_no_number_after_a_finite_loss(caplog: pytest.LogCaptureFixture) -> None:
    """The last gradient of the training is none: no loss would ever tell."""
    job = job_of()
    hook = job.model[0].bias.register_hook(poison(at=18))  # type: ignore[index]
    finetuned(job)
    hook.remove()
    assert caplog.messages == [
        "training has diverged: weights are no longer numbers at step 19: going back to the state after step 12, with "
        "half the learning rate (1 of 3 times)"
    ]
    assert all(bool(torch.isfinite(p).all()) for p in job.model.parameters())


def poison(at: int) -> Callable[[Tensor], Tensor]:
    calls = 0

    def hook(gradient: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gradient * math.nan if calls == at else gradient

    return hook


def test_72_a_gpu_is_asked_now_and_then(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On another device the loss is looked at every 50 steps, at the end of an epoch and before anything is kept."""
    from compressor import training

    monkeypatch.setattr(training, "CHECKED", 4)
    monkeypatch.setattr(training, "at_hand", lambda device: False)
    job = job_of()
    accident = Accident(job, {9, 15})
    finetuned(job)
    assert [message.partition(" step ")[2].partition(":")[0] for message in caplog.messages] == ["13", "13"]
    # 12 steps, of which 9 is bad; from 7 on again to 12, the 15th call is step 9; then to the end
    assert accident.calls == 12 + 6 + 12
    assert all(bool(torch.isfinite(p).all()) for p in job.model.parameters())


@pytest.mark.parametrize(("scheme", "each"), [("learnt", 12), ("kmeans", 8), ("inq", 16)])
def test_the_memory_of_the_state_to_go_back_to(monkeypatch: pytest.MonkeyPatch, scheme: str, each: int) -> None:
    """With AdamW, in bytes a weight, as docs/resuming.md says."""
    taken = []
    real = resuming._copied

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            taken.append(value.nbytes)
        return real(value)

    monkeypatch.setattr(resuming, "_copied", copied)
    torch.manual_seed(0)
    job = Compressor(nn.Linear(300, 300), Policy([Rule("*", scheme=scheme, bits=5)])).prepare()
    data = TensorDataset(torch.randn(4, 300), torch.zeros(4, dtype=torch.int64))
    marks: list[int] = []
    job.finetune(DataLoader(data, 4), epochs=5, on_epoch=lambda *_: marks.append(len(taken)))
    most = max(sum(taken[begin:end]) for begin, end in itertools.pairwise(marks))  # a round begins without moments
    assert most / 300**2 == pytest.approx(each, abs=0.3)


def test_72_lost_checkpoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where the state of the epoch's beginning is damaged, the one before it is gone back to; without any, it ends."""
    job, folder = job_of(), tmp_path / "c"
    accident = Accident(job, {14, 20})

    def damage(*_: object) -> None:
        if accident.calls in (13, 19):
            for path in sorted(folder.glob("*.safetensors"))[1 if accident.calls == 13 else 0 :]:
                path.write_bytes(path.read_bytes()[:-1])

    checkpoints = Checkpoints(folder, steps=5)
    with pytest.raises(QualityError, match="no earlier state is left to go back to"):
        job.finetune(loader(), epochs=3, lr=0.01, checkpoints=checkpoints, on_step=damage)
    assert "going back to the state after step 10" in " ".join(caplog.messages)
    checkpoints.close()


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


def close(job: Compressor, other: Compressor) -> bool:
    """Compare the trained weights: sums over parts round otherwise."""
    pairs = zip(job.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_54_fewer_images_at_a_time_make_the_same_step(
    caplog: pytest.LogCaptureFixture, error: type[RuntimeError]
) -> None:
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


def test_54_batchnorm_keeps_two_images(caplog: pytest.LogCaptureFixture) -> None:
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


def test_54_not_one_image_fits(tmp_path: Path) -> None:
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


def test_54_a_resumed_run_takes_no_more_images_at_a_time(tmp_path: Path) -> None:
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


def test_54_evaluation_takes_half_as_many() -> None:
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


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_accumulated_gradients_are_those_of_a_larger_batch(opt: str) -> None:
    """Three batches of 4 make the step that one of 12 makes; at the end of an epoch what is left, here two of 4."""
    jobs, steps = [job_of("dense", dropout=0) for _ in range(2)], []
    data = [(x, y) for x, y in DataLoader(loader().dataset, 20)][:1]
    for job, size, grad_accum in zip(jobs, (12, 4), (1, 3), strict=True):
        few = DataLoader(TensorDataset(*data[0]), size)
        steps.append([(done, total) for done, total in progress(job, few, opt, grad_accum)])
    assert steps[0] == steps[1] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert close(*jobs)


def progress(job: Compressor, data: DataLoader[Any], opt: str, grad_accum: int) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    job.finetune(data, epochs=2, lr=0.01, opt=opt, grad_accum=grad_accum, on_step=lambda *at: seen.append(at[:2]))
    return seen


def test_accumulation_goes_on(tmp_path: Path) -> None:
    whole = finetuned(job_of(), grad_accum=2)
    first = Checkpoints(tmp_path / "c")

    def on_step(done: int, total: int, loss: Tensor) -> None:
        first.stop = done == 4
        assert total == 9

    with pytest.raises(InterruptionError, match="after step 5 of 9"):
        job_of().finetune(loader(), epochs=3, lr=0.01, grad_accum=2, checkpoints=first, on_step=on_step)
    first.close()
    again = Checkpoints(tmp_path / "c", resume=True)
    with pytest.raises(UsageError, match="grad_accum was 2, is 3"):
        job_of().finetune(loader(), epochs=3, lr=0.01, grad_accum=3, checkpoints=again)
    again.close()
    assert finetuned(job_of(), tmp_path / "c", resume=True, grad_accum=2) == whole
    with pytest.raises(UsageError, match="grad_accum must be at least 1, got 0"):
        finetuned(job_of(), grad_accum=0)


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


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_54_real_memory_that_runs_out() -> None:
    """A layer's output of 32 images takes 128 MB, and there is room for one and a half; then, of one image 64 MB."""
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
    assert done.stderr.startswith("out of memory with 32 images at a time: going on with 16")
    assert "ResourceError: step 1: out of memory with 1 image of 1x1024x1024 at a time" in done.stderr
    assert "(you tried to allocate " in done.stderr


def test_a_log_line_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    job = job_of()
    Accident(job, {2})
    finetuned(job)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
