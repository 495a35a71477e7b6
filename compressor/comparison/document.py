"""A comparison as JSON-ready values (docs/json.md)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.comparison.front import choices, front
from compressor.comparison.page import Comparison
from compressor.comparison.points import Configuration

__all__ = ["document"]


def document(comparison: Comparison) -> dict[str, Any]:
    """Returns the configurations by ascending size, those on the front marked, and the choices of each data set."""
    groups = comparison.groups
    on_front = {id(one) for group in groups.values() for one in front(group)}
    ordered = sorted(comparison.configurations, key=lambda one: one.bytes)
    chosen = [(data, choice) for data, group in groups.items() for choice in choices(group, comparison.bounds)]
    return {
        "configurations": [_facts(one, id(one) in on_front) for one in ordered],
        "choices": [
            {"title": one.title, "reason": one.reason, "data": data, "configuration": one.configuration.name}
            for data, one in chosen
        ],
        "bounds": {"bytes": comparison.bounds.size, "top1": comparison.bounds.top1},
    }


def _facts(one: Configuration, on_front: bool) -> Mapping[str, Any]:
    point = one.best
    return {
        "configuration": one.name,
        "architecture": point.model,
        "files": [None if each.path is None else str(each.path) for each in one.points],
        "bytes": one.bytes,
        "dense_bytes": point.dense_bytes,
        "ratio": point.dense_bytes / one.bytes,
        "top1": _top1(one),
        "deviation": one.deviation,
        "data": point.data or None,
        "on_front": on_front,
        "options": dict(point.options),
        "command": point.command or None,
    }


def _top1(one: Configuration) -> Mapping[str, Any] | None:
    """Returns the accuracy in the form that all documents have; None where it was not measured."""
    if one.interval is None:
        return None
    point, (low, high) = one.best, one.interval
    facts = {"packed": one.top1, "n": point.n, "low": low, "high": high, "dense": point.dense_top1}
    return {**facts, "lost": point.lost, "gained": point.gained}
