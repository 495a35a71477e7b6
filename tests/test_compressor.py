"""Compressor: the public workflow, its order of calls, and what ends in the file."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.errors import MissingError, UsageError
from compressor.training.distillation import distillation

ARGS: dict[str, Any] = {"num_classes": 10, "in_chans": 1}
LEARNT = Policy([Rule("*", scheme="learnt", bits=2)])


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", **ARGS)


def loader(n: int = 24, batch: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(n, 1, 32, 32, generator=generator), torch.randint(10, (n,), generator=generator))
    return DataLoader(data, batch, shuffle=True, generator=generator)


def finetuned(model: Any, seed: int = 0) -> Compressor:
    job = Compressor(model, LEARNT, model_args=ARGS, seed=seed).prepare()
    return job.finetune(loader(), epochs=2, lr=1e-3)


def test_the_whole_way_and_back(model: Any, tmp_path: Path) -> None:
    job = finetuned(model)
    packed = job.finish()
    size = packed.save(tmp_path / "small.safetensors")
    assert size == (tmp_path / "small.safetensors").stat().st_size
    loaded = compressor.load(tmp_path / "small.safetensors")
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded(x), job.model.eval()(x))
    assert packed.report().totals.file == size


def test_a_seed_gives_the_same_bytes(model: Any) -> None:
    runs = [finetuned(model).finish().to_bytes() for _ in range(2)]
    assert runs[0] == runs[1]


def test_your_own_loop(model: Any) -> None:
    job = Compressor(model, LEARNT, model_args=ARGS).prepare()
    opt = torch.optim.AdamW(job.param_groups(lr=1e-3, weight_decay=0.05))
    job.attach(opt, total_steps=3)
    job.model.train()
    for inputs, target in loader():
        loss = job.loss(job.model(inputs), target, inputs=inputs)
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert job.steps == 3
    assert max(row.used for row in job.finish().report().rows) == 4


def test_loss_is_task_and_distillation(model: Any) -> None:
    job = Compressor(model, LEARNT, distill=0.25, temperature=3.0).prepare()
    inputs, target = next(iter(loader()))
    output = job.model.eval()(inputs)
    with torch.no_grad():
        wanted = model.eval()(inputs)
    expected = 0.75 * functional.cross_entropy(output, target) + 0.25 * distillation(output, wanted, 3.0)
    torch.testing.assert_close(job.loss(output, target, inputs=inputs), expected)
    with pytest.raises(UsageError, match="inputs=x"):
        job.loss(output, target)


def test_a_teacher_is_left_as_it_is(model: Any) -> None:
    job = Compressor(model, LEARNT, copy=False, teacher=model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert job.teacher is not model
    with pytest.raises(UsageError, match="teacher must be 'dense'"):
        Compressor(model, LEARNT, teacher="densse")  # type: ignore[arg-type]


def test_distillation_of_the_teacher_itself_is_nothing() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    assert float(distillation(logits, logits.detach(), 2.0).detach()) == pytest.approx(0, abs=1e-12)
    assert torch.autograd.gradcheck(lambda x: distillation(x, torch.zeros_like(x), 2.0), logits)


def test_parameters_are_each_given_once_and_decay_is_for_the_unshared(model: Any) -> None:
    job = Compressor(model, Policy([Rule("fc", scheme="learnt", bits=2)])).prepare()
    groups = job.param_groups(lr=0.1, weight_decay=0.5)
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in job.model.parameters())
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {id(p): name for name, p in job.model.named_parameters()}
    assert all(name.endswith("weight") and ".original" not in name for i, name in names.items() if i in decayed)
    assert id(job.groups[0].master_weight(job.groups[0].sites[0])) not in decayed


def test_calibration_weighs_the_errors_and_estimates_batch_norm(model: Any) -> None:
    plain = Compressor(model, LEARNT).prepare()
    weighed = Compressor(model, LEARNT).prepare(calibration=loader())
    first, second = plain.groups[-1], weighed.groups[-1]
    assert not torch.equal(first.codebook(), second.codebook())
    norm: Any = plain.model.get_submodule("bn1")
    before = copy.deepcopy(norm.running_mean)
    plain.finish(calibration=loader())
    assert not torch.equal(norm.running_mean, before)


def test_batch_norm_stays_where_new_statistics_answer_worse(model: Any) -> None:
    """The statistics of an untrained model, 0 and 1, answer the dense model's images best."""
    job = Compressor(model, LEARNT).prepare(calibration=loader())
    norm: Any = job.model.get_submodule("bn1")
    job.finish(calibration=loader())
    assert not norm.running_mean.any()
    assert bool((norm.running_var == 1).all())


