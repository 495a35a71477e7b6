"""Mixed precision and the choice of a device: what is computed in what, and that no run sees another's settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor import SCHEMES, Compressor, Policy, Rule
from compressor.cache import cache_dir
from compressor.cli import main as command
from compressor.cli.configs import ExecutionConfig, ModelConfig, Request
from compressor.distributed.collectives import launched_world_size, rank
from compressor.distributed.devices import find_device, half_precision
from compressor.formats.errors import ResourceError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.training.mixed_precision import MixedPrecision

ARGS: dict[str, Any] = {"num_classes": 10, "in_chans": 1}
LEARNT = Policy([Rule("*", scheme="learnt", bits=2)])
ABSENT, UNKNOWN = ["cuda:99", "meta", "cpu:1"], ["warp", "cuda:x", ""]


def model() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", **ARGS)


def loader(n: int = 24, batch: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(n, 1, 32, 32, generator=generator), torch.randint(10, (n,), generator=generator))
    return DataLoader(data, batch)


def finetuned(amp: bool, **settings: Any) -> Compressor:
    job = Compressor(model(), LEARNT, model_args=ARGS).prepare()
    return job.finetune(loader(), epochs=1, lr=1e-3, amp=amp, **settings)


class Watch:
    """Notes the dtypes a module takes, computes with and gives, in training and in evaluation."""

    def __init__(self, module: nn.Module) -> None:
        self.given: set[tuple[bool, torch.dtype]] = set()
        self.weight: set[torch.dtype] = set()
        module.register_forward_hook(self)

    def __call__(self, module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        del inputs
        self.given.add((module.training, output.dtype))
        self.weight.add(module.weight.dtype)


def test_layers_compute_in_bfloat16_and_all_state_stays_float32(tmp_path: Path) -> None:
    job = Compressor(model(), LEARNT, model_args=ARGS).prepare()
    student, teacher = (Watch(net.get_submodule("layer3.0.conv2")) for net in (job.model, job.teacher) if net)
    job.finetune(loader(), val=loader(), epochs=1, lr=1e-3, amp=True, device="cpu")
    assert student.given == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert teacher.given == {(False, torch.bfloat16)}
    assert student.weight == {torch.float32}
    moved = [group.values.grad for group in job.groups]
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in moved)
    states = [*job.model.parameters(), *job.model.buffers()]
    assert {state.dtype for state in states if state.is_floating_point()} <= {torch.float32, torch.float64}
    packed = job.finish()
    packed.save(tmp_path / "small.safetensors")
    loaded = compressor.load(tmp_path / "small.safetensors")
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(x), job.model.eval()(x)), "the model is an ordinary one again, in full precision"
    assert max(row.used for row in packed.report().rows) == 4


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
def test_shared_weights_are_exact_under_autocast(scheme: str) -> None:
    torch.manual_seed(0)
    job = Compressor(nn.Sequential(nn.Linear(32, 32)), Policy([Rule("*", scheme=scheme)]), teacher=None).prepare()
    plain = job.model[0].weight  # type: ignore[index]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(job.model[0].weight, plain)  # type: ignore[index]


def test_runs_in_one_process_do_not_see_each_other() -> None:
    alone = finetuned(amp=False).finish().to_bytes()
    half = finetuned(amp=True).finish().to_bytes()
    assert finetuned(amp=False, device="cpu").finish().to_bytes() == alone
    assert finetuned(amp=True).finish().to_bytes() == half
    assert half != alone


def test_a_model_can_be_trained_again_otherwise() -> None:
    job = finetuned(amp=False)
    watch = Watch(job.model.get_submodule("layer3.0.conv2"))
    for amp, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        watch.given.clear()
        job.finetune(loader(), epochs=1, amp=amp)
        assert watch.given == {(True, dtype)}
    assert "forward" not in vars(job.model)


def test_a_run_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Compressor(model(), LEARNT, model_args=ARGS).prepare()

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        job.finetune(loader(), epochs=1, amp=True, on_step=fail)
    assert "forward" not in vars(job.model)
    assert job.model(torch.randn(2, 1, 32, 32)).dtype == torch.float32
    assert finetuned(amp=False).steps == 3


def test_an_accelerator_of_the_caller_is_left_as_it_is() -> None:
    own = Accelerator(mixed_precision="bf16", cpu=True)
    try:
        job = finetuned(amp=False)
        assert own.mixed_precision == "bf16"
        assert own.is_main_process
        assert job.steps == 3
    finally:
        own.state._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("asked", ABSENT)
def test_an_absent_device_is_named_with_those_there_are(asked: str) -> None:
    with pytest.raises(ResourceError, match=rf"device '{asked}': torch .* has none such here; it has cpu; without"):
        find_device(asked)
    with pytest.raises(ResourceError, match="none such here"):
        finetuned(amp=False, device=asked)


@pytest.mark.parametrize("asked", UNKNOWN)
def test_no_device_at_all(asked: str) -> None:
    with pytest.raises(UsageError, match=f"device '{asked}': torch knows none such; here it has cpu"):
        find_device(asked)


def test_devices_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for asked in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert find_device(asked) == torch.device(asked)
    for asked in ("cuda:2", "mps"):
        with pytest.raises(ResourceError, match=r"it has cpu, cuda:0, cuda:1; without"):
            find_device(asked)


def test_the_fastest_device_is_taken_unless_the_launcher_says_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device(None) == torch.device("cpu"), "there is no other here"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    assert find_device(None) == torch.device("cuda")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")  # accelerate launch --cpu
    assert find_device(None) == torch.device("cpu")


@pytest.mark.parametrize("strategy", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_model_split_among_processes_is_refused(monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{strategy}", "false")
    assert find_device("cpu") == torch.device("cpu")
    monkeypatch.setenv(f"ACCELERATE_USE_{strategy}", "true")
    with pytest.raises(UsageError, match=rf"^ACCELERATE_USE_{strategy}: the model cannot be split among processes"):
        find_device("cpu")


def test_processes_are_counted_where_a_launcher_has_numbered_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert (launched_world_size(), rank()) == (1, 0), "a scheduler sets WORLD_SIZE for other ends"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (launched_world_size(), rank()) == (4, 3)


def test_a_process_takes_the_device_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, backends = list[int](), list[Any]()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr("compressor.distributed.devices._meet", backends.append)
    monkeypatch.setenv("WORLD_SIZE", "4")
    for local, number in (("0", 0), ("1", 1), ("3", 1)):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert find_device(None) == torch.device("cuda", number)
    assert find_device("cpu") == torch.device("cpu")
    assert (chosen, backends) == ([0, 1, 1], ["nccl", "nccl", "nccl", "gloo"])


@pytest.mark.parametrize(
    ("capability", "half"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_bfloat16_where_the_gpu_knows_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], half: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert half_precision(torch.device("cuda:0")) == half
    assert half_precision(torch.device("cpu")) == torch.bfloat16


def test_a_loss_in_float16_is_scaled_and_steps_that_overflow_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.training.mixed_precision.half_precision", lambda device: torch.float16)
    precision, weight = MixedPrecision(torch.device("cpu"), enabled=True), torch.ones(2, requires_grad=True)
    assert precision.scaler is not None
    optimizer = torch.optim.SGD([weight], 0.5)
    precision.backward(weight.sum())
    assert weight.grad is not None
    assert weight.grad[0] == precision.scaler.get_scale() > 1
    precision.step(optimizer)
    assert weight.tolist() == [0.5, 0.5], "by the gradient, not the scaled one"
    scale = precision.scaler.get_scale()
    weight.grad.fill_(torch.inf)
    precision.step(optimizer)
    assert weight.tolist() == [0.5, 0.5]
    assert precision.scaler.get_scale() < scale == precision.scaler.state_dict()["scale"] * 2


class Pair(NamedTuple):
    logits: Tensor
    features: Tensor


def test_outputs_reach_the_loss_in_float32() -> None:
    precision, half = MixedPrecision(torch.device("cpu"), enabled=True), torch.ones(2, dtype=torch.bfloat16)
    assert precision.scaler is None
    for output in (half, (half, half), [half], {"logits": half}, Pair(half, half)):
        full = precision.full(output)
        assert type(full) is type(output)
        parts = [full] if isinstance(full, Tensor) else list(full.values()) if isinstance(full, dict) else list(full)
        assert {part.dtype for part in parts} == {torch.float32}
    assert precision.full(None) is None
    assert MixedPrecision(torch.device("cpu"), enabled=False).full(half) is half


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_the_command_refuses_an_absent_device_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("compressor.models.names.timm.is_model", pytest.fail)
    for words in (["test_resnet", "--amp"], ["eval", "no.safetensors"]):
        assert command.run([*words, "--device", "cuda:99"]) == 6
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: device 'cuda:99': torch ")
    assert not list(folder.iterdir())


def test_the_command_needs_data_for_mixed_precision() -> None:
    with pytest.raises(UsageError, match="no data to train on for --device, --amp: name --dataset or --data-dir"):
        Request(ModelConfig("test_resnet", pretrained=True), execution=ExecutionConfig(device="cpu", amp=True)).check()


@pytest.mark.slow
def test_the_command_trains_in_mixed_precision(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["test_resnet", "--baseline-epochs", "1", "--epochs", "1", "--force"]
    assert command.run(quick) == 0
    with PackedFile.open("test_resnet-digits-learnt4.safetensors") as file:
        assert "amp" not in file.provenance
    assert command.run([*quick, "--amp", "--device", "cpu"]) == 0
    with PackedFile.open("test_resnet-digits-learnt4.safetensors") as file:
        assert file.provenance["amp"] is True
    assert len(list(cache_dir().glob("*.safetensors"))) == 2, "a baseline trained in mixed precision is another one"
    assert command.run(["eval", "test_resnet-digits-learnt4.safetensors", "--device", "cpu"]) == 0
    assert "as recorded in the file" in capsys.readouterr().out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models on two threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
