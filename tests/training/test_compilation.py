"""--channels-last and --torchcompile: the layout arrives, compiled steps are the steps, and the file is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.cli import setup
from compressor.cli.main import run
from compressor.data.datasets import Dataset
from compressor.formats.errors import ResourceError, UsageError
from compressor.training.compilation import compiled_model
from tests.helpers import tiny


def finetuned(scheme: str, backend: str | None) -> tuple[list[float], bytes]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    job = Compressor(net, Policy([Rule("*", scheme=scheme)])).prepare()
    data = TensorDataset(torch.randn(24, 1, 8, 8), torch.arange(24) % 4)
    losses: list[float] = []
    with compiled_model(job.model, backend):
        job.finetune(DataLoader(data, 8), epochs=4, lr=1e-2, on_epoch=lambda epoch, _: losses.append(epoch.loss))
    return losses, job.finish().to_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_steps_are_the_steps(scheme: str) -> None:
    """Through dynamo and autograd's tracing, rounds and growing codebooks included; no code is generated."""
    assert finetuned(scheme, "aot_eager") == finetuned(scheme, None)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_lookup_is_compiled_once_however_the_codebook_changes() -> None:
    graphs: list[Any] = []

    def count(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    job = Compressor(nn.Sequential(nn.Linear(8, 8)), Policy([Rule("*", scheme="wfn")]), teacher=None).prepare()
    job.model.compile(backend=count)
    optimizer = torch.optim.SGD(job.param_groups(lr=0.1))
    job.attach(optimizer, total_steps=20)
    sizes = set()
    for _ in range(20):
        job.model(torch.ones(4, 8)).sum().backward()
        optimizer.step()
        sizes.add(len(job.groups[0].codebook()))
    assert len(sizes) > 3, "rounds have come and gone"
    assert len(graphs) <= 2


def test_a_model_is_itself_again() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ZeroDivisionError), compiled_model(model, "eager"):
        raise ZeroDivisionError
    assert model._compiled_call_impl is None
    with (
        pytest.raises(UsageError, match=r"no backend 'inducto'\. Did you mean 'inductor'"),
        compiled_model(model, "inducto"),
    ):
        pass


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with (
        pytest.raises(ResourceError, match=r"torch\.compile with backend 'inductor' fails here"),
        compiled_model(model),
    ):
        model(torch.ones(2, 3)).sum().backward()


def of_two_channels() -> Dataset:
    data = tiny.few_digits()
    for split in (data.train, data.validation, data.test):
        split.images = split.images.expand(-1, 2, -1, -1)  # type: ignore[union-attr]
    return replace(data, input_size=(2, 32, 32), mean=data.mean * 2, std=data.std * 2)


@pytest.mark.parametrize("asked", [True, False])
def test_channels_last_arrives_in_training_and_evaluation(
    asked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(setup, "load_data", lambda *_, **__: of_two_channels())
    seen: set[tuple[bool, bool]] = set()

    def watch(module: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
        del given
        if isinstance(module, nn.BatchNorm2d) and len(output) > 1:  # the arguments of the model are tried on one image
            seen.add((module.training, output.is_contiguous(memory_format=torch.channels_last)))

    words = ["tiny", "--baseline-epochs", "1", "--epochs", "1", "--batch-size", "16", "-o", str(tmp_path / "out")]
    hook = nn.modules.module.register_module_forward_hook(watch)
    try:
        assert run([*words, *(["--channels-last"] if asked else [])]) == 0
    finally:
        hook.remove()
    assert seen == {(True, asked), (False, asked)}


@pytest.mark.slow
def test_the_command_compiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(setup, "load_data", lambda *_, **__: tiny.few_digits())
    words = ["tiny", "--baseline-epochs", "1", "--epochs", "1", "--batch-size", "16"]
    assert run([*words, "-o", str(tmp_path / "as it is")]) == 0
    assert run([*words, "-o", str(tmp_path / "compiled"), "--torchcompile", "aot_eager"]) == 0
    assert (tmp_path / "as it is").read_bytes() == (tmp_path / "compiled").read_bytes()
    capsys.readouterr()
    assert run([*words, "-o", str(tmp_path / "refused"), "--torchcompile", "inducto"]) == 2
    assert "error: torch.compile has no backend 'inducto'. Did you mean 'inductor'?" in capsys.readouterr().err
