"""Tests of two processes, run in a process of their own that imports once.

Forks of a process with threads, as pytest's may have, can hang.

``python -m tests.helpers.several FOLDER [NAME ...]``; ``tests/distributed/test_processes.py`` runs all.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from compressor.cli import main, setup
from compressor.cli.show import Step
from compressor.compressor import Compressor
from compressor.distributed import collectives
from compressor.formats.errors import CompressorError
from compressor.lifecycle.packed import Packed
from tests.helpers import tiny
from tests.helpers.pairs import Pair, alone
from tests.helpers.several_jobs import JOBS

import_module("compressor.cli.run")  # once for all
DIGITS = tiny.few_digits()
WORDS = ["tiny", "--baseline-epochs", "1", "--epochs", "4", "--batch-size", "8", "--lr", "0.01", "-o", "out"]


def command(*options: str, watch: Callable[[int], None] | None = None) -> int:
    """Runs ``compress tiny`` and calls ``watch`` with the number of each step of the fine-tuning."""
    vars(setup)["load_data"] = lambda *_, **__: DIGITS
    main._RANK = int(os.environ.get("RANK", "0"))
    steps = 0

    def on_step(self: Step, done: int, total: int, loss: Any) -> None:
        nonlocal steps
        steps += "fine-tuning" in self.head
        if watch is not None:
            watch(steps)

    Step.on_step = on_step  # type: ignore[method-assign]
    main.main([*WORDS, *options])
    raise AssertionError("main() exits")


def exit_code(do: Callable[[], int]) -> int:
    try:
        return do()
    except SystemExit as exc:
        return int(exc.code or 0)


def run(*options: str, watch: Callable[[int], None] | None = None) -> Callable[[], int]:
    return partial(exit_code, partial(command, *options, watch=watch))


def one_writes_and_both_agree(folder: Path) -> None:
    with Pair(run(), folder / "a") as pair:
        assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
        assert "4/4 file" in pair.said(0)
        assert not pair.said(1)
    assert sorted(path.name for path in (folder / "a").iterdir()) == ["cache", "log0", "log1", "out", "out.summary.csv"]
    assert alone(lambda: main.run(["verify", "out"]), folder / "a") == 0
    with Pair(run("--force"), folder / "a") as pair:
        before = (folder / "a" / "out").read_bytes()
        assert pair.codes() == [0, 0]
        assert "reused from" in pair.said(0)
    assert (folder / "a" / "out").read_bytes() == before, "with the baseline from the cache, in both"


def refusals_are_said_once_and_both_exit_alike(folder: Path) -> None:
    with Pair(run("--require-top1", "100"), folder / "a") as pair:
        assert pair.codes() == [5, 5]
        assert not pair.said(1)
    (folder / "a" / "out").write_bytes(b"mine")
    refused = ("--bits", "99"), (), ("--device", "warp"), ("--require-size", "1", "--force")
    for options, code in (*((options, 2) for options in refused), (("-o", "none/out"), 6)):
        with Pair(run(*options), folder / "a") as pair:
            assert pair.codes() == [code, code], options
            assert pair.said(0).count("error: ") == 1
            assert not pair.said(1)
    assert (folder / "a" / "out").read_bytes() == b"mine"


def stopped_and_resumed_it_ends_in_the_same_file(folder: Path) -> None:
    with Pair(run(), folder / "whole") as pair:
        assert pair.codes() == [0, 0], pair.said(0)

    def stop(step: int) -> None:
        if step == 8 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    with Pair(run(watch=stop), folder / "a") as pair:
        assert pair.codes() == [7, 7], pair.said(0)
        assert "--resume" in pair.said(0)
    assert alone(run("--resume"), folder / "a") == 2
    assert "processes was 2, is 1" in (folder / "a" / "log").read_text()
    with Pair(run("--resume"), folder / "a") as pair:
        assert pair.codes() == [0, 0], pair.said(0)
        assert "Resuming stage 1" in pair.said(0)
    assert (folder / "a" / "out").read_bytes() == (folder / "whole" / "out").read_bytes()


def one_that_dies_or_hangs_is_not_waited_for_for_ever(folder: Path) -> None:
    def stop(number: int, step: int) -> None:
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), number)

    for number in (signal.SIGKILL, signal.SIGSTOP):
        if number == signal.SIGSTOP:  # of the other the rest hears at once
            collectives.PATIENCE = timedelta(seconds=8)
        with Pair(run("--force", watch=partial(stop, number)), folder / number.name) as pair:
            assert pair.code(0) == 6, pair.said(0)
            assert "waits for another that has ended or hangs" in pair.said(0).splitlines()[-1]
            assert "Traceback" not in pair.said(0)


def an_error_of_one_is_that_of_all(folder: Path) -> None:
    def fails() -> int:
        from compressor.distributed.devices import init_processes
        from compressor.formats.errors import MissingError

        init_processes()
        try:
            with collectives.raise_on_all():
                if collectives.rank() == 1:
                    raise MissingError("no such folder")
        except CompressorError as exc:
            sys.stdout.write(f"{type(exc).__name__} {exc}\n")
        try:
            collectives.main_process_first(lambda: 1 // (1 - collectives.rank()))
            value = collectives.main_process_first(lambda: collectives.rank() + 7)
        except ZeroDivisionError:
            return 1
        return 0 if value == 7 else 2

    with Pair(fails, folder / "a") as pair:
        assert pair.codes() == [0, 0], pair.said(0)
        assert pair.said(0) == pair.said(1) == "MissingError process 1: no such folder\n"


def splitting_the_model_is_refused(folder: Path) -> None:
    for name in ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"):
        with Pair(run(), folder / name, **{name: "true"}) as pair:
            assert pair.codes() == [2, 2]
            assert f"{name}: the model cannot be split" in pair.said(0)
            assert "Traceback" not in pair.said(0)
            assert not pair.said(1)


def calibration_and_targets_give_each_process_the_file_of_one(folder: Path) -> None:
    def keeping_all(*options: str) -> Callable[[], int]:
        def do() -> int:
            original = Compressor.finish

            def finish(job: Compressor, *given: Any, **named: Any) -> Packed:
                packed = original(job, *given, **named)
                Path(f"of process {collectives.rank()}").write_bytes(packed.to_bytes())
                return packed

            Compressor.finish = finish  # type: ignore[method-assign, assignment]
            return run("--epochs", "0", "--force", *options)()

        return do

    target, drop = ("--target-size", "2KB"), ("--max-drop", "9")
    for words in (
        target,
        drop,
        ("--rate", "1e-6", "--calibration", "synthetic"),
        ("--bits", "3", "--calibration", "data"),
    ):
        assert alone(keeping_all(*words), folder / "a") == 0, words
        whole, bare = (folder / "a" / "out").read_bytes(), (folder / "a" / "of process 0").read_bytes()
        with Pair(keeping_all(*words), folder / "a") as pair:  # the baseline is in the cache
            assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
        assert (folder / "a" / "out").read_bytes() == whole, words
        for rank in (0, 1):
            assert (folder / "a" / f"of process {rank}").read_bytes() == bare, (words, rank)


def a_size_is_held_by_both(folder: Path) -> None:
    with Pair(run("--target-size", "2KB"), folder / "a") as pair:
        assert pair.codes() == [0, 0], pair.said(0) + pair.said(1)
        assert "bytes at a price of" in pair.said(0)
        assert not pair.said(1)
    assert (folder / "a" / "out").stat().st_size <= 2_000
    assert not (folder / "a" / "out.checkpoints").exists()


TESTS = (
    *JOBS,
    a_size_is_held_by_both,
    one_writes_and_both_agree,
    refusals_are_said_once_and_both_exit_alike,
    stopped_and_resumed_it_ends_in_the_same_file,
    one_that_dies_or_hangs_is_not_waited_for_for_ever,
    an_error_of_one_is_that_of_all,
    splitting_the_model_is_refused,
    calibration_and_targets_give_each_process_the_file_of_one,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()  # what is imported is not to be looked through in each child
    failed = 0
    for test in TESTS:
        if not sys.argv[2:] or test.__name__ in sys.argv[2:]:
            began = time.monotonic()
            try:
                test(Path(sys.argv[1]) / test.__name__)
                sys.stdout.write(f"{test.__name__} {time.monotonic() - began:.1f} s\n")
            except AssertionError:
                failed += 1
                traceback.print_exc()
    sys.exit(failed)
