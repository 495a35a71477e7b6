"""Exporting a packed file: the file is built, written atomically, run and compared with ours before it has its name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import make_target
from compressor.deployment.target import Target
from compressor.formats.errors import CompressorError, IntegrityError, UnsupportedError, UsageError, printable
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.atomic import check_not_input, check_writable, write_atomically, write_folder_atomically
from compressor.formats.io.hub import local_path, parse_name, pinned_name
from compressor.formats.io.locking import holding
from compressor.report.report import dense_size

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Exported", "export"]

_MAX_REASON = 300  # characters of a message that may be another's


@dataclass(frozen=True)
class Exported:
    """A file that was written for another runtime.

    Args:
        path: of the file.
        target: id of the target.
        dense: bytes of the plain ``.safetensors`` file of the same tensors.
        packed: bytes of the packed file.
        exported: bytes of the file, and of its companions; of a folder those of its files.
        run: whether it was run; if not, it was read back.
        difference: the largest difference of logits from those of the packed file, over the largest logit; 0 where all
            tensors are equal bit for bit.
        limits: what the file can not do or not hold, in one line.
        notes: what has become of this model in particular, such as tensors that are stored dense, a line each.
        usage: a line that runs or reads it.
    """

    path: Path
    target: str
    dense: int
    packed: int
    exported: int
    run: bool
    difference: float
    limits: str
    notes: tuple[str, ...]
    usage: str


def export(
    path: str | os.PathLike[str],
    to: str,
    output: str | os.PathLike[str] | None = None,
    *,
    force: bool = False,
    model: nn.Module | None = None,
    inputs: Tensor | None = None,
    max_memory: int | None = None,
    **settings: Any,
) -> Exported:
    """Writes a packed file for another runtime, runs what was written, and compares it.

    Args:
        path: the packed file, as for ``compressor.load``.
        to: id of a target: ``compress targets`` lists them.
        output: the file to write; None, the default, for one beside the packed file, or in this folder and called like
            the repository where that is on the hub.
        force: whether an existing file is replaced.
        model: the module to load into, for a file that names no timm model.
        inputs: a batch of two or more inputs of the model; None, the default, for random images of the size it takes.
        max_memory: as for ``compressor.load``.
        **settings: of the target.

    Returns:
        The sizes of all forms, and how far the logits are from those of the packed file.

    Raises:
        UsageError: there is no such target or setting, or the file exists or has the ending of another.
        MissingError: a package that the target needs is not installed, or the model cannot be built.
        UnsupportedError: the target cannot hold this model, or its exporter or runtime fails with it.
        IntegrityError: what was written computes something else. No file is there then.
        FileError: the packed file is damaged, hostile or of another kind.

    Example:
        >>> import tempfile
        >>> from compressor.model_zoo import packed_path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     export(packed_path("zoo:test_resnet-tiny"), "reader", f"{folder}/packed_reader.py").difference
        0.0
    """
    target = make_target(to, settings)
    if not target.writes:
        raise UsageError(f"target {to!r} writes no file: --estimate (compressor.deployment.estimate) gives its sizes")
    source = local_path(path)
    with PackedFile.open(source, max_memory) as file:
        packed = PackedModel(file, source, model, inputs, max_memory)
        written = Path(output) if output is not None else _beside(source, target)
        paths = _paths(target, written)
        for each in paths.values():
            check_not_input(each, source)
            check_writable(each, force, target.folder)
        with holding(written):
            size, difference = _write(target, packed, paths, force)
        return Exported(
            path=written,
            target=target.id,
            dense=dense_size(file),
            packed=file.source.size,
            exported=size,
            run=target.runs,
            difference=difference,
            limits=target.limits,
            notes=target.notes(packed),
            usage=target.usage(written, source),
        )


def _beside(source: Path, target: Target) -> Path:
    """Returns the path of a file beside the packed one, but of none in the hub's cache."""
    if (pinned := pinned_name(source)) is None:
        return source.parent / target.file_name(source.stem)
    return Path(target.file_name(parse_name(pinned)[0].rpartition("/")[2]))


def _paths(target: Target, written: Path) -> dict[str, Path]:
    """Returns the paths of a target's files by their endings; raises UsageError where they could be another's."""
    if (target.companions or target.folder) and written.suffix != target.suffix:
        beside = f"{' and '.join(target.companions)} beside it" if target.companions else "a folder of that ending"
        raise UsageError(
            f"{written} ends in {written.suffix!r}, expected {target.suffix!r}: target {target.id!r} writes {beside}"
        )
    return {target.suffix: written, **{ending: written.with_suffix(ending) for ending in target.companions}}


def _write(target: Target, packed: PackedModel, paths: Mapping[str, Path], force: bool) -> tuple[int, float]:
    """Writes the files and compares them; returns their size together and the difference."""
    with _foreign_errors(target, packed):
        data = target.build(packed)
    found: list[float] = []

    def write(endings: Sequence[str], written: Mapping[str, Path]) -> None:
        """Writes each file while those before it are still temporary: all get their names once all are compared."""
        if not endings:
            found.append(_compare(target, written, packed))
            return
        first, *others = endings
        write_atomically(paths[first], data[first], lambda path: write(others, {**written, first: path}), force)

    if target.folder:
        (path,) = paths.values()
        write_folder_atomically(path, data, lambda temporary: write([], {target.suffix: temporary}), force)
    else:
        write([*paths], {})
    return sum(map(len, data.values())), found[0]


def _compare(target: Target, written: Mapping[str, Path], packed: PackedModel) -> float:
    """Returns the difference of what was written; raises IntegrityError where it is more than rounding."""
    with _foreign_errors(target, packed):
        difference = target.difference(written, packed)
    allowed = max(target.tolerance, packed.rounding) if target.tolerance else 0.0
    if not difference <= allowed:  # which a NaN is not, either
        raise IntegrityError(
            f"target {target.id!r}: what was written for {packed.path} differs by {difference:.2g} of the largest "
            f"logit, expected at most {allowed:g}: please report this"
        )
    return difference


@contextmanager
def _foreign_errors(target: Target, packed: PackedModel) -> Iterator[None]:
    """Raises UnsupportedError of one line in place of whatever an exporter or a runtime raises for a model."""
    try:
        yield
    except (CompressorError, MemoryError):
        raise
    except Exception as error:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))[:_MAX_REASON]
        raise UnsupportedError(f"target {target.id!r} cannot take the model of {packed.path}: {reason}") from error
