"""Recipes: one or several stages, each a policy and the training under it; written as TOML."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from compressor.formats.errors import PolicyError, UsageError, did_you_mean
from compressor.policy.policy import Policy, Rule
from compressor.training.config import TrainingConfig

__all__ = ["Recipe", "Stage"]


@dataclass(frozen=True)
class Stage:
    """A policy, and the training under it."""

    policy: Policy
    training: TrainingConfig = field(default_factory=TrainingConfig)


@dataclass(frozen=True)
class Recipe:
    """Stages in order; each starts from the weights that the one before it has trained.

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
        """Reads a recipe.

        Args:
            text: TOML.
            source: names the recipe in errors.

        Raises:
            PolicyError: a key or value cannot be; it names the place, and the nearest known key.
        """
        try:
            return cls.from_dict(tomllib.loads(text), source)
        except tomllib.TOMLDecodeError as error:
            raise PolicyError(f"{source} is not TOML: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "recipe") -> Recipe:
        """Reads a recipe from its dictionary form; raises PolicyError as ``from_toml`` does."""
        _only_known(data, ["stage"], source)
        stages = _tables(data.get("stage"), f"{source}: [[stage]]")
        return cls(tuple(_stage(stage, f"{source}, stage {n}") for n, stage in enumerate(stages, 1)))

    def to_dict(self) -> dict[str, Any]:
        """Returns the recipe as TOML- and JSON-ready values, with all settings spelt out."""
        return {
            "stage": [
                {**stage.training.to_dict(), "rule": [rule.to_dict() for rule in stage.policy.rules]}
                for stage in self.stages
            ]
        }

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(str(self.to_dict()))


def _stage(data: Mapping[str, Any], where: str) -> Stage:
    _only_known(data, [*TrainingConfig.names(), "rule"], where)
    rules = [_rule(rule, f"{where}, rule {n}") for n, rule in enumerate(_tables(data.get("rule"), f"{where}: rule"), 1)]
    try:
        training = TrainingConfig(**{key: value for key, value in data.items() if key != "rule"})
    except UsageError as error:
        raise PolicyError(f"{where}, {error}") from None
    return Stage(_located(where, Policy, rules), training)


def _rule(data: Mapping[str, Any], where: str) -> Rule:
    settings = dict(data)
    match, scheme = settings.pop("match", "*"), settings.pop("scheme", None)
    ignore, types = settings.pop("ignore", False), settings.pop("types", [])
    _check_type(match, str, f"{where}, match")
    _check_type(ignore, bool, f"{where}, ignore")
    _check_type(types, list, f"{where}, types")
    if scheme is not None:
        _check_type(scheme, str, f"{where}, scheme")
    if ignore and (settings or scheme):
        raise PolicyError(f"{where}: ignore = true leaves no room for {', '.join(settings) or 'scheme'}")
    return Rule.ignore(match, types) if ignore else _located(where, Rule, match, scheme, types=types, **settings)


def _located(where: str, make: Any, *arguments: Any, **named: Any) -> Any:
    """Calls ``make``, and puts the place in front of its PolicyError."""
    try:
        return make(*arguments, **named)
    except PolicyError as error:
        raise PolicyError(f"{where}: {error}") from None


def _check_type(value: Any, kind: type, where: str) -> None:
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
