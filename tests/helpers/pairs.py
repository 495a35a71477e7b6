"""Pairs of processes that train together, forked from one that has imported everything; see ``Pair``."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

__all__ = ["Pair", "alone"]


class Pair:
    """Two processes that run the same function, as torchrun launches them; their output goes to ``log0`` and ``log1``.

    Args:
        do: the function each process runs; its value is the exit code.
        folder: their working directory.
        more: additional environment variables.
    """

    def __init__(self, do: Callable[[], int], folder: Path, **more: str) -> None:
        self.folder, self.ended = folder, {0: False, 1: False}
        folder.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        known = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]
        self.ids = [_forked(do, folder, f"log{rank}", known | own | more) for rank, own in enumerate(ranks)]

    def code(self, rank: int, seconds: float = 180) -> int:
        """Waits for and returns the exit code, negative for a signal; called once a process."""
        end = time.monotonic() + seconds
        while not (found := os.waitpid(self.ids[rank], os.WNOHANG))[0]:
            assert time.monotonic() < end, f"process {rank} has not ended: {self.said(rank)}"
            time.sleep(0.01)
        self.ended[rank] = True
        return os.waitstatus_to_exitcode(found[1])

    def codes(self) -> list[int]:
        """Waits for both processes and returns their exit codes."""
        return [self.code(0), self.code(1)]

    def said(self, rank: int) -> str:
        """Returns the output of a process."""
        return (self.folder / f"log{rank}").read_text()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        for rank, ended in self.ended.items():
            if not ended:
                os.kill(self.ids[rank], signal.SIGKILL)
                os.waitpid(self.ids[rank], 0)


def alone(do: Callable[[], int], folder: Path) -> int:
    """Runs the function in one process and returns its exit code."""
    folder.mkdir(parents=True, exist_ok=True)
    return os.waitstatus_to_exitcode(os.waitpid(_forked(do, folder, "log", {}), 0)[1])


def _forked(do: Callable[[], int], folder: Path, log: str, more: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        os.environ.update({"TIMM_COMPRESSOR_CACHE": str(folder / "cache"), **more})
        os.dup2(os.open(folder / log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        os.dup2(2, 1)
        os.chdir(folder)
        code = do()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
