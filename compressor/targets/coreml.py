"""A Core ML program whose shared weights stay indices and tables, for Apple's devices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import register
from compressor.deployment.target import Target
from compressor.formats.content import Codebook, SharedTensor
from compressor.formats.errors import UnsupportedError
from compressor.targets.coreml_palette import Palette, gains, palette, why_dense
from compressor.targets.coreml_program import convert, read_palettes

__all__ = ["CoreMl"]


@register
@dataclass(frozen=True)
class CoreMl(Target):
    """Core ML's .mlpackage, whose shared weights stay indices and tables, for iOS 18, macOS 15 and later.

    Args:
        half: rounds tables and all other constants to float16 and computes with these, as the Neural Engine does.
    """

    id: ClassVar[str] = "coreml"
    suffix: ClassVar[str] = ".mlpackage"
    folder: ClassVar[bool] = True
    runs: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("coremltools",)
    install: ClassVar[str] = "timm-compressor[coreml]"
    tolerance: ClassVar[float] = 0.0
    limits: ClassVar[str] = (
        "indices and tables are read back and compared, logits are not, for only a Mac computes them; indices take "
        "1, 2, 3, 4, 6 or 8 bits; one image of one size; the Neural Engine takes float16 alone: --half"
    )

    half: bool = False

    def build(self, model: PackedModel) -> dict[str, bytes]:
        """Returns the files of the package, for one image."""
        image = model.inputs(2)[:1]
        if str(image.dtype) != "torch.float32":
            kind = str(image.dtype).removeprefix("torch.")
            raise UnsupportedError(f"target 'coreml': the model of {model.path} computes in {kind}, expected float32")
        return convert(model.dense, image, dict(_palettes(model)), self.half)

    def difference(self, written: Mapping[str, Path], model: PackedModel) -> float:
        """Returns 0 where the program has indices and table of every shared tensor bit for bit, else infinity."""
        stored = {found.identity for found in read_palettes(written[self.suffix])}
        return 0.0 if all(self._stored(found).identity in stored for _, found in _palettes(model)) else float("inf")

    def _stored(self, found: Palette) -> Palette:
        """Returns a palette with the table that the program is to have."""
        if not self.half:
            return found
        with np.errstate(over="ignore"):
            return replace(found, table=found.table.astype(np.float16).astype(np.float32))

    def notes(self, model: PackedModel) -> tuple[str, ...]:
        """Returns which shared weights are stored dense, a line for each reason, and whether all is rounded."""
        names: dict[str, list[str]] = {}
        for name, entry in model.file.sites.items():
            if len(entry.shape) > 1 and not _is_stack(name):
                names.setdefault(why_dense(*_entry(model, name)), []).append(name)
        names.pop("", None)
        rounded = ["tables and all other constants are rounded to float16"] if self.half else []
        return *(f"stored dense: {_some(found)}: {reason}" for reason, found in names.items()), *rounded

    def usage(self, path: Path, packed: Path) -> str:
        """Returns the line of Python that gives the logits on a Mac."""
        del packed
        return f'coremltools.models.MLModel({str(path)!r}).predict({{"images": image}})["logits"]'


def _palettes(model: PackedModel) -> Iterator[tuple[str, Palette]]:
    """Yields the shared tensors, by name, that are smaller as palettes than as floats."""
    for name in model.file.sites:
        site, book = _entry(model, name)
        if not _is_stack(name) and not why_dense(site, book) and gains(site, book):
            yield name, palette(model.file.shared(name), book)


def _is_stack(name: str) -> bool:
    """Returns whether a name is that of several small tensors."""
    return " " in name


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{', '.join(names[:2])} and {len(names) - 2} others"


def _entry(model: PackedModel, name: str) -> tuple[SharedTensor, Codebook]:
    """Returns a shared tensor without its indices, and its codebook."""
    site = model.file.shared(name, indices=False)
    return site, model.file.book(site.book)
