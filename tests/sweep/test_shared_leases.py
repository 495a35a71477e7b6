"""Leases in an Optuna storage: one worker a row, and the rows of the dead are free again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("optuna", reason="needs the extra sweep")

from optuna.exceptions import StorageInternalError

from compressor.formats.errors import MissingError, ResourceError
from compressor.sweep import shared_leases
from compressor.sweep.shared_leases import SharedLeases

Workers = Callable[..., SharedLeases]


@pytest.fixture(params=["journal.log", "sqlite:///sweep.db"])
def worker(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workers:
    monkeypatch.chdir(tmp_path)
    return lambda interval=60.0: SharedLeases(request.param, "a sweep", interval)


def test_a_row_has_one_worker(worker: Workers) -> None:
    one, other = worker(), worker()
    assert one.claim(["a", "b"]) == "a"
    assert other.claim(["a", "b"]) == "b"
    assert one.claim(["a", "b"]) is None
    one.release("a")
    assert other.claim(["a", "b"]) == "a"


def test_workers_that_claim_at_once_get_different_rows(worker: Workers) -> None:
    names, got = [f"row{number}" for number in range(6)], []
    worker()  # makes the tables of a database

    def claim() -> None:
        leases = worker()
        while (name := leases.claim(names)) is not None:
            got.append(name)

    threads = [threading.Thread(target=claim) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == names


class Clock:
    """Stands for the clock of the workers."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(shared_leases, "time", clock)
    return clock


def test_the_rows_of_a_silent_worker_are_free_and_it_learns_so(worker: Workers, clock: Clock) -> None:
    silent, other = worker(10), worker(10)
    assert silent.claim(["a"]) == "a"
    assert other.claim(["a"]) is None
    clock.now += 60
    assert other.claim(["a"]) is None
    clock.now += 1
    assert other.claim(["a"]) == "a"
    assert silent.beat() == {"a"}
    silent.release("a")
    assert silent.claim(["a"]) is None


def test_a_worker_that_beats_keeps_its_rows(worker: Workers, clock: Clock) -> None:
    alive, other = worker(10), worker(10)
    assert alive.claim(["a"]) == "a"
    for _ in range(5):
        assert other.claim(["a"]) is None
        clock.now += 50
        assert alive.beat() == set()
    clock.now += 5
    before = other.claim(["a"])
    assert alive.beat() == set()  # not due, and nothing is written
    clock.now += 61
    assert (before, other.claim(["a"])) == (None, "a")


def test_a_row_that_failed_is_not_tried_again_by_those_at_work_but_by_later_ones(worker: Workers) -> None:
    one, other = worker(), worker()
    assert one.claim(["a"]) == "a"
    one.release("a", "exit code 6: out of memory")
    assert other.claim(["a"]) is None
    assert other.failed() == {"a": "exit code 6: out of memory"}
    later = worker()
    assert later.failed() == {}
    assert later.claim(["a"]) == "a"


def test_sweeps_in_one_storage_do_not_meet(tmp_path: Path) -> None:
    path = str(tmp_path / "journal.log")
    assert SharedLeases(path, "one").claim(["a"]) == "a"
    assert SharedLeases(path, "two").claim(["a"]) == "a"


def test_a_storage_that_cannot_be_opened_is_named_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"--storage sqlite:////nowhere/at/all\.db: cannot be opened"):
        SharedLeases("sqlite:////nowhere/at/all.db", "a sweep")
    with pytest.raises((MissingError, ResourceError), match=r"--storage nosuch://me:\.\.\.@host/x: ") as caught:
        SharedLeases("nosuch://me:secret@host/x", "a sweep")
    assert "secret" not in str(caught.value)


class Broken:
    """Makes a storage fail from now on, until it is mended."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, leases: SharedLeases) -> None:
        self.is_broken = True
        for name in ("get_all_trials", "set_trial_user_attr", "set_trial_state_values", "create_new_trial"):
            monkeypatch.setattr(leases._storage, name, self._failing(getattr(leases._storage, name)))

    def _failing(self, call: Callable[..., object]) -> Callable[..., object]:
        def called(*args: object, **options: object) -> object:
            if self.is_broken:
                raise StorageInternalError("during the commit") from OSError("server closed the connection")
            return call(*args, **options)

        return called


def test_a_storage_that_is_back_before_others_take_the_rows_is_waited_for(
    worker: Workers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases, other = worker(10), worker(10)
    assert leases.claim(["a", "b"]) == "a"
    other.claim(["b"])
    other.release("b", "exit code 6")
    assert leases.failed() == {"b": "exit code 6"}
    broken = Broken(monkeypatch, leases)
    for _ in range(5):
        clock.now += 10
        assert (leases.beat(), leases.claim(["c"])) == (set(), None)
        assert leases.failed() == {"b": "exit code 6"}
    broken.is_broken = False
    clock.now += 10
    assert (leases.beat(), leases.claim(["c"])) == (set(), "c")


def test_a_storage_that_stays_away_is_an_error_of_one_line(
    worker: Workers, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    leases = worker(10)
    assert leases.claim(["a"]) == "a"
    Broken(monkeypatch, leases)
    clock.now += 61
    wanted = r"^--storage \S+: cannot be reached any more \(server closed the connection\); [^\n]+ goes on$"
    for call in (leases.beat, leases.failed, lambda: leases.claim(["b"]), lambda: leases.release("a")):
        with pytest.raises(ResourceError, match=wanted):
            call()
