"""TrainingConfig: one field is a recipe's key, an option of the command, a keyword of Python and part of resuming."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compressor import Compressor, Policy, Recipe, Rule
from compressor.checkpointing.manager import Checkpoints
from compressor.cli.click_options import click_options
from compressor.cli.compress import OPTIONS
from compressor.config_fields import config_field
from compressor.formats.errors import InterruptionError, PolicyError, UsageError
from compressor.training.config import TrainingConfig
from compressor.training.loop import Epoch, train
from compressor.training.mixup import make_mixup
from compressor.training.optim import make_optimizer
from tests.helpers.accidents import _fast, job_of, loader

__all__ = ["_fast"]  # the fixture

RULE = '[[stage.rule]]\nscheme = "kmeans"\nbits = 2\n'


@dataclass(frozen=True, kw_only=True)
class WithOneMore(TrainingConfig):
    """The config with one field added, and nothing else."""

    clip_grad: float = config_field(1.5, "Norm that gradients are clipped to.", ge=0, metavar="NORM")


@pytest.fixture
def one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compressor.policy.recipe", "compressor.lifecycle.training_options"):
        monkeypatch.setattr(f"{module}.TrainingConfig", WithOneMore)


@pytest.mark.usefixtures("one_more")
def test_a_field_that_is_added_is_a_key_of_a_recipe() -> None:
    recipe = Recipe.from_toml(f"[[stage]]\nclip_grad = 3\n{RULE}")
    assert recipe.to_dict()["stage"][0]["clip_grad"] == 3.0
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    with pytest.raises(PolicyError, match="stage 1, clip_grad: expected at least 0, got -1"):
        Recipe.from_toml(f"[[stage]]\nclip_grad = -1\n{RULE}")


def test_a_field_that_is_added_is_an_option_with_help_and_default() -> None:
    command = click.Command("run", params=[*click_options(WithOneMore, overrides=True)])
    (line,) = [text for option, text in help_of(command) if option == "--clip-grad NORM"]
    assert line == "Norm that gradients are clipped to. [default: 1.5]  [x>=0]"
    assert command.make_context("run", ["--clip-grad", "2"]).params["clip_grad"] == 2.0
    assert command.make_context("run", []).params["clip_grad"] is None


def help_of(command: click.Command) -> list[tuple[str, str]]:
    context = click.Context(command)
    return [record for parameter in command.params if (record := parameter.get_help_record(context)) is not None]


@pytest.mark.usefixtures("one_more")
def test_a_field_that_is_added_is_a_keyword_and_must_be_the_same_to_resume(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c")

    def on_step(done: int, *_: object) -> None:
        checkpoints.stop = done == 2

    with pytest.raises(InterruptionError):
        job_of().finetune(loader(), clip_grad=2, on_step=on_step, checkpoints=checkpoints)
    checkpoints.close()
    again = Checkpoints(tmp_path / "c", resume=True)
    with pytest.raises(UsageError, match=r"clip_grad was 2\.0, is 1\.5"):
        job_of().finetune(loader(), checkpoints=again)
    job_of().finetune(loader(), clip_grad=2, checkpoints=again)
    again.close()


def test_every_option_of_the_command_shows_its_default() -> None:
    shown = {parameter.name: parameter.help for parameter in OPTIONS}
    hidden = {"temperature"}
    for one in fields(TrainingConfig):
        assert (one.name in shown) == (one.name not in hidden)
        assert one.name in hidden or f"[default: {one.default:{'g' if one.type == 'float' else ''}}" in str(
            shown[one.name]
        )


def rates(job: Compressor, *arguments: Any, **options: Any) -> list[tuple[int, float]]:
    """Returns number and learning rate of each epoch."""
    seen: list[tuple[int, float]] = []

    def on_epoch(epoch: Epoch, top1: float | None) -> None:
        del top1
        seen.append((epoch.epochs, round(epoch.lr, 6)))

    job.finetune(loader(), None, *arguments, **options, on_epoch=on_epoch)
    return seen


def test_a_config_an_int_and_keywords() -> None:
    config = TrainingConfig(epochs=2, lr=0.01, sched="none")
    assert rates(job_of(), config) == [(2, 0.01)] * 2
    assert rates(job_of(), 2, lr=0.01, sched="none") == [(2, 0.01)] * 2
    assert rates(job_of(), config, epochs=1, lr=0.02) == [(1, 0.02)]
    assert rates(job_of(), np.int64(1), lr=0.01, sched="none") == [(1, 0.01)]
    assert rates(job_of(), epochs=np.int64(1), lr=0, sched="none") == [(1, 0.0)]
    assert [epochs for epochs, _ in rates(job_of())] == [4] * 4


def test_a_callback_computes_in_full_precision() -> None:
    """Whatever the training computes in, and the evaluation after each epoch."""
    seen: list[torch.dtype] = []
    job = job_of()
    probe = nn.Linear(2, 2)
    job.finetune(loader(), loader(), 1, amp=True, on_epoch=lambda *_: seen.append(probe(torch.ones(1, 2)).dtype))
    assert seen == [torch.float32]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 2}, "there is no training option 'epoch'. Did you mean 'epochs'?"),
        ({"epochs": 0}, "epochs must be at least 1, got 0; without training go on with finish()"),
        ({"config": 0}, "epochs must be at least 1, got 0; without training go on with finish()"),
        ({"config": TrainingConfig(epochs=0)}, "epochs must be at least 1, got 0; without training go on with finish"),
        ({"grad_accum": 0}, "grad_accum must be at least 1, got 0"),
        ({"config": 2.0}, "epochs: expected a whole number, got 2.0"),
        ({"config": "2"}, "epochs: expected a whole number, got '2'"),
        ({"lr": -1}, "lr: expected at least 0, got -1"),
        ({"epochs": "two"}, "epochs: expected a whole number, got 'two'"),
        (
            {"mixup": make_mixup(1.0, 0.0, 0.0, 3), "cutmix": 1.0},
            "mixup is a mixer of your own, which does all of the",
        ),
        ({"smoothing": 0.1}, "has no num_classes: give mixup=timm.data.Mixup(..., num_classes=N)"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        job_of().finetune(loader(), **options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


class Classifier(nn.Sequential):
    """A network that tells its number of classes, as timm's do."""

    num_classes = 3


