"""Dense baselines: a timm model trained to convergence on a data set, and kept for the next run.

Kept in ``$TIMM_COMPRESSOR_CACHE``, else ``$XDG_CACHE_HOME/timm-compressor``, else ``~/.cache/timm-compressor``, as
``<key>.safetensors``; the key is the SHA-256 of all that the result depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
import timm
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR

from compressor.checkpoint import Checkpoints
from compressor.datasets import Dataset
from compressor.formats.atomic import write_atomically
from compressor.formats.errors import MissingError, ResourceError
from compressor.resuming import Keeper
from compressor.state_file import checksum
from compressor.training import Epoch, OnStep, evaluate, train

__all__ = ["Baseline", "BaselineRecipe", "cache_dir", "create_model", "train_baseline"]

_log = logging.getLogger(__name__)
_KEY = "timm-compressor-baseline"


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


def cache_dir() -> Path:
    """Give the folder baselines are kept in."""
    if own := os.environ.get("TIMM_COMPRESSOR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm-compressor"


def create_model(name: str, args: Mapping[str, Any], *, pretrained: bool = False, seed: int = 0) -> nn.Module:
    """Build a timm model; weights that are not loaded follow ``seed``. Raises MissingError where timm cannot."""
    torch.manual_seed(seed)
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **args)
    except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as exc:
        said = " ".join(f"{name} with {dict(args) or 'no arguments'}: {exc}".split())
        hint = "; is the hub reachable, or the weights in its cache (HF_HOME)?" if pretrained else ""
        raise MissingError(f"timm cannot build {said}{hint}") from exc
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
        on_epoch, on_step, device, amp: as in ``compressor.training.train``.
        checkpoints: where a training that is interrupted is kept.
    """
    model = create_model(name, args, pretrained=pretrained, seed=seed)
    recipe = BaselineRecipe.for_model(model, epochs)
    if pretrained:  # gentler, or the start would be lost
        recipe = replace(recipe, lr=recipe.lr / 10)
    identity = _identity(name, args, data, recipe, seed, pretrained) | ({"amp": True} if amp else {})
    digest = hashlib.sha256(_canonical(identity).encode()).hexdigest()
    path = cache_dir() / f"{digest[:16]}.safetensors"
    with _locked(path) as usable:
        if usable and (kept := _read(path, identity, model)) is not None:
            return kept
        keeper = Keeper(checkpoints, model, identity)
        trained = partial(train, on_epoch=on_epoch, on_step=on_step, device=device, amp=amp, keeper=keeper)
        figures = _train(model, data, recipe, seed, trained)
        baseline = Baseline(dict(model.state_dict()), figures, None, reused=False)
        return _keep(path, identity, baseline) if usable else baseline


def _train(
    model: nn.Module, data: Dataset, recipe: BaselineRecipe, seed: int, train: Callable[..., None]
) -> dict[str, Any]:
    groups = param_groups_weight_decay(model, recipe.weight_decay)
    optimizer: torch.optim.Optimizer
    if recipe.opt == "sgd":
        optimizer = torch.optim.SGD(groups, recipe.lr, momentum=0.9, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups, recipe.lr)
    loader = data.train_loader(recipe.batch_size, seed)
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


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the entry's lock; where the folder cannot be written, say so and go on without."""
    lock = filelock.FileLock(path.with_suffix(".lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            _log.warning("another process is training this baseline: waiting for it")
            lock.acquire()
    except OSError as exc:
        _log.warning("%s cannot be written (%s): the baseline will not be kept", path.parent, exc.strerror or exc)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _read(path: Path, identity: Mapping[str, Any], model: nn.Module) -> Baseline | None:
    """Read a kept baseline; None where there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file is no mapping)
        if facts["crc32"] != checksum(state) or facts["identity"] != json.loads(_canonical(identity)):
            raise ValueError("checksum or key differ")
        model.load_state_dict(state)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as exc:
        _log.warning("%s is damaged (%s): training the baseline anew", path, " ".join(str(exc).split())[:100])
        return None
    return Baseline(state, facts["figures"], path, reused=True)


def _keep(path: Path, identity: Mapping[str, Any], baseline: Baseline) -> Baseline:
    state = {key: value.detach().cpu().clone().contiguous() for key, value in baseline.state.items()}
    facts = {"identity": identity, "figures": baseline.figures, "crc32": checksum(state)}
    try:  # one metadata key: safetensors writes several in random order
        write_atomically(path, safetensors.torch.save(state, {_KEY: _canonical(facts)}), force=True)
    except ResourceError as exc:
        _log.warning("%s: the baseline will not be kept", exc)
        return baseline
    return replace(baseline, path=path)
