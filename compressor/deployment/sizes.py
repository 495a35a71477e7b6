"""The sizes of a packed file in the forms of all runtimes that it can be exported to here."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from compressor.deployment.estimate import estimate
from compressor.deployment.export import export
from compressor.deployment.registry import TARGETS, describe, make_target
from compressor.deployment.target import Target
from compressor.formats.errors import CompressorError
from compressor.report.runtime_size import RuntimeSize

__all__ = ["runtime_sizes"]


def runtime_sizes(
    path: Path, max_memory: int | None = None, on_target: Callable[[str], None] = lambda _: None
) -> Iterator[RuntimeSize]:
    """Exports a packed file to each target, with its default settings, and yields the sizes; nothing is kept.

    A target that lacks a package here, or that cannot take the model, says so in place of a size. Of one that writes no
    file it is the estimate, of the weights alone, with one scale a tensor.

    Args:
        path: of the packed file.
        max_memory: as for ``compressor.load``.
        on_target: called with the id of each target before its export, which takes seconds.
    """
    for name in sorted(TARGETS):
        what = str(describe(TARGETS[name])["summary"])
        try:
            target = make_target(name, {})
            on_target(name)
            yield _size(path, target, what, max_memory)
        except CompressorError as exc:
            yield RuntimeSize(name, what, None, str(exc))


def _size(path: Path, target: Target, what: str, max_memory: int | None) -> RuntimeSize:
    """Returns the bytes of an export, which is not kept, or of an estimate."""
    if not target.writes:
        found = estimate(path, target.id, max_memory)
        layers = [(layer.site, layer.uncoded, layer.per_tensor) for layer in found.layers]
        return RuntimeSize(target.id, what, found.total.per_tensor, layers=layers)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, target.file_name(path.stem))
        return RuntimeSize(target.id, what, export(path, target.id, output, max_memory=max_memory).exported)
