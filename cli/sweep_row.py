"""``python -m compressor.cli.sweep_row OUTPUT WORDS... DESCRIPTOR``: one row of a sweep, in a process of its own.

It runs ``compress WORDS...``, and goes on where an earlier process was stopped or killed. It ends, as at SIGTERM, when
the descriptor is closed at the other end, which the system does whatever has become of the worker that started it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from compressor.checkpointing.manager import checkpoints_in
from compressor.cli.main import main
from compressor.cli.show import say
from compressor.formats.errors import FileError, InterruptionError, UsageError
from compressor.sweep.ledger import Ledger, waiting_for

__all__ = ["run_row"]

CHECKPOINTS = ".checkpoints"
NOT_RESUMABLE = UsageError.exit_code, FileError.exit_code


def run_row(arguments: Sequence[str]) -> None:
    """Runs a row, and exits with the code of the command; with that of a stop where another worker has recorded it."""
    output, *words, descriptor = arguments
    threading.Thread(target=_end_with_the_worker, args=[int(descriptor)], daemon=True).start()
    words += ["-o", output, "--json", "--force"]  # a file without a record: the worker was killed in between
    path, waits = Path(output), f"waiting for the process of another worker that writes {output}"
    with waiting_for(path, lambda: say(waits)):  # it may be one that was killed, and is saving its state
        found = bool(checkpoints_in(Path(output + CHECKPOINTS)))
    ledger = Ledger(path.parent.parent)
    if path in map(ledger.file_of, ledger.entries()):
        say("another worker has recorded this row meanwhile: its file stays")
        sys.exit(InterruptionError.exit_code)
    if found:
        try:
            main([*words, "--resume"])
        except SystemExit as exc:
            if exc.code not in NOT_RESUMABLE:
                raise
            say(f"the row cannot go on from {output + CHECKPOINTS}, as the line above says: it starts again")
    main(words)


def _end_with_the_worker(descriptor: int) -> None:
    while os.read(descriptor, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    run_row(sys.argv[1:])
