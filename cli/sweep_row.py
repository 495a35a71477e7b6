"""``python -m compressor.cli.sweep_row PROCESSES OUTPUT WORDS... DESCRIPTOR``: one row of a sweep.

It runs ``compress WORDS...``, by so many processes, and goes on where an earlier one was stopped or killed. It ends, as
at SIGTERM, when the descriptor is closed at the other end, which the system does whatever has become of the worker
that started it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from compressor.checkpointing.manager import checkpoints_in
from compressor.cli.main import main
from compressor.cli.show import say
from compressor.formats.errors import FileError, InterruptionError, UsageError
from compressor.sweep.ledger import Ledger, waiting_for
from compressor.sweep.together import run_together
from compressor.sweep.watched import end_with

__all__ = ["run_row"]

CHECKPOINTS = ".checkpoints"
NOT_RESUMABLE = UsageError.exit_code, FileError.exit_code


def run_row(arguments: Sequence[str]) -> None:
    """Runs a row, and exits with the code of the command; with that of a stop where another worker has recorded it."""
    processes, output, *words, descriptor = arguments
    end_with(int(descriptor))
    words += ["-o", output, "--json", "--force"]  # a file without a record: the worker was killed in between
    path, waits = Path(output), f"waiting for the process of another worker that writes {output}"
    with waiting_for(path, lambda: say(waits)):  # it may be one that was killed, and is saving its state
        found = bool(checkpoints_in(Path(output + CHECKPOINTS)))
    ledger = Ledger(path.parent.parent)
    if path in map(ledger.file_of, ledger.entries()):
        say("another worker has recorded this row meanwhile: its file stays")
        sys.exit(InterruptionError.exit_code)
    code = _run([*words, "--resume"], int(processes)) if found else None
    if code in NOT_RESUMABLE:
        say(f"the row cannot go on from {output + CHECKPOINTS}, as the line above says: it starts again")
    sys.exit(_run(words, int(processes)) if code is None or code in NOT_RESUMABLE else code)


def _run(words: Sequence[str], processes: int) -> int:
    """Runs ``compress`` in this process, or in several others, and returns its exit code."""
    if processes > 1:
        return run_together([sys.executable, "-m", "compressor.cli.sweep_process", *words], processes)
    try:
        main(words)
    except SystemExit as exc:
        return int(exc.code or 0)
    return 0


if __name__ == "__main__":
    run_row(sys.argv[1:])
