"""Imports point one way, cli -> model_zoo -> compressor -> formats; plug-ins are named by nobody; files stay small."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["formats", "compressor", "model_zoo", "cli"]  # a layer imports itself and those before it
LINES = 400


def is_own(path: Path) -> bool:
    """Tell a real file of its folder from one seen through a link."""
    return path.resolve() == path


FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py")) if is_own(path)]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def module_name(path: Path) -> str:
    """Give the name a file is imported by, ``compressor.formats.content`` for ``formats/record.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "compressor" else ("compressor", *parts)
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Give line and absolute name of all imports of a file, those inside functions included."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def layer(name: str) -> int | None:
    """Give the layer of a module, None for one that is not ours; bare ``formats.x`` counts as ours."""
    parts = name.split(".")
    if parts[0] in LAYERS and parts[0] != "compressor":
        return len(LAYERS)
    if parts[0] != "compressor":
        return None
    second = parts[1] if len(parts) > 1 else ""
    return LAYERS.index(second) if second in LAYERS else LAYERS.index("compressor")


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_one_way(path: Path) -> None:
    own = layer(module_name(path))
    assert own is not None
    lazy_root = path == ROOT / "compressor" / "__init__.py"
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if (other := layer(name)) is not None and other > own and not lazy_root
    ]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_plug_ins_are_named_by_nobody(path: Path) -> None:
    for folder in ("compressor.schemes.", "compressor.formats.codecs."):
        assert not [(line, name) for line, name in imports(path) if name.startswith(folder)]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES


def test_no_two_files_import_each_other() -> None:
    """Neither directly nor through others, in functions or for annotations alone."""
    modules = {module_name(path): path for path in FILES}
    needed: dict[str, set[str]] = {}
    for name, path in modules.items():
        found = {other if other in modules else other.rpartition(".")[0] for _, other in imports(path)}
        faces = {other for other in found if other in modules and modules[other].name == "__init__.py"}
        needed[name] = (found & modules.keys()) - faces - {name}  # a face imports its members lazily, or not at all
    while free := [name for name, others in needed.items() if not others & needed.keys()]:
        for name in free:
            del needed[name]
    assert not {name: sorted(others & needed.keys()) for name, others in needed.items()}


def test_relative_and_nested_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "formats" / "codecs").mkdir(parents=True)
    file = tmp_path / "formats" / "codecs" / "bits.py"
    file.write_text("def f():\n    from ..record import decode\n    from ...cli import main\nimport formats.codec\n")
    found = {name: layer(name) for _, name in imports(file)}
    assert found == {"compressor.formats.content.decode": 0, "compressor.cli.main": 3, "formats.codec": 4}
