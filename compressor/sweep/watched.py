"""Processes that end with the one that started them, whatever has become of that one."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import IO

__all__ = ["Watched", "end_with"]


class Watched:
    """A process that is told to end, by SIGTERM, when this one lets go of it or has ended.

    It gets one more argument, a descriptor to hand to ``end_with``.

    Args:
        arguments: of the process, its program first.
        stdout, stderr: where its output goes, as for ``subprocess.Popen``.
        environment: of the process; None: that of this one.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        stdout: IO[bytes] | int | None = None,
        stderr: IO[bytes] | int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        watched, self._alive = os.pipe()
        try:
            self.process = subprocess.Popen(
                [*arguments, str(watched)], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=environment,
                pass_fds=(watched,), start_new_session=True,
            )  # fmt: skip
        except OSError:
            self.let_go()
            raise
        finally:
            os.close(watched)

    def let_go(self) -> None:
        """Tells the process to end, which may save its work first."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1


def end_with(descriptor: int) -> None:
    """Sends SIGTERM to this process when the one that has started it, with this descriptor, lets go of it or ends."""

    def watch() -> None:
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