def test_calls_out_of_order_are_refused(model: Any) -> None:
    job = Compressor(model, LEARNT)
    for call in (job.finish, job.undo, job.state_dict, lambda: job.param_groups(0.1)):
        with pytest.raises(UsageError, match=r"needs prepare\(\) before it"):
            call()
    job.prepare()
    with pytest.raises(UsageError, match="shared already"):
        job.prepare()
    with pytest.raises(UsageError, match="epochs must be at least 1"):
        job.finetune(loader(), epochs=0)
    with pytest.raises(UsageError, match="total_steps"):
        job.attach(torch.optim.SGD(job.param_groups(0.1)), total_steps=0)


def test_a_model_cannot_be_compressed_twice_at_once(model: Any) -> None:
    Compressor(model, LEARNT, copy=False).prepare()
    with pytest.raises(UsageError, match=r"is being compressed already: finish\(\) or undo\(\) that first"):
        Compressor(model, LEARNT, copy=False)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(model: Any, bad: float) -> None:
    with torch.no_grad():
        model.layer2[0].conv1.weight.view(-1)[:3] = bad
    with pytest.raises(MissingError, match=r"layer2.0.conv1.weight: 3 of .* NaN or infinite"):
        Compressor(model, LEARNT)


def test_any_module_is_saved_and_loaded_into_its_like(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))

    job = Compressor(make(), LEARNT).prepare()
    job.finish().save(tmp_path / "mlp.safetensors")
    loaded = compressor.load(tmp_path / "mlp.safetensors", model=make())
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), job.model.eval()(x))
    with pytest.raises(MissingError):
        compressor.load(tmp_path / "mlp.safetensors")


def test_skipped_layers_are_not_touched(model: Any) -> None:
    dense = copy.deepcopy(model.state_dict())
    job = Compressor(model, Policy([Rule("fc", scheme="learnt", bits=2)])).prepare()
    job.finish()
    for name, value in job.model.state_dict().items():
        assert name == "fc.weight" or torch.equal(value, dense[name])


@pytest.mark.parametrize("name", sorted(timm.list_models("test_*")))
def test_every_small_timm_model_packs_and_reloads(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    job = Compressor(model, LEARNT, teacher=None).prepare()
    job.finish().save(tmp_path / "model.safetensors")
    loaded = compressor.load(tmp_path / "model.safetensors")
    cfg: Any = model.pretrained_cfg
    x = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        assert torch.equal(loaded(x), job.model.eval()(x))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small models on two threads spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_untouched_tensors_in_half_precision(tmp_path: Path) -> None:
    """What is evaluated is what is stored: rounded in the model, half the bytes; what float16 cannot hold is left."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].running_var.fill_(1e6)
        for tensor in (model[1].running_mean, model[1].weight, model[1].bias):
            tensor.normal_()  # tensors of one value take no bytes at all
    policy = Policy([Rule("*", scheme="kmeans", bits=2)])
    sizes = []
    for half in (False, True):
        job = Compressor(model, policy, teacher=None).prepare()
        trained: Any = job.model
        packed = job.finish(half_untouched=half)
        path = tmp_path / f"{half}.safetensors"
        packed.save(path)
        loaded = compressor.load_state_dict(path)
        assert all(torch.equal(value, loaded[name]) for name, value in job.model.state_dict().items())
        sizes.append(packed.report().totals.untouched)
    floats = sum(t.numel() for name, t in model.state_dict().items() if t.ndim == 1 and "running_var" not in name)
    assert sizes[0] - sizes[1] == 2 * floats
    assert not torch.equal(trained[1].running_mean, model[1].running_mean)
    assert float(trained[1].running_var[0]) == 1e6


def test_a_job_that_is_finished_says_so() -> None:
    job = Compressor(nn.Linear(16, 16), Policy([Rule("*", scheme="kmeans", bits=2)]), teacher=None).prepare()
    job.finish()
    with pytest.raises(UsageError, match=r"^finish\(\) after finish\(\): the model is an ordinary module again"):
        job.finish()
