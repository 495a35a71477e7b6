"""Schemes: how codebook and indices are found while training.

A scheme is one file in ``schemes/``, or in a package of its own: a frozen dataclass of settings, constructible with no
arguments, registered by ``registry.register``, with five functions and nothing else. Nothing else is edited; the
contract tests find it in ``registry.SCHEMES``. A scheme sees a GroupState and never the optimiser, the trainer or the
modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from compressor.formats.codecs.base import Codec
from compressor.formats.errors import PolicyError
from compressor.sharing.export import SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["Scheme"]


class Scheme(ABC):
    """A frozen dataclass of settings and the five functions of a scheme."""

    id: ClassVar[str]
    paper: ClassVar[str]

    shares: ClassVar[bool] = True
    """Whether it shares values at all; False: its tensors stay free, and are stored untouched."""

    bits_taken: ClassVar[tuple[int, int]] = 1, 16
    """The least and the most that ``bits`` may be."""

    caution: ClassVar[str] = ""
    """What to say, once, where it shares weights that have been trained."""

    @property
    def whole_network(self) -> bool:
        """Whether all tensors under this scheme, with these settings, form one group."""
        return False

    @property
    def wants_gradients(self) -> bool:
        """Whether ``fit`` should be told the importance of the weights, where there is data to learn it from."""
        return False

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Give what ``bits`` stands for: the setting of that name, or codewords; raises PolicyError out of range."""
        least, most = cls.bits_taken
        if not least <= bits <= most:
            raise PolicyError(f"scheme {cls.id!r} takes {least} to {most} bits, got {bits}")
        return {"bits": bits} if "bits" in cls.__annotations__ else {"codewords": 2**bits}

    def generator(self) -> Codec | None:
        """Give the codec that generates its indices, of the group's codebook and after it its negatives.

        None where indices are found and kept. Only what is generated can be trained without a dense weight.
        """
        return None

    @abstractmethod
    def stored_values(self, weights: int) -> int:
        """Count the codebook values stored for a tensor of so many weights, to tell whether sharing pays.

        Raises PolicyError for more than can be stored.
        """

    @abstractmethod
    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Set the group's codebook and indices from its weights; ``importance`` weighs the squared errors."""

    @abstractmethod
    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Give the weight the network computes with, differentiable in ``master`` and the codebook."""

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Do what is due as training progresses, 0 to 1; called before the first step and after each, under no_grad.

        Called with 1.0 before ``export``, however long training was, so that no round is left undone.

        Returns:
            Where a round begins, the progress at which it will end: the trainer then restarts the learning rate of
            this group's parameters for it, and forgets what the optimiser remembers of them. Else None.
        """
        del group, progress
        return None

    def penalty(self, group: GroupState, task: Tensor) -> Tensor | None:
        """Give a term to add to the loss, or None; ``task`` is the loss without it, a scalar without gradient."""
        del group, task
        return None

    @abstractmethod
    def export(self, group: GroupState) -> SharedTensors:
        """Give the shared tensors; decoding them gives the weights ``Group.weight`` gave last.

        A site left out keeps those weights as they are and is stored untouched.
        """
