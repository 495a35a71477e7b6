"""The error tree as its module draws it, against the classes."""

from __future__ import annotations

import re

from compressor.formats import errors
from compressor.formats.errors import CompressorError


def drawn() -> dict[str, tuple[str, int]]:
    """Read parent and exit code of every error off the drawing; a code that is not drawn is the parent's."""
    tree: dict[str, tuple[str, int]] = {}
    above: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"( *)[*-] (\w+)(?: \((\d))?", line):
            indent, name, code = len(found[1]), found[2], found[3]
            above = [(column, other) for column, other in above if column < indent]
            parent = above[-1][1] if above else "Exception"
            tree[name] = parent, int(code) if code else tree[parent][1]
            above.append((indent, name))
    return tree


def classes(base: type[CompressorError]) -> dict[str, tuple[str, int]]:
    """Walk the subclasses of the package."""
    tree = {base.__name__: (base.__bases__[0].__name__, base.exit_code)}
    for child in base.__subclasses__():
        if child.__module__.startswith("compressor."):
            tree |= classes(child)
    return tree


def test_the_drawing_is_the_tree() -> None:
    assert drawn() == classes(CompressorError)


def test_all_of_it_is_public() -> None:
    assert set(drawn()) < set(errors.__all__)
