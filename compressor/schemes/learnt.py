"""Learnt assignment: weights, codebook and the assignment between them are trained together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.calibration.error_feedback import compensate
from compressor.calibration.price import MOST_STEPS, grid_step, least_step
from compressor.clustering.granularity import Granularity, GroupSize, VectorLength
from compressor.clustering.kmeans1d import Init
from compressor.clustering.reseeding import reseed
from compressor.formats.content import Grid
from compressor.ops.gather_scatter import straight_through
from compressor.ops.nearest import nearest
from compressor.ops.soft_assignment import soft_gradient
from compressor.sharing.code_length import CodeLength
from compressor.sharing.curvature import Curvature, diagonals
from compressor.sharing.export import SharedTensors, export_grid
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

# Buffers of the group; the names are in checkpoints.
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
        group: "site", the default: a codebook for each tensor; "channel": the same as ``group_size=1``; "network": one
            for all tensors, of weights divided by a power of two near each tensor's spread, which the file stores.
        group_size: G, slices of axis 0 that have a codebook of their own, which are the output channels of all but
            transposed convolutions; 0, the default: all. Slices of no more weights than codewords share one.
        channel_scale: whether the codebook is in units of the root mean square of each output channel, which the file
            stores; default False.
        vector: d, output channels that share an index, 1 to 64; codewords are then vectors, and ``bits`` bits are those
            of d weights. Default 1.
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
    group_size: GroupSize = 0
    channel_scale: bool = False
    vector: VectorLength = 1
    rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    soft: Annotated[float, Field(ge=0, le=100)] = 0.0
    init: Init = "optimal"

    @property
    def whole_network(self) -> bool:
        """Whether one codebook serves all tensors."""
        return self.group == "network" and not self.rate

    @property
    def gains_from_curvature(self) -> bool:
        """Returns True: files of 3 and 4 bits were a quarter smaller, see docs/decisions/0020."""
        return True

    @property
    def granularity(self) -> Granularity:
        """Which weights have a codebook, a factor and an index in common."""
        if self.rate:
            return Granularity(self.codewords)  # a grid for each tensor
        group_size = 1 if self.group == "channel" else self.group_size
        return Granularity(self.codewords, group_size, self.channel_scale, self.vector, self.whole_network)

    def conflict(self) -> str:
        """Returns why these settings contradict each other, by the names they were given; "": they do not."""
        units = {"group_size": self.group_size, "channel_scale": self.channel_scale, "vector": self.vector > 1}
        given = " and ".join(name for name, value in units.items() if value)
        if given and self.rate:
            return f"{given} and rate: a price has one grid for each tensor; leave out one"
        if given and self.group == "network":
            return f"{given} and group=network: the network has one codebook; leave out one"
        if self.group == "channel" and self.group_size > 1:
            return "group_size and group=channel, which is group_size=1: leave out one"
        if self.vector > 1 and self.soft:
            return "vector and soft: only codewords of single weights are assigned softly; leave out one"
        return self.granularity.conflict(self.init, "group=channel" if self.group == "channel" else "group_size")

    @property
    def can_prune(self) -> bool:
        """Whether codewords are single weights: of a vector, one weight cannot be zero by itself."""
        return self.vector == 1

    def stored_values(self, weights: int) -> int:
        """Returns K d, one value an entry of a codeword."""
        del weights
        return 3 if self.rate else self.codewords * self.vector  # a grid is three numbers

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets the codebook to that of least squared error, and begins the schedules of reseeding and temperature.

        With a price it is a grid instead. Where the curvature is known, weights make up for each other's errors.
        """
        group.register_buffer(RESEEDS_DONE, torch.zeros((), dtype=torch.int64))
        group.register_buffer(TEMPERATURE, torch.tensor(self.soft, dtype=torch.float64))
        if self.rate:
            self._fit_grid(group, curvature)
            return
        codebook = self.granularity.fit(group, diagonals(curvature), self.init)
        group.set_codebook(codebook, learnt=True)
        compensate(group, curvature, lambda site: self.granularity.rounding(group, site, codebook))

    def _fit_grid(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets the codebook to all multiples of a step that the weights of the tensor round to."""
        (site,) = group.sites
        weights = group.master_weight(site).detach()
        first = grid_step(self.rate, 1.0 if curvature is None else curvature[site].mean, weights)
        compensate(group, curvature, lambda _: lambda column, _: (column / first).round() * first)
        kept = weights.float().masked_fill(group.pruned(site), 0)  # those that make up for others may have grown
        step = max(first, float(torch.tensor(least_step(kept), dtype=torch.float32)))
        numbers = (kept / step).round()
        least, most = (int(end) for end in numbers.aminmax()) if numbers.numel() else (0, 0)
        room = min(2 + (most - least) // 4, MOST_STEPS // 10)  # for weights that training takes beyond the ends
        least, most = min(0, least) - room, max(0, most) + room
        grid = Grid(least * step, step, most - least + 1)
        # Fixed: codewords that move would have to be listed, at four bytes each, where the grid is three numbers.
        group.set_codebook(torch.from_numpy(grid.expand().reshape(-1)).to(weights.device), learnt=False)
        price = self.rate if curvature is not None else min(self.rate, UNMEASURED_PRICE)
        CodeLength.begin(group, price, least, step)

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the codeword nearest to each master weight, with gradients to both."""
        factor = self.granularity.factor(group, site)
        return (
            self._assign(group, site, master) if factor is None else self._assign(group, site, master / factor) * factor
        )

    def _assign(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the codeword nearest to each weight, by straight-through or soft gradients."""
        # The codebook is sorted here, because training may have let codewords overtake each other.
        units = group.codebook_scale(self.granularity.rows(group))
        if self.soft and len(group.values) > units.rows:
            return self._assign_softly(group, master)
        positions = None
        if units.rows != 1:
            codebooks = group.codebook(units.rows).detach()
            positions = self.granularity.positions(group, site, master.detach().float(), codebooks)
        return straight_through(master, group.values, positions, units)

    def _assign_softly(self, group: GroupState, master: Tensor) -> Tensor:
        """Returns the codeword nearest to each weight, with the gradients of the soft assignment."""
        rows = master.reshape(-1).split(self.granularity.row(group))
        pairs = zip(rows, group.codebook(len(rows)), strict=True)
        return torch.cat([self._assign_row_softly(group, *pair) for pair in pairs]).view(master.shape)

    def _assign_row_softly(self, group: GroupState, master: Tensor, codebook: Tensor) -> Tensor:
        """Returns the codeword of a codebook nearest to each weight of a row, float[n], with the soft gradients."""
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
            reseed(group, self.granularity)
        return None

    def penalty(self, group: GroupState, task: Tensor) -> Tensor | None:
        """Returns the price of the bits that all indices take; None without a price."""
        del task
        return CodeLength(group).penalty() if self.rate else None

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the codebook or codebooks, and the index of each weight's nearest codeword."""
        codebooks = group.codebook(self.granularity.rows(group)).detach()
        if self.rate and (grid := _exact_grid(group, codebooks[0])) is not None:
            (site,) = group.sites
            numbers = nearest(group.master_weight(site).detach().float(), codebooks[0]) + grid[0]
            return export_grid(group, grid[1], {site: numbers})
        positions = {site: self.granularity.nearest(group, site, codebooks) for site in group.sites}
        return self.granularity.export(group, codebooks, positions)


def _exact_grid(group: GroupState, codebook: Tensor) -> tuple[int, float] | None:
    """Returns the least number of steps, and the step, of a codebook; None where another dtype has rounded it."""
    least, step = CodeLength(group).grid
    grid = Grid(least * step, step, len(codebook))
    same = bool((torch.from_numpy(grid.expand().reshape(-1)).to(codebook.device) == codebook).all())
    return (least, step) if same else None
