"""The contract of a scheme: how a group of tensors gets its codebook and indices, and how both are trained.

A scheme is one file in ``compressor/schemes/``, or in a package that names it as an entry point: a frozen dataclass of
settings that can be built without arguments, decorated with ``registry.register``. Nothing else has to be edited: the
command line, policies, recipes and contract tests find it in ``registry.SCHEMES``.

A scheme holds settings only. All that it remembers lies in the ``GroupState`` it is given, as parameters and buffers,
so that checkpoints, ``.to()``, data-parallel training and averaged copies of the model carry it. It never sees the
optimiser, the trainer or a module. A run calls its five functions in this order::

    fit       once, by Compressor.prepare()
    on_step   before the first step with progress 0.0, after each step, and with 1.0 before the last export
    weight    in every forward pass, for every module that reads a tensor of the group
    penalty   once for every loss, after the forward pass
    export    by Compressor.finish(), and by whoever measures the training while it goes on

Notation: a site is one tensor, N its number of weights; the master weight is the dense trained tensor behind it; the
codebook of the group has K codewords. Where a scheme states the gradient of a codeword, the group multiplies it by a
constant, see ``GroupState.codebook_scale``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, Self

from pydantic import ConfigDict
from torch import Tensor

from compressor.formats.codecs.base import Codec
from compressor.formats.errors import PolicyError
from compressor.sharing.curvature import Curvature
from compressor.sharing.export import SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["Scheme"]


class Scheme(ABC):
    """The settings of a scheme and its five functions: ``fit``, ``weight``, ``on_step``, ``penalty``, ``export``."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")  # a misspelt setting is an error

    id: ClassVar[str]
    """The name that policies, recipes and the command line know it by."""

    paper: ClassVar[str]
    """The publication it implements."""

    shares: ClassVar[bool] = True
    """Whether it shares values; False: its tensors stay dense and are stored untouched."""

    bits_range: ClassVar[tuple[int, int]] = 1, 16
    """The smallest and the largest value of ``bits``, both allowed."""

    caution: ClassVar[str] = ""
    """A warning that is logged once where the scheme is applied to weights that have been trained; "": none."""

    @property
    def whole_network(self) -> bool:
        """Whether all tensors under this scheme with these settings form one group; False: each its own group."""
        return False

    @property
    def wants_curvature(self) -> bool:
        """Whether the result of ``fit`` depends on ``curvature`` by design, so that it should be measured."""
        return False

    @property
    def gains_from_curvature(self) -> bool:
        """Whether files are much smaller, at the same accuracy after training, where ``fit`` has the curvature."""
        return False

    @property
    def has_price(self) -> bool:
        """Whether there is a setting ``rate``, the price of a bit of the file, so that a target can be searched for.

        Training holds the size where ``fit`` begins a ``CodeLength``, and ``on_step`` and ``penalty`` call its own.
        """
        return any(one.name == "rate" for one in fields(self))  # type: ignore[arg-type]

    @property
    def brief_settings(self) -> dict[str, Any]:
        """The settings that tell it from others: the first, and those that differ from their defaults."""
        settings = fields(self)  # type: ignore[arg-type]
        shown = (f.name for n, f in enumerate(settings) if n == 0 or getattr(self, f.name) != f.default)
        return {name: getattr(self, name) for name in shown}

    def __str__(self) -> str:
        """Returns id and settings as a command line and a recipe have them, such as ``learnt codewords=16``."""
        return " ".join([self.id, *(f"{name}={value}" for name, value in self.brief_settings.items())])

    def priced(self, rate: float) -> Self:
        """Returns the scheme with another price of a bit.

        Raises:
            PolicyError: its other settings cannot have a price.
        """
        return replace(self, rate=rate).checked()  # type: ignore[type-var]

    def checked(self) -> Self:
        """Returns the scheme.

        Raises:
            PolicyError: its settings contradict each other.
        """
        if conflict := self.conflict():
            raise PolicyError(f"scheme {self.id!r}, {conflict}")
        return self

    def conflict(self) -> str:
        """Returns which settings contradict each other and what to do, as ``checked`` says it; "": none do."""
        return ""

    @property
    def can_prune(self) -> bool:
        """Whether single weights can be fixed to zero under these settings."""
        return True

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Returns the settings that ``bits`` stands for: the setting of that name, else 2^bits codewords.

        Raises:
            PolicyError: ``bits`` is out of ``bits_range``, or the scheme takes no bits.
        """
        least, most = cls.bits_range
        if not least <= bits <= most:
            raise PolicyError(f"scheme {cls.id!r} takes {least} to {most} bits, got {bits}")
        return {"bits": bits} if "bits" in cls.__annotations__ else {"codewords": 2**bits}

    def generator(self) -> Codec | None:
        """Returns the codec that generates the indices from name and position, or None where indices are stored.

        Generated indices lie in 0..2K-1: codeword K + k is the negative of codeword k. Only a tensor whose indices are
        generated can be trained without its dense master weight, by ``Compressor.prepare(virtual=True)``.
        """
        return None

    @abstractmethod
    def stored_values(self, weights: int) -> int:
        """Returns how many numbers the file stores for a tensor beside its indices.

        A policy leaves a tensor dense that has no more weights than that. Called before there is a group.

        Args:
            weights: N, the number of weights of the tensor.

        Raises:
            PolicyError: the tensor needs more values than the format can store.
        """

    @abstractmethod
    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets codebook, indices and buffers of the group from its master weights.

        Called once, before training, in the autograd mode of the caller: master weights have to be detached. Pruning
        comes first, so weights may be pinned to zero already: ``group.survivors(site)`` are the others.

        Args:
            group: may be changed by ``set_codebook``, ``set_indices`` and ``register_buffer``; what is registered
                here is part of every checkpoint. The master weights may be changed by ``compensate`` alone.
            curvature: by site, what errors of its weights cost; None: it was not measured, and all errors count alike.
        """

    @abstractmethod
    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the weight that the network computes with, differentiable in ``master`` and the codebook.

        Called in every forward pass, outside autocast, with gradients in training and under ``no_grad`` in evaluation.
        It may be called several times in a pass, for a tied tensor for example, and always returns the same values.
        Not called for a virtual group, whose layers generate their weights block by block.

        Args:
            group: only ``group.step_cache`` may be changed, to leave something for ``penalty``.
            site: the tensor asked for.
            master: float[shape], the master weight of the site. Entries that have an index may be overwritten by
                their codewords, as ``gather_scatter.frozen_lookup`` does.

        Returns:
            float[shape]. The caller casts it to the dtype of ``master`` and puts zeros where weights are pruned.
        """

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Does what is due at this point of the training: freezing, rounding, cooling; nothing by default.

        Called under ``no_grad``: before the first step, after each step, and with 1.0 before the last ``export``
        however short the training was, so that no round is left out. Calls may skip values of progress and may repeat
        one. The pruning masks have been updated before.

        Args:
            group: everything may be changed: codebook, indices, buffers, and master weights in place.
            progress: share of the training that is done, 0.0 to 1.0.

        Returns:
            Where a round of training begins, the progress at which it will end: the trainer then restarts the learning
            rate of this group's parameters for that round and drops the optimiser's state of them. Else None.
        """
        del group, progress
        return None

    def penalty(self, group: GroupState, task: Tensor) -> Tensor | None:
        """Returns a term that is added to the loss, float scalar with a gradient; None, the default, for no term.

        Called with gradients once for every loss, after the forward pass of the same step.

        Args:
            group: ``group.step_cache`` holds what ``weight`` left there in this step; buffers of the scheme may be
                written to.
            task: float scalar without gradient, the loss without any penalty; 1.0 where the caller has no loss to give.
        """
        del group, task
        return None

    @abstractmethod
    def export(self, group: GroupState) -> SharedTensors:
        """Returns the codebooks and indices that the file stores.

        Called under ``no_grad``, at the end and at any time during training, so it changes nothing. Decoding its result
        gives, bit for bit, the weights that ``Group.weight`` returned last.

        Returns:
            The shared tensors by name. A site that is left out keeps its weights and is stored untouched. In training,
            where a weight may still be free, its index need not mean anything.
        """
