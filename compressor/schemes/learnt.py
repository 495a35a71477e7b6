"""Learnt assignment: weights, codebook and the assignment between them are trained together."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.calibration.error_feedback import Round, compensate, nearest_codeword
from compressor.calibration.price import MOST_STEPS, grid_step
from compressor.clustering.kmeans1d import Init, fit_codebook, fit_codebook_of_each_slice, spread
from compressor.formats.content import Grid
from compressor.ops.gather_scatter import straight_through
from compressor.ops.nearest import nearest, nearest_by_row
from compressor.ops.parallel import cache_chunks
from compressor.ops.soft_assignment import soft_gradient
from compressor.sharing.code_length import CodeLength
from compressor.sharing.curvature import Curvature, diagonals
from compressor.sharing.export import SharedTensors, export_grid, export_scalars, export_slices
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

_log = logging.getLogger(__name__)

# Buffers of the group; the names are in checkpoints.
SCALES = "scales"  # float32[sites]: what the weights of each site are divided by; only with group="network"
RESEEDS_DONE = "reseeds"  # int64 scalar
TEMPERATURE = "temperature"  # float64 scalar, in halves of the mean squared spacing of the codewords

UNMEASURED_PRICE = 1e-7  # of a bit in training, where ``rate`` is that of squared errors of weights
RESEEDS = 10  # times in a training run that unused codewords are moved to where weights are
LAST_RESEED = 0.8  # progress after which they are not moved any more, so that the network can adapt
FINAL_TEMPERATURE = 0.01  # at the end of training, as a share of the first


@register
@dataclass(frozen=True)
class Learnt(Scheme):
    """Assigns each weight to its nearest codeword in every step, and trains weights and codewords together.

    With ``w`` the N master weights of a tensor, ``c`` its K codewords, ``a`` the N indices and L the loss::

        a_i = argmin_k (w_i - c_k)^2                    in every step
        weight_i = c[a_i]
        dL/dc_k = sum of dL/dweight_i over a_i = k
        dL/dw_i = dL/dweight_i                          straight-through

    Stock operators compute the same: a 1x1 convolution to the logits ``2 w c_k - c_k^2``, a max-pooling over channels,
    a deconvolution by ``c``. The network computes with exactly what the file will hold, so nothing changes when
    training ends.

    ``soft`` keeps the forward pass and takes the gradients of DKM's soft assignment, at temperature tau::

        p_ik = softmax over k of -(w_i - c_k)^2 / tau
        soft_i = sum of p_ik c_k over k                 dsoft_i/dw_i = 2 Var_i(c) / tau,  Var_i under p_i

    That slope is near 1 for every weight where tau is half the squared spacing of the codewords; straight-through is
    that slope exactly, at the cost of one lookup. At DKM's customary 1e-4 it is below 0.1 for 98 % of the weights.

    Args:
        codewords: K, the number of values a tensor may take, 1 to 65,536; default 16.
        group: "site", the default: a codebook for each tensor; "channel": one for each slice of its axis 0, the output
            channels of all but transposed convolutions, if those have more weights than codewords; "network": one for
            all tensors, of weights divided by a power of two near each tensor's spread, which the file stores.
        rate: the price of a bit of the file, in the loss of one image; 0, the default: none. With a price the codebook
            is a grid through zero that training leaves as it is; its step follows from price and curvature, and
            ``codewords``, ``group`` and ``init`` are not used. What the bits cost is in the loss of the training, see
            ``CodeLength``. Useful prices are 1e-9 to 1e-6.
        soft: 0, the default: straight-through; above, to 100: tau at the start of training, in halves of the mean
            squared spacing of the codewords. It is cooled to a hundredth of that.
        init: the k-means of the first codebook: "optimal", the default, "linear", "density" or "quantile", see
            ``kmeans1d.optimal_codebook``.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.0, 0.25, 1.0, 1.25]])
        >>> job = Compressor(layer, Policy([Rule("*", scheme="learnt", codewords=2)]), teacher=None).prepare()
        >>> job.model.weight.tolist()
        [[0.125, 0.125, 1.125, 1.125]]
        >>> group = job.groups[0]
        >>> group.master_weight(group.sites[0]).data[0, 1] = 0.75  # training may carry a weight to another codeword
        >>> job.model.weight.tolist()
        [[0.125, 1.125, 1.125, 1.125]]

    Reference: Cho, Alizadeh-Vahid, Adya, Rastegari, "DKM: Differentiable k-Means Clustering Layer", ICLR 2022; for the
    straight-through gradient Bengio, Leonard, Courville, "Estimating or Propagating Gradients Through Stochastic
    Neurons", 2013.
    """

    # Divergence from DKM, whose layer finds the codewords of each step by soft k-means iterations: here they are
    # parameters, learnt from the loss. docs/decisions/0003 has the reasons for straight-through.

    id: ClassVar[str] = "learnt"
    paper: ClassVar[str] = 'after Cho et al., "DKM", ICLR 2022; Chen et al., "HashedNets", ICML 2015'

    codewords: Annotated[int, Field(ge=1, le=65536, strict=True)] = 16
    group: Literal["site", "channel", "network"] = "site"
    rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    soft: Annotated[float, Field(ge=0, le=100)] = 0.0
    init: Init = "optimal"

    @property
    def whole_network(self) -> bool:
        """Whether one codebook serves all tensors."""
        return self.group == "network" and not self.rate

    def stored_values(self, weights: int) -> int:
        """Returns K, one value a codeword."""
        del weights
        return 3 if self.rate else self.codewords  # a grid is three numbers

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets the codebook to that of least squared error, and begins the schedules of reseeding and temperature.

        With a price it is a grid instead. Where the curvature is known, weights make up for each other's errors.
        """
        group.register_buffer(RESEEDS_DONE, torch.zeros((), dtype=torch.int64))
        group.register_buffer(TEMPERATURE, torch.tensor(self.soft, dtype=torch.float64))
        if self.rate:
            self._fit_grid(group, curvature)
            return
        importance = diagonals(curvature)
        if self.whole_network:
            group.register_buffer(SCALES, torch.tensor([spread(group.survivors(site)) for site in group.sites]))
            group.unit.fill_(1.0)
        if self._codebook_count(group) > 1:
            codebook = fit_codebook_of_each_slice(group, self.codewords, importance, self.init).reshape(-1)
        else:
            codebook = fit_codebook(group, self.codewords, importance, self.init, _scales(group))
        group.set_codebook(codebook, learnt=True)
        compensate(group, curvature, lambda site: self._rounding(group, site))

    def _fit_grid(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets the codebook to all multiples of a step that the weights of the tensor round to."""
        (site,) = group.sites
        weights = group.master_weight(site).detach()
        step = grid_step(self.rate, 1.0 if curvature is None else curvature[site].mean, weights)
        compensate(group, curvature, lambda _: lambda column, _: (column / step).round() * step)
        numbers = (weights.float() / step).round().masked_fill(group.pruned(site), 0)
        least, most = (int(end) for end in numbers.aminmax()) if numbers.numel() else (0, 0)
        room = min(2 + (most - least) // 4, MOST_STEPS // 10)  # for weights that training takes beyond the ends
        least, most = min(0, least) - room, max(0, most) + room
        grid = Grid(least * step, step, most - least + 1)
        # Fixed: codewords that move would have to be listed, at four bytes each, where the grid is three numbers.
        group.set_codebook(torch.from_numpy(grid.expand().reshape(-1)).to(weights.device), learnt=False)
        price = self.rate if curvature is not None else min(self.rate, UNMEASURED_PRICE)
        CodeLength.begin(group, price, least, step)

    def _rounding(self, group: GroupState, site: Site) -> Round:
        """Returns the rounding to the codebook, or to that of the slice of each weight."""
        books = group.codebook(self._codebook_count(group)).detach()
        if len(books) == 1:
            return nearest_codeword(books[0])
        size = group.master_weight(site).numel() // len(books)

        def rounded(weights: Tensor, positions: Tensor) -> Tensor:
            own = books[positions // size]
            return own.gather(1, (weights[:, None] - own).abs().argmin(dim=1, keepdim=True))[:, 0]

        return rounded

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the codeword nearest to each master weight, with gradients to both."""
        if self.whole_network:
            scale = group.get_buffer(SCALES)[group.sites.index(site)]
            return self._assign(group, master / scale) * scale
        return self._assign(group, master)

    def _codebook_count(self, group: GroupState) -> int:
        """Returns the number of codebooks of a group, which lie one after the other in its values."""
        shape = group.master_weight(group.sites[0]).shape
        by_channel = not self.rate and self.group == "channel" and math.prod(shape[1:]) > self.codewords
        return shape[0] if by_channel else 1

    def _assign(self, group: GroupState, master: Tensor) -> Tensor:
        """Returns the codeword nearest to each weight, by straight-through or soft gradients."""
        # The codebook is sorted here, because training may have let codewords overtake each other.
        units = group.codebook_scale(self._codebook_count(group))
        rows, codewords = units.rows, len(group.values) // units.rows
        if not self.soft or codewords == 1:
            indices = nearest_by_row(master.detach().float(), group.codebook(rows).detach()) if rows > 1 else None
            return straight_through(master, group.values, indices, units)
        pairs = zip(master.reshape(rows, -1), group.codebook(rows), strict=True)
        return torch.stack([self._assign_softly(group, *pair) for pair in pairs]).view(master.shape)

    def _assign_softly(self, group: GroupState, master: Tensor, codebook: Tensor) -> Tensor:
        """Returns the codeword nearest to each weight, with the gradients of the soft assignment."""
        indices = nearest(master.detach().float(), codebook.detach())
        half_spacing = float(codebook.detach().diff().square().mean()) / 2
        smallest = torch.finfo(torch.float32).tiny  # all codewords may have become equal
        tau = max(float(group.get_buffer(TEMPERATURE)) * half_spacing, smallest)
        return soft_gradient(master, codebook, indices, tau)

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Cools the temperature, and at every tenth of the training moves codewords that no weight uses.

        With a price, it counts the indices now and then, and nothing else.
        """
        if self.rate:
            CodeLength(group).on_step()
            return None
        group.get_buffer(TEMPERATURE).fill_(self.soft * FINAL_TEMPERATURE**progress)
        due, done = math.floor(min(progress, LAST_RESEED) * RESEEDS), group.get_buffer(RESEEDS_DONE)
        if due > int(done) and progress < 1:  # at the end it would change what was trained
            done.fill_(due)
            _reseed(group, self._codebook_count(group))
        return None

    def penalty(self, group: GroupState, task: Tensor) -> Tensor | None:
        """Returns the price of the bits that all indices take; None without a price."""
        del task
        return CodeLength(group).penalty() if self.rate else None

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the codebook or codebooks, and the index of each weight's nearest codeword."""
        codebooks = group.codebook(self._codebook_count(group)).detach()
        if self.rate and (grid := _exact_grid(group, codebooks[0])) is not None:
            (site,) = group.sites
            numbers = nearest(group.master_weight(site).detach().float(), codebooks[0]) + grid[0]
            return export_grid(group, grid[1], {site: numbers})
        if len(codebooks) > 1:
            rows = group.master_weight(group.sites[0]).detach().float()
            return export_slices(group, codebooks, nearest_by_row(rows, codebooks) % codebooks.shape[1])
        codebook, scales = codebooks[0], _scales(group)
        masters = {site: group.master_weight(site).detach() / (scales[site] if scales else 1) for site in group.sites}
        indices = {site: nearest(master.float(), codebook) for site, master in masters.items()}
        return export_scalars(group, codebook, indices, scales)


def _exact_grid(group: GroupState, codebook: Tensor) -> tuple[int, float] | None:
    """Returns the least number of steps, and the step, of a codebook; None where another dtype has rounded it."""
    least, step = CodeLength(group).grid
    grid = Grid(least * step, step, len(codebook))
    same = bool((torch.from_numpy(grid.expand().reshape(-1)).to(codebook.device) == codebook).all())
    return (least, step) if same else None


def _scales(group: GroupState) -> dict[Site, float] | None:
    """Returns what the weights of each site are divided by; None where each site has its own codebook."""
    if SCALES not in dict(group.named_buffers()):
        return None
    return dict(zip(group.sites, group.get_buffer(SCALES).tolist(), strict=True))


def _reseed(group: GroupState, codebook_count: int) -> None:
    """Splits a cluster for each codeword that no weight uses: the one with most squared error in the same codebook.

    An unused codeword has no gradient, so training alone would never use it again. The halves of a normal or uniform
    cluster have their means about 0.8 standard deviations from the middle, and an eighth of the squared error each.
    """
    values = group.values.detach()
    codewords = len(values) // codebook_count
    first = torch.arange(0, len(values), codewords, device=values.device)
    order = (values.view(codebook_count, -1).argsort() + first[:, None]).reshape(-1)
    count, mean, error = _clusters(group, (values[order] * group.unit).view(codebook_count, -1))
    reseeded = 0
    for unused in torch.nonzero(count == 0).flatten().tolist():
        start = unused // codewords * codewords
        widest = start + int(error[start : start + codewords].argmax())
        if float(error[widest]) <= 0:
            continue
        offset = 0.8 * (error[widest] / count[widest]).sqrt()
        mean[unused], mean[widest] = mean[widest] - offset, mean[widest] + offset
        for half in (unused, widest):
            values[order[half]] = (mean[half] / group.unit).to(values.dtype)
        count[unused] = count[widest] = count[widest] / 2
        error[unused] = error[widest] = error[widest] / 8
        reseeded += 1
    if reseeded:
        names = group.sites[0].name if len(group.sites) == 1 else f"{len(group.sites)} tensors"
        _log.info("%s: %s of %s codewords were unused and are put back to use", names, reseeded, len(values))


def _clusters(group: GroupState, codebooks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns count, mean and squared error of the weights nearest to each codeword, float64[B K] each.

    Args:
        codebooks: float32[B, K], each ascending.
    """
    flat = codebooks.reshape(-1).double()
    count, first, second = torch.zeros(3, len(flat), dtype=torch.float64, device=flat.device)
    scales = _scales(group)
    for site in group.sites:
        master = group.master_weight(site).detach() / (scales[site] if scales else 1)
        kept = ~group.pruned(site).reshape(-1)
        indices, weights = nearest_by_row(master.float(), codebooks).reshape(-1), master.reshape(-1)
        # In chunks, because a layer in double precision would be a large part of a step's memory.
        for chunk in cache_chunks(weights):
            nearest_here = indices[chunk][kept[chunk]]
            offset = weights[chunk][kept[chunk]].double() - flat[nearest_here]
            count += torch.bincount(nearest_here, minlength=len(flat))
            first += torch.bincount(nearest_here, offset, len(flat))
            second += torch.bincount(nearest_here, offset.square(), len(flat))
    shift = first / count.clamp(min=1)
    return count, flat + shift, (second - first * shift).clamp(min=0)
