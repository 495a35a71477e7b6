"""Options of a fine-tuning reach what they are about: the optimiser, the random generators, the loss."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor, Policy, Rule
from compressor.training.config import TrainingConfig


class ReachedError(Exception):
    """Ends a fine-tuning where the optimiser would be made."""


def data(batch: int = 4) -> DataLoader[Any]:
    random = torch.Generator().manual_seed(3)
    images, labels = torch.randn(24, 12, generator=random), torch.randint(3, (24,), generator=random)
    return DataLoader(TensorDataset(images, labels), batch, shuffle=True)


def job_of(seed: int = 0, **options: Any) -> Compressor:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 24), nn.Dropout(0.3), nn.ReLU(), nn.Linear(24, 3))
    policy = Policy([Rule("0", scheme="learnt", bits=2), Rule.ignore("*")])
    return Compressor(net, policy, seed=seed, **options).prepare()


def trained(job: Compressor, **options: Any) -> bytes:
    return job.finetune(data(), **{"epochs": 1, "lr": 0.01, **options}).finish().to_bytes()


def weights(job: Compressor, **options: Any) -> torch.Tensor:
    """Returns the weights of the layer that is not shared, after a fine-tuning."""
    job.finetune(data(), **{"epochs": 1, "lr": 0.01, "opt": "sgd", **options})
    model: Any = job.model
    found: torch.Tensor = model[3].weight.detach().clone()
    return found


def test_the_seed_decides_and_nothing_else_random_does() -> None:
    """Order of the images and dropout are drawn from the seed, wherever the generators were before."""
    first, second, third = job_of(5), job_of(5), job_of(6)
    torch.manual_seed(1)
    one = weights(first)
    torch.manual_seed(2)
    assert torch.equal(weights(second), one)
    torch.manual_seed(1)
    assert not torch.equal(weights(third), one)


def test_the_default_seed_is_zero() -> None:
    model = nn.Sequential(nn.Linear(12, 3))
    assert Compressor(model, Policy([Rule("*", scheme="learnt", bits=2)])).seed == 0
    assert torch.equal(weights(job_of()), weights(job_of(0)))


def test_weight_decay_and_rate_reach_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def make_optimizer(parameters: Any, *rest: Any) -> None:
        seen.extend([parameters, rest])
        raise ReachedError

    monkeypatch.setattr("compressor.compressor.make_optimizer", make_optimizer)
    config = TrainingConfig(epochs=3, opt="lamb", lr=0.25, sched="step", weight_decay=0.125, grad_accum=4)
    with pytest.raises(ReachedError):
        job_of().finetune(data(), None, config)
    groups, rest = seen
    shapes = {tuple(p.shape): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert shapes == {
        (24, 12): (0.25, 0.0), (24,): (0.25, 0.0), (4,): (0.25, 0.0), (3, 24): (0.25, 0.125), (3,): (0.25, 0.0),
    }  # fmt: skip
    assert rest == ("lamb", 0.25, "step", 3, 2)  # six batches, four a step: two steps an epoch


def test_layer_decay_reaches_the_optimiser(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def make_optimizer(parameters: Any, *_: Any) -> None:
        seen.extend(sorted({group["lr"] for group in parameters}))
        raise ReachedError

    monkeypatch.setattr("compressor.compressor.make_optimizer", make_optimizer)
    model = timm.create_model("test_resnet", num_classes=3)
    job = Compressor(model, Policy([Rule("*", scheme="learnt", bits=2)]), copy=False, teacher=None).prepare()
    with pytest.raises(ReachedError):
        job.finetune(data(), lr=1.0, layer_decay=0.5)
    assert seen == [0.5**5, 0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]  # stem, four stages, head


def test_weight_decay_shrinks_what_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no gradient moves it, AdamW shrinks it by the share 0.1 * 0.5 in each of six steps."""
    job = job_of(teacher=None)
    model: Any = job.model
    before = model[3].weight.detach().clone()
    monkeypatch.setattr(job, "loss", lambda output, target, inputs: 0 * output.sum())
    after = weights(job, lr=0.1, weight_decay=0.5, opt="adamw", sched="none")
    torch.testing.assert_close(after, before * 0.95**6)


@pytest.mark.parametrize(
    ("options", "other"),
    [({"temperature": 2.0}, {"temperature": 4.0}), ({"distill": 0.5}, {"distill": 0.25}), ({}, {"smoothing": 0.2}),
     ({}, {"mixup": 0.5}), ({}, {"weight_decay": 0.5}), ({}, {"model_ema_decay": 0.5})],
)  # fmt: skip
def test_no_option_is_without_effect(options: dict[str, Any], other: dict[str, Any]) -> None:
    def job() -> Compressor:
        made = job_of()
        made.model.num_classes = 3  # type: ignore[assignment]
        made.groups[0].values.data *= 1.5  # else the student would be near its teacher
        return made

    assert trained(job(), **options) == trained(job(), **options) != trained(job(), **other)


def test_temperature_of_the_constructor_is_that_of_the_loss() -> None:
    """Cross entropy of logits (0, 0, 0) is ln 3, distillation from (2 ln 3, 0, 0) at T = 2 is 0.5934."""
    teacher = nn.Linear(12, 3)
    with torch.no_grad():
        teacher.weight.zero_()
        teacher.bias.copy_(torch.tensor([2.1972245, 0.0, 0.0]))
    job = job_of(teacher=teacher, distill=0.5, temperature=2.0)
    loss = job.loss(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long), torch.zeros(4, 12))
    # softmax (3/5, 1/5, 1/5): KL from thirds is 0.6 ln 1.8 + 0.4 ln 0.6 = 0.148342, times 4
    assert float(loss) == pytest.approx(0.5 * 1.0986123 + 0.5 * 0.593367, abs=1e-5)
