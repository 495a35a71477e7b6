"""Dense baselines: timm models trained to convergence on a data set, and cached for later runs."""

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
from compressor.models.baseline_cache import keep_baseline, locked, path_of, read_baseline
from compressor.models.hub import create_pretrained
from compressor.training.checkpointer import TrainingCheckpointer
from compressor.training.evaluation import evaluate
from compressor.training.loop import Epoch, OnStep, train

__all__ = ["Baseline", "BaselineRecipe", "create_model", "train_baseline"]


@dataclass(frozen=True)
class BaselineRecipe:
    """How a dense baseline is trained: one cycle of the learning rate, label smoothing, no decay on norms and biases.

    Args:
        epochs: passes over the training split.
        batch_size: images per step.
        opt: ``sgd`` (Nesterov momentum 0.9) or ``adamw``.
        lr: highest learning rate, reached after a quarter of the steps.
        weight_decay: weight decay of matrices and kernels.
        label_smoothing: share of a label spread over all classes, 0 to 1.
    """

    epochs: int = 12
    batch_size: int = 64
    opt: str = "sgd"
    lr: float = 0.05
    weight_decay: float = 5e-4
    label_smoothing: float = 0.05

    @classmethod
    def for_model(cls, model: nn.Module, epochs: int | None = None) -> BaselineRecipe:
        """Returns a recipe that was measured to converge: SGD with BatchNorm, and AdamW, for longer, without.

        Args:
            epochs: passes over the training split; None: as many as the kind of model needs.

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
        figures: ``validation_top1``, 0 to 1, ``epochs``, ``seconds``.
        path: of the cached file; None where it could not be written.
        reused: whether an earlier run has trained it.
    """

    state: Mapping[str, Tensor]
    figures: Mapping[str, Any]
    path: Path | None
    reused: bool


def create_model(name: str, args: Mapping[str, Any], *, pretrained: bool = False, seed: int = 0) -> nn.Module:
    """Builds a timm model.

    Args:
        name, args: of ``timm.create_model``.
        pretrained: load timm's pretrained weights.
        seed: of the weights that are not loaded.

    Raises:
        MissingError: timm cannot build the model, or its pretrained weights are not available.
    """
    torch.manual_seed(seed)
    try:
        if pretrained:
            return create_pretrained(name, args)
        model: nn.Module = timm.create_model(name, **args)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as exc:
        reason = " ".join(f"{name} with {dict(args) or 'no arguments'}: {exc}".split())
        raise MissingError(f"timm cannot build {reason}") from exc
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
    """Trains a dense timm model, or returns the one that an earlier call with the same arguments has trained.

    A second process that asks for the same baseline waits for the first. A damaged cache entry is trained anew.

    Args:
        name, args: of ``timm.create_model``.
        data: what the model is trained and evaluated on.
        seed: of initial weights, order and augmentation.
        epochs: passes over the training split; None: as many as the kind of model needs.
        pretrained: start from timm's pretrained weights, at a tenth of the learning rate.
        on_epoch, on_step, device, amp: see ``compressor.training.loop.train``.
        checkpoints: where the training is saved, and resumed from.

    Raises:
        MissingError: timm cannot build the model.
        QualityError, ResourceError, InterruptionError: see ``compressor.training.loop.train``.
    """
    model = create_model(name, args, pretrained=pretrained, seed=seed)
    recipe = BaselineRecipe.for_model(model, epochs)
    if pretrained:  # a higher rate would destroy the pretrained weights
        recipe = replace(recipe, lr=recipe.lr / 10)
    identity = _identity(name, args, data, recipe, seed, pretrained) | ({"amp": True} if amp else {})
    identity |= {"channels last": True} if data.channels_last else {}
    init_processes(device)
    path = path_of(identity)
    with locked(path) as usable:
        if usable and (figures := read_baseline(path, identity, model)) is not None:
            return Baseline(dict(model.state_dict()), figures, path, reused=True)
        checkpointer = TrainingCheckpointer(checkpoints, model, identity)
        train_here = partial(
            train, on_epoch=on_epoch, on_step=on_step, device=device, amp=amp, checkpointer=checkpointer
        )
        figures = _train(model, data, recipe, seed, train_here)
        kept = usable and keep_baseline(path, identity, model, figures)
        return Baseline(dict(model.state_dict()), figures, path if kept else None, reused=False)


def _train(
    model: nn.Module, data: Dataset, recipe: BaselineRecipe, seed: int, train_here: Callable[..., None]
) -> dict[str, Any]:
    """Trains the model by a recipe; returns the figures of the baseline."""
    groups = param_groups_weight_decay(model, recipe.weight_decay)
    optimizer: torch.optim.Optimizer
    if recipe.opt == "sgd":
        optimizer = torch.optim.SGD(groups, recipe.lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, recipe.lr)
    loader = shard_loader(data.train_loader(recipe.batch_size, seed))
    steps = max(1, recipe.epochs * len(loader))
    rise = 0.5 if steps == 4 else 0.25  # torch divides by the number of rising steps minus one, here 0
    schedule = OneCycleLR(optimizer, recipe.lr, total_steps=steps, pct_start=rise)

    def loss(output: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
        del inputs
        return functional.cross_entropy(output, target, label_smoothing=recipe.label_smoothing)

    started = time.monotonic()
    train_here(model, loader, loss, optimizer, schedule, recipe.epochs)
    seconds = round(time.monotonic() - started, 1)
    top1 = evaluate(model, data.eval_loader(256, "validation")).top1
    return {"validation_top1": top1, "epochs": recipe.epochs, "seconds": seconds}


def _identity(
    name: str, args: Mapping[str, Any], data: Dataset, recipe: BaselineRecipe, seed: int, pretrained: bool
) -> dict[str, Any]:
    """Returns all that a baseline depends on, as JSON values; its hash names the cached file."""
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