def finetuned(**options: Any) -> bytes:
    torch.manual_seed(0)
    job = Compressor(Classifier(nn.Flatten(), nn.Linear(36, 3)), Policy([Rule("*", scheme="learnt", bits=2)]))
    images = torch.rand(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(images, torch.arange(16) % 3), 4)
    job.prepare().finetune(data, epochs=2, lr=0.01, **options)
    return job.finish().to_bytes()


def test_mixing_by_numbers_is_that_of_timms_mixup() -> None:
    mixer = make_mixup(0.8, 1.0, 0.1, classes=3)
    assert finetuned(mixup=0.8, cutmix=1.0, smoothing=0.1) == finetuned(mixup=mixer) != finetuned()
    config = TrainingConfig(mixup=0.8, cutmix=1.0, smoothing=0.1)
    assert finetuned(config=config) == finetuned(mixup=mixer)
    assert finetuned(config=config, mixup=make_mixup(0.0, 0.0, 0.3, classes=3)) == finetuned(smoothing=0.3)
    assert finetuned(mixup=None) == finetuned()


def test_the_constructor_distils_by_default_and_a_config_wins() -> None:
    """Seen by the weight that ``loss`` distils with in the middle of the training, and after it."""
    seen: list[tuple[float, float]] = []
    job = Compressor(job_of().undo(), Policy([Rule("*", scheme="learnt")]), distill=0.25, temperature=3.0).prepare()

    def on_step(*_: object) -> None:
        seen.append((job.distill, job.temperature))

    for options in ({}, {"distill": 0.75}, {"config": TrainingConfig()}):
        job.finetune(loader(), **{"epochs": 1, **options}, on_step=on_step)  # type: ignore[arg-type]
    assert list(dict.fromkeys(seen)) == [(0.25, 3.0), (0.75, 3.0), (0.5, 2.0)]
    assert (job.distill, job.temperature) == (0.25, 3.0)


def test_without_a_teacher_nothing_is_distilled() -> None:
    alone = Compressor(job_of().undo(), Policy([Rule("*", scheme="learnt")]), teacher=None).prepare()
    alone.finetune(loader(), epochs=1, distill=0.75)


def test_the_loop_alone_takes_keywords_too() -> None:
    model, data = nn.Linear(12, 3), loader()
    optimizer, schedule = make_optimizer([{"params": list(model.parameters())}], "sgd", 0.1, "none", 2, 3)
    steps: list[tuple[int, int]] = []

    def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        del inputs
        return nn.functional.cross_entropy(output, target)

    train(
        model, data, loss, optimizer, schedule, epochs=2, grad_accum=2, model_ema_decay=0.9, mixup=None,
        on_step=lambda *at: steps.append(at[:2]),
    )  # fmt: skip
    assert steps == [(step, 6) for step in range(1, 7)]
    with pytest.raises(UsageError, match="Did you mean 'epochs'"):
        train(model, data, loss, optimizer, schedule, epoch=2)


@pytest.mark.parametrize(
    ("opt", "sched", "hint"), [("adamww", "cosine", "'adamw'"), ("adamw", "cosin", "'cosine'"), ("sgd", "zzz", "")]
)
def test_a_misspelt_optimiser_or_schedule(opt: str, sched: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_optimizer([{"params": [torch.nn.Parameter(torch.zeros(2))]}], opt, 0.1, sched, 1, 1)
    assert str(caught.value).partition(" Did you mean ")[2] == (f"{hint}?" if hint else "")
