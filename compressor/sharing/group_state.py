"""The state of a group, all of it tensors: what schemes and pruning see of the sites that share one codebook."""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.inference.generated import Generated
from compressor.ops.buffer_pool import give_back
from compressor.ops.codebook_scale import CodebookScale, scaled_codebook
from compressor.sharing.sites import Site

__all__ = ["CHUNK", "GroupState"]

CHUNK = 1 << 18
"""Weights summed at a time, in double precision."""


class StepCache(dict[Site, Any]):
    """What a scheme's ``weight`` leaves for its ``penalty`` in the same step; a copy begins without."""

    def __reduce__(self) -> tuple[type[StepCache], tuple[()]]:
        return StepCache, ()


class GroupState(nn.Module):
    """The sites that share one codebook; codebook, indices and scheme state are parameters and buffers.

    The codebook is kept in units of the weights' spread, a power of two, so that one learning rate suits all
    layers and no digit is lost. Sites are held in a plain list: they are not registered, yet a deep copy of the
    model carries copies that point into the copy. A scheme keeps tensors of its own by ``register_buffer`` and reads
    them by ``get_buffer``.

    Args:
        sites: the sites, in state-dict order.
        from_scratch: whether the weights are random yet, and only their spread matters.
        virtual: whether the weights are never whole, for their indices are generated.
    """

    unit: Tensor
    values: Tensor

    def __init__(self, sites: list[Site], from_scratch: bool = False, virtual: bool = False) -> None:
        super().__init__()
        self.from_scratch, self.virtual = from_scratch, virtual
        self.sites = sites
        self.has_zeros = False
        """Whether weights are pruned here, or will be: then one codeword is 0.0."""
        self.step_cache = StepCache()
        self._master_weights = [site.tensor for site in sites]
        self.weights = sum(master.numel() for master in self._master_weights)
        spread = math.sqrt(
            sum(float(_sum_of_squares(master)) for master in self._master_weights) / max(self.weights, 1)
        )
        unit = torch.tensor(_power_of_two(spread), dtype=torch.float32, device=self._master_weights[0].device)
        self.register_buffer("unit", unit)
        weakref.finalize(self, give_back)

    def master_weight(self, site: Site) -> Tensor:
        """The dense trained tensor behind a site."""
        return self._master_weights[self.sites.index(site)]

    def set_master_weights(self, masters: list[Tensor]) -> None:
        """Replace the dense tensors behind the sites by others of their shapes."""
        self._master_weights = masters

    def set_codebook(self, codebook: Tensor, learnt: bool) -> None:
        """Replace the codebook, float32[K]; ``learnt`` makes it a parameter."""
        values = codebook.detach().to(self.unit) / self.unit
        self._parameters.pop("values", None)
        self._buffers.pop("values", None)
        if learnt:
            self.values = nn.Parameter(values)
        else:
            self.register_buffer("values", values)

    def codebook(self, rows: int = 0) -> Tensor:
        """The codebook, float32[K], differentiable where it is learnt; or in rows that ascend, [rows, K / rows]."""
        return scaled_codebook(self.values, self.codebook_scale(rows))

    def codebook_scale(self, rows: int = 0) -> CodebookScale:
        """How the codebook comes from ``values``.

        Its gradient is scaled so that under plain gradient descent a codeword moves by the learning rate times
        the mean gradient of its weights (the sum would be thousands of times a weight's own), if all codewords
        were used alike. The optimisers that normalise do not notice.
        """
        unit = float(self.unit)
        return CodebookScale(unit, len(self.values) / (self.weights * unit**2), rows)

    @property
    def has_indices(self) -> bool:
        """Whether the scheme keeps the indices of its sites."""
        return self._buffer_name("indices", self.sites[0]) in self._buffers

    def set_indices(self, site: Site, indices: Tensor, codewords: int, saved: bool = True) -> None:
        """Keep the indices of a site in few bytes.

        Args:
            indices: int[shape], below ``codewords``, or -1 where an entry is still free.
            saved: in the state dict.
        """
        kept = indices.to(_least_dtype(codewords))
        self.register_buffer(self._buffer_name("indices", site), kept, persistent=saved)

    def indices(self, site: Site) -> Tensor:
        """The kept indices of a site, int8, int16 or int32 [shape]."""
        return self.get_buffer(self._buffer_name("indices", site))

    def trained(self) -> list[Tensor]:
        """All that training changes: master weights and codebook."""
        return [*self._master_weights, *self.parameters()]

    def prune(self, site: Site, pruned: Tensor) -> None:
        """Pin weights of a site to zero: bool[shape]."""
        self.has_zeros = True
        self.register_buffer(self._buffer_name("pruned", site), pruned)

    def pruned(self, site: Site) -> Tensor:
        """Which weights of a site are pinned to zero, bool[shape]."""
        pruned = self._buffers.get(self._buffer_name("pruned", site))
        return torch.zeros_like(self.master_weight(site), dtype=torch.bool) if pruned is None else pruned

    def survivors(self, site: Site) -> Tensor:
        """The weights of a site that are not pruned, without gradient: float[n]."""
        master = self.master_weight(site).detach()
        return master[~self.pruned(site)] if self.has_zeros else master.reshape(-1)

    def generated(self, site: Site, codec: Codec) -> Generated:
        """Where the weights of a site come from, whose indices the codec generates."""
        master = self.master_weight(site)
        stream = Stream(site.name, master.numel(), 2 * len(self.values))
        return Generated(codec, stream, tuple(master.shape), master.dtype)

    def _buffer_name(self, kind: str, site: Site) -> str:
        return f"{kind}_{self.sites.index(site)}"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """Let codebooks and indices change shape, and buffers come into being: a scheme may do both in training.

        So may pruning: weights that are pinned to zero in a saved state need not have been when this group was made.
        """
        device = self.unit.device
        for site in self.sites:
            if isinstance(pruned := state_dict.get(prefix + self._buffer_name("pruned", site)), Tensor):
                self.prune(site, torch.empty_like(pruned, device=device))
        for held in (self._parameters, self._buffers):
            for name, tensor in held.items():
                saved = state_dict.get(prefix + name)
                if tensor is not None and isinstance(saved, Tensor) and saved.shape != tensor.shape:
                    tensor.data = tensor.new_empty(saved.shape)
        for name in [self._buffer_name("indices", site) for site in self.sites] if self.has_indices else ():
            if isinstance(indices := state_dict.get(prefix + name), Tensor):
                self._buffers[name] = torch.empty_like(indices, device=device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _sum_of_squares(master: Tensor) -> Tensor:
    """Sum the squared distances from the mean, in double precision but never all at a time."""
    runs = master.detach().reshape(-1).split(CHUNK)
    # Sums are taken in place: small tensors made between large ones keep the allocator from using their memory again.
    mean = torch.zeros((), dtype=torch.float64, device=master.device)
    total = torch.zeros_like(mean)
    for run in runs:
        mean += run.double().sum() / max(master.numel(), 1)
    for run in runs:
        total += (run.double() - mean).square().sum()
    return total


def _least_dtype(codewords: int) -> torch.dtype:
    """Choose the dtype of indices: it holds -1, and the number of codewords, which is how pruned weights are marked."""
    dtypes = torch.int8, torch.int16, torch.int32
    return next(dtype for dtype in dtypes if codewords <= torch.iinfo(dtype).max)


def _power_of_two(spread: float) -> float:
    return 2.0 ** max(-20, min(20, round(math.log2(spread)))) if spread > 0 else 1.0
