"""The state of a group, all of it tensors: what schemes and pruning see of the sites that share one codebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.inference.generated import Generated
from compressor.ops.codebook_scale import CodebookScale, scaled_codebook
from compressor.sharing.sites import Site

__all__ = ["CHUNK", "GroupState"]

CHUNK = 1 << 18
"""The number of weights that are summed at a time, in double precision."""


class StepCache(dict[Site, Any]):
    """What a scheme's ``weight`` keeps for its ``penalty`` in the same step, by site; a copy is empty."""

    def __reduce__(self) -> tuple[type[StepCache], tuple[()]]:
        return StepCache, ()


class GroupState(nn.Module):
    """The sites that share one codebook; codebook, indices and scheme state are parameters and buffers.

    The codebook is kept in units of the weights' spread, rounded to a power of two, so that one learning rate suits all
    layers and no digit is lost. Sites are in a plain list: they are not registered, yet a deep copy of the model has
    copies of them that refer to its own modules. A scheme keeps further tensors by ``register_buffer`` and reads them
    by ``get_buffer``.

    Args:
        sites: the sites, in state-dict order.
        from_scratch: whether the weights are still random, so that only their spread matters.
        virtual: whether the weights are never materialised, because their indices are generated.
    """

    unit: Tensor
    values: Tensor

    def __init__(self, sites: list[Site], from_scratch: bool = False, virtual: bool = False) -> None:
        super().__init__()
        self.from_scratch, self.virtual = from_scratch, virtual
        self.sites = sites
        self.has_zeros = False
        """Whether weights of this group are pruned, or will be: one codeword is 0.0 then."""
        self.step_cache = StepCache()
        self._counted: tuple[tuple[int, int], int] | None = None  # identity and version of ``values``, and the count
        self._master_weights = [site.tensor for site in sites]
        self.weights = sum(master.numel() for master in self._master_weights)
        spread = math.sqrt(
            sum(float(_sum_of_squares(master)) for master in self._master_weights) / max(self.weights, 1)
        )
        unit = torch.tensor(_power_of_two(spread), dtype=torch.float32, device=self._master_weights[0].device)
        self.register_buffer("unit", unit)

    def master_weight(self, site: Site) -> Tensor:
        """Returns the dense trained tensor behind a site."""
        return self._master_weights[self.sites.index(site)]

    def set_master_weights(self, masters: list[Tensor]) -> None:
        """Replaces the dense tensors behind the sites, in the order of the sites, by others of their shapes."""
        self._master_weights = masters

    def set_codebook(self, codebook: Tensor, learnt: bool, capacity: int = 0) -> None:
        """Replaces the codebook.

        Args:
            codebook: float32[K].
            learnt: whether it is a parameter; else it is a buffer.
            capacity: for a codebook that grows in training: the length of the buffer, whose rest is NaN, so that its
                shape stays that of copies, such as ``torch.optim.swa_utils.AveragedModel`` makes; 0: K.
        """
        values = codebook.detach().to(self.unit) / self.unit
        if capacity > len(values):
            values = torch.cat([values, values.new_full((capacity - len(values),), torch.nan)])
        if learnt:
            self._buffers.pop("values", None)
            self.values = nn.Parameter(values)
        else:
            self._parameters.pop("values", None)
            self.register_buffer("values", values)  # in its old place, for AveragedModel goes by the order

    @property
    def codeword_count(self) -> int:
        """The number of codewords, K."""
        if isinstance(self.values, nn.Parameter):
            return len(self.values)
        state = id(self.values), self.values._version
        if self._counted is None or self._counted[0] != state:
            self._counted = state, int((~self.values.isnan()).sum())
        return self._counted[1]

    def codebook(self, rows: int = 0) -> Tensor:
        """Returns the codebook, differentiable where it is learnt.

        Args:
            rows: the number of rows it is cut into, each of which is sorted in ascending order; 0: none.

        Returns:
            float32[K], or [rows, K / rows].
        """
        count = self.codeword_count
        values = self.values if count == len(self.values) else self.values[:count]
        return scaled_codebook(values, self.codebook_scale(rows))

    def codebook_scale(self, rows: int = 0) -> CodebookScale:
        """Returns how the codebook follows from ``values``; ``rows`` as for ``codebook``.

        Its gradient is scaled so that under plain gradient descent a codeword moves by the learning rate times the mean
        gradient of its weights, if all codewords have as many; the sum would be thousands of times a single weight's
        gradient. For optimisers that normalise gradients this makes no difference.
        """
        unit = float(self.unit)
        return CodebookScale(unit, self.codeword_count / (self.weights * unit**2), rows)

    @property
    def has_indices(self) -> bool:
        """Whether the scheme keeps the indices of the sites."""
        return self._buffer_name("indices", self.sites[0]) in self._buffers

    def set_indices(self, site: Site, indices: Tensor, codewords: int, saved: bool = True) -> None:
        """Keeps the indices of a site in the smallest dtype that holds them.

        Args:
            site: of this group.
            indices: int[shape], below ``codewords``, or -1 where a weight is free.
            codewords: how many the codebook has.
            saved: whether they are part of the state dict.
        """
        small = indices.to(_smallest_dtype(codewords))
        self.register_buffer(self._buffer_name("indices", site), small, persistent=saved)

    def indices(self, site: Site) -> Tensor:
        """Returns the kept indices of a site, int8, int16 or int32 [shape]."""
        return self.get_buffer(self._buffer_name("indices", site))

    def trained(self) -> list[Tensor]:
        """Returns what training changes: the master weights, and the codebook where it is learnt."""
        return [*self._master_weights, *self.parameters()]

    def prune(self, site: Site, pruned: Tensor) -> None:
        """Fixes weights of a site to zero: those where ``pruned``, bool[shape], is True."""
        self.has_zeros = True
        self.register_buffer(self._buffer_name("pruned", site), pruned)

    def pruned(self, site: Site) -> Tensor:
        """Returns which weights of a site are fixed to zero, bool[shape]."""
        pruned = self._buffers.get(self._buffer_name("pruned", site))
        return torch.zeros_like(self.master_weight(site), dtype=torch.bool) if pruned is None else pruned

    def survivors(self, site: Site) -> Tensor:
        """Returns the weights of a site that are not pruned, without gradient: float[n]."""
        master = self.master_weight(site).detach()
        return master[~self.pruned(site)] if self.has_zeros else master.reshape(-1)

    def generated(self, site: Site, codec: Codec) -> Generated:
        """Returns the description of a site's weights whose indices the codec generates."""
        master = self.master_weight(site)
        stream = Stream(site.name, master.numel(), 2 * len(self.values))
        return Generated(codec, stream, tuple(master.shape), master.dtype)

    def _buffer_name(self, kind: str, site: Site) -> str:
        return f"{kind}_{self.sites.index(site)}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Accepts codebooks and indices of other shapes, and masks of pruned weights that this group does not have yet.

        A scheme may change the number of codewords in training, and pruning may begin in it.
        """
        device = self.unit.device
        for site in self.sites:
            if isinstance(pruned := state_dict.get(prefix + self._buffer_name("pruned", site)), Tensor):
                self.prune(site, torch.empty_like(pruned, device=device))
        for tensors in (self._parameters, self._buffers):
            for name, tensor in tensors.items():
                saved = state_dict.get(prefix + name)
                if tensor is not None and isinstance(saved, Tensor) and saved.shape != tensor.shape:
                    tensor.data = tensor.new_empty(saved.shape)
        for name in [self._buffer_name("indices", site) for site in self.sites] if self.has_indices else ():
            if isinstance(indices := state_dict.get(prefix + name), Tensor):
                self._buffers[name] = torch.empty_like(indices, device=device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _sum_of_squares(master: Tensor) -> Tensor:
    """Returns the sum of the squared distances from the mean, in double precision, a chunk at a time."""
    chunks = master.detach().reshape(-1).split(CHUNK)
    # Sums are in place: small tensors allocated between large ones keep the allocator from reusing the large ones'.
    mean = torch.zeros((), dtype=torch.float64, device=master.device)
    total = torch.zeros_like(mean)
    for chunk in chunks:
        mean += chunk.double().sum() / max(master.numel(), 1)
    for chunk in chunks:
        total += (chunk.double() - mean).square().sum()
    return total


def _smallest_dtype(codewords: int) -> torch.dtype:
    """Returns the dtype of indices: it holds -1, and the number of codewords, which marks pruned weights."""
    dtypes = torch.int8, torch.int16, torch.int32
    return next(dtype for dtype in dtypes if codewords <= torch.iinfo(dtype).max)


def _power_of_two(spread: float) -> float:
    return 2.0 ** max(-20, min(20, round(math.log2(spread)))) if spread > 0 else 1.0
