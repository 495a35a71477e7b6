"""The packed checkpoints that ship with the package; ``index.toml`` describes each of them and how it was made."""

from __future__ import annotations

import hashlib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import compressor
from compressor.formats.errors import IntegrityError, MissingError, did_you_mean
from compressor.formats.io.hub import local_path

if TYPE_CHECKING:
    from torch import nn

__all__ = ["INDEX", "PREFIX", "Checkpoint", "checkpoint", "list_checkpoints", "load", "packed_path"]

INDEX = Path(__file__).parent / "index.toml"
PREFIX = "zoo:"


@dataclass(frozen=True)
class Checkpoint:
    """The index entry of a packed file.

    Args:
        name: without ``zoo:``.
        model: timm's name.
        dataset: the data it was trained and measured on.
        seed: of all random numbers.
        command: the command that wrote the file.
        dense_sha256: of the file of dense weights that ``command`` names; "" if the command trained them itself.
        sha256: of the packed file.
        bytes: size of the packed file.
        parameters: number of parameters of the model.
        dense_top1: share of test images that the dense model classified correctly.
        top1: share of test images that the packed model classified correctly.
        interval: 95 % interval of ``top1``, by Wilson's score.
        n: number of test images.
        correct_of_first_200: how many of the first 200 test images the packed model classified correctly.
    """

    name: str
    model: str
    dataset: str
    seed: int
    command: str
    dense_sha256: str
    sha256: str
    bytes: int
    parameters: int
    dense_top1: float
    top1: float
    interval: tuple[float, float]
    n: int
    correct_of_first_200: int

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file, including its header, per parameter of the model."""
        return 8 * self.bytes / self.parameters


def list_checkpoints() -> list[str]:
    """Returns the names of the shipped checkpoints, sorted.

    >>> "test_resnet-tiny" in list_checkpoints()
    True
    """
    return sorted(_index())


def checkpoint(name: str) -> Checkpoint:
    """Returns the index entry of a checkpoint.

    Args:
        name: one of ``list_checkpoints``.

    Raises:
        MissingError: there is no such checkpoint; the message suggests the nearest name.

    Example:
        >>> checkpoint("test_resnet-tiny").bits_per_weight < 1.5
        True
    """
    if name not in _index():
        known = ", ".join(list_checkpoints())
        raise MissingError(f"no checkpoint {name!r}.{did_you_mean(name, list_checkpoints())} Shipped ones: {known}.")
    return _index()[name]


def packed_path(text: str) -> Path:
    """Returns the file of ``zoo:NAME``, or of ``hf-hub:OWNER/NAME``, fetched; any other text is returned as a path.

    Args:
        text: ``zoo:NAME``, ``hf-hub:OWNER/NAME`` with or without ``@REVISION``, or a path.

    Raises:
        MissingError: there is no such checkpoint, or its file is missing from the installation.
        CompressorError: as ``compressor.formats.io.hub.fetch``, for a file on the hub.
        IntegrityError: the file is not the one of the index.

    Example:
        >>> packed_path("zoo:test_resnet-tiny").name, str(packed_path("a/b.safetensors"))
        ('test_resnet-tiny.safetensors', 'a/b.safetensors')
    """
    if not text.startswith(PREFIX):
        return local_path(text)
    entry = checkpoint(text.removeprefix(PREFIX))
    path = INDEX.parent / "checkpoints" / f"{entry.name}.safetensors"
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as exc:
        raise MissingError(f"{text}: {path} cannot be read ({exc.strerror or exc}): install the package again") from exc
    if digest != entry.sha256:
        raise IntegrityError(f"{text}: the sha256 of {path} is {digest}, expected {entry.sha256}: install it again")
    return path


def load(name: str, weights: str = "dense") -> nn.Module:
    """Returns the timm model of a shipped checkpoint, in eval mode.

    Args:
        name: one of ``list_checkpoints``.
        weights: "dense" or "packed", as for ``compressor.load``.

    Raises:
        UsageError: as for ``compressor.load``.
        MissingError: as for ``packed_path``.
        IntegrityError: as for ``packed_path``.

    Example:
        >>> load("test_resnet-tiny").num_classes
        10
    """
    return compressor.load(packed_path(PREFIX + name), weights=weights)


@cache
def _index() -> dict[str, Checkpoint]:
    tables = tomllib.loads(INDEX.read_text(encoding="utf-8"))["checkpoint"]
    return {
        name: Checkpoint(**{**facts, "name": name, "interval": tuple(facts["interval"])})
        for name, facts in tables.items()
    }
