"""Fixed point: the weights are whole multiples of a power of two, rounded to nearest or stochastically."""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.autograd import Function

from compressor.calibration.error_feedback import Round, compensate
from compressor.formats.content import Grid, SharedTensor, index_dtype
from compressor.sharing.curvature import Curvature
from compressor.sharing.export import DTYPE_NAMES, SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

# Buffers of the group; the names are in checkpoints. Stochastic rounding depends on nothing else, so that a resumed
# training draws as one that was not interrupted does: the state of a torch generator would not be saved.
FRACTION_BITS = "fraction_bits"  # int64[sites]: FL of each site
SEED = "seed"  # int64 scalar: the seed that torch had when training began
STEPS = "steps"  # int64 scalar: calls of on_step
TRAINED = "settled"  # bool scalar: whether training is over, from where on rounding is to nearest

MIN_BITS, MAX_BITS = 2, 16
MAX_FL, MIN_FL = 126, -112  # 2^-FL and its inverse are then normal numbers of float32


@register
@dataclass(frozen=True)
class Fixed(Scheme):
    """Rounds weights to fixed-point numbers of so many bits, to nearest or stochastically.

    With FL fraction bits, ``IL = bits - FL`` integer bits, the sign among them, and ``eps = 2^-FL``, the values are::

        -2^(IL-1), ..., -eps, 0, eps, ..., 2^(IL-1) - eps

    A weight beyond them takes the nearest end. With ``f`` the largest value not above the weight ``w``::

        nearest         f where w - f < eps / 2, else f + eps
        stochastic      f + eps with probability (w - f) / eps, else f: the mean is w

    With a master copy the optimiser moves dense weights, the network computes with them rounded, and gradients pass
    straight through. Without one the weights themselves are rounded after each step, as in the paper: to nearest, steps
    below ``eps / 2`` are lost for ever; stochastically they count on average.

    Args:
        bits: bits of a weight, 2 to 16; default 8.
        fraction_bits: FL, -112 to 126; "auto", the default: for each tensor the most with which the magnitude of its
            largest weight is below ``2^(IL-1)``.
        rounding: "nearest", halves up, the default; or "stochastic".
        master_copy: whether training keeps dense weights beside the rounded ones; default True.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.75, -0.3, 0.125, 0.1]])
        >>> job = Compressor(layer, Policy([Rule("*", scheme="fixed", bits=3)]), teacher=None).prepare()
        >>> job.model.weight.tolist()  # multiples of 1/4 from -1 to 3/4
        [[0.75, -0.25, 0.25, 0.0]]

    Reference: Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited Numerical Precision", ICML 2015.
    """

    id: ClassVar[str] = "fixed"
    paper: ClassVar[str] = 'Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015'
    bits_range: ClassVar[tuple[int, int]] = MIN_BITS, MAX_BITS

    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS, strict=True)] = 8
    fraction_bits: Annotated[int, Field(ge=MIN_FL, le=MAX_FL, strict=True)] | Literal["auto"] = "auto"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    master_copy: bool = True

    def stored_values(self, weights: int) -> int:
        """Returns 3: the grid is stored as its smallest value, its step and its length."""
        del weights
        return 3

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets the fraction bits of each tensor; with curvature, weights make up for each other's errors."""
        fraction_bits = [_fraction_bits(group, site, self) for site in group.sites]
        group.register_buffer(FRACTION_BITS, torch.tensor(fraction_bits))
        group.register_buffer(SEED, torch.tensor(_torch_seed()))
        group.register_buffer(STEPS, torch.zeros((), dtype=torch.int64))
        group.register_buffer(TRAINED, torch.zeros((), dtype=torch.bool))
        compensate(group, curvature, lambda site: _rounding(_grid(group, site, self)))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the master weights rounded, with the gradient passed straight through to them."""
        # Divergence: the paper rounds stochastically after updates only; with a master copy the forward pass does. In
        # evaluation and after the last step it rounds to nearest, so that what is evaluated is what is stored.
        stochastic = self.master_copy and group.training and not bool(group.get_buffer(TRAINED))
        rounded = _round(group, site, master, self, stochastic)
        result: Tensor = _StraightThrough.apply(master, rounded)
        return result

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Begins a new draw; without a master copy, rounds the weights that the optimiser has moved."""
        if progress == 0:
            group.get_buffer(SEED).fill_(_torch_seed())
        group.get_buffer(STEPS).add_(1)
        group.get_buffer(TRAINED).fill_(progress >= 1)
        if not self.master_copy:
            for site in group.sites:
                # Divergence: the paper has plain gradient descent; an optimiser's state stays in floating point here.
                master = group.master_weight(site)
                master.copy_(_round(group, site, master, self, stochastic=progress > 0))
        return None

    def export(self, group: GroupState) -> SharedTensors:
        """Returns a grid for each tensor, stored as three numbers, and the steps of its weights."""
        books: list[Grid] = []
        tensors: dict[str, SharedTensor] = {}
        for site in group.sites:
            master, grid = group.master_weight(site).detach(), _grid(group, site, self)
            steps = _nearest_steps(master.float(), grid).masked_fill(group.pruned(site), 0) - grid.least
            indices = steps.cpu().numpy().reshape(-1).astype(index_dtype(grid.count))
            tensors[site.name] = SharedTensor(tuple(master.shape), len(books), indices, DTYPE_NAMES[master.dtype])
            books.append(Grid(grid.least * grid.step, grid.step, grid.count))
        return SharedTensors(tuple(books), tensors)


