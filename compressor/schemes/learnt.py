"""Learnt hash: weights, codebook and the assignment between them are trained together."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.clustering.kmeans1d import Init, fit_codebook, fit_codebook_of_each_slice, spread
from compressor.ops.gather_scatter import straight_through
from compressor.ops.nearest import nearest, nearest_by_row
from compressor.ops.parallel import cache_chunks
from compressor.ops.soft_assignment import soft_gradient
from compressor.sharing.export import SharedTensors, export_scalars, export_slices
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

_log = logging.getLogger(__name__)
RESEEDS = 10  # times in a training run that unused codewords are put to use again
LAST_RESEED = 0.8  # after which they no longer are, so that the network can settle
COLDEST = 0.01  # of the first temperature, reached at the end


@register
@dataclass(frozen=True)
class Learnt(Scheme):
    """Hash each weight to its nearest codeword inside the network, and learn weights and codewords together.

    The hash is a layer: logits ``-(w - c_k)^2``, a max over k, a lookup of ``c``; as stock operators a 1x1
    convolution, a max-pooling over channels and a deconvolution. It computes exactly what the file will hold,
    so nothing changes when training ends. Backwards, a codeword gets the gradients of its weights, and the
    master weight gets its own straight through.

    The soft hash of DKM (softmax instead of max) has slope ``2 Var(c) / tau``: near 1 for every weight where
    ``tau`` is half the squared spacing, and for 2 % of the weights at its customary cold 1e-4. Straight-through is
    the first, at the cost of one lookup; see docs/decisions. ``soft`` gives the soft hash's own gradients instead.

    Args:
        codewords: K, the number of values a tensor may take.
        group: "site": a codebook for each tensor; "channel": for each slice of its axis 0, the output channels of all
            but transposed convolutions, if those have more weights than codewords; "network": one for all, of weights
            divided by a power of two that is near each tensor's spread, and that the file stores.
        soft: 0: gradients pass straight through; above: the exact gradients of the soft hash, at first at this
            temperature in halves of the mean squared spacing of the codewords, cooled to a hundredth of it.
        init: where the k-means starts that gives the first codebook: "optimal", "linear", "density" or "quantile".

    Reference: Cho, Alizadeh-Vahid, Adya, Rastegari, "DKM: Differentiable k-Means Clustering Layer", ICLR 2022.
    """

    id: ClassVar[str] = "learnt"
    paper: ClassVar[str] = 'after Cho et al., "DKM", ICLR 2022; Chen et al., "HashedNets", ICML 2015'

    codewords: Annotated[int, Field(ge=1, le=65536, strict=True)] = 16
    group: Literal["site", "channel", "network"] = "site"
    soft: Annotated[float, Field(ge=0, le=100)] = 0.0
    init: Init = "optimal"

    @property
    def whole_network(self) -> bool:
        """Whether one codebook serves all."""
        return self.group == "network"

    def stored_values(self, weights: int) -> int:
        """One per codeword."""
        del weights
        return self.codewords

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Start from the codebook with the least error."""
        if self.whole_network:
            group.register_buffer("scales", torch.tensor([spread(group.survivors(site)) for site in group.sites]))
            group.unit.fill_(1.0)
        if self._books(group) > 1:
            codebook = fit_codebook_of_each_slice(group, self.codewords, importance, self.init).reshape(-1)
        else:
            codebook = fit_codebook(group, self.codewords, importance, self.init, _scales(group))
        group.set_codebook(codebook, learnt=True)
        group.register_buffer("reseeds", torch.zeros((), dtype=torch.int64))
        group.register_buffer("temperature", torch.tensor(self.soft, dtype=torch.float64))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Hash the master weights to their nearest codewords."""
        if self.whole_network:
            scale = group.get_buffer("scales")[group.sites.index(site)]
            return self._hash(group, master / scale) * scale
        return self._hash(group, master)

    def _books(self, group: GroupState) -> int:
        """Count the codebooks of a group, which lie one after the other in its values."""
        shape = group.master_weight(group.sites[0]).shape
        alone = self.group == "channel" and math.prod(shape[1:]) > self.codewords
        return shape[0] if alone else 1

    def _hash(self, group: GroupState, master: Tensor) -> Tensor:
        units = group.codebook_scale(
            self._books(group)
        )  # ascending: training may have let codewords overtake each other
        rows, codewords = units.rows, len(group.values) // units.rows
        if not self.soft or codewords == 1:
            several = nearest_by_row(master.detach().float(), group.codebook(rows).detach()) if rows > 1 else None
            return straight_through(master, group.values, several, units)
        pairs = zip(master.reshape(rows, -1), group.codebook(rows), strict=True)
        return torch.stack([self._soft(group, *pair) for pair in pairs]).view(master.shape)

    def _soft(self, group: GroupState, master: Tensor, codebook: Tensor) -> Tensor:
        indices = nearest(master.detach().float(), codebook.detach())
        halved = float(codebook.detach().diff().square().mean()) / 2
        coldest = torch.finfo(torch.float32).tiny  # codewords may all have met
        return soft_gradient(master, codebook, indices, max(float(group.get_buffer("temperature")) * halved, coldest))

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Cool; and at every tenth of a run, put codewords that no weight uses back to use."""
        group.get_buffer("temperature").fill_(self.soft * COLDEST**progress)
        due = math.floor(min(progress, LAST_RESEED) * RESEEDS)
        if due > int(group.get_buffer("reseeds")) and progress < 1:  # what is trained is what is stored
            group.get_buffer("reseeds").fill_(due)
            _reseed(group, self._books(group))
        return None

    def export(self, group: GroupState) -> SharedTensors:
        """Give the codebook and each weight's nearest codeword in it."""
        codebooks = group.codebook(self._books(group)).detach()
        if len(codebooks) > 1:
            rows = group.master_weight(group.sites[0]).detach().float()
            return export_slices(group, codebooks, nearest_by_row(rows, codebooks) % codebooks.shape[1])
        codebook, scales = codebooks[0], _scales(group)
        masters = {site: group.master_weight(site).detach() / (scales[site] if scales else 1) for site in group.sites}
        nearest_now = {site: nearest(master.float(), codebook) for site, master in masters.items()}
        return export_scalars(group, codebook, nearest_now, scales)


