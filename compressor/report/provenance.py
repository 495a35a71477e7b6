"""The provenance of a packed file, validated as it is read: it may be as malicious as any other part of the file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from compressor.formats.errors import FormatError, printable
from compressor.formats.file.reader import PackedFile
from compressor.validation import one_line_errors

__all__ = ["Provenance", "read_provenance", "rule_of"]


Text = Annotated[str, AfterValidator(printable)]
Share = Annotated[float, Field(ge=0, le=1)]


class Measured(BaseModel):
    """The data that accuracy was measured on."""

    name: Text
    version: Text
    split: Text
    n: int


class Accuracy(BaseModel):
    """Top-1 accuracy of the packed model, and of the dense one if it was measured."""

    packed: Share
    dense: Share | None = None


class Provenance(BaseModel):
    """Facts about how a file was made; none of them is needed to load it.

    ``sqnr`` (dB) and ``rules`` (position in the last stage of the recipe) are in the order of the shared tensors.
    """

    model_config = ConfigDict(extra="allow")

    sqnr: list[float | None] = []
    rules: list[Annotated[int, Field(ge=0)]] = []
    left: dict[Text, Text] = {}
    parameters: Annotated[int, Field(ge=0)] | None = None
    seed: int = 0
    versions: dict[Text, Text] = {}
    top1: Accuracy | None = None
    data: Measured | None = None


def read_provenance(file: PackedFile) -> Provenance:
    """Reads and validates the provenance of a file.

    Raises:
        FormatError: it is not of the form that this program writes.
    """

    def describe(path: str) -> str:
        return f"{file.label}: {printable(f'provenance.{path}' if path else 'provenance')}"

    with one_line_errors(FormatError, describe, show_value=False):
        return Provenance.model_validate(file.provenance)


def rule_of(file: PackedFile, provenance: Provenance, position: int) -> tuple[str, str]:
    """Returns pattern and scheme of the rule by which a tensor was shared, "" for both if the file does not say.

    Args:
        file: the packed file.
        provenance: its provenance.
        position: the tensor's position among the shared tensors.
    """
    if position >= len(provenance.rules):
        return "", ""
    try:
        rule: Any = (file.recipe or {})["stage"][-1]["rule"][provenance.rules[position]]
        return printable(str(rule["match"])), printable(str(rule.get("scheme", "")))
    except (LookupError, TypeError, AttributeError):
        return "", ""
