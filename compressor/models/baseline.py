"""Dense baselines: a timm model trained to convergence on a data set, and kept for the next run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from compressor.checkpointing.manager import Checkpoints
from compressor.data.datasets import Dataset
from compressor.data.distributed_sampler import shard_loader
from compressor.distributed.devices import init_processes
from compressor.formats.errors import MissingError
from compressor.models.baseline_cache import cache_dir, keep_baseline, locked, path_of, read_baseline
from compressor.models.hub import create_pretrained
from compressor.training.checkpointer import TrainingCheckpointer
from compressor.training.evaluation import evaluate
from compressor.training.loop import Epoch, OnStep, train

__all__ = ["Baseline", "BaselineRecipe", "cache_dir", "create_model", "train_baseline"]


@dataclass(frozen=True)
class BaselineRecipe:
    """How a dense baseline is trained: one cycle of the learning rate, label smoothing, no decay on norms and biases.

    Args:
        epochs: passes over the training split.
        batch_size: images per step.
        opt: ``sgd`` (Nesterov momentum 0.9) or ``adamw``.
        lr: highest learning rate, reached after a quarter of the steps.
        weight_decay: of matrices and kernels.
        label_smoothing: share of the target spread over all classes.
    """

    epochs: int = 12
    batch_size: int = 64
    opt: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05

    @classmethod
    def for_model(cls, model: nn.Module, epochs: int | None = None) -> BaselineRecipe:
        """Give the recipe that was measured to converge: SGD needs BatchNorm; AdamW, for longer, for models without.

        >>> BaselineRecipe.for_model(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))).opt
        'adamw'
        """
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            return cls() if epochs is None else cls(epochs)
        return cls(40 if epochs is None else epochs, opt="adamw", lr=1e-3, weight_decay=0.05)


@dataclass(frozen=True, eq=False)
class Baseline:
    """A trained dense model.

    Args:
        state: its state dict.
        figures: ``validation_top1`` in 0..1, ``epochs``, ``seconds``.
        path: where it is kept; None where it could not be.
        reused: whether it was found there.
    """

    state: Mapping[str, Tensor]
    figures: Mapping[str, Any]
    path: Path | None
    reused: bool


def create_model(name: str, args: Mapping[str, Any], *, pretrained: bool = False, seed: int = 0) -> nn.Module:
    """Build a timm model; weights that are not loaded follow ``seed``. Raises MissingError where timm cannot."""
    torch.manual_seed(seed)
    try:
        if pretrained:
            return create_pretrained(name, args)
        model: nn.Module = timm.create_model(name, **args)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as exc:
        said = " ".join(f"{name} with {dict(args) or 'no arguments'}: {exc}".split())
        raise MissingError(f"timm cannot build {said}") from exc
    return model


def train_baseline(
    name: str,
    args: Mapping[str, Any],
    data: Dataset,
    *,
    seed: int = 0,
    epochs: int | None = None,
    pretrained: bool = False,
    on_epoch: Callable[[Epoch], None] | None = None,
    on_step: OnStep | None = None,
    device: str | None = None,
    amp: bool = False,
    checkpoints: Checkpoints | None = None,
) -> Baseline:
    """Train a dense timm model, or give the one trained before by the same call.

    A second process that wants the same baseline waits for the first. An entry that is damaged is trained anew.

    Args:
        seed: of initial weights, order and augmentation.
        epochs: passes over the training split; None for as many as the kind of model needs.
        pretrained: start from timm's pretrained weights, at a tenth of the learning rate.
        on_epoch, on_step, device, amp: as in ``compressor.training.loop.train``.
        checkpoints: where a training that is interrupted is kept.
    """
    model = create_model(name, args, pretrained=pretrained, seed=seed)
    recipe = BaselineRecipe.for_model(model, epochs)
    if pretrained:  # gentler, or the start would be lost
        recipe = replace(recipe, lr=recipe.lr / 10)
    identity = _identity(name, args, data, recipe, seed, pretrained) | ({"amp": True} if amp else {})
    identity |= {"channels last": True} if data.channels_last else {}
    init_processes(device)
    path = path_of(identity)
    with locked(path) as usable:
        if usable and (figures := read_baseline(path, identity, model)) is not None:
            return Baseline(dict(model.state_dict()), figures, path, reused=True)
        checkpointer = TrainingCheckpointer(checkpoints, model, identity)
        trained = partial(train, on_epoch=on_epoch, on_step=on_step, device=device, amp=amp, checkpointer=checkpointer)
        figures = _train(model, data, recipe, seed, trained)
        kept = usable and keep_baseline(path, identity, model, figures)
        return Baseline(dict(model.state_dict()), figures, path if kept else None, reused=False)


def _train(
    model: nn.Module, data: Dataset, recipe: BaselineRecipe, seed: int, train: Callable[..., None]
) -> dict[str, Any]:
    groups = param_groups_weight_decay(model, recipe.weight_decay)
    optimizer: torch.optim.Optimizer
    if recipe.opt == "sgd":
        optimizer = torch.optim.SGD(groups, recipe.lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, recipe.lr)
    loader = shard_loader(data.train_loader(recipe.batch_size, seed))
    steps = max(1, recipe.epochs * len(loader))
    rise = 0.5 if steps == 4 else 0.25  # torch divides by the steps of the rise less one
    schedule = OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=rise)

    def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        del inputs
        return functional.cross_entropy(output, target, label_smoothing=recipe.label_smoothing)

    started = time.monotonic()
    train(model, loader, loss, optimizer, schedule, recipe.epochs)
    seconds = round(time.monotonic() - started, 1)
    top1 = evaluate(model, data.eval_loader(256, "validation")).top1
    return {"validation_top1": top1, "epochs": recipe.epochs, "seconds": seconds}


def _identity(
    name: str, args: Mapping[str, Any], data: Dataset, recipe: BaselineRecipe, seed: int, pretrained: bool
) -> dict[str, Any]:
    """Name all that a baseline depends on."""
    return {
        "model": name,
        "args": dict(args),
        "data": {"name": data.name, "version": data.version, "input": data.input_size},
        "normalisation": {"mean": data.mean, "std": data.std},
        "recipe": asdict(recipe),
        "seed": seed,
        "pretrained": pretrained,
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }
