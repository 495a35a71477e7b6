"""Are the installed packages those that this one was made for?"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from compressor.formats.errors import MissingError

__all__ = ["check_requirements"]


def check_requirements(distribution: str = "timm-compressor") -> None:
    """Raise MissingError for each required package that is absent or outside its range, in one line.

    An installer sees to it once; a later install of something else may undo it, and the fault then shows far away.
    """
    faults = []
    for text in _required(distribution):
        needed = Requirement(text)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(needed.name)
        except PackageNotFoundError:
            faults.append(f"{needed} is not installed")
            continue
        if not needed.specifier.contains(found, prereleases=True):
            faults.append(f"{needed} is needed, {found} is installed")
    if faults:
        raise MissingError(f"{'; '.join(faults)}: python -m pip install '{distribution}' puts that right")


def _required(distribution: str) -> list[str]:
    try:
        return requires(distribution) or []
    except PackageNotFoundError:  # run from a source tree that was never installed
        return []