def _scales(group: GroupState) -> dict[Site, float] | None:
    """Give what each site's weights are divided by; None where every site has its own codebook."""
    if "scales" not in dict(group.named_buffers()):
        return None
    return dict(zip(group.sites, group.get_buffer("scales").tolist(), strict=True))


def _reseed(group: GroupState, books: int) -> None:
    """Split the cluster with the largest squared error of its codebook for each codeword that no weight uses.

    An unused codeword has no gradient for ever. The halves of a bell or a box have their means about 0.8
    standard deviations from the middle, and an eighth of the squared error each.
    """
    values = group.values.detach()
    codewords = len(values) // books
    first = torch.arange(0, len(values), codewords, device=values.device)
    order = (values.view(books, -1).argsort() + first[:, None]).reshape(-1)
    count, mean, error = _clusters(group, (values[order] * group.unit).view(books, -1))
    reused = 0
    for unused in torch.nonzero(count == 0).flatten().tolist():
        start = unused // codewords * codewords
        widest = start + int(error[start : start + codewords].argmax())
        if float(error[widest]) <= 0:
            continue
        spread = 0.8 * (error[widest] / count[widest]).sqrt()
        mean[unused], mean[widest] = mean[widest] - spread, mean[widest] + spread
        for half in (unused, widest):
            values[order[half]] = (mean[half] / group.unit).to(values.dtype)
        count[unused] = count[widest] = count[widest] / 2
        error[unused] = error[widest] = error[widest] / 8
        reused += 1
    if reused:
        names = group.sites[0].name if len(group.sites) == 1 else f"{len(group.sites)} tensors"
        _log.info("%s: %s of %s codewords were unused and are put back to use", names, reused, len(values))


def _clusters(group: GroupState, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and squared error of the weights nearest to each codeword, float64[B K] each."""
    flat = codebooks.reshape(-1).double()
    count, first, second = torch.zeros(3, len(flat), dtype=torch.float64, device=flat.device)
    scales = _scales(group)
    for site in group.sites:
        master = group.master_weight(site).detach() / (scales[site] if scales else 1)
        kept = ~group.pruned(site).reshape(-1)
        indices, weights = nearest_by_row(master.float(), codebooks).reshape(-1), master.reshape(-1)
        for block in cache_chunks(
            weights
        ):  # in double precision all of a layer would be a large part of a step's memory
            found = indices[block][kept[block]]
            offset = weights[block][kept[block]].double() - flat[found]
            count += torch.bincount(found, minlength=len(flat))
            first += torch.bincount(found, offset, len(flat))
            second += torch.bincount(found, offset.square(), len(flat))
    shift = first / count.clamp(min=1)
    return count, flat + shift, (second - first * shift).clamp(min=0)
