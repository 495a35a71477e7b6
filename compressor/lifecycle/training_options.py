"""The options of a fine-tuning: a config, keywords that win over it, and the defaults of the job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from compressor.checkpointing.serialization import checksum
from compressor.distributed.collectives import is_main_process
from compressor.formats.errors import UsageError
from compressor.policy.policy import Policy
from compressor.training.config import TrainingConfig
from compressor.training.history import History
from compressor.training.loop import Epoch, OnEpoch, OnStep
from compressor.training.mixup import Mixer, describe_mixup, mixup_for, split_mixer
from compressor.training.progress_bar import ProgressBar

__all__ = ["fingerprint", "replaced", "resolve_options", "watched"]


def resolve_options(
    model: nn.Module,
    config: TrainingConfig | int | None,
    overrides: Mapping[str, Any],
    distill: float | None,
    temperature: float,
) -> tuple[TrainingConfig, Mixer | None]:
    """Returns the options of a fine-tuning, and its mixer.

    Args:
        model: the model that is trained.
        config: the options, or the number of epochs; None: the defaults.
        overrides: fields that win over ``config``; ``mixup`` may also be a mixer.
        distill: weight of the distillation where ``config`` is no whole config; None: there is no teacher.
        temperature: of the distillation, likewise.

    Raises:
        UsageError: an option does not exist or has a value that cannot be, or all parameters are frozen.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UsageError("finetune(): nothing to train, all parameters are frozen (requires_grad is False)")
    options, mixup = split_mixer(overrides)
    defaults = {"distill": distill or 0.0, "temperature": temperature}
    resolved = TrainingConfig.resolve(config, options, defaults=defaults, least_epochs=1)
    if distill is None:
        resolved = replace(resolved, distill=0.0)
    return resolved, mixup or mixup_for(model, resolved)


def fingerprint(
    policy: Policy,
    config: TrainingConfig,
    mixup: Mixer | None,
    seed: int,
    amp: bool,
    original: Mapping[str, Tensor] | None,
) -> dict[str, Any]:
    """Returns what must be the same to resume a fine-tuning, as JSON values.

    Args:
        policy, config, mixup, seed, amp: by which it is trained.
        original: the dense weights by name; None where nothing is saved, and so nothing compared.
    """
    weights = "" if original is None else f"CRC-32 {checksum(original):08x}"
    facts = {"mixup": describe_mixup(mixup), "seed": seed, "amp": amp, "weights": weights}
    return {"rules": [rule.to_dict() for rule in policy.rules], **config.to_dict(), **facts}


@contextmanager
def watched(
    history: History, progress: bool | None, on_epoch: OnEpoch | None, on_step: OnStep | None
) -> Iterator[tuple[OnEpoch, OnStep]]:
    """Gives the callbacks of a training that is noted in a history and shown by a bar.

    Args:
        history: gets a row for each epoch.
        progress: whether the first process has a bar; None: on a terminal and in a notebook, where nothing else watches
            the steps.
        on_epoch, on_step: the caller's own callbacks, called afterwards.
    """
    is_watched = progress is None and on_step is not None
    bar = ProgressBar(False if is_watched or not is_main_process() else progress)

    def after_epoch(epoch: Epoch, top1: float | None) -> None:
        history.add(epoch, top1)
        bar.on_epoch(epoch, top1)
        if on_epoch is not None:
            on_epoch(epoch, top1)

    def after_step(done: int, total: int, loss: Tensor) -> None:
        bar.on_step(done, total, loss)
        if on_step is not None:
            on_step(done, total, loss)

    try:
        yield after_epoch, after_step
    finally:
        bar.close()


@contextmanager
def replaced(instance: object, **attributes: Any) -> Iterator[None]:
    """Gives an object other values of some attributes inside, and the former ones afterwards.

    Example:
        >>> layer = nn.ReLU()
        >>> with replaced(layer, inplace=True):
        ...     layer.inplace
        True
        >>> layer.inplace
        False
    """
    before = {name: getattr(instance, name) for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(instance, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(instance, name, value)
