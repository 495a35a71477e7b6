"""Several processes on this machine that train one model: started as torchrun does, and ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence

from compressor.sweep.watched import Watched

__all__ = ["run_together"]

HOST = "127.0.0.1"


def run_together(arguments: Sequence[str], count: int) -> int:
    """Runs so many processes of the same arguments until all have ended; each finds its rank in its environment.

    SIGTERM is passed on to all of them. Only the first one prints on stdout.

    Args:
        arguments: of each process, as for ``Watched``.
        count: of processes.

    Returns:
        The exit code of the first one that is not 0; of one that a signal has killed, 128 and its number.
    """
    running: list[Watched] = []
    is_stopped = False

    def stop(*_: object) -> None:
        nonlocal is_stopped
        is_stopped = True
        for one in running:
            one.let_go()

    before = signal.signal(signal.SIGTERM, stop)
    try:
        # torchrun itself ends with 1 whatever the processes have ended with, and knows nothing of the descriptor.
        places = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": HOST}
        places["MASTER_PORT"] = str(_free_port())
        for rank in map(str, range(count)):
            environment = {**os.environ, **places, "RANK": rank, "LOCAL_RANK": rank}
            running.append(Watched(arguments, None if rank == "0" else subprocess.DEVNULL, None, environment))
        if is_stopped:  # before all were there
            stop()
        codes = [one.process.wait() for one in running]
    finally:
        stop()
        signal.signal(signal.SIGTERM, before)
    return next((code if code > 0 else 128 - code for code in codes if code), 0)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind((HOST, 0))
        port: int = one.getsockname()[1]
    return port
