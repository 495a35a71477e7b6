"""The package as a whole: one copy of it, its public names, its examples, and what importing it costs."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import compressor

MODULES = [module.name for module in pkgutil.walk_packages(compressor.__path__, "compressor.")]
NEEDED = {"compressor.publishing.push": "matplotlib"}  # by the examples of a module
HEAVY = {"torch", "timm", "torchvision", "sklearn", "accelerate"}


def modules_after(statement: str) -> set[str]:
    """Run a statement in a new process and give the top-level modules it leaves loaded."""
    code = f"{statement}\nimport sys\nprint(*{{m.split('.')[0] for m in sys.modules}}, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    if name in NEEDED:
        pytest.importorskip(NEEDED[name], reason="needs an extra")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_folder_is_walked() -> None:
    assert {"compressor.cli.main", "compressor.formats.errors", "compressor.model_zoo"} <= set(MODULES)


def test_nothing_is_imported_twice() -> None:
    for name in MODULES:
        importlib.import_module(name)
    assert not {"formats", "cli", "model_zoo"} & set(sys.modules)


def test_public_names() -> None:
    assert compressor.__all__ == [
        "SCHEMES",
        "Compressor",
        "Policy",
        "Recipe",
        "Rule",
        "Stage",
        "__version__",
        "export",
        "load",
        "load_state_dict",
        "push_to_hub",
    ]
    assert dir(compressor) == sorted(compressor.__all__)
    for name in compressor.__all__:
        assert getattr(compressor, name) is not None


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compressor.nothing  # noqa: B018


def test_links_are_links() -> None:
    package = Path(compressor.__file__).parent
    if "site-packages" in package.parts:
        pytest.skip("an installed package holds real files")
    for name in ("formats", "cli", "model_zoo"):
        assert (package / name).is_symlink()
        assert (package / name).resolve() == package.parent / name


@pytest.mark.parametrize(
    "statement", ["import compressor", "import compressor.cli.main", "import compressor.model_zoo"]
)
def test_import_is_light(statement: str) -> None:
    assert not HEAVY & modules_after(statement)


def test_help_imports_neither_torch_nor_timm_nor_numpy_nor_pydantic() -> None:
    run = "from compressor.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    assert not (HEAVY | {"numpy", "pydantic"}) & modules_after(run)
