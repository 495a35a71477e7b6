"""What other commands have measured of files and models, read from the JSON documents that they print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, Field

from compressor.formats.errors import FormatError, MissingError, printable
from compressor.report.class_flips import ClassFlips
from compressor.validation import one_line_errors

__all__ = ["Measured", "TensorLoss", "read_measured"]

Text = Annotated[str, AfterValidator(printable)]
EXPECTED = "'compress eval FILE --against DENSE --per-class --json' or 'compress sensitivity MODEL --json'"


@dataclass(frozen=True)
class TensorLoss:
    """What the model loses where one tensor alone is rounded at a price.

    Args:
        site: name of the tensor.
        rate: the price of a bit, in the loss of one image.
        measured: mean divergence of the answers from the dense ones, in nats.
    """

    site: Text
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    measured: Annotated[float, Field(allow_inf_nan=False)]


class _Named(BaseModel):
    name: Text


class _Sensitivity(BaseModel):
    """The document of ``compress sensitivity``."""

    model: _Named
    sensitivity: list[TensorLoss]


class _Evaluation(BaseModel):
    """The document of ``compress eval``, with another model and class by class."""

    content_sha256: str
    classes: list[ClassFlips]


@dataclass(frozen=True)
class Measured:
    """What some documents say.

    Args:
        classes: of files, by the SHA-256 of their content.
        losses: of tensors, by the name of the model.
        paths: of the documents, by the same keys.
    """

    classes: Mapping[str, tuple[ClassFlips, ...]]
    losses: Mapping[str, tuple[TensorLoss, ...]]
    paths: Mapping[str, Path]


def read_measured(paths: Iterable[Path]) -> Measured:
    """Reads documents, which may be of strangers; of several about the same, the last counts.

    Raises:
        MissingError: one cannot be read.
        FormatError: one is neither of the two documents.
    """
    classes: dict[str, tuple[ClassFlips, ...]] = {}
    losses: dict[str, tuple[TensorLoss, ...]] = {}
    where: dict[str, Path] = {}
    for path in paths:
        document = _document(path)
        with one_line_errors(FormatError, partial(_wrong, path), show_value=False):
            if "sensitivity" in document:
                tensors = _Sensitivity.model_validate(document)
                key = tensors.model.name
                losses[key] = tuple(tensors.sensitivity)
            else:
                images = _Evaluation.model_validate(document)
                key = images.content_sha256
                classes[key] = tuple(one for one in images.classes if one.lost or one.gained)
        where[key] = path
    return Measured(classes, losses, where)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as exc:
        raise MissingError(f"--measured {path}: cannot be read ({exc.strerror or exc})") from exc
    except (ValueError, RecursionError) as exc:
        raise FormatError(f"--measured {path}: not JSON; expected what {EXPECTED} prints") from exc
    if not isinstance(document, dict):
        raise FormatError(f"--measured {path}: expected what {EXPECTED} prints")
    return document


def _wrong(path: Path, key: str) -> str:
    return f"--measured {path}: not what {EXPECTED} prints: {printable(key)}"
