"""What a training does when its loss is no longer a number: it goes back, and on with smaller steps."""

from __future__ import annotations

import logging

from torch.optim import Optimizer

from compressor.checkpointing.progress import Position
from compressor.formats.errors import QualityError
from compressor.training.checkpointer import Keeper
from compressor.training.divergence import DivergedError
from compressor.training.optim import Schedule, halve_rates

__all__ = ["RETURNS", "recovered"]

_log = logging.getLogger(__name__)
RETURNS = 3  # after which a training is given up


def recovered(keeper: Keeper, optimizer: Optimizer, schedule: Schedule, at: Position, why: DivergedError) -> Position:
    """Go back to the state the epoch began with, at half the learning rate; give where the training then stands.

    Args:
        at: where it stood when its loss was no longer a number.

    Raises QualityError for the fourth time, having gone back all the same, and where there is no state to go back to.
    """
    what = f"training has diverged: {why} at step {keeper.step(at) + 1}"
    back = keeper.go_back(at)
    if back is None:
        raise QualityError(f"{what}, and no earlier state is left to go back to; try a lower --lr")
    halve_rates(optimizer, schedule)
    back.returns += 1
    times, place = back.returns, f"the state after step {keeper.step(back)}"
    if times > RETURNS:
        back.returns = 0
    keeper.mark(back)
    if times > RETURNS:
        raise QualityError(
            f"{what}, with a learning rate of an {2**RETURNS}th, too; try a lower --lr, or look at the data. "
            f"T{place[1:]} is kept{keeper.where()}, at a {2 * 2**RETURNS}th"
        )
    _log.warning("%s: going back to %s, with half the learning rate (%s of %s times)", what, place, times, RETURNS)
    return back
