"""The fingerprint of a training run: the settings and versions its result depends on, as JSON values."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import timm
import torch

__all__ = ["as_json", "differences", "machine", "with_more_epochs"]


def differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    """Yields a sentence for each place where two nestings of JSON values differ.

    Args:
        then: the earlier values.
        now: the values of today.
        where: the path of the two values in the outermost nesting.

    Example:
        >>> list(differences({"seed": 0, "data": {"name": "digits"}}, {"seed": 1, "data": {"name": "digits"}}))
        ['seed was 0, is 1']
    """
    if isinstance(then, dict) and isinstance(now, dict):
        for key in [*then, *(key for key in now if key not in then)]:
            yield from differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for number, (old, new) in enumerate(zip(then, now, strict=True), 1):
            yield from differences(old, new, f"{where} {number}")
    elif then != now:
        yield f"{where} was {json.dumps(then)}, is {json.dumps(now)}"


def with_more_epochs(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the earlier settings of a training with the epochs of today, where these are more.

    Example:
        >>> with_more_epochs({"epochs": 2, "lr": 0.1}, {"epochs": 4, "lr": 0.2})
        {'epochs': 4, 'lr': 0.1}
    """
    grown = then.get("epochs", 0) < now.get("epochs", 0)
    return {**then, "epochs": now["epochs"]} if grown else dict(then)


def machine() -> dict[str, Any]:
    """Returns the versions, the thread count and the device, on which the last bits of sums depend."""
    gpu = torch.accelerator.current_accelerator()
    versions = {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__}
    return {**versions, "threads": torch.get_num_threads(), "device": str(gpu or platform.machine())}


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values as they read back from JSON: lists in place of tuples."""
    values: dict[str, Any] = json.loads(json.dumps(facts))
    return values
