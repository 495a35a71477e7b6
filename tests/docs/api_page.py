"""Writes docs/api.md from signatures and docstrings: ``python -m tests.docs.api_page``."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compressor
from compressor import SCHEMES, model_zoo
from compressor.api import clustering, combine, quantization, sparsity
from compressor.checkpointing.manager import Checkpoints
from compressor.data.datasets import Dataset, load_data
from compressor.formats import errors
from compressor.lifecycle.packed import Packed
from compressor.lifecycle.sensitivity import sensitivity
from compressor.report.report import Report
from compressor.training.config import TrainingConfig
from compressor.training.detailed_evaluation import DetailedEvaluation, measure
from compressor.training.evaluation import Evaluation, evaluate
from compressor.training.history import History

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
HEAD = """# Python reference

Every public name with its signature and first sentence; `help(NAME)` has arguments, units, errors and examples. This
page is written from the code by `python -m tests.docs.api_page`, and a test compares the two.
"""
PACKAGE = [getattr(compressor, name) for name in compressor.__all__ if name not in ("SCHEMES", "__version__")]
SECTIONS: dict[str, list[Any]] = {
    "The package: `import compressor`": [*PACKAGE, Packed, Report, sensitivity],
    "Data, training and evaluation": [
        load_data, Dataset, TrainingConfig, History, Checkpoints, evaluate, Evaluation, measure, DetailedEvaluation,
    ],
    "Schemes, as `Rule` takes them": [SCHEMES[name] for name in sorted(SCHEMES.built_in())],
    "The zoo: `from compressor import model_zoo`": [getattr(model_zoo, name) for name in model_zoo.__all__],
    "TensorFlow's names: `compressor.api`": [
        getattr(module, name) for module in (clustering, sparsity, quantization, combine) for name in module.__all__
    ],
    "Errors": [getattr(errors, name) for name in errors.__all__ if inspect.isclass(getattr(errors, name))],
}  # fmt: skip


def summary(thing: Any) -> str:
    """Return the first sentence of a docstring, as Markdown."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    assert text, f"{thing} has no docstring"
    sentence = re.match(r".*?[.:](?=\s|$)", text)
    return (sentence[0] if sentence else text).replace("``", "`").replace("|", "\\|")


def signature(thing: Callable[..., Any]) -> str:
    """Return the parameters of a function or class with their defaults, without types."""
    parameters = [
        one.replace(annotation=inspect.Parameter.empty)
        for one in inspect.signature(thing).parameters.values()
        if one.name != "self"
    ]
    text = str(inspect.Signature(parameters))
    return re.sub(r"<factory>|<object object at 0x\w+>", "...", text)


def members(cls: type) -> Iterator[tuple[str, str]]:
    """Yield the public methods and properties of a class that are its own or of a base in this package."""
    owners = [base for base in reversed(cls.__mro__) if base.__module__.startswith("compressor.")]
    names = {name: None for owner in owners for name in vars(owner) if not name.startswith("_")}
    for name in names:
        raw = inspect.getattr_static(cls, name)
        if isinstance(raw, property):
            yield name, summary(raw.fget)
        elif callable(value := getattr(cls, name)) and not inspect.isclass(value):
            yield f"{name}{signature(value)}", summary(value)


def entry(thing: Any, with_members: bool) -> Iterator[str]:
    """Yield the lines of a name."""
    yield f"### `{thing.__name__}`\n"
    called = "" if inspect.isclass(thing) and issubclass(thing, Exception) else signature(thing)
    yield f"`{thing.__module__}.{thing.__name__}{called}`\n"
    yield f"{summary(thing)}\n"
    rows = list(members(thing)) if with_members and inspect.isclass(thing) else []
    if rows:
        yield "| member | what it does |\n|---|---|"
        yield from (f"| `{name}` | {text} |" for name, text in rows)
        yield ""


def render() -> str:
    """Return the page."""
    lines = [HEAD]
    for title, things in SECTIONS.items():
        lines.append(f"## {title}\n")
        for thing in things:
            lines += entry(thing, with_members=not title.startswith(("Schemes", "Errors")))
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
