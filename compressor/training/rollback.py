"""What a training does when its loss is no longer a number: it goes back, and on with smaller steps."""

from __future__ import annotations

import logging

from torch.optim import Optimizer

from compressor.checkpointing.progress import TrainingProgress
from compressor.formats.errors import QualityError
from compressor.training.checkpointer import TrainingCheckpointer
from compressor.training.divergence import DivergedError
from compressor.training.optim import Schedule, halve_rates

__all__ = ["MOST_ROLLBACKS", "roll_back"]

_log = logging.getLogger(__name__)
MOST_ROLLBACKS = 3  # after which a training is given up


def roll_back(
    checkpointer: TrainingCheckpointer,
    optimizer: Optimizer,
    schedule: Schedule,
    at: TrainingProgress,
    why: DivergedError,
) -> TrainingProgress:
    """Go back to the state the epoch began with, at half the learning rate; give where the training then stands.

    Args:
        at: where it stood when its loss was no longer a number.

    Raises QualityError for the fourth time, having gone back all the same, and where there is no state to go back to.
    """
    what = f"training has diverged: {why} at step {checkpointer.step(at) + 1}"
    back = checkpointer.rollback(at)
    if back is None:
        raise QualityError(f"{what}, and no earlier state is left to go back to; try a lower --lr")
    halve_rates(optimizer, schedule)
    back.rollbacks += 1
    times, place = back.rollbacks, f"the state after step {checkpointer.step(back)}"
    if times > MOST_ROLLBACKS:
        back.rollbacks = 0
    checkpointer.save(back)
    if times > MOST_ROLLBACKS:
        raise QualityError(
            f"{what}, with a learning rate of an {2**MOST_ROLLBACKS}th, too; try a lower --lr, or look at the data. "
            f"T{place[1:]} is kept{checkpointer.where()}, at a {2 * 2**MOST_ROLLBACKS}th"
        )
    _log.warning(
        "%s: going back to %s, with half the learning rate (%s of %s times)", what, place, times, MOST_ROLLBACKS
    )
    return back
