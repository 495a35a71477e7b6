"""Granularity: which weights of a tensor have a codebook, a factor and an index in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compressor.clustering.kmeans1d import Init, fit_codebook, fit_codebook_of_each_row, spread
from compressor.clustering.vector_kmeans import vector_codebook
from compressor.ops.nearest import nearest, nearest_by_row
from compressor.ops.nearest_vector import nearest_vector
from compressor.sharing.export import SharedTensors, export_codebook, export_rows
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["Granularity", "GroupSize", "VectorLength"]

GroupSize = Annotated[int, Field(ge=0, le=1 << 31, strict=True)]
VectorLength = Annotated[int, Field(ge=1, le=64, strict=True)]

MOST_VECTORS = 1 << 14  # codewords that are vectors: with more, k-means alone would take hours
LEAST_FACTOR = 2.0**-100  # of a channel; the greatest is its inverse
FACTORS = "scales"  # buffer of the group: float32[n], what codewords are multiplied by, by site or by channel


@dataclass(frozen=True)
class Granularity:
    """Which weights of a tensor have a codebook, a factor and an index in common.

    A group keeps its codebooks one after the other, and of vectors one entry after the other. A position is a place in
    that list: each weight has one, whatever the granularity.

    Args:
        codewords: K, of each codebook.
        group_size: G consecutive slices of axis 0 have a codebook of their own, the last ones maybe fewer; 0: one
            codebook for all. Rows of no more weights than codewords share one.
        channel_scale: whether the weights of an output channel are divided by their root mean square, which is stored.
        vector: d, weights of consecutive output channels, at the same input, that have one index; codewords are
            vectors of d. They lie along the output channels because error feedback goes from input to input.
        site_scale: whether the weights of each tensor are divided by a power of two near their root mean square.
    """

    codewords: int
    group_size: int = 0
    channel_scale: bool = False
    vector: int = 1
    site_scale: bool = False

    def conflict(self, init: Init, groups: str = "group_size") -> str:
        """Returns why these settings contradict each other; "": they do not.

        Args:
            init: as in ``optimal_codebook``.
            groups: the setting that asked for groups of channels.
        """
        if self.group_size and self.channel_scale:
            return f"{groups} and channel_scale: the groups of a tensor in a file have codebooks or factors; name one"
        if self.group_size and self.vector > 1:
            return f"{groups} and vector: codewords that are vectors are those of the whole tensor; name one"
        if self.vector > 1 and self.codewords > MOST_VECTORS:
            most = f"at most {MOST_VECTORS:,}, which are 14 bits, since each vector is compared with every codeword"
            return f"vector and codewords={self.codewords}: name {most}"
        if self.vector > 1 and init != "optimal":
            return f"vector and init={init}: only codewords of single weights start from {init}; leave out init"
        return ""

    def row(self, group: GroupState) -> int:
        """Returns how many consecutive weights of a site have a codebook; where sites share one, all of theirs."""
        shape = group.master_weight(group.sites[0]).shape
        row = self.group_size * math.prod(shape[1:])
        return row if self.codewords < row < shape.numel() else group.weights

    def codebook_count(self, group: GroupState) -> int:
        """Returns B, the number of codebooks."""
        weights = group.master_weight(group.sites[0]).numel()
        return -(-weights // max(self.row(group), 1)) or 1

    def length(self, group: GroupState) -> int:
        """Returns d, the length of codewords: no more than there are output channels."""
        (site, *_) = group.sites
        return min(self.vector, group.master_weight(site).shape[site.output_axis]) if self.vector > 1 else 1

    def rows(self, group: GroupState) -> int:
        """Returns how many rows of codewords ascend, as ``GroupState.codebook`` takes it: B, or 0 of vectors."""
        return self.codebook_count(group) if self.length(group) == 1 else 0

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None, init: Init) -> Tensor:
        """Returns the codebooks of least squared error, float32[B K d]; factors become a buffer of the group."""
        factors = self._set_factors(group)
        if self.codebook_count(group) > 1:
            row = self.row(group)
            return fit_codebook_of_each_row(group, row, self.codewords, importance, init).reshape(-1)
        length = self.length(group)
        if length == 1:
            return fit_codebook(group, self.codewords, importance, init, factors)
        (site,) = group.sites
        factor = factors[site] if factors else torch.ones((), device=group.unit.device)
        weights = group.master_weight(site).detach().float() / factor
        mass = None if importance is None else _whole_vectors(importance[site] * factor.square(), site, length)
        return vector_codebook(_whole_vectors(weights, site, length), self.codewords, mass).reshape(-1)

    def factor(self, group: GroupState, site: Site) -> Tensor | None:
        """Returns what the codewords of a site are multiplied by, in a shape that broadcasts over it; None: nothing."""
        if not (self.site_scale or self.channel_scale):
            return None
        factors = group.get_buffer(FACTORS).float()  # a model that was moved to half precision has moved them, too
        if self.site_scale:
            return factors[group.sites.index(site)]
        return factors.view([-1 if axis == site.output_axis else 1 for axis in range(group.master_weight(site).ndim)])

    def positions(self, group: GroupState, site: Site, weights: Tensor, codebooks: Tensor) -> Tensor:
        """Returns the position of the nearest codeword of each weight, int32[shape].

        Args:
            group: of the site; it is not changed.
            site: whose weights these are.
            weights: float32[shape], divided by the factor.
            codebooks: float[B K d] in any shape, each ascending where codewords are single weights.
        """
        books, length, codebooks = self.codebook_count(group), self.length(group), codebooks.float()
        if length == 1:
            return nearest_by_row(weights, codebooks.view(books, -1), self.row(group))
        moved = weights.movedim(site.output_axis, -1)
        found = _entries(moved.reshape(-1, moved.shape[-1]), codebooks.view(-1, length))
        return found.view(moved.shape).movedim(-1, site.output_axis).contiguous()

    def nearest(self, group: GroupState, site: Site, codebooks: Tensor) -> Tensor:
        """Returns ``positions`` of the master weights of a site."""
        weights, factor = group.master_weight(site).detach().float(), self.factor(group, site)
        return self.positions(group, site, weights if factor is None else weights / factor, codebooks)

    def rounding(self, group: GroupState, site: Site, codebooks: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Returns the rounding of columns of weights to their codewords, for error feedback.

        Args:
            group: of the site.
            site: whose weights are rounded.
            codebooks: as for ``positions``.
        """
        books, row, length = self.codebook_count(group), self.row(group), self.length(group)
        master, factor = group.master_weight(site), self.factor(group, site)
        by_book, flat = codebooks.view(books, -1), codebooks.reshape(-1)

        def nearest_codewords(weights: Tensor, positions: Tensor) -> Tensor:
            if length > 1:  # a column is one input to all output channels: whole vectors, in their order
                channels = weights.view(-1, master.shape[site.output_axis])
                return flat[_entries(channels, flat.view(-1, length)).reshape(-1).long()]
            if books == 1:
                return flat[nearest(weights, flat).long()]
            own = by_book[positions // row]
            return own.gather(1, (weights[:, None] - own).abs().argmin(dim=1, keepdim=True))[:, 0]

        if factor is None:
            return nearest_codewords
        factors = factor.expand(master.shape).reshape(-1)
        return lambda weights, at: nearest_codewords(weights / factors[at], at) * factors[at]

    def export(self, group: GroupState, codebooks: Tensor, positions: Mapping[Site, Tensor]) -> SharedTensors:
        """Returns the shared tensors of a group.

        Args:
            group: it is not changed.
            codebooks: float32[B K d] in any shape.
            positions: int[shape] by site.
        """
        books, length = self.codebook_count(group), self.length(group)
        if books > 1:
            return export_rows(group, codebooks.view(books, -1), positions[group.sites[0]], self.row(group))
        factors = {site: factor for site in positions if (factor := self.factor(group, site)) is not None}
        if length > 1:  # of each vector the first entry
            positions = {
                site: _rows(where, site)[:, ::length].reshape(-1) // length for site, where in positions.items()
            }
        return export_codebook(group, codebooks.view(-1, length), positions, factors or None)

    def _set_factors(self, group: GroupState) -> dict[Site, Tensor] | None:
        """Makes the factors a buffer of the group, and returns them by site; None where there are none."""
        if self.site_scale:
            factors = torch.tensor([spread(group.survivors(site)) for site in group.sites])
        elif self.channel_scale:
            factors = _root_mean_squares(group)
        else:
            return None
        group.register_buffer(FACTORS, factors.to(group.unit.device))
        group.unit.fill_(1.0)
        return {site: factor for site in group.sites if (factor := self.factor(group, site)) is not None}


def _root_mean_squares(group: GroupState) -> Tensor:
    """Returns the root mean square of what is not pruned in each output channel of a group's only tensor.

    float32[channels], rounded to bfloat16, which the file stores; 1 for a channel of zeros, so that all divide.
    """
    (site,) = group.sites
    rows = _rows(group.master_weight(site).detach(), site).double()
    kept = _rows(~group.pruned(site), site)
    squares = rows.square().mul_(kept).sum(dim=0) / kept.sum(dim=0).clamp(min=1)
    return torch.where(squares > 0, squares.sqrt().clamp(LEAST_FACTOR, 1 / LEAST_FACTOR), 1.0).bfloat16().float()


def _rows(tensor: Tensor, site: Site) -> Tensor:
    """Returns a tensor of the shape of a site as [n, output channels]: vectors lie along its rows."""
    moved = tensor.movedim(site.output_axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def _whole_vectors(tensor: Tensor, site: Site, length: int) -> Tensor:
    """Returns the vectors of a tensor of the shape of a site, [n, d], without those that are cut off at the end."""
    rows = _rows(tensor, site)
    return rows[:, : rows.shape[1] // length * length].reshape(-1, length)


def _entries(rows: Tensor, codebook: Tensor) -> Tensor:
    """Returns the position of the entry that stands for each weight, int32[R, S], in a codebook float32[K, d]."""
    length = codebook.shape[1]
    first = nearest_vector(rows, codebook) * length
    entries = first[:, :, None] + torch.arange(length, dtype=torch.int32, device=rows.device)
    return entries.reshape(len(rows), -1)[:, : rows.shape[1]]
