"""What a training does when it has diverged: it returns to an earlier state, and continues with smaller steps."""

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
MOST_ROLLBACKS = 3  # the training is given up at the next divergence


def roll_back(
    checkpointer: TrainingCheckpointer,
    optimizer: Optimizer,
    schedule: Schedule,
    progress: TrainingProgress,
    cause: DivergedError,
) -> TrainingProgress:
    """Restores the state at the start of the epoch, halves the learning rate, and returns the restored progress.

    Args:
        progress: where the training diverged.
        cause: what was found not to be finite.

    Raises:
        QualityError: the training has diverged for the fourth time, and is restored all the same; or there is no
            state to restore.
    """
    diverged = f"training has diverged: {cause} at step {checkpointer.step(progress) + 1}"
    restored = checkpointer.rollback(progress)
    if restored is None:
        raise QualityError(f"{diverged}, and no earlier state is left to go back to; try a lower --lr")
    halve_rates(optimizer, schedule)
    restored.rollbacks += 1
    rollbacks, step = restored.rollbacks, checkpointer.step(restored)
    if rollbacks > MOST_ROLLBACKS:
        restored.rollbacks = 0
    checkpointer.save(restored)
    if rollbacks > MOST_ROLLBACKS:
        raise QualityError(
            f"{diverged}, with a learning rate of an {2**MOST_ROLLBACKS}th, too; try a lower --lr, or look at the "
            f"data. The state after step {step} is kept{checkpointer.where()}, at a {2 * 2**MOST_ROLLBACKS}th"
        )
    _log.warning(
        "%s: going back to the state after step %s, with half the learning rate (%s of %s times)",
        diverged, step, rollbacks, MOST_ROLLBACKS,
    )  # fmt: skip
    return restored
