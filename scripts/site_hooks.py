"""Hooks of mkdocs: pages keep their places in the repository, and the tutorial is run where the site is built."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import ExecutePreprocessor

from compressor import SCHEMES

ROOT = Path(__file__).resolve().parents[1]
BESIDE = {"README.md": "index.html"}
"""Place in the site by path, of pages that are not in ``docs/`` and do not keep their path."""
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "formats/SPEC.md", "benchmarks/README.md"]
FILES = ["model_zoo/index.toml", *(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/results/*"))]
"""What pages link to."""
SECONDS = 600  # that a cell of the tutorial may take
os.environ.setdefault("PYTHONWARNINGS", "ignore:IProgress not found")  # tqdm's, of a widget that a page cannot have


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Names every page by its path in the repository, so that the links between them hold as they are."""
    found = [_moved(file, config) for file in files if not file.src_uri.endswith((".py", ".ipynb"))]
    found += [_file(path, config, BESIDE.get(path)) for path in PAGES + FILES]
    for notebook in sorted((ROOT / "docs").glob("*.ipynb")):
        found += _executed(notebook, config)
    config.nav = _listed(config.nav, [file.src_uri for file in found])
    return Files(found)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts every scheme that comes with the package where a page asks for them."""
    return markdown.replace("<!-- schemes -->", "".join(map(_scheme, sorted(SCHEMES.built_in()))))


def _scheme(name: str) -> str:
    cls = SCHEMES.find(name)
    options = f"{{ heading: {name}, toc_label: {name}, members: false }}"
    return f"::: {cls.__module__}.{cls.__qualname__}\n    options: {options}\n\n"


def _moved(file: File, config: MkDocsConfig) -> File:
    """Returns a page of ``docs/`` under its path in the repository, at the address that it has without."""
    if file.abs_src_path is None or ROOT not in Path(file.abs_src_path).parents:
        return file
    return _file(f"docs/{file.src_uri}", config, file.dest_uri)


def _file(path: str, config: MkDocsConfig, address: str | None = None) -> File:
    return File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=address)


def _executed(notebook: Path, config: MkDocsConfig) -> list[File]:
    """Runs a notebook, and returns a page of its text, code and outputs, and its pictures.

    A cell that fails ends the build, as does one that writes to stderr: warnings are no part of a page.
    """
    content = nbformat.read(notebook, as_version=4)
    with TemporaryDirectory() as folder:
        ExecutePreprocessor(timeout=SECONDS).preprocess(content, {"metadata": {"path": folder}})
    outputs = [output for cell in content.cells for output in cell.get("outputs", [])]
    if complaints := [output.text for output in outputs if output.get("name") == "stderr"]:
        raise PluginError(f"{notebook.name} wrote to stderr: {complaints[0]}")
    text, resources = MarkdownExporter().from_notebook_node(content)
    name = notebook.stem
    made = {f"docs/{name}.md": (text, f"{name}/index.html")}
    made |= {f"docs/{picture}": (data, picture) for picture, data in resources["outputs"].items()}
    return [_generated(path, data, address, config) for path, (data, address) in made.items()]


def _generated(path: str, content: str | bytes, address: str, config: MkDocsConfig) -> File:
    file = File.generated(config, path, content=content)
    file.dest_uri = address
    return file


def _listed(nav: Any, paths: list[str]) -> list[Any]:
    """Returns the navigation with all paths in the place of a pattern that match it and have no place of their own."""
    named = set(_strings(nav))

    def listed(entries: list[Any]) -> list[Any]:
        full: list[Any] = []
        for entry in entries:
            if isinstance(entry, dict):
                full += [{title: listed(part) if isinstance(part, list) else part} for title, part in entry.items()]
            elif "*" in entry:
                full += sorted(path for path in paths if path not in named and PurePosixPath(path).match(entry))
            else:
                full.append(entry)
        return full

    return listed(nav)


def _strings(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _strings(part)
