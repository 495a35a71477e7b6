"""CONTRIBUTING.md: its Python runs, and what it names exists."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_docstring_it_shows_has_an_example_that_runs() -> None:
    """The function of the page shows a docstring alone: here it is given the body that its summary states."""
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {"Tensor": Tensor, "torch": torch}
    exec(block + "    return ((weight - codeword) / scale) ** 2\n", names)
    example = doctest.DocTestFinder().find(names["scaled_distance"], "scaled_distance", module=False, globs=names)
    assert doctest.DocTestRunner().run(example[0]) == (0, 1)


def test_the_files_it_names_exist() -> None:
    paths = set(re.findall(r"`((?:scripts|docs|tests|formats|compressor)/[\w./-]*)", PAGE))
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / link).exists(), link
