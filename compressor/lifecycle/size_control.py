"""Control of the size of the file while the weights are trained: a price of a bit that rises and falls."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

from torch import Tensor

from compressor.lifecycle.settling import settle
from compressor.lifecycle.target import NEAR
from compressor.sharing.code_length import STEPS_BETWEEN_COUNTS, CodeLength, is_priced
from compressor.sharing.group import Group
from compressor.training.loop import OnEpoch

__all__ = ["SizeControl", "coded_bytes", "interval"]

_log = logging.getLogger(__name__)

INTEGRAL_TIME = 0.02  # of the training: the time in which a lasting error changes the price as much as a new one does
WANTED = 0.998  # of the target: predictions have a margin, and files become a little smaller as the learning rate falls
GAIN = 8.0  # change of the price for a change of the size, both relative: bytes follow a price slowly, and by less
MOST_CHANGE = 0.7  # of the logarithm of the price, between two counts
LOWEST = 0.03  # times the first price
MEASURED = 20  # times in a training that the file is made, to see what it takes: predictions drift from it
LOOSE = 0.25  # of the first price: below it, a file that is too small is so for another reason
REFINED_UNTIL = 0.5  # of the training, so that weights can follow their grid
BYTES_BY_STEP = 0.7  # relative change of the bytes of indices for one of the step of the grid, about
FINEST = 0.8  # times the step, at once
UNSETTLED = 0.05  # of the target: a last correction that is worth a warning


class SizeControl:
    """Keeps the file that training would end in at a target, by the price of a bit.

    This is dual ascent on the bytes beyond the target, in relative steps. With e the logarithm of predicted to wanted
    bytes, the logarithm of the price follows e times a gain, and a share of that is added whenever indices are counted.
    What is wanted is a little less than the target, which the file must not exceed. The file itself is made now and
    then, for predictions drift. Training frees the bytes of weights on which the loss hardly depends, whatever the
    price is; where that leaves room, all grids are made finer.

    Args:
        groups: of the model; those with a price are controlled, at least one.
        target: bytes of the file.
        size: bytes of the file, were training to end now.
        size_of: returns the bytes of the file, were the model packed now; takes the options of ``settle``.
        coded: bytes by the entropy of the indices of that file; None: of the groups as they are.
        measure: returns the bytes of the file as ``size_of`` does, and leaves the model as it is; None: there is no
            telling before the training has ended.
        curvature: of the weights of a tensor, by its name: what errors of a last rounding cost; None: it is not known.

    Example:
        >>> import torch
        >>> from compressor import Compressor
        >>> job = Compressor(torch.nn.Linear(64, 64), target_size=3_000).prepare()
        >>> job.control.target, job.control.predicted == job.search.size
        (3000, True)

    Reference: Gallego-Posada, Ramirez, Erraqabi, Bengio, Lacoste-Julien, "Controlled Sparsity via Constrained
    Optimization", NeurIPS 2022; the proportional term after Sohrabi, Ramirez, Zhang, Lacoste-Julien, Gallego-Posada,
    "On PI Controllers for Updating Lagrange Multipliers in Constrained Optimization", ICML 2024.
    """

    highest: ClassVar[float] = 1e4
    """The highest price, over the first one."""

    def __init__(
        self,
        groups: Sequence[Group],
        target: int,
        size: int,
        size_of: Callable[..., int],
        coded: float | None = None,
        measure: Callable[[], int] | None = None,
        curvature: Callable[[str], Tensor] | None = None,
    ) -> None:
        self._groups = [group for group in groups if is_priced(group) and not group.frozen]
        self.lengths = [CodeLength(group) for group in self._groups]
        self.first_price, self._size_of, self._measure = self.price, size_of, measure
        self._curvature = curvature
        self._note_target(target)
        coded = self._coded() if coded is None else coded
        self._share = min(1.0, size / coded) if coded else 1.0  # of the entropy: a codec may need fewer bits
        self._note_rest(size - self._share * coded)
        self._pruned_by = max((group.pruning.sparsity_by for group in groups if group.pruning), default=0.0)
        self.is_held = True
        """Whether anything is held in training."""
        self.has_ended = False
        """Whether all steps are done, so that ``settle`` warns of a price that has not converged."""

    @property
    def price(self) -> float:
        """The price of a bit, in the loss of one image."""
        return self.lengths[0].price

    @property
    def predicted(self) -> int:
        """Bytes of the file, were training to end now: by the entropy of the indices when they were last counted."""
        return max(1, round(self.lengths[0].rest + self._share * self._coded()))

    @property
    def target(self) -> int:
        """Bytes of the file that are wanted."""
        return max(1, round(self.lengths[0].target))

    def _coded(self) -> float:
        return sum(length.bits for length in self.lengths) / 8

    def _note_target(self, size: float) -> None:
        for length in self.lengths:
            length.target = size

    def _note_rest(self, size: float) -> None:
        for length in self.lengths:
            length.rest = size

    def on_step(self, steps: int, total_steps: int) -> None:
        """Changes the price where indices have been counted in this step, and pruning will make no more of them zero.

        Args:
            steps: done.
            total_steps: of the training.
        """
        self.has_ended = steps >= total_steps
        if steps % STEPS_BETWEEN_COUNTS or not steps or steps < self._pruned_by * total_steps:
            return
        is_due = steps % interval(total_steps, 1 / MEASURED) == 0 and not self.has_ended
        if is_due and self._measure is not None:
            self._note_rest(self._measure() - self._share * self._coded())
        self._steer(steps, total_steps, is_due)

    def _steer(self, steps: int, total_steps: int, is_due: bool) -> None:
        """Changes price and grids by how far the file is from what is wanted.

        Args:
            steps: done.
            total_steps: of the training.
            is_due: whether the file may have been made in this step.
        """
        self._reprice(total_steps)
        if is_due and steps <= REFINED_UNTIL * total_steps and self.price < LOOSE * self.first_price:
            self._refine()

    @property
    def _error(self) -> float:
        """How far the file is from what is wanted: a logarithm."""
        return math.log(self.predicted / (WANTED * self.target))

    def _reprice(self, total_steps: int) -> None:
        """Changes the price by how far the file is from what is wanted, in a training of so many steps."""
        error, before = self._error, self.lengths[0].error
        change = GAIN * (error - before + STEPS_BETWEEN_COUNTS / interval(total_steps, INTEGRAL_TIME) * error)
        price = self.price * math.exp(min(max(change, -MOST_CHANGE), MOST_CHANGE))
        price = min(max(price, LOWEST * self.first_price), self.highest * self.first_price)
        for length in self.lengths:
            length.reprice(price, error)

    def _refine(self) -> None:
        """Makes all grids finer where the file would be smaller than it may be."""
        if self.predicted < NEAR * self.target:
            factor = max((self.predicted / self.target) ** (1 / BYTES_BY_STEP), FINEST)
            for length in self.lengths:
                length.rescale(factor)

    def following(self, on_epoch: OnEpoch | None, val: object, epochs: int) -> OnEpoch | None:
        """Returns what is to be called after each epoch of a training that begins now.

        Args:
            on_epoch: what would be called otherwise; it is called first.
            val: what the model is evaluated on after each epoch; None: nothing.
            epochs: of the training.
        """
        return on_epoch

    def rank(self, top1: float, size: int) -> tuple[float, ...]:
        """Returns how good a file of this training is, to be compared with others: here the higher top-1 is better.

        Args:
            top1: on the validation images, 0 to 1.
            size: of the file, in bytes.
        """
        return (top1,)

    def settle(self, **options: bool) -> None:
        """Rounds weights to shorter codes where the file would be larger than the target.

        Args:
            options: how the file will be written, where that is not as it was expected.
        """
        size_of = partial(self._size_of, **options)
        if (before := size_of()) <= self.target:
            return
        free = [CodeLength(group) for group in self._groups if not group.frozen]  # some may have been frozen since
        size = settle(free, self.target, before, size_of, self._curvature)
        if self.has_ended and before - self.target > UNSETTLED * self.target:
            _log.warning(
                "training ended at %s bytes, and rounding to shorter codes has made it %s: the price of a bit had not "
                "converged for a target of %s; train longer",
                f"{before:,}", f"{size:,}", f"{self.target:,}",
            )  # fmt: skip


def interval(total_steps: int, share: float) -> int:
    """Returns about a share of the steps of a training, a multiple of those between two counts."""
    return max(round(share * total_steps / STEPS_BETWEEN_COUNTS), 1) * STEPS_BETWEEN_COUNTS


def coded_bytes(groups: Sequence[Group]) -> float:
    """Returns the bytes of the indices that training changes, by their entropy, of groups whose rounds have ended."""
    lengths = [CodeLength(group) for group in groups if is_priced(group) and not group.frozen]
    for length in lengths:
        length.count()
    return sum(length.bits for length in lengths) / 8
