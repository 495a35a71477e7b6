"""A check that the installed packages are those that this one needs."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from compressor.formats.errors import MissingError

__all__ = ["check_requirements"]


def check_requirements(distribution: str = "timm-compressor") -> None:
    """Checks that each required package is installed, in a version within its range.

    An installer makes sure of it once; a later installation of another package may undo it, and the error then shows
    far from its cause.

    Raises:
        MissingError: with one line for all packages that do not fit.
    """
    problems = []
    for text in _required(distribution):
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            problems.append(f"{needed} is not installed")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            problems.append(f"{needed} is needed, {found} is installed")
    if problems:
        raise MissingError(f"{'; '.join(problems)}: python -m pip install '{distribution}' puts that right")


def _required(distribution: str) -> list[str]:
    try:
        return requires(distribution) or []
    except PackageNotFoundError:  # run from a source tree that was never installed
        return []
