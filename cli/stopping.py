"""Ctrl-C and other signals to stop: the training saves its state first; told again, the process ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from compressor.checkpointing.manager import Checkpoints
from compressor.cli.show import say
from compressor.formats.errors import InterruptionError
from compressor.training.checkpointer import HOW_TO_RESUME

__all__ = ["stoppable"]

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def stoppable(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Let signals stop the run in such a way that it can go on, and let the checkpoints' folder go in the end.

    In training the first signal finishes the step and saves: InterruptionError, as between trainings where there is a
    checkpoint to go on from. Otherwise, and at the second signal, Ctrl-C is KeyboardInterrupt, and others SystemExit.
    """
    if checkpoints is None:
        yield
        return
    signals = _Signals(checkpoints)
    main = threading.current_thread() is threading.main_thread()  # others get no signals
    before = {number: signal.getsignal(number) for number in SIGNALS if main}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as nohup has it
                signal.signal(number, signals.handle)
        yield
    except (KeyboardInterrupt, SystemExit):
        if signals.count == 1 and checkpoints.paths():
            raise InterruptionError(
                f"stopped; {checkpoints.folder} keeps how far it had come: {HOW_TO_RESUME}"
            ) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        checkpoints.close()


class _Signals:
    """Counts the signals, and does what each of them is for."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints, self.count, self.process = checkpoints, 0, os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Stop after this step of a training; or at once, the second time and where none is running."""
        del frame
        if os.getpid() != self.process:  # one that loads data: Ctrl-C goes to all of them
            return
        self.count += 1
        if self.count == 1 and self.checkpoints.training:
            self.checkpoints.stop = True
            with suppress(OSError):  # the terminal may be gone
                say("stopping after this step; once more, to stop at once")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            raise SystemExit(128 + number)
