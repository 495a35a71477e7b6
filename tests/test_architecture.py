"""Imports point one way, from room to room as docs/architecture.md lists them; plug-ins are named by nobody.

Files stay small, and the page names only what exists.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["formats", "compressor", "model_zoo", "cli"]  # a layer imports itself and those before it
LINES = 400
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## The rooms")[2].partition("## The way of a weight")[0]
ROOMS = dict(re.findall(r"^\| `([\w/.]+)` \| (.+) \|$", TABLE, re.MULTILINE))
"""Sentence by folder or file, each of which imports only those after it."""
WITH_NAMES = {"compressor", "compressor/api", "model_zoo"}
"""Folders whose ``__init__.py`` offers public names."""
LEAST_FILES = 3


def is_own(path: Path) -> bool:
    """Whether a path is a real file of its folder, and not seen through a link."""
    return path.resolve() == path


FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py")) if is_own(path)]
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def module_name(path: Path) -> str:
    """Returns the name a file is imported by, ``compressor.formats.content`` for ``formats/content.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "compressor" else ("compressor", *parts)
    return ".".join(part for part in parts if part != "__init__")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yields line and absolute name of all imports of a file, those inside functions included."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def layer(name: str) -> int | None:
    """Returns the layer of a module, None for a foreign one; bare ``formats.x`` is beyond all layers."""
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
    doors = {ROOT / "compressor" / "__init__.py", ROOT / "compressor" / "__main__.py"}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if (target := layer(name)) is not None and target > own and path not in doors
    ]
    assert not wrong


def room(name: str) -> int | None:
    """Returns the position of a module's room in the page's table, None where it is in none, as the root is."""
    parts = name.split(".")
    places = parts[1:] if len(parts) > 1 and parts[1] in LAYERS[:1] + LAYERS[2:] else parts
    paths = ["/".join(places[:end]) for end in range(len(places), 0, -1)]
    known = [place for path in paths for place in (f"{path}/", f"{path}.py") if place in ROOMS]
    return list(ROOMS).index(known[0]) if known else None


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_down_the_table_of_rooms(path: Path) -> None:
    own = room(module_name(path))
    formats = list(ROOMS).index("formats/")  # its single files are above and below its folders
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if own is not None and (target := room(name)) is not None and target < own and target != formats
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("compressor.compressor.Compressor", "compressor/compressor.py"),
        ("compressor.sharing.group.Group", "compressor/sharing/"),
        ("compressor.formats.codecs.bits", "formats/codecs/"),
        ("compressor.formats.loader.load", "formats/"),
        ("compressor.cli.main", "cli/"),
    ],
)
def test_a_module_is_in_its_room(name: str, place: str) -> None:
    assert room(name) == list(ROOMS).index(place)


def folders() -> list[Path]:
    """Returns all packages of the four layers."""
    return [path.parent for path in FILES if path.name == "__init__.py"]


def test_the_page_lists_every_room_with_its_own_sentence() -> None:
    existing = {f"{folder.relative_to(ROOT)}/" for folder in folders()} - {"compressor/"}
    alone = {str(path.relative_to(ROOT)) for path in (ROOT / "compressor").glob("*.py")} - {"compressor/__init__.py"}
    assert {*ROOMS} == existing | alone
    assert {place: summary(ROOT / place) for place in ROOMS} == ROOMS


def summary(path: Path) -> str:
    """Returns the first paragraph of a module's or folder's docstring in one line, as Markdown."""
    text = (path / "__init__.py" if path.is_dir() else path).read_text(encoding="utf-8")
    paragraph = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    return " ".join(paragraph.split()).replace("``", "`")


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_is_worth_one_and_its_face_is_a_docstring(folder: Path) -> None:
    assert sum(path.is_file() for path in folder.iterdir()) >= LEAST_FILES
    if str(folder.relative_to(ROOT)) not in WITH_NAMES:
        (docstring,) = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr)


def test_the_page_names_what_exists() -> None:
    names = {name for path in FILES for name in defined(ast.parse(path.read_text(encoding="utf-8")))}
    modules = {module_name(path) for path in FILES}
    text = re.sub(r"^```.*?^```", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    unknown = []
    for word in dict.fromkeys(re.findall(r"`([^`\n]+)`", text)):
        if "/" in word or word.endswith((".py", ".md")):
            exists = (ROOT / word).exists() or word == "__init__.py"
        elif word.endswith("()") or re.fullmatch(r"[A-Z]\w+(\.\w+)*", word):
            exists = word.removesuffix("()") in names
        else:
            exists = not word.startswith("compressor.") or word in modules
        unknown += [] if exists else [word]
    assert not unknown
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists()


def defined(tree: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Yields the names of the functions and classes of a module, methods as ``Class.method``."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        if isinstance(node, ast.ClassDef):
            yield from (f"{node.name}.{name}" for name in defined(node))


def is_plug_in(path: Path) -> bool:
    """Whether a module registers a class, rather than serving those that do, as ``codecs/base.py`` does."""
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    return any(isinstance(mark, ast.Name) and mark.id == "register" for node in classes for mark in node.decorator_list)


PLUG_INS = tuple(module_name(path) for path in FILES if is_plug_in(path))


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_plug_ins_are_named_by_nobody(path: Path) -> None:
    wrong = [f"{path.relative_to(ROOT)}:{line} imports {name}" for line, name in imports(path) if is_one(name)]
    assert len(PLUG_INS) > 10
    assert not wrong


def is_one(name: str) -> bool:
    return any(name == plug_in or name.startswith(f"{plug_in}.") for plug_in in PLUG_INS)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= LINES


def test_no_two_files_import_each_other() -> None:
    """Neither directly nor through others, in functions or for annotations alone."""
    modules = {module_name(path): path for path in FILES}
    needed: dict[str, set[str]] = {}
    for name, path in modules.items():
        imported = {target if target in modules else target.rpartition(".")[0] for _, target in imports(path)}
        faces = {target for target in imported if target in modules and modules[target].name == "__init__.py"}
        needed[name] = (imported & modules.keys()) - faces - {name}  # a face imports its members lazily, or not at all
    while free := [name for name, targets in needed.items() if not targets & needed.keys()]:
        for name in free:
            del needed[name]
    assert not {name: sorted(targets & needed.keys()) for name, targets in needed.items()}


def test_relative_and_nested_imports_are_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "formats" / "codecs").mkdir(parents=True)
    file = tmp_path / "formats" / "codecs" / "bits.py"
    file.write_text("def f():\n    from ..content import decode\n    from ...cli import main\nimport formats.codec\n")
    found = {name: layer(name) for _, name in imports(file)}
    assert found == {"compressor.formats.content.decode": 0, "compressor.cli.main": 3, "formats.codec": 4}
