"""Which worker runs which row, where one worker has the sweep for itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["Leases", "SoleLeases"]


class Leases(Protocol):
    """Rows that this worker may run, each of which no other one runs at the same time."""

    def claim(self, names: Sequence[str]) -> str | None:
        """Takes one of some rows that nobody has; None where there is none now."""

    def beat(self) -> set[str]:
        """Says that this worker lives, and returns the rows that it has lost to others because it was silent."""

    def release(self, name: str, error: str | None = None) -> None:
        """Gives a row back.

        Args:
            name: of the row.
            error: why it failed; None where it has ended, or was stopped.
        """

    def failed(self) -> dict[str, str]:
        """Returns why rows failed since this worker began, whoever ran them, by their names."""


class SoleLeases:
    """Leases of a worker beside whom there is no other."""

    def __init__(self) -> None:
        self._held: set[str] = set()
        self._failed: dict[str, str] = {}

    def claim(self, names: Sequence[str]) -> str | None:
        """Takes the first of some rows that is not running."""
        free = next((name for name in names if name not in self._held), None)
        if free is not None:
            self._held.add(free)
        return free

    def beat(self) -> set[str]:
        """Returns nothing: no row is lost."""
        return set()

    def release(self, name: str, error: str | None = None) -> None:
        """Gives a row back."""
        self._held.discard(name)
        if error is not None:
            self._failed[name] = error

    def failed(self) -> dict[str, str]:
        """Returns why rows failed."""
        return dict(self._failed)
