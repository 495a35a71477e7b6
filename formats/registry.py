"""Registries of plug-ins: the modules of one folder, and what other installed packages offer by entry points."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Generic, TypeVar

from compressor.formats.errors import CompressorError, UsageError, did_you_mean

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["Registry"]

P = TypeVar("P")
ID = re.compile(r"[a-z0-9][a-z0-9_-]*")


class Registry(Mapping[str, type[P]], Generic[P]):
    """The plug-in classes of one kind by id; each is imported when it is first asked for.

    A plug-in is built in, which means that a module of the registry's folder registers it, or it comes from another
    package, which names it in an entry point: the entry's name is the plug-in's id, and importing the entry's object
    registers the class. The installed packages are searched, once, only when all ids are listed or when an id is asked
    for that is not built in; the others are not imported until one of them is asked for itself.

    Args:
        kind: what messages call a plug-in, such as "codec".
        package: import name of the folder whose modules register the built-in plug-ins.
        group: the entry-point group in which other packages name theirs.
        missing: the error that ``find`` raises for an unknown id.
        reserved: ids that no plug-in may have.
    """

    def __init__(
        self, kind: str, package: str, group: str, missing: type[CompressorError], reserved: tuple[str, ...] = ()
    ) -> None:
        self._kind, self._package, self._group, self._missing = kind, package, group, missing
        self._reserved = reserved
        self._classes: dict[str, type[P]] = {}
        self._built_in: frozenset[str] | None = None
        self._entries: dict[str, EntryPoint] | None = None

    def register(self, name: str, cls: type[P]) -> None:
        """Adds a class under its id.

        Raises:
            UsageError: the id is taken or no word of lower-case letters, digits, ``-`` and ``_``, or the class leaves
                out a function of the contract.
        """
        if not self._is_built_in(cls):
            self.built_in()  # a class that is registered first must not take an id from the package
        if not ID.fullmatch(name) or name in self._reserved:
            raise UsageError(f"{self._kind} id {name!r} of {cls.__module__} cannot be used: take another word")
        if name in self._classes:
            raise UsageError(f"{self._kind} id {name!r} is taken by {self._classes[name].__module__}")
        if lacking := sorted(getattr(cls, "__abstractmethods__", ())):
            raise UsageError(f"{self._kind} {name!r} of {cls.__module__} does not define {', '.join(lacking)}")
        self._classes[name] = cls

    def built_in(self) -> frozenset[str]:
        """Returns the ids of the built-in plug-ins: the same on every machine, whatever else is installed."""
        if self._built_in is None:
            package = import_module(self._package)
            for module in sorted(module.name for module in iter_modules(package.__path__)):
                import_module(f"{self._package}.{module}")
            self._built_in = frozenset(name for name, cls in self._classes.items() if self._is_built_in(cls))
        return self._built_in

    def find(self, name: str) -> type[P]:
        """Returns the class of an id.

        Raises:
            CompressorError: nothing has this id; the registry's own kind of error, naming the nearest known id.
            UsageError: another package offers it and cannot be imported, or offers an id that is taken.
        """
        if name not in self:
            known = ", ".join(sorted(self))
            hint = did_you_mean(name, list(self))
            raise self._missing(f"no {self._kind} {name!r}.{hint} Known {self._kind}s: {known}.")
        return self[name]

    def __getitem__(self, name: str) -> type[P]:
        if name not in self.built_in() and name not in self._classes:
            self._import(self._offered()[name])
        return self._classes[name]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in() or name in self._classes or name in self._offered()

    def __iter__(self) -> Iterator[str]:
        self.built_in()
        return iter({**self._classes, **self._offered()})

    def __len__(self) -> int:
        return len(list(iter(self)))

    def _is_built_in(self, cls: type[P]) -> bool:
        return cls.__module__.startswith(f"{self._package}.")

    def _offered(self) -> dict[str, EntryPoint]:
        """Returns the entry points of other packages by the id they name; raises UsageError where one is taken."""
        if self._entries is None:
            from importlib.metadata import entry_points  # takes as long to import as all other modules of formats/

            entries: dict[str, EntryPoint] = {}
            for entry in entry_points(group=self._group):
                before = entries.setdefault(entry.name, entry)
                if entry.name in self.built_in() or before is not entry:
                    holder = "built in" if entry.name in self.built_in() else f"offered by {_source(before)}, too"
                    what = f"{self._kind} id {entry.name!r}, offered by {_source(entry)}, is {holder}"
                    raise UsageError(f"{what}: uninstall one of them")
            self._entries = entries
        return self._entries

    def _import(self, entry: EntryPoint) -> None:
        """Imports what an entry point names, which registers its class; a failure leaves the registry as before."""
        before = dict(self._classes)
        try:
            entry.load()
        except Exception as exc:  # whatever another package raises while it is imported
            reason = " ".join(f"{type(exc).__name__}: {exc}".split())[:200]
        else:
            if entry.name in self._classes:
                return
            reason = f"{entry.value} registers no class of this id"
        self._classes = before
        what = f"{self._kind} {entry.name!r} of {_source(entry)} cannot be used ({reason})"
        raise UsageError(f"{what}: repair or uninstall that package")


def _source(entry: EntryPoint) -> str:
    return entry.value if entry.dist is None else f"package {entry.dist.name!r}"
