"""Fixed point: weights are whole multiples of a power of two, rounded to nearest or at random."""

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

from compressor.formats.content import Grid, SharedTensor, index_dtype
from compressor.sharing.export import DTYPE_NAMES, SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

LEAST_BITS, MOST_BITS = 2, 16
FINEST, COARSEST = 126, -112  # fraction bits: 2^-FL and its inverse are normal numbers of float32


@register
@dataclass(frozen=True)
class Fixed(Scheme):
    """Keep weights on the grid of two's complement fixed point: ``eps k`` for whole ``k``, with ``eps = 2^-FL``.

    Of ``bits``, FL are behind the point and ``IL = bits - FL`` before it, the sign among them. The values are
    ``-2^(IL-1)`` to ``2^(IL-1) - eps``; what is beyond takes the nearest end. To nearest, halves round up. At random, a
    weight rounds up with the probability of its distance from the value below, so that its mean is itself.

    With a master copy the optimiser moves float weights, and the network computes with them rounded, gradients passing
    straight through. Without, the weights are rounded after every step and nothing else remembers them, as in the
    paper: to nearest, steps below ``eps / 2`` are then lost for ever, and at random they count on average.

    Args:
        bits: of a weight.
        fraction_bits: FL; "auto": for each tensor the most with which its largest weight is less than ``2^(IL-1)``.
        rounding: "nearest" or "stochastic".
        master_copy: whether training keeps the weights in floating point beside the rounded ones.

    Reference: Gupta, Agrawal, Gopalakrishnan, Narayanan, "Deep Learning with Limited Numerical Precision", ICML 2015.
    """

    id: ClassVar[str] = "fixed"
    paper: ClassVar[str] = 'Gupta et al., "Deep Learning with Limited Numerical Precision", ICML 2015'
    bits_taken: ClassVar[tuple[int, int]] = LEAST_BITS, MOST_BITS

    bits: Annotated[int, Field(ge=LEAST_BITS, le=MOST_BITS, strict=True)] = 8
    fraction_bits: Annotated[int, Field(ge=COARSEST, le=FINEST, strict=True)] | Literal["auto"] = "auto"
    rounding: Literal["nearest", "stochastic"] = "nearest"
    master_copy: bool = True

    def stored_values(self, weights: int) -> int:
        """The grid's least value, its step, and how many there are."""
        del weights
        return 3

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Choose the place of the point."""
        del importance  # the range follows from the largest weight alone
        places = [_fraction_bits(group, site, self) for site in group.sites]
        group.register_buffer("fraction_bits", torch.tensor(places))
        # All that random rounding depends on is in buffers, so that a resumed training rounds as one that was not
        # interrupted: a torch generator's state would not be among what is saved.
        group.register_buffer("seed", torch.tensor(_seed()))
        group.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        group.register_buffer("settled", torch.zeros((), dtype=torch.bool))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Round the master weights; at random where a network in training has a master copy of them."""
        # The paper rounds at random after updates only. With a master copy the forward pass does: so it is to nearest
        # in evaluation and from the last step on, that what is evaluated is what is stored.
        drawn = self.master_copy and group.training and not bool(group.get_buffer("settled"))
        rounded = _rounded(group, site, master, self, drawn)
        result: Tensor = _StraightThrough.apply(master, rounded)
        return result

    def on_step(self, group: GroupState, progress: float) -> float | None:
        """Draw anew; without a master copy, round the weights that the optimiser has moved."""
        if progress == 0:
            group.get_buffer("seed").fill_(_seed())
        group.get_buffer("steps").add_(1)
        group.get_buffer("settled").fill_(progress >= 1)
        if not self.master_copy:
            for site in group.sites:
                # The optimiser's own state stays in floating point; the paper has plain gradient descent.
                master = group.master_weight(site)
                master.copy_(_rounded(group, site, master, self, drawn=progress > 0))
        return None

    def export(self, group: GroupState) -> SharedTensors:
        """Give a grid for each tensor: three numbers."""
        books: list[Grid] = []
        tensors: dict[str, SharedTensor] = {}
        for site in group.sites:
            master, point = group.master_weight(site).detach(), _point(group, site, self)
            steps = _to_nearest(master.float(), point).masked_fill(group.pruned(site), 0) - point.least
            indices = steps.cpu().numpy().reshape(-1).astype(index_dtype(point.count))
            tensors[site.name] = SharedTensor(tuple(master.shape), len(books), indices, DTYPE_NAMES[master.dtype])
            books.append(Grid(point.least * point.step, point.step, point.count))
        return SharedTensors(tuple(books), tensors)


