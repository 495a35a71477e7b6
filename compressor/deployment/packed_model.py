"""A packed file that is to be exported: its tensors, its model, and the logits that every export is compared with."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.formats.errors import MissingError, UnsupportedError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from compressor.formats.file.reader import PackedFile

__all__ = ["PackedModel"]

_SEED = 0
_ROUNDINGS = 8  # of a layer after the other
_COMPARED = 3  # images that are compared: not as many as a model is exported with, to see that any number will do


class PackedModel:
    """What an export target is given. The model is built when it is first asked for.

    Args:
        file: the packed file, open.
        path: of that file.
        module: the module to load into, of the caller; None for the timm model that the file names.
        inputs: a batch of inputs of two or more; None for random images of the size that the timm model takes.
        max_memory: as for ``compressor.load``.
    """

    def __init__(
        self,
        file: PackedFile,
        path: Path,
        module: nn.Module | None = None,
        inputs: Tensor | None = None,
        max_memory: int | None = None,
    ) -> None:
        self.file, self.path, self._module, self._inputs, self._max_memory = file, path, module, inputs, max_memory

    @cached_property
    def dense(self) -> nn.Module:
        """The model with all weights expanded, in eval mode; not to be changed."""
        return self.load()

    def load(self) -> nn.Module:
        """Returns another such model, to be changed."""
        from compressor.formats.loader import load

        return load(self.path, copy.deepcopy(self._module), max_memory=self._max_memory).requires_grad_(False)

    def inputs(self, count: int) -> Tensor:
        """Returns a batch of inputs, the same in every call: random images, or of those that the caller gave.

        Raises:
            UsageError: the caller gave fewer than two.
            MissingError: the caller gave none, and the model does not say what it takes.
        """
        import torch

        from compressor.calibration.image_shape import image_shape

        if self._inputs is not None:
            if len(self._inputs) < 2:
                raise UsageError(f"inputs: a batch of {len(self._inputs)}, expected two or more")
            return self._inputs[[number % len(self._inputs) for number in range(count)]]
        shape = image_shape(self.dense)
        if shape is None:
            raise MissingError(
                f"{self.path}: its model does not say what images it takes: pass inputs=, a batch of some"
            )
        images = torch.randn(count, *shape, generator=torch.Generator().manual_seed(_SEED))
        return images.to(next((p.dtype for p in self.dense.parameters() if p.is_floating_point()), images.dtype))

    @cached_property
    def compared(self) -> tuple[Tensor, Tensor]:
        """Inputs and logits that an exported model is compared with: a batch of other size than it is exported with."""
        import torch

        images = self.inputs(_COMPARED)
        with torch.no_grad():
            logits = self.dense(images)
        if not isinstance(logits, torch.Tensor):
            kind = type(logits).__name__
            raise UnsupportedError(f"{self.path}: its model returns a {kind}, expected a tensor of logits")
        return images, logits

    @property
    def rounding(self) -> float:
        """The difference that rounding to the dtype of the logits alone may make, over the largest of them."""
        import torch

        return _ROUNDINGS * torch.finfo(self.compared[1].dtype).eps

    def difference(self, logits: Tensor) -> float:
        """Returns the largest difference from the logits of ``compared``, over the largest of these; NaN for a NaN."""
        expected = self.compared[1].double()
        return float((logits.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
