"""Which worker runs which row, where several workers, on this machine and others, share a sweep by an Optuna storage.

A lease is a running trial of one study. The storage gives all trials one order, in which each worker sees them: of
those for one row that nobody has ended, the first holds the lease. A worker beats on its trials as long as it lives.
Where one has been silent for ``SILENT`` beats, by the clock of whoever watches, its trial is ended, and the row free.
A storage that cannot be reached is waited for as long as others would wait for this worker; nothing is claimed then.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from compressor.formats.errors import MissingError, ResourceError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

__all__ = ["SILENT", "SharedLeases"]

SILENT = 6  # beats that are missed before a worker counts as dead
ROW, OWNER, BEAT, ERROR = "row", "owner", "beat", "error"  # what is noted of a trial


class SharedLeases:
    """Leases in an Optuna storage.

    Args:
        storage: a file of Optuna's journal, which is made if need be, or the URL of a database.
        study: names the sweep among all that the storage has.
        interval: seconds between beats.

    Raises:
        MissingError: Optuna, or the driver of the database, is not installed.
        ResourceError: the storage cannot be opened; later, of any method, that it has failed.
    """

    def __init__(self, storage: str, study: str, interval: float = 10.0) -> None:
        self._storage, self._interval = _opened(storage), interval
        self._shown, self._reached = _without_password(storage), time.monotonic()
        with self._reaching():
            self._study = _study_id(self._storage, study)
        self._owner = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._held: dict[str, int] = {}  # trial by row
        self._beats = 0
        self._due = time.monotonic()
        self._seen: dict[int, tuple[Any, float]] = {}  # last beat of others' trials, and when it was first seen
        self._failed: dict[str, str] = {}  # as was last seen
        with self._reaching():
            self._first = max((trial.number for trial in self._trials()), default=-1) + 1

    def claim(self, names: Sequence[str]) -> str | None:
        """Takes one of some rows that nobody has, or whose worker has died; none while the storage is out of reach."""
        try:
            with self._reaching():
                self._end_silent()
                taken = {trial.user_attrs[ROW] for trial in self._running()}
        except ResourceError:
            if self._is_cut_off:
                raise
            return None
        failed = self.failed()
        with self._reaching():  # a bid that is left half-way is none of a living worker: others end it
            free = (name for name in names if name not in taken and name not in failed)
            return next((name for name in free if self._take(name)), None)

    def beat(self) -> set[str]:
        """Says that this worker lives, where that is due, and returns the rows that it has lost."""
        from optuna.exceptions import UpdateFinishedTrialError

        lost: set[str] = set()
        if time.monotonic() < self._due:
            return lost
        self._due, self._beats = time.monotonic() + self._interval, self._beats + 1
        try:
            for name, trial in list(self._held.items()):
                try:
                    with self._reaching():
                        self._storage.set_trial_user_attr(trial, BEAT, self._beats)
                except UpdateFinishedTrialError:
                    lost.add(name)
                    del self._held[name]
        except ResourceError:
            if self._is_cut_off:
                raise
        return lost

    def release(self, name: str, error: str | None = None) -> None:
        """Gives a row back; one that failed is not tried again by workers that are at work now."""
        from optuna.trial import TrialState

        trial = self._held.pop(name, None)
        if trial is None:  # it was lost
            return
        with self._reaching(), _if_running():
            if error is not None:
                self._storage.set_trial_user_attr(trial, ERROR, error)
            self._storage.set_trial_state_values(trial, TrialState.FAIL)

    def failed(self) -> dict[str, str]:
        """Returns why rows failed since this worker began, as far as the storage was last reached."""
        try:
            with self._reaching():
                recent = [one for one in self._trials() if one.number >= self._first and ERROR in one.user_attrs]
            self._failed = {one.user_attrs[ROW]: str(one.user_attrs[ERROR]) for one in recent}
        except ResourceError:
            if self._is_cut_off:
                raise
        return self._failed

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Makes one line of what a storage raises that cannot be reached."""
        from optuna.exceptions import StorageInternalError

        try:
            yield
        except (StorageInternalError, OSError) as exc:
            reason = _shortened(exc.__cause__ or exc)
            raise ResourceError(
                f"--storage {self._shown}: cannot be reached any more ({reason}); "
                "rows that have ended are kept, and the same command goes on"
            ) from exc
        self._reached = time.monotonic()

    @property
    def _is_cut_off(self) -> bool:
        """Whether the storage has been out of reach for so long that others take the rows."""
        return time.monotonic() - self._reached > SILENT * self._interval

    def _take(self, name: str) -> bool:
        """Bids for a row, and returns whether no other bid came before."""
        from optuna.trial import TrialState, create_trial

        bid = create_trial(state=TrialState.RUNNING, user_attrs={ROW: name, OWNER: self._owner, BEAT: self._beats})
        trial = self._storage.create_new_trial(self._study, bid)
        first = min((one for one in self._running() if one.user_attrs[ROW] == name), key=lambda one: one.number)
        self._held[name] = trial
        if self._storage.get_trial_number_from_id(trial) == first.number:
            return True
        self.release(name)
        return False

    def _end_silent(self) -> None:
        """Ends the trials of workers that have died."""
        from optuna.trial import TrialState

        now, seen = time.monotonic(), {}
        for trial in self._running():
            if trial.user_attrs[OWNER] == self._owner:
                continue
            beat, since = self._seen.get(trial.number, (None, now))
            if beat != trial.user_attrs[BEAT]:
                beat, since = trial.user_attrs[BEAT], now
            seen[trial.number] = beat, since
            if now - since > SILENT * self._interval:
                with _if_running():
                    number = self._storage.get_trial_id_from_study_id_trial_number(self._study, trial.number)
                    self._storage.set_trial_state_values(number, TrialState.FAIL)
        self._seen = seen

    def _running(self) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return [trial for trial in self._trials() if trial.state == TrialState.RUNNING]

    def _trials(self) -> list[FrozenTrial]:
        return [one for one in self._storage.get_all_trials(self._study, deepcopy=False) if ROW in one.user_attrs]


