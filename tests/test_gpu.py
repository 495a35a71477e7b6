"""Every scheme on a GPU: training steps, mixed precision, resuming, loading and packed inference against the CPU's.

Each test runs on the CPU too, which exercises the test itself; its runs on a GPU skip where there is none.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor.checkpointing.manager import Checkpoints
from compressor.compressor import Compressor
from compressor.formats.errors import InterruptionError
from compressor.policy.policy import Policy
from tests.helpers.contract import SHARING, rule_of

STEPS = 4
every_scheme = pytest.mark.parametrize("scheme", SHARING)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """The device under test, computing in full float32 precision."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device here")
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield torch.device(request.param)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))


def images(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator)


def assert_close(actual: Any, expected: Any) -> None:
    """Compares float32 tensors, or dicts of them: a GPU sums in another order."""
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


class Training:
    """A training of the network under a scheme, on a device."""

    def __init__(self, scheme: str, device: torch.device) -> None:
        self.job = Compressor(network(), Policy([rule_of(scheme)]), teacher=None).prepare()
        self.job.model.to(device)
        self.optimizer = torch.optim.SGD(self.job.param_groups(lr=0.01), lr=0.01, momentum=0.9)
        self.job.attach(self.optimizer, STEPS)
        self.inputs, self.targets = (tensor.to(device) for tensor in images())

    def gradients(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the logits, and the gradient of each parameter that has one, both on the CPU."""
        self.optimizer.zero_grad()
        output = self.job.model(self.inputs)
        self.job.loss(output, self.targets, self.inputs).backward()
        named = self.job.model.named_parameters()
        return output.detach().cpu(), {name: p.grad.cpu() for name, p in named if p.grad is not None}

    def step(self, count: int) -> dict[str, Tensor]:
        """Takes optimiser steps and returns the parameters on the CPU."""
        for _ in range(count):
            self.gradients()
            self.optimizer.step()
        return {name: parameter.detach().cpu() for name, parameter in self.job.model.named_parameters()}


@every_scheme
def test_logits_and_gradients_are_the_cpus(scheme: str, device: torch.device) -> None:
    logits, gradients = Training(scheme, device).gradients()
    expected_logits, expected_gradients = Training(scheme, torch.device("cpu")).gradients()
    assert_close(logits, expected_logits)
    assert_close(gradients, expected_gradients)


@every_scheme
def test_two_optimiser_steps_are_the_cpus(scheme: str, device: torch.device) -> None:
    assert_close(Training(scheme, device).step(2), Training(scheme, torch.device("cpu")).step(2))


@every_scheme
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_leaves_shared_weights_exact(scheme: str, device: torch.device, dtype: torch.dtype) -> None:
    training = Training(scheme, device)
    layer: Any = training.job.model.get_submodule("4")
    plain = layer.weight.detach()
    with torch.autocast(device.type, dtype):
        assert torch.equal(layer.weight, plain)
        output = training.job.model(training.inputs)
        loss = training.job.loss(output, training.targets, training.inputs)
    loss.backward()
    assert output.dtype == dtype
    half = torch.cat([p.grad.flatten() for p in training.job.model.parameters() if p.grad is not None])
    assert half.dtype == torch.float32
    full = torch.cat([gradient.flatten() for gradient in training.gradients()[1].values()])
    assert functional.cosine_similarity(half.cpu(), full, dim=0) > 0.99


@every_scheme
def test_a_state_saved_in_training_goes_on_alike(scheme: str, device: torch.device) -> None:
    whole = Training(scheme, device)
    whole.step(2)
    state, moments = copy.deepcopy(whole.job.state_dict()), copy.deepcopy(whole.optimizer.state_dict())
    resumed = Training(scheme, device)
    resumed.job.load_state_dict(state)
    resumed.optimizer.load_state_dict(moments)
    assert_close(resumed.step(2), whole.step(2))


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "amp"])
def test_finetune_resumes_from_a_checkpoint(device: torch.device, tmp_path: Path, amp: bool) -> None:
    loader = DataLoader(TensorDataset(*images(32)), 8)

    def finetuned(folder: str, resume: bool = False, stop_at: int = 0) -> Compressor:
        def on_step(done: int, *_: object) -> None:
            checkpoints.stop = done == stop_at

        job = Compressor(network(), Policy([rule_of("learnt")])).prepare()
        checkpoints = Checkpoints(tmp_path / folder, resume=resume)
        try:
            return job.finetune(
                loader, loader, epochs=2, lr=0.05, opt="sgd", device=device.type, amp=amp, on_step=on_step,
                checkpoints=checkpoints,
            )  # fmt: skip
        finally:
            checkpoints.close()

    whole = finetuned("whole")
    with pytest.raises(InterruptionError):
        finetuned("cut", stop_at=5)
    again = finetuned("cut", resume=True)
    assert next(again.model.parameters()).device.type == device.type
    assert again.steps == whole.steps == 8
    pairs = (dict(job.model.named_parameters()) for job in (again, whole))
    torch.testing.assert_close(*pairs, rtol=1e-2, atol=1e-3)


@every_scheme
def test_a_file_written_on_the_device_loads_onto_it(scheme: str, device: torch.device, tmp_path: Path) -> None:
    training = Training(scheme, device)
    training.step(STEPS)
    training.job.finish().save(path := tmp_path / "small.safetensors")
    loaded = compressor.load(path, model=network().to(device))
    with torch.no_grad():
        assert torch.equal(loaded(training.inputs), training.job.model.eval()(training.inputs))
        on_cpu = compressor.load(path, model=network())(training.inputs.cpu())
        assert_close(loaded(training.inputs).cpu(), on_cpu)


@every_scheme
@pytest.mark.parametrize("how", ["loaded there", "moved there"])
def test_packed_inference_gives_the_cpus_logits(scheme: str, device: torch.device, tmp_path: Path, how: str) -> None:
    training = Training(scheme, torch.device("cpu"))
    training.job.finish().save(path := tmp_path / "small.safetensors")
    expected = compressor.load(path, model=network(), weights="packed")
    start = network().to(device if how == "loaded there" else "cpu")
    packed = compressor.load(path, model=start, weights="packed").to(device)
    assert {buffer.device.type for buffer in packed.buffers()} == {device.type}
    with torch.no_grad():
        logits = packed(training.inputs.to(device)).cpu()
        assert_close(logits, expected(training.inputs))


def test_training_to_a_size_fits_finer_grids_wherever_the_model_is(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compressor.lifecycle.fitting.LEAST_STEPS", STEPS)
    monkeypatch.setattr("compressor.lifecycle.fitting.FAR", -1.0)
    inputs, classes = images()
    job = Compressor(network(), target_size=2_500, teacher=None).prepare(calibration=inputs)
    assert job.search is not None
    price = job.search.rate
    job.model.to(device)  # as to evaluate it
    job.finetune(DataLoader(TensorDataset(inputs, classes), 4), epochs=STEPS // 4, device=str(device))
    assert job.search.rate == price / 2
    assert next(job.model.parameters()).device.type == device.type
    assert len(job.finish().to_bytes()) <= 2_500