@plain_dataclass(frozen=True)
class FixedPointGrid:
    """The values of a tensor: ``step`` times the whole numbers from ``least`` to ``most``.

    Args:
        step: eps, a power of two.
        least: the smallest value in steps, <= 0.
        most: the largest value in steps, >= 0.
    """

    step: float
    least: int
    most: int

    @property
    def count(self) -> int:
        """The number of values."""
        return self.most - self.least + 1


class _StraightThrough(Function):
    """The rounded weights; their gradient goes to the master weights, to those beyond the ends of the grid too."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def round_nearest(scaled: Tensor) -> Tensor:
    """Returns the nearest whole numbers, halves rounded up: float32[shape].

    Args:
        scaled: float32[shape], weights in steps.

    Example:
        >>> round_nearest(torch.tensor([-1.5, -0.5, 0.49999997, 0.5, 1.5, 2.5])).tolist()
        [-1.0, 0.0, 0.0, 1.0, 2.0, 3.0]
    """
    below = scaled.floor()
    return below + (scaled - below >= 0.5)  # floor(x + 0.5) is 1 for 0.49999997, because the sum is rounded itself


def round_stochastic(scaled: Tensor, uniform: Tensor) -> Tensor:
    """Returns whole numbers next to the given ones, rounded up where the fraction exceeds the drawn number.

    Args:
        scaled: float32[shape], weights in steps.
        uniform: float32[shape], drawn uniformly from [0, 1).

    Example:
        >>> round_stochastic(torch.tensor([-1.0, 0.25, 0.25]), torch.tensor([0.0, 0.2, 0.3])).tolist()
        [-1.0, 1.0, 0.0]
    """
    below = scaled.floor()
    return below + (uniform < scaled - below)


def _round(group: GroupState, site: Site, master: Tensor, scheme: Fixed, stochastic: bool) -> Tensor:
    """Returns the rounded weights of a site, float32[shape]; to nearest unless both flag and scheme are stochastic."""
    master, grid = master.detach().float(), _grid(group, site, scheme)
    if not stochastic or scheme.rounding == "nearest":
        return _nearest_steps(master, grid) * grid.step
    # One draw for each step and tensor, the same on all devices. A CRC because torch takes 32 bits of a seed.
    seed, steps = int(group.get_buffer(SEED)), int(group.get_buffer(STEPS))
    draw_seed = zlib.crc32(f"{seed} {steps} {site.name}".encode())
    uniform = torch.rand(master.shape, generator=torch.Generator().manual_seed(draw_seed)).to(master.device)
    return round_stochastic(master / grid.step, uniform).clamp_(grid.least, grid.most) * grid.step


def _nearest_steps(master: Tensor, grid: FixedPointGrid) -> Tensor:
    """Returns the weights rounded to nearest, in steps of the grid: float32[shape]."""
    return round_nearest(master / grid.step).clamp_(grid.least, grid.most)


def _torch_seed() -> int:
    """Returns the number torch was last seeded with, cut to the range of int64."""
    return torch.initial_seed() & (1 << 63) - 1


def _rounding(grid: FixedPointGrid) -> Round:
    return lambda weights, _: _nearest_steps(weights, grid) * grid.step


def _fraction_bits(group: GroupState, site: Site, scheme: Fixed) -> int:
    if scheme.fraction_bits != "auto":
        return scheme.fraction_bits
    weights = group.survivors(site)
    exponent = math.frexp(float(weights.abs().max()) if len(weights) else 0.0)[1]  # the largest is below 2^exponent
    return min(scheme.bits - 1 - exponent, MAX_FL)


def _grid(group: GroupState, site: Site, scheme: Fixed) -> FixedPointGrid:
    step = 2.0 ** -int(group.get_buffer(FRACTION_BITS)[group.sites.index(site)])
    half = 1 << (scheme.bits - 1)
    largest_finite = torch.finfo(group.master_weight(site).dtype).max  # beyond it values would be stored as infinity
    steps = int(min(largest_finite / step, half))
    return FixedPointGrid(step, -steps, min(steps, half - 1))