@plain_dataclass(frozen=True)
class Point:
    """The values of a tensor: ``step`` times the whole numbers from ``least`` to ``most``."""

    step: float
    least: int
    most: int

    @property
    def count(self) -> int:
        """How many values there are."""
        return self.most - self.least + 1


class _StraightThrough(Function):
    """Give the second in place of the first, and the gradient to the first; beyond the ends of the grid too."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, rounded: Tensor) -> Tensor:
        ctx.dtype = master.dtype
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def round_nearest(scaled: Tensor) -> Tensor:
    """Round to whole numbers, halves up; ``floor(x + 0.5)`` would not, where the sum is rounded itself.

    >>> round_nearest(torch.tensor([-1.5, -0.5, 0.49999997, 0.5, 1.5, 2.5])).tolist()
    [-1.0, 0.0, 0.0, 1.0, 2.0, 3.0]
    """
    below = scaled.floor()
    return below + (scaled - below >= 0.5)


def round_stochastic(scaled: Tensor, uniform: Tensor) -> Tensor:
    """Round up to whole numbers where the distance from the one below is more than a number drawn from [0, 1).

    >>> round_stochastic(torch.tensor([-1.0, 0.25, 0.25]), torch.tensor([0.0, 0.2, 0.3])).tolist()
    [-1.0, 1.0, 0.0]
    """
    below = scaled.floor()
    return below + (uniform < scaled - below)


def _rounded(group: GroupState, site: Site, master: Tensor, scheme: Fixed, drawn: bool) -> Tensor:
    """Round a site's weights, at random if ``drawn`` and the scheme says so: float32 of its shape."""
    master, point = master.detach().float(), _point(group, site, scheme)
    if not drawn or scheme.rounding == "nearest":
        return _to_nearest(master, point) * point.step
    # One draw for each step and tensor, and the same on all devices; torch takes 32 bits of a seed.
    seed, steps = int(group.get_buffer("seed")), int(group.get_buffer("steps"))
    drawn_from = zlib.crc32(f"{seed} {steps} {site.name}".encode())
    uniform = torch.rand(master.shape, generator=torch.Generator().manual_seed(drawn_from)).to(master.device)
    return round_stochastic(master / point.step, uniform).clamp_(point.least, point.most) * point.step


def _to_nearest(master: Tensor, point: Point) -> Tensor:
    """Give the number of steps of each weight: whole float32."""
    return round_nearest(master / point.step).clamp_(point.least, point.most)


def _seed() -> int:
    """Give what torch was last seeded with, in the range of int64."""
    return torch.initial_seed() & (1 << 63) - 1


def _fraction_bits(group: GroupState, site: Site, scheme: Fixed) -> int:
    if scheme.fraction_bits != "auto":
        return scheme.fraction_bits
    weights = group.survivors(site)
    exponent = math.frexp(float(weights.abs().max()) if len(weights) else 0.0)[1]  # the largest is below 2^exponent
    return min(scheme.bits - 1 - exponent, FINEST)


def _point(group: GroupState, site: Site, scheme: Fixed) -> Point:
    step = 2.0 ** -int(group.get_buffer("fraction_bits")[group.sites.index(site)])
    half = 1 << (scheme.bits - 1)
    most = torch.finfo(group.master_weight(site).dtype).max  # what is beyond would be stored as infinity
    finite = int(min(most / step, half))
    return Point(step, -finite, min(finite, half - 1))
