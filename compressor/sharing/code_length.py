"""The length of the code of a group's indices, and its price in the loss, while training changes both.

A group whose scheme has a price has these buffers, so that checkpoints and copies carry them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats.content import Grid
from compressor.ops.nearest import nearest
from compressor.ops.rate_gradient import with_rate_gradient
from compressor.sharing.group_state import GroupState

__all__ = ["STEPS_BETWEEN_COUNTS", "CodeLength", "is_priced", "lengths_of"]

# Names of buffers, which are in checkpoints.
GRID = "grid"  # float64[2]: the least number of steps, and the step
PRICE = "price"  # float64 scalar: of a bit, in the loss of one image
BITS = "bits"  # float64 scalar: that all indices took when they were last counted
SLOPES = "slopes"  # float32[K - 1]: bits for each unit of weight, between each codeword and the next
ERROR = "error"  # float64 scalar: how far the file was from a target, see ``lifecycle.size_control``
REST = "rest"  # float64 scalar: bytes of the file beside the coded indices, likewise
TARGET = "target"  # float64 scalar: bytes of the file that are wanted, likewise
STEPS = "steps"  # int64 scalar: of the training

STEPS_BETWEEN_COUNTS = 20
"""Steps of a training after which the indices are counted anew."""
UNSEEN = 0.5  # how often a codeword counts beside its weights, so that one without any has a code


class CodeLength:
    """The code length of the indices of a group of one tensor on a grid through zero.

    A codeword that n_k of N weights have takes ``-log2((n_k + 1/2) / (N + K/2))`` bits: the entropy coder's lengths,
    but for codewords that no weight has. Between codewords the length is taken as linear, so that a weight between the
    codewords k and k + 1 has a gradient of ``(length[k + 1] - length[k]) / step`` bits: it is drawn to the cheaper one,
    and those between zero and its neighbours to zero.

    Args:
        group: of one tensor, with the buffers that ``begin`` registers.

    Reference: Wiedemann, Marban, Mueller, Samek, "Entropy-Constrained Training of Deep Neural Networks", IJCNN 2019,
    for the price of the entropy; here the gradient is a difference of code lengths.
    """

    def __init__(self, group: GroupState) -> None:
        self.group = group

    @classmethod
    def begin(cls, group: GroupState, price: float, least: int, step: float) -> CodeLength:
        """Registers the buffers of a group whose codebook is a grid, and counts its indices.

        Args:
            group: of one tensor.
            price: of a bit.
            least: the number of steps of the first codeword.
            step: between codewords.
        """
        device, float64 = group.unit.device, torch.float64
        group.register_buffer(GRID, torch.tensor([least, step], dtype=float64))
        group.register_buffer(PRICE, torch.tensor(price, dtype=float64, device=device))
        group.register_buffer(BITS, torch.zeros((), dtype=float64, device=device))
        group.register_buffer(ERROR, torch.zeros((), dtype=float64, device=device))
        group.register_buffer(REST, torch.zeros((), dtype=float64, device=device))
        group.register_buffer(TARGET, torch.zeros((), dtype=float64, device=device))
        group.register_buffer(SLOPES, torch.zeros(group.codeword_count - 1, device=device))
        group.register_buffer(STEPS, torch.zeros((), dtype=torch.int64))
        result = cls(group)
        result.count()
        return result

    @property
    def grid(self) -> tuple[int, float]:
        """The number of steps of the first codeword, and the step."""
        least, step = self.group.get_buffer(GRID).tolist()
        return int(least), step

    @property
    def bits(self) -> float:
        """The bits that all indices took when they were last counted: their order-0 entropy."""
        return float(self.group.get_buffer(BITS))

    @property
    def price(self) -> float:
        """The price of a bit."""
        return float(self.group.get_buffer(PRICE))

    @property
    def error(self) -> float:
        """What was noted when the price was last changed."""
        return float(self.group.get_buffer(ERROR))

    def reprice(self, price: float, error: float) -> None:
        """Sets the price of a bit, and notes for what error."""
        self.group.get_buffer(PRICE).fill_(price)
        self.group.get_buffer(ERROR).fill_(error)

    @property
    def rest(self) -> float:
        """What was noted of the bytes beside the coded indices."""
        return float(self.group.get_buffer(REST))

    @rest.setter
    def rest(self, size: float) -> None:
        self.group.get_buffer(REST).fill_(size)

    @property
    def target(self) -> float:
        """What was noted of the bytes of the file that are wanted."""
        return float(self.group.get_buffer(TARGET))

    @target.setter
    def target(self, size: float) -> None:
        self.group.get_buffer(TARGET).fill_(size)

    def rescale(self, factor: float) -> None:
        """Multiplies the step of the grid, and counts the indices, which take more bits where it is smaller.

        Args:
            factor: of the step; the grid keeps its number of codewords, and shrinks or grows.
        """
        least, step = self.grid
        step = float(torch.tensor(step * factor, dtype=torch.float32))
        values = torch.from_numpy(Grid(least * step, step, self.group.codeword_count).expand().reshape(-1))
        self.group.get_buffer(GRID)[1] = step
        self.group.set_codebook(values.to(self.group.unit.device), learnt=False)
        self.count()

    @property
    def master(self) -> Tensor:
        """The master weights, float[shape], without gradient."""
        (site,) = self.group.sites
        return self.group.master_weight(site).detach()

    def counts(self) -> Tensor:
        """Returns how often each codeword occurs, int64[K]; pruned weights are zeros."""
        (site,), master = self.group.sites, self.master.float()
        master = master.masked_fill(self.group.pruned(site), 0) if self.group.has_zeros else master
        indices = nearest(master, self.group.codebook().detach()).reshape(-1)
        return torch.bincount(indices, minlength=self.group.codeword_count)

    @torch.no_grad()
    def count(self) -> None:
        """Counts how often each codeword occurs, and sets code lengths by that."""
        counts = self.counts()
        seen = counts[counts > 0].double()
        self.group.get_buffer(BITS).copy_((seen * (seen.sum() / seen).log2()).sum())
        self.group.get_buffer(SLOPES).copy_(lengths_of(counts).diff() / self.grid[1])

    def on_step(self) -> None:
        """Counts the indices anew at every so many steps."""
        steps = self.group.get_buffer(STEPS)
        if int(steps) % STEPS_BETWEEN_COUNTS == 0:
            self.count()
        steps += 1

    def penalty(self) -> Tensor:
        """Returns the price of all bits when they were last counted, a scalar whose gradient is that of the weights."""
        price, grid, (site,) = self.group.get_buffer(PRICE), self.group.get_buffer(GRID), self.group.sites
        cost, slopes = (price * self.group.get_buffer(BITS)).float(), price.float() * self.group.get_buffer(SLOPES)
        line = torch.stack([1 / grid[1], grid[0]]).float()
        return with_rate_gradient(self.group.master_weight(site), cost, slopes, line)


def lengths_of(counts: Tensor) -> Tensor:
    """Returns the bits of the code of each codeword, float64[K], from how often each occurs.

    Example:
        >>> [round(bits, 2) for bits in lengths_of(torch.tensor([3, 0, 1])).tolist()]
        [0.65, 3.46, 1.87]
    """
    return -((counts.double() + UNSEEN) / (counts.sum() + UNSEEN * len(counts))).log2()


def is_priced(group: GroupState) -> bool:
    """Whether the bits of a group have a price in training."""
    return PRICE in dict(group.named_buffers())
