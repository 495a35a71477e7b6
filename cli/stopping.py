"""Ctrl-C and other signals to stop: at the first one a training saves its state, at the second the process ends."""

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
    """Makes signals stop the run so that it can be resumed, and releases the folder of the checkpoints at the end.

    In training, the first signal ends the training after its step, and saves it. Otherwise, and at the second signal,
    the process ends at once.

    Raises:
        InterruptionError: the run was stopped, and there is a checkpoint to resume it from.
        KeyboardInterrupt: Ctrl-C in all other cases.
        SystemExit: another signal in all other cases.
    """
    if checkpoints is None:
        yield
        return
    signals = _Signals(checkpoints)
    main = threading.current_thread() is threading.main_thread()  # other threads receive no signals
    before = {number: signal.getsignal(number) for number in SIGNALS if main}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # ignored under nohup
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
    """Counts the signals, and acts on each."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints, self.count, self.process = checkpoints, 0, os.getpid()

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Stops a training after its step at the first signal; otherwise ends the process."""
        del frame
        if os.getpid() != self.process:  # a worker that loads data: Ctrl-C reaches it as well
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
