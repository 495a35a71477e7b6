"""The global random generators that training draws from: saving, restoring and seeding their state."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["random_state", "seed_all", "seeded", "set_random_state"]


def random_state() -> dict[str, Any]:
    """Returns the state of the global generators of Python, NumPy and torch, those of the GPUs included.

    Example:
        >>> state = random_state()
        >>> drawn = torch.rand(2), np.random.rand(), random.random()
        >>> set_random_state(state)
        >>> bool((torch.rand(2) == drawn[0]).all()), np.random.rand() == drawn[1], random.random() == drawn[2]
        (True, True, True)
    """
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    mps = [torch.mps.get_rng_state()] if torch.backends.mps.is_available() else []
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 (timm's augmentation draws from it)
        "torch": torch.get_rng_state(),
        "cuda": gpus,
        "mps": mps,
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restores the state that ``random_state`` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for mps in state["mps"]:
        torch.mps.set_rng_state(mps)


def seed_all(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch, those of the GPUs included.

    Args:
        seed: 0 to 2^32 - 1.
    """
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU generators of Python, NumPy and torch inside a ``with`` block and restores their state afterwards.

    Args:
        seed: 0 to 2^32 - 1.

    Example:
        >>> with seeded(5):
        ...     first = torch.rand(1)
        >>> with seeded(5):
        ...     print(bool(torch.rand(1) == first))
        True
    """
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs too
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
