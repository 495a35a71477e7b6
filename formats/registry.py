"""Registries of plug-ins: the modules of a package, and what other installed packages offer as entry points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules
from typing import Generic, TypeVar

from compressor.formats.errors import CompressorError, UsageError, did_you_mean

__all__ = ["Registry"]

P = TypeVar("P")


class Registry(Mapping[str, type[P]], Generic[P]):
    """Plug-in classes by id, imported when they are first asked for.

    The plug-ins of the package are the modules of one folder. Those of other packages are looked for only when all
    are listed, or an id is asked for that the package does not have: to look through all that is installed takes time.

    Args:
        kind: what messages call a plug-in, such as "codec".
        package: the package whose modules register the plug-ins that come with it.
        group: the entry-point group in which other packages name the modules of theirs.
        missing: the error that is raised for an id that nothing has.
    """

    def __init__(self, kind: str, package: str, group: str, missing: type[CompressorError]) -> None:
        self._kind, self._package, self._group, self._missing = kind, package, group, missing
        self._classes: dict[str, type[P]] = {}
        self._own: frozenset[str] | None = None
        self._others_loaded = False

    def register(self, name: str, cls: type[P]) -> None:
        """Adds a class under its id; raises UsageError where another class has it."""
        if name in self._classes:
            raise UsageError(f"{self._kind} id {name!r} is taken by {self._classes[name].__module__}")
        self._classes[name] = cls

    def built_in(self) -> frozenset[str]:
        """Returns the ids of the plug-ins that come with the package, whatever else is installed."""
        if self._own is None:
            package = import_module(self._package)
            for module in sorted(found.name for found in iter_modules(package.__path__)):
                import_module(f"{self._package}.{module}")
            self._own = frozenset(name for name in self._classes if self._comes_with_package(name))
        return self._own

    def find(self, name: str) -> type[P]:
        """Returns the class of an id; raises the registry's error, with the nearest known id, where nothing has it."""
        if name not in self:
            known = ", ".join(sorted(self))
            hint = did_you_mean(name, list(self))
            raise self._missing(f"no {self._kind} {name!r}.{hint} Known {self._kind}s: {known}.")
        return self._classes[name]

    def __getitem__(self, name: str) -> type[P]:
        self.built_in()
        if name not in self._classes:
            self._load_others()
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        self.built_in()
        self._load_others()
        return iter(dict(self._classes))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _comes_with_package(self, name: str) -> bool:
        return self._classes[name].__module__.startswith(f"{self._package}.")

    def _load_others(self) -> None:
        if self._others_loaded:
            return
        self._others_loaded = True
        for entry in sorted(entry_points(group=self._group), key=lambda entry: entry.name):
            try:
                entry.load()
            except Exception as exc:  # whatever the other package does when it is imported
                self._others_loaded = False
                owner = "" if entry.dist is None else f" of {entry.dist.name}"
                said = " ".join(f"{type(exc).__name__}: {exc}".split())[:200]
                what = f"the {self._kind} {entry.name!r}{owner} cannot be imported ({said})"
                raise UsageError(f"{what}; mend or uninstall that package") from exc
