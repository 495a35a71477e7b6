"""Checkpoints of a training: a folder of the newest ones, which a later process goes on from."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import filelock

from compressor.checkpointing.fingerprint import as_json, differences, machine
from compressor.checkpointing.serialization import broadcast_state, read_state, write_state
from compressor.distributed.collectives import main_process_first
from compressor.distributed.devices import init_processes
from compressor.formats.errors import IntegrityError, MissingError, ResourceError, UsageError

__all__ = ["Checkpoints"]

_log = logging.getLogger(__name__)
KEPT = 2
LOCK = ".lock"


class Checkpoints:
    """The checkpoints of one training, or of several stages of it, in a folder that no other process may use meanwhile.

    Of several processes that train together the first alone reads and writes; all have to make these, and call what
    they call, alike.

    A training that is given them, as ``Compressor.finetune(..., checkpoints=...)``, saves one after every epoch, and
    in between as the arguments say. With ``resume`` it goes on from the newest that is sound, and ends as if it had
    never been interrupted. Call ``clear()`` when their work is done; ``close()`` lets the folder go and keeps them.

    Args:
        folder: made where it is missing.
        about: what the result depends on beside what the training knows itself; JSON values.
        minutes: after which one is saved in the middle of an epoch; 0: never.
        steps: after which one is saved; 0: never.
        resume: go on from what is there.
        force: where not to go on, drop what is there.

    Raises:
        UsageError: there are some, and neither ``resume`` nor ``force`` is set; or ``about`` has changed since.
        MissingError: there are none to resume from.
        IntegrityError: all there are are damaged.
        ResourceError: the folder cannot be written, or another process is at work in it.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> first = Checkpoints(folder)
        >>> first.save(7, {"weights": [1, 2]}, {"lr": 0.1})
        >>> first.close()
        >>> again = Checkpoints(folder, resume=True)
        >>> again.take({"lr": 0.1})
        {'weights': [1, 2]}
        >>> again.clear()
    """

    def __init__(
        self,
        folder: str | PathLike[str],
        about: Mapping[str, Any] | None = None,
        *,
        minutes: float = 10.0,
        steps: int = 0,
        resume: bool = False,
        force: bool = False,
    ) -> None:
        self.folder, self.about = Path(folder), as_json(about or {})
        self.minutes, self.steps = minutes, steps
        self.stage = 0
        """Which training of several this is; their checkpoints are told apart by it."""
        self.stop = False
        """Set it, as from a signal, and the training saves one more after the step it is at, and ends."""
        self.training = False
        """Whether a training is running that will heed ``stop``."""
        self._lock: filelock.BaseFileLock | None = None
        self._saved = time.monotonic()
        self._found: dict[str, Any] | None = None
        init_processes()
        where = main_process_first(lambda: self._opened(resume, force))
        self.found: tuple[int, int] | None = None if where is None else tuple(where)
        """Stage and step that the run is resumed from; None where it is not."""

    def _opened(self, resume: bool, force: bool) -> tuple[int, int] | None:
        """Take the folder, in the first of several processes; give stage and step of what is found there."""
        self._lock = self._locked()
        try:
            self._begin(resume, force)
        except BaseException:
            self.close()
            raise
        return None if self._found is None else (self._found["stage"], self._found["step"])

    def _begin(self, resume: bool, force: bool) -> None:
        if resume:
            self._found = self._newest()
            self._refuse_changes(self._found["about"], self.about)
            for change in differences(self._found["machine"], machine()):
                _log.warning("%s: the file will not be the same to the last bit", change)
        elif self.paths() and not force:
            raise UsageError(
                f"{self.folder} holds a run that was interrupted: go on with --resume (resume=True), or begin anew "
                "with --force (force=True)"
            )
        else:
            self._drop(self.paths())

    def paths(self) -> list[Path]:
        """Give the files there are, oldest first."""
        return sorted(self.folder.glob("[0-9]*-[0-9]*.safetensors"))

    def due(self, step: int) -> bool:
        """Tell whether one is to be saved after so many steps of the training, in the middle of an epoch."""
        late = self.minutes and time.monotonic() - self._saved >= 60 * self.minutes
        return bool(late or (self.steps and step % self.steps == 0))

    def save(self, step: int, state: Mapping[str, Any], training: Mapping[str, Any], keep: int | None = None) -> None:
        """Save one: what ``state_file.write_state`` takes, and what the training depends on, as JSON values.

        Args:
            keep: the step of another that is to be kept as well; of the others, only the newest before this one is.

        Raises ResourceError where disk or permissions do not allow it; the one before is then kept.
        """
        path, kept = self._path(step), None if keep is None else self._path(keep)
        earlier = [other for other in self.paths() if other < path]
        later = [other for other in self.paths() if other > path]  # of a way that was not gone on
        old = [other for other in earlier[: 1 - KEPT] if other != kept]
        self._drop(old + later)  # first: the disk may be near full
        facts = {"about": self.about, "training": as_json(training), "stage": self.stage, "step": step}
        facts["machine"] = machine()
        write_state(path, {**facts, "state": state})
        self._saved = time.monotonic()

    def back_to(self, step: int) -> dict[str, Any] | None:
        """Give the state after a step of this stage, or one before it where that is lost; None where all are."""
        for path in reversed(self.paths()):
            if self._path(0) <= path <= self._path(step):
                try:
                    state: dict[str, Any] = read_state(path)["state"]
                except IntegrityError as exc:
                    _log.warning("%s", exc)
                else:
                    return state
        return None

    def take(self, training: Mapping[str, Any]) -> dict[str, Any] | None:
        """Give the state to go on from, once; None where there is none for this stage.

        Raises UsageError where what the training depends on has changed.
        """
        if self.found is None or self.found[0] != self.stage:
            return None
        state = broadcast_state(lambda: self._taken(training))
        self.found = None
        return state

    def _taken(self, training: Mapping[str, Any]) -> dict[str, Any]:
        assert self._found is not None
        self._refuse_changes(self._found["training"], as_json(training))
        state: dict[str, Any] = self._found["state"]
        self._found = None  # it holds all tensors
        return state

    def clear(self) -> None:
        """Delete them: what they were for is done."""
        if self._lock is not None:
            self._drop(self.paths())
        self.close()

    def close(self) -> None:
        """Let other processes use the folder; it goes where it is empty."""
        if self._lock is not None and self._lock.is_locked:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.release()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _path(self, step: int) -> Path:
        return self.folder / f"{self.stage:02}-{step:010}.safetensors"

    def _newest(self) -> dict[str, Any]:
        """Read the newest that is sound."""
        paths = self.paths()
        if not paths:
            raise MissingError(f"nothing to resume: no checkpoint in {self.folder}; leave out --resume (resume=True)")
        while True:
            path = paths.pop()
            try:
                return read_state(path)
            except IntegrityError as exc:
                if not paths:
                    raise IntegrityError(f"{exc}; no other is left: begin anew with --force (force=True)") from exc
                _log.warning("%s: going back to %s", exc, paths[-1].name)
                self._drop([path])

    def _refuse_changes(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = list(differences(then, now))
        if changed:
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise UsageError(
                f"{self.folder} holds another run: {'; '.join(changed[:4])}{more}. Give the command as it was, or "
                "begin anew with --force (force=True)"
            )

    def _locked(self) -> filelock.BaseFileLock:
        lock = filelock.FileLock(self.folder / LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout as exc:
            raise ResourceError(f"another process is at work in {self.folder}: wait for it, or stop it first") from exc
        except OSError as exc:
            raise ResourceError(f"{self.folder} cannot be written: {exc.strerror or exc}") from exc
        return lock

    def _drop(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)
