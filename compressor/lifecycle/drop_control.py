"""Control of the accuracy while the weights are trained: the file becomes smaller as long as top-1 allows it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn

from compressor.lifecycle.size_control import BYTES_BY_STEP, SizeControl, interval
from compressor.sharing.code_length import STEPS_BETWEEN_COUNTS
from compressor.sharing.group import Group
from compressor.training.evaluation import evaluate
from compressor.training.loop import Epoch, OnEpoch

__all__ = ["DropControl", "TopOneDrop", "next_share", "shrinking"]

_log = logging.getLogger(__name__)

SMALLEST = 0.4  # of the bytes of indices before training, if every epoch allows it: about what training gains
LEAST_SHARE = 0.65  # of the bytes of indices that one epoch keeps at least
SLACK = 0.1  # of the dense model's errors, by which a drop at the beginning of a training may be an over-estimate
MOST_SLACK = 4.0  # times that, beyond which it is none
CLOSE = 0.03  # a logarithm: bytes that the price is left to correct, and not the grid
GLIDE, GLIDE_TIME = 3.0, 0.05  # times, by which grids become coarser at most, in this part of the training
MOST_COARSER = 1.15  # times, at once: in a training of a few counts the weights could not follow, and all be lost
COARSENED_UNTIL = 0.75  # of the training


class TopOneDrop:
    """Measures how many points of top-1 a model has lost against the dense one.

    Args:
        val: batches (inputs, targets) that can be gone through again.
        dense: the dense model, as it is now.

    Attributes:
        dense: its top-1, 0 to 1.
    """

    def __init__(self, val: Any, dense: nn.Module) -> None:
        self.val, self.dense = val, evaluate(dense, val).top1

    def __call__(self, model: nn.Module) -> float:
        """Returns the points that a model has lost."""
        return 100 * (self.dense - evaluate(model, self.val).top1)


class DropControl(SizeControl):
    """Makes the file smaller from epoch to epoch, as long as top-1 on the validation images drops at most so much.

    The target begins as the size that post-training has found for the drop. Before the first epoch, and after each
    one, ``next_share`` says what it becomes; grids follow it at once, and the price holds what they have come to.
    Without validation images in training nothing moves, and the price is that of the search.

    Args:
        groups, size, size_of, coded, measure: as in ``SizeControl``.
        allowed: points of top-1.
        dense: top-1 of the dense model on the validation images, 0 to 1.
    """

    highest: ClassVar[float] = 30.0  # no size has been promised, and late in a training few weights follow a price

    def __init__(
        self,
        groups: Sequence[Group],
        size: int,
        size_of: Callable[..., int],
        coded: float | None,
        measure: Callable[[], int] | None,
        allowed: float,
        dense: float,
    ) -> None:
        super().__init__(groups, size, size, size_of, coded, measure)
        self.allowed, self.dense, self.most, self.is_held = allowed, dense, size, False

    def drop(self, top1: float) -> float:
        """Returns the points that top-1 is below that of the dense model."""
        return 100 * (self.dense - top1)

    def following(self, on_epoch: OnEpoch | None, val: object, epochs: int) -> OnEpoch | None:
        """Returns what moves the target after each epoch of a training that begins now; see ``SizeControl``."""
        if val is None:
            return on_epoch
        self.is_held = True
        self._move(shrinking(epochs))

        def after_epoch(epoch: Epoch, top1: float | None) -> None:
            if on_epoch is not None:
                on_epoch(epoch, top1)
            if top1 is not None:
                self._after_epoch(epoch.number, epoch.epochs, self.drop(top1))

        return after_epoch

    def _after_epoch(self, done: int, epochs: int, drop: float) -> None:
        """Moves the target after an epoch; after the last one, warns of a drop that is too large."""
        if done < epochs:
            slack = SLACK * 100 * (1 - self.dense)
            self._move(next_share(drop, self.allowed, slack, done, epochs))
        elif drop > self.allowed:
            _log.warning(
                "training ended with top-1 %.2f points below that of the dense model, which is more than max_drop=%g: "
                "train longer, or allow more", drop, self.allowed
            )  # fmt: skip

    def rank(self, top1: float, size: int) -> tuple[float, ...]:
        """Returns how good a file is: of those within the drop the smallest is best, of the others the best top-1."""
        return (1.0, -size) if self.drop(top1) <= self.allowed else (0.0, top1)

    def settle(self, **options: bool) -> None:
        """Does nothing: no size has been promised, and rounding would cost accuracy."""

    def on_step(self, steps: int, total_steps: int) -> None:
        """Does what ``SizeControl.on_step`` does, in a training that has validation images."""
        if self.is_held:
            super().on_step(steps, total_steps)

    def _move(self, share: float) -> None:
        """Changes the target so that indices take this share of their present bytes."""
        if share == 1:
            return
        rest = self.lengths[0].rest
        size = (max if share > 1 else min)(self.predicted, self.target)
        wanted = min(rest + share * max(size - rest, 1), self.most)  # at which post-training was within the drop
        self._note_target(wanted)
        if share > 1:  # at once: finer grids harm nothing, and bring back a network that has lost its weights
            missing = max(self.predicted - rest, 1) / max(wanted - rest, 1)
            self._rescale(max(missing ** (1 / BYTES_BY_STEP), 1 / GLIDE))
        self._note_error()

    def _steer(self, steps: int, total_steps: int, is_due: bool) -> None:
        """Makes grids coarser where the file is far too large, and changes the price where it is nearly right."""
        rest = self.lengths[0].rest
        excess = math.log(max(self.predicted - rest, 1) / max(self.target - rest, 1))
        if excess > CLOSE and steps <= COARSENED_UNTIL * total_steps:
            most = min(GLIDE ** (STEPS_BETWEEN_COUNTS / interval(total_steps, GLIDE_TIME)), MOST_COARSER)
            self._rescale(min(math.exp(excess / BYTES_BY_STEP), most))
            self._note_error()
        else:
            self._reprice(total_steps)

    def _rescale(self, factor: float) -> None:
        """Multiplies the steps of all grids, and the price by the square: a step follows from the root of its price."""
        for length in self.lengths:
            length.rescale(factor)
            length.reprice(length.price * factor**2, length.error)

    def _note_error(self) -> None:
        """Notes how far the file is from what is wanted, so that the price does not answer to a move of the target."""
        for length in self.lengths:
            length.reprice(length.price, self._error)


def shrinking(epochs: int) -> float:
    """Returns the share of their bytes that indices keep where the target falls, in a training of so many epochs.

    Example:
        >>> [round(shrinking(epochs), 2) for epochs in (1, 4, 10, 30)]
        [0.65, 0.74, 0.88, 0.96]
    """
    moves = (2 * epochs + 2) // 3  # before the first epoch, and after those of the first two thirds
    return float(max(SMALLEST ** (1 / moves), LEAST_SHARE))


def next_share(drop: float, allowed: float, slack: float, done: int, epochs: int) -> float:
    """Returns the share of their present bytes that indices are to take from now on.

    A drop in the middle of a training is an over-estimate, for accuracy rises as the learning rate falls. So some slack
    is allowed, in proportion to the epochs that are left. Within it the target falls, in the first two thirds of the
    training; beyond four times as much it rises, by the root of what it falls by.

    Args:
        drop: points of top-1, as measured now.
        allowed: points at the end of the training.
        slack: points, at its beginning.
        done, epochs: how many are done, and of all.

    Example:
        >>> [round(next_share(drop, 0.5, 0.8, 2, 4), 2) for drop in (0.3, 0.9, 1.0, 2.2)]
        [0.74, 0.74, 1.0, 1.16]
    """
    left = slack * (1 - done / epochs)
    if drop > allowed + MOST_SLACK * left:
        return 1 / math.sqrt(shrinking(epochs))
    return shrinking(epochs) if drop <= allowed + left and 3 * done < 2 * epochs else 1.0
