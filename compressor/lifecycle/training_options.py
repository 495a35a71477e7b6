"""The options of a fine-tuning: a config, keywords that win over it, and the defaults of the job."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from compressor.training.config import TrainingConfig
from compressor.training.mixup import Mixer, mixup_for, split_mixer

__all__ = ["replaced", "resolve_options"]


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
        UsageError: an option does not exist or has a value that cannot be.
    """
    options, mixup = split_mixer(overrides)
    defaults = {"distill": distill or 0.0, "temperature": temperature}
    resolved = TrainingConfig.resolve(config, options, defaults=defaults, least_epochs=1)
    if distill is None:
        resolved = replace(resolved, distill=0.0)
    return resolved, mixup or mixup_for(model, resolved)


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