@contextlib.contextmanager
def _if_running() -> Iterator[None]:
    """Does nothing more where another worker has ended the trial."""
    from optuna.exceptions import UpdateFinishedTrialError

    with contextlib.suppress(UpdateFinishedTrialError):
        yield


def _opened(storage: str) -> BaseStorage:
    try:
        import optuna
        from optuna.storages import JournalStorage, RDBStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as exc:
        raise MissingError(f"--storage {storage}: {exc}; pip install 'timm-compressor[sweep]'") from exc
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of databases that Optuna's package sets up
            return RDBStorage(storage) if "://" in storage else JournalStorage(JournalFileBackend(storage))
    except Exception as exc:  # of any driver of a database
        kind = MissingError if isinstance(exc, ImportError) else ResourceError
        raise kind(f"--storage {_without_password(storage)}: cannot be opened ({_shortened(exc)})") from exc


def _shortened(exc: BaseException) -> str:
    return " ".join(str(exc).split()[:30])


def _without_password(storage: str) -> str:
    """Returns a storage as it may be shown.

    >>> _without_password("postgresql://me:secret@host/sweeps"), _without_password("journal.log")
    ('postgresql://me:...@host/sweeps', 'journal.log')
    """
    scheme, colon, rest = storage.partition("://")
    login, at, host = rest.rpartition("@")
    name, has_password, _ = login.partition(":")
    return f"{scheme}{colon}{name}{has_password and ':...'}{at}{host}"


def _study_id(storage: BaseStorage, name: str) -> int:
    from optuna.exceptions import DuplicatedStudyError
    from optuna.study import StudyDirection

    try:
        return storage.create_new_study([StudyDirection.MINIMIZE], name)
    except DuplicatedStudyError:
        return storage.get_study_id_from_name(name)
