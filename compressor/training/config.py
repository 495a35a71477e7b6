"""The options of a fine-tuning: one class that recipes, the command line, Python and checkpoints all read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from compressor.config_fields import config_field
from compressor.formats.errors import UsageError, did_you_mean

__all__ = ["TrainingConfig"]


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """How a model is fine-tuned; names as in timm.

    Each field is, under the same name, a key of a recipe's stage, a keyword argument of ``Compressor.finetune`` and a
    fact that a training must share with the checkpoint it resumes from; and an option of ``compress MODEL``.

    Raises:
        UsageError: a value has another type, or is out of bounds.

    Example:
        >>> TrainingConfig(epochs=2).lr
        0.0003
        >>> TrainingConfig(lr=-1)
        Traceback (most recent call last):
        compressor.formats.errors.UsageError: lr: expected at least 0, got -1
    """

    batch_size: int = config_field(64, "Images of a batch.", ge=2)
    grad_accum: int = config_field(
        1, "Batches of a step, whose gradients are added up.", ge=1, flags=("--grad-accum", "--grad-accum-steps")
    )
    epochs: int = config_field(4, "Epochs of fine-tuning; 0: shared values only.", ge=0, from_scratch=12)
    opt: str = config_field("adamw", "timm's optimiser for fine-tuning.")
    lr: float = config_field(
        3e-4, "Highest learning rate of fine-tuning, of weights and codebooks alike.", ge=0, from_scratch=3e-3
    )
    sched: str = config_field("cosine", "timm's schedule for fine-tuning.")
    weight_decay: float = config_field(0.0, "Weight decay of the weights that are not shared.", ge=0)
    mixup: float = config_field(0.0, "Mix pairs of images, as timm does; 0: do not.", ge=0, metavar="ALPHA")
    cutmix: float = config_field(0.0, "Put a part of one image into another; 0: do not.", ge=0, metavar="ALPHA")
    smoothing: float = config_field(0.0, "Label smoothing: the share of a label spread over all classes.", ge=0, lt=1)
    layer_decay: float = config_field(1.0, "Learning rate of a layer, relative to the next one's.", gt=0, le=1)
    model_ema_decay: float = config_field(
        0.0, "Average the weights over the steps with this decay, and pack the average; 0: do not.", ge=0, lt=1
    )
    distill: float = config_field(
        0.5, "Weight of distillation from the dense model, beside the loss of the labels.", ge=0, le=1
    )
    temperature: float = config_field(2.0, "Temperature of the distillation's softmax.", gt=0, on_command_line=False)

    def __post_init__(self) -> None:
        # pydantic takes longer to import than --help takes in all, so it is imported with the first config.
        from compressor.validation import validate_config

        for name, value in validate_config(type(self), vars(self), UsageError).items():
            object.__setattr__(self, name, value)

    @classmethod
    def names(cls) -> list[str]:
        """Returns the names of all options."""
        return [one.name for one in fields(cls)]

    @classmethod
    def resolve(
        cls,
        config: TrainingConfig | int | None,
        overrides: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        least_epochs: int = 0,
    ) -> TrainingConfig:
        """Returns the config that the arguments of a call ask for.

        Args:
            config: a whole config; a number of epochs; or None.
            overrides: options that win over ``config``.
            defaults: options that hold where ``config`` is no whole config.
            least_epochs: the fewest epochs that make sense to the caller.

        Raises:
            UsageError: an option has a name or a value that cannot be.

        Example:
            >>> TrainingConfig.resolve(2, {"lrr": 0.1})  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            compressor.formats.errors.UsageError: there is no training option 'lrr'. Did you mean 'lr'? ...
        """
        kind = type(config) if isinstance(config, TrainingConfig) else cls
        known = kind.names()
        for name in overrides:
            if name not in known:
                hint = did_you_mean(name, known)
                raise UsageError(f"there is no training option {name!r}.{hint} The options: {', '.join(known)}.")
        values = asdict(config) if isinstance(config, TrainingConfig) else dict(defaults or {})
        if config is not None and not isinstance(config, TrainingConfig):
            values["epochs"] = config
        values |= overrides
        _check_at_least("epochs", values, least_epochs, "; without training go on with finish()")
        _check_at_least("grad_accum", values, 1)
        return kind(**values)

    def to_dict(self) -> dict[str, Any]:
        """Returns all options by name, as TOML- and JSON-ready values.

        They are also the fingerprint of a fine-tuning: what must be the same to resume it from a checkpoint.
        """
        return asdict(self)


def _check_at_least(name: str, values: Mapping[str, Any], least: int, hint: str = "") -> None:
    value = values.get(name, least)
    if isinstance(value, int) and value < least:
        raise UsageError(f"{name} must be at least {least}, got {value}{hint}")
