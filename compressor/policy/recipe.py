"""Recipes: one or several stages, each a policy and how long to train under it; written as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from compressor.formats.errors import PolicyError, did_you_mean
from compressor.policy.policy import Policy, Rule

__all__ = ["Recipe", "Stage", "Training"]


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Training:
    """How a stage is fine-tuned; names as in timm.

    Args:
        epochs: passes over the training data; 0: codebooks only.
        lr: highest learning rate, of weights and codebooks alike.
        opt, sched, weight_decay, batch_size: timm's.
        grad_accum: batches of a step, whose gradients are added up; timm's --grad-accum-steps.
        mixup, cutmix, smoothing, layer_decay: timm's; 0, or a layer_decay of 1, for none.
        model_ema_decay: of the average of the weights over the steps, timm's --model-ema with its warm-up; 0: none.
        distill: weight of the distillation loss beside the task's, 0 to 1.
        temperature: of the distillation's softmax.
    """

    epochs: Annotated[int, Field(ge=0, strict=True)] = 4
    lr: Annotated[float, Field(gt=0)] = 3e-4
    opt: str = "adamw"
    sched: str = "cosine"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Annotated[int, Field(ge=2, strict=True)] = 64
    grad_accum: Annotated[int, Field(ge=1, strict=True)] = 1
    mixup: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    cutmix: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    model_ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    distill: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Field(gt=0)] = 2.0


@dataclass(frozen=True)
class Stage:
    """A policy and the training under it."""

    policy: Policy
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class Recipe:
    """Stages in order; each starts from the weights the one before it left.

    Example:
        >>> recipe = Recipe.from_toml('''
        ... [[stage]]
        ... epochs = 2
        ... [[stage.rule]]
        ... match = "*"
        ... scheme = "kmeans"
        ... bits = 4
        ... ''')
        >>> Recipe.from_dict(recipe.to_dict()) == recipe
        True
    """

    stages: tuple[Stage, ...]

    @classmethod
    def from_toml(cls, text: str, source: str = "recipe") -> Recipe:
        """Read a recipe; raises PolicyError naming ``source``, the place and the nearest known key."""
        try:
            return cls.from_dict(tomllib.loads(text), source)
        except tomllib.TOMLDecodeError as error:
            raise PolicyError(f"{source} is not TOML: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Read a recipe from its dictionary form."""
        _only_known(data, ["stage"], source)
        stages = _tables(data.get("stage"), f"{source}: [[stage]]")
        return cls(tuple(_stage(stage, f"{source}, stage {n}") for n, stage in enumerate(stages, 1)))

    def to_dict(self) -> dict[str, Any]:
        """Give the recipe as TOML- and JSON-ready values, all settings spelt out."""
        return {
            "stage": [
                {**asdict(stage.training), "rule": [rule.to_dict() for rule in stage.policy.rules]}
                for stage in self.stages
            ]
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))


TRAINING_KEYS = [setting.name for setting in fields(Training)]


def _stage(data: Mapping[str, Any], where: str) -> Stage:
    _only_known(data, [*TRAINING_KEYS, "rule"], where)
    rules = [_rule(rule, f"{where}, rule {n}") for n, rule in enumerate(_tables(data.get("rule"), f"{where}: rule"), 1)]
    try:
        training = TypeAdapter(Training).validate_python({k: v for k, v in data.items() if k != "rule"})
    except ValidationError as error:
        first = error.errors()[0]
        raise PolicyError(f"{where}, {first['loc'][0]}: {first['msg']}, got {first['input']!r}") from None
    return Stage(_located(where, Policy, rules), training)


def _rule(data: Mapping[str, Any], where: str) -> Rule:
    settings = dict(data)
    match, scheme = settings.pop("match", "*"), settings.pop("scheme", None)
    ignore, types = settings.pop("ignore", False), settings.pop("types", [])
    _is(match, str, f"{where}, match")
    _is(ignore, bool, f"{where}, ignore")
    _is(types, list, f"{where}, types")
    if scheme is not None:
        _is(scheme, str, f"{where}, scheme")
    if ignore and (settings or scheme):
        raise PolicyError(f"{where}: ignore = true leaves no room for {', '.join(settings) or 'scheme'}")
    return Rule.ignore(match, types) if ignore else _located(where, Rule, match, scheme, types=types, **settings)


def _located(where: str, make: Any, *arguments: Any, **named: Any) -> Any:
    try:
        return make(*arguments, **named)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def _is(value: Any, kind: type, where: str) -> None:
    if not isinstance(value, kind):
        raise PolicyError(f"{where}: expected {kind.__name__}, got {value!r}")


def _tables(value: Any, where: str) -> Sequence[Mapping[str, Any]]:
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise PolicyError(f"{where}: expected at least one [[...]] table, got {value!r}")
    return value


def _only_known(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in data:
        if key not in known:
            near = did_you_mean(key, known)
            raise PolicyError(f"{where}: unknown key {key!r}.{near} Known keys: {', '.join(known)}.")
