"""Groups: the state of the sites that share one codebook, with the scheme and the pruning that change it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from compressor.formats.inference.virtual_weight import VirtualTensor, mirrored
from compressor.sharing.group_state import GroupState
from compressor.sharing.pruning import Pruning
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

__all__ = ["Group"]


class Group(GroupState):
    """The sites that share one codebook, with their scheme and pruning.

    Args:
        scheme: how codebook and indices are found and trained.
        sites: the sites, in state-dict order.
        pruning: how many weights become zero, and by when; None: only those that ``prune`` is called for.
        from_scratch: whether the weights are still random, so that only their spread matters.
        virtual: whether ``weight`` returns tensors that are never materialised; ``free_dense`` then follows once the
            scheme has fitted the group.
    """

    def __init__(
        self,
        scheme: Scheme,
        sites: list[Site],
        pruning: Pruning | None = None,
        from_scratch: bool = False,
        virtual: bool = False,
    ) -> None:
        super().__init__(sites, from_scratch, virtual)
        self.scheme, self.pruning = scheme, pruning
        self.frozen = False
        """Whether the group no longer changes, because its sites have ``requires_grad_(False)``."""
        if pruning is not None:
            for site in sites:
                self.prune(site, torch.zeros_like(self.master_weight(site), dtype=torch.bool))
            pruning.on_step(self, 0.0)

    @torch.no_grad()
    def freeze(self) -> None:
        """Ends the sharing at once and for good: no codeword or index changes any more."""
        self.on_step(1.0)
        self.requires_grad_(False)
        self.frozen = True

    def free_dense(self) -> None:
        """Frees the master weights: their shapes and dtypes remain, and parameters of the model without elements."""
        for number, site in enumerate(self.sites):
            self._master_weights[number] = torch.empty_like(site.tensor, device="meta")
            site.tensor.data = site.tensor.new_empty(0)

    def weight(self, site: Site, master: Tensor) -> Tensor:
        """Returns the weight the network computes with: the scheme's, or zero where it is pruned.

        Args:
            site: of this group.
            master: its master weight, or what autograd has in its place.

        Returns:
            A tensor of the shape and dtype of ``master``.
        """
        codec = self.scheme.generator() if self.virtual else None
        if codec is not None:
            return VirtualTensor(self.generated(site, codec), mirrored(self.codebook()), master.dtype)
        weight = self.scheme.weight(self, site, master).to(master.dtype)
        return weight.masked_fill(self.pruned(site), 0) if self.has_zeros else weight

    def on_step(self, progress: float) -> float | None:
        """Applies pruning and scheme at this point of the training; see ``Scheme.on_step``. Frozen groups skip it."""
        if self.frozen:
            return None
        if self.pruning is not None:
            self.pruning.on_step(self, progress)
        return self.scheme.on_step(self, progress)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Refuses indices of no codeword, which only a damaged or foreign state has."""
        super()._load_from_state_dict(state_dict, prefix, *rest)
        rest[-1].extend(self._wrong_indices(prefix))

    def _wrong_indices(self, prefix: str) -> Iterator[str]:
        """Yields a message for each site with indices of no codeword: machine code looks codewords up unchecked."""
        for site in self.sites if self.has_indices else ():
            if (indices := self.indices(site)).numel():
                codewords = self.codeword_count * (
                    1 if self.scheme.generator() is None else 2
                )  # some generate negatives
                lowest, highest = (int(end) for end in indices.aminmax())
                if lowest < -1 or highest >= codewords:
                    name = prefix + self._buffer_name("indices", site)
                    yield f"{name} has indices from {lowest} to {highest}, and there are {codewords} codewords"

    def extra_repr(self) -> str:
        """Returns the scheme and the names of the sites, for ``repr``."""
        return f"{self.scheme}, {', '.join(site.name for site in self.sites)}"
