"""The contract of export targets.

A target is one file in ``targets/``, or in another package: a frozen dataclass of settings, constructible with no
arguments, registered by ``registry.register``. Nothing else is edited; the contract tests find it in
``registry.TARGETS``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from compressor.deployment.layer_sizes import Estimate
from compressor.deployment.packed_model import PackedModel
from compressor.formats.errors import UsageError
from compressor.formats.file.reader import PackedFile

__all__ = ["Target"]


class Target(ABC):
    """Writes a packed model as one file for another runtime, and runs that file, or reads it back, to compare it."""

    id: ClassVar[str]
    """The name that ``--to`` takes."""

    suffix: ClassVar[str]
    """The ending of the file, with its dot."""

    companions: ClassVar[tuple[str, ...]] = ()
    """Endings of further files, which stand beside it and differ from it in their endings alone."""

    folder: ClassVar[bool] = False
    """Whether it is a folder that looks like a file, such as ``.mlpackage``; then it has no companions."""

    writes: ClassVar[bool] = True
    """Whether there is a file; if not, there is an ``estimate`` alone."""

    runs: ClassVar[bool] = True
    """Whether ``difference`` runs what was written; if not, it is read back and compared with the packed file."""

    packages: ClassVar[tuple[str, ...]] = ()
    """Import names of what it needs besides this package's own requirements."""

    install: ClassVar[str] = ""
    """What pip installs to get ``packages``, such as ``timm-compressor[onnx]``; "" where there are none."""

    limits: ClassVar[str]
    """What the file can not do or not hold, in one line."""

    tolerance: ClassVar[float] = 1e-4
    """The largest difference allowed, as a share of the largest logit; 0: every bit is equal."""

    def file_name(self, stem: str) -> str:
        """Returns the name of the file where none is asked for: ``stem``, of the packed file, with another ending."""
        return stem + self.suffix

    @abstractmethod
    def build(self, model: PackedModel) -> dict[str, bytes]:
        """Returns the bytes of the file, and of its companions, by their endings; those of a folder by paths in it.

        Raises:
            UnsupportedError: this model cannot be written for this runtime.
        """

    @abstractmethod
    def difference(self, written: Mapping[str, Path], model: PackedModel) -> float:
        """Runs what was written, or reads it back, and returns how far it is from the packed file.

        Args:
            written: the paths of the files, or the folder, by the endings that they will have; now they have another.
            model: what it was built from.

        Returns:
            The largest difference of logits, over the largest logit: see ``PackedModel.difference``.
        """

    def notes(self, model: PackedModel) -> tuple[str, ...]:
        """Returns what becomes of this model beyond the ``limits`` of all, a line each; by default nothing."""
        del model
        return ()

    def estimate(self, file: PackedFile) -> Estimate:
        """Returns what the weights of a packed file take by the runtime's own coder; by default there is none.

        Raises:
            UsageError: this target does not estimate.
        """
        raise UsageError(f"target {self.id!r} gives no estimate: without --estimate it writes the file")

    @abstractmethod
    def usage(self, path: Path, packed: Path) -> str:
        """Returns a line of code or of a shell that runs or reads the file at ``path``, written for ``packed``."""
