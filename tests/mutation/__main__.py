"""Applies faults one at a time to a copy of the tree, runs the tests that must see them, and prints those they miss.

Each run is forked from one process that has imported torch, timm and pytest, and nothing of the tree.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutation.faults import ROOT, Fault, read_faults, write

LIMIT = 1200.0  # seconds, after which a run is ended: the tests have seen an endless loop
PASSED = 0
REWRITTEN = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # plugins that are imported before pytest starts


@dataclass
class Run:
    """The tests of a fault, or of none, on one copy of the tree.

    Args:
        tests: arguments of pytest.
        fault: None: the tests must pass.
    """

    tests: str
    fault: Fault | None = None
    copy: Path = field(default_factory=Path)
    text: str = ""
    process: int = 0
    started: float = 0.0

    def start(self, copy: Path) -> None:
        """Applies the fault and starts the tests."""
        self.copy, self.started = copy, time.monotonic()
        if self.fault is not None:
            self.text = self.fault.apply(copy)
        self.process = os.fork()
        if not self.process:
            _test(copy, self.tests)

    def ended(self) -> int | None:
        """Returns the exit code of the tests, and takes the fault out again; None while they run."""
        found, status = os.waitpid(self.process, os.WNOHANG)
        if not found and time.monotonic() - self.started > LIMIT:
            os.killpg(self.process, signal.SIGKILL)
            found, status = os.waitpid(self.process, 0)
        if not found:
            return None
        if self.fault is not None:
            write(self.copy / self.fault.file, self.text)
        return os.waitstatus_to_exitcode(status)


def _test(copy: Path, tests: str) -> None:
    """Runs tests on a copy, in a process group of its own, and exits."""
    code = 99
    try:
        os.setsid()
        os.chdir(copy)
        output = os.open(copy.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "compressor")]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(entry for entry in sys.path if entry not in ("", str(ROOT)))]
        os.environ["PYTHONPATH"] = str(copy)
        import pytest

        code = int(pytest.main(["-x", "-q", "-n0", "-p", "no:cacheprovider", *REWRITTEN, *tests.split()]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _copies(folder: Path, count: int) -> list[Path]:
    """Returns copies of the working tree: what git tracks, or would."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    names = [name for name in listed.stdout.decode().split("\0") if name and os.path.lexists(ROOT / name)]
    copies = [folder / f"copy{number}" for number in range(count)]
    for copy in copies:
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    return copies


def run_all(runs: Iterable[Run], copies: list[Path]) -> Iterator[tuple[Run, int]]:
    """Yields each run and the exit code of its tests, with as many at a time as there are copies."""
    waiting, running, free = list(runs), list[Run](), list(copies)
    while waiting or running:
        while waiting and free:
            run = waiting.pop(0)
            run.start(free.pop())
            running.append(run)
        time.sleep(0.05)
        for run in list(running):
            if (code := run.ended()) is not None:
                yield run, code
                running.remove(run)
                free.append(run.copy)


def mutate(faults: list[Fault], copies: list[Path]) -> list[Fault]:
    """Returns the faults whose tests have not done as expected.

    They missed one, or have seen one that is argued equivalent, or fail without any.
    """
    runs: list[Run] = []
    for fault in sorted(faults, key=lambda fault: (fault.tests, fault.name)):
        runs += [] if runs and runs[-1].tests == fault.tests else [Run(fault.tests)]
        runs.append(Run(fault.tests, fault))
    unexpected, broken, done = list[Fault](), set[str](), 0
    for run, code in run_all(runs, copies):
        if run.fault is None:
            if code != PASSED:
                broken.add(run.tests)
                log = run.copy.with_suffix(".log").read_text(errors="replace")
                _say(f"WITHOUT A FAULT, pytest {run.tests} exits with {code}:\n{log[-3000:]}")
            continue
        done += 1
        seconds = time.monotonic() - run.started
        _say(
            f"{done:3}/{len(faults)} {seconds:4.0f} s  {run.fault.file}: {run.fault.name}: {_outcome(run.fault, code)}"
        )
        if (code == PASSED) != bool(run.fault.equivalent):
            unexpected.append(run.fault)
    return unexpected + [fault for fault in faults if fault.tests in broken and fault not in unexpected]


def _outcome(fault: Fault, code: int) -> str:
    if code != PASSED:
        return "SEEN, though argued equivalent" if fault.equivalent else "seen"
    return f"equivalent: {fault.equivalent}" if fault.equivalent else f"SURVIVED {fault.tests}"


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    """Runs the faults that the command line names; returns 1 where tests have missed one."""
    parser = argparse.ArgumentParser(prog="scripts/mutate", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of the names or files of faults; without any, all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, default 2")
    options = parser.parse_args()
    faults = [f for f in read_faults() if not options.names or any(n in f.name or n in f.file for n in options.names)]
    if not faults:
        parser.error(f"no fault has {' or '.join(options.names)} in its name or file")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # as tests/conftest.py, before torch is imported
    import hypothesis  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import timm  # noqa: F401
    import torch  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        survivors = mutate(faults, _copies(Path(folder), max(1, options.jobs)))
    equivalent = sum(bool(fault.equivalent) for fault in faults)
    _say(f"{len(faults)} faults, {equivalent} argued equivalent, {len(survivors)} not as expected")
    for fault in survivors:
        _say(f"  {fault.file}: {fault.name}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
