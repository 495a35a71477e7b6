"""A folder with the newest checkpoints of a training run, from which a later process can resume it."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import filelock

from compressor.checkpointing.fingerprint import as_json, differences, machine, with_more_epochs
from compressor.checkpointing.serialization import broadcast_state, read_state, write_state
from compressor.distributed.collectives import main_process_first
from compressor.distributed.devices import init_processes
from compressor.formats.errors import IntegrityError, MissingError, ResourceError, UsageError

__all__ = ["Checkpoints", "checkpoints_in"]

_log = logging.getLogger(__name__)
KEPT = 2  # the newest checkpoints, in case the last one is damaged
FORMAT = 2  # of what a checkpoint holds; one of another format is not resumed
LOCK = ".lock"


class Checkpoints:
    """The checkpoints of a training run of one or several stages, in a folder that is locked against other processes.

    With several training processes, only the first reads and writes; all of them must create this object and make the
    same calls in the same order.

    ``Compressor.finetune(..., checkpoints=...)`` saves a checkpoint after every epoch, and within epochs as ``minutes``
    and ``steps`` say. With ``resume`` the training continues from the newest undamaged checkpoint and ends exactly as
    if it had never been interrupted; with more epochs it goes on to their end. ``clear()`` deletes the checkpoints when
    the work is done; ``close()`` releases the folder and keeps them.

    Args:
        folder: created if missing.
        about: what the result depends on beyond what the training records itself; JSON values. A ``recipe`` has the
            stages of the run, which are numbered from 1.
        minutes: time between checkpoints within an epoch; 0: none.
        steps: number of steps between checkpoints; 0: none.
        resume: whether to continue from the newest checkpoint in the folder.
        force: whether existing checkpoints are deleted when ``resume`` is not set.

    Raises:
        UsageError: the folder holds checkpoints and neither ``resume`` nor ``force`` is set; or ``about`` has changed.
        MissingError: ``resume`` is set and the folder holds no checkpoint.
        IntegrityError: all checkpoints are damaged.
        ResourceError: the folder cannot be written, or another process uses it.

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
        """The number of the current stage, which is part of the names of its checkpoints."""
        self.stop = False
        """Set, for example by a signal handler, to save a last checkpoint after the current step and stop training."""
        self.training = False
        """Whether a training is running that will react to ``stop``."""
        self._lock: filelock.BaseFileLock | None = None
        self._last_save = time.monotonic()
        self._newest_content: dict[str, Any] | None = None
        init_processes()
        start = main_process_first(lambda: self._open(resume, force))
        self.found: tuple[int, int] | None = None if start is None else tuple(start)
        """Stage and step that the run is resumed from; None if it starts anew."""

    def _open(self, resume: bool, force: bool) -> tuple[int, int] | None:
        """Locks the folder, in the first of several processes; returns stage and step of the checkpoint to resume."""
        self._lock = self._acquire_lock()
        try:
            self._load_or_clear(resume, force)
        except BaseException:
            self.close()
            raise
        return None if self._newest_content is None else (self._newest_content["stage"], self._newest_content["step"])

    def _load_or_clear(self, resume: bool, force: bool) -> None:
        """Reads the newest checkpoint with ``resume``; otherwise deletes existing ones, if ``force`` allows it."""
        if resume:
            self._newest_content = self._newest()
            if self._newest_content.get("format") != FORMAT:
                raise UsageError(
                    f"{self.folder} holds what another version of this program has saved. Go on with that one, or "
                    "begin anew with --force (force=True)"
                )
            then = self._newest_content["about"]
            self._refuse_changes(_with_longer_stages(then, self.about, self._newest_content["stage"]), self.about)
            for change in differences(self._newest_content["machine"], machine()):
                _log.warning("%s: the file will not be the same to the last bit", change)
        elif self.paths() and not force:
            raise UsageError(
                f"{self.folder} holds a run that was interrupted: go on with --resume (resume=True), or begin anew "
                "with --force (force=True)"
            )
        else:
            self._delete(self.paths())

    def paths(self) -> list[Path]:
        """Returns the checkpoint files, oldest first."""
        return checkpoints_in(self.folder)

    def due(self, step: int) -> bool:
        """Returns whether a checkpoint within an epoch is due after the given number of steps."""
        late = self.minutes and time.monotonic() - self._last_save >= 60 * self.minutes
        return bool(late or (self.steps and step % self.steps == 0))

    def save(self, step: int, state: Mapping[str, Any], training: Mapping[str, Any], keep: int | None = None) -> None:
        """Saves a checkpoint and deletes older ones.

        Args:
            step: number of steps done in this stage.
            state: what ``serialization.write_state`` accepts.
            training: what the training depends on, as JSON values; compared on resuming.
            keep: the step of an older checkpoint to keep; of the others, only the newest before this one is kept.

        Raises:
            ResourceError: disk or permissions do not allow it; the checkpoint before is then kept.
        """
        path, kept = self._path(step), None if keep is None else self._path(keep)
        earlier = [file for file in self.paths() if file < path]
        later = [file for file in self.paths() if file > path]  # from before a rollback, no longer valid
        old = [file for file in earlier[: 1 - KEPT] if file != kept]
        self._delete(old + later)  # before writing, because the disk may be nearly full
        facts = {
            "format": FORMAT,
            "about": self.about,
            "training": as_json(training),
            "stage": self.stage,
            "step": step,
        }
        facts["machine"] = machine()
        write_state(path, {**facts, "state": state})
        self._last_save = time.monotonic()

    def back_to(self, step: int) -> dict[str, Any] | None:
        """Returns the state after a step of this stage, or an earlier one if that is damaged; None if all are."""
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
        """Returns the state to resume from and forgets it; None if there is none for this stage.

        Args:
            training: what the training depends on now, as JSON values.

        Raises:
            UsageError: what the training depends on has changed since the checkpoint was saved.
        """
        if self.found is None or self.found[0] != self.stage:
            return None
        state = broadcast_state(lambda: self._checked_state(training))
        self.found = None
        return state

    def _checked_state(self, training: Mapping[str, Any]) -> dict[str, Any]:
        assert self._newest_content is not None
        now = as_json(training)
        self._refuse_changes(with_more_epochs(self._newest_content["training"], now), now)
        state: dict[str, Any] = self._newest_content["state"]
        self._newest_content = None  # frees the memory of all its tensors
        return state

    def clear(self) -> None:
        """Deletes the checkpoints, which are of no more use when the training is done, and releases the folder."""
        if self._lock is not None:
            self._delete(self.paths())
        self.close()

    def close(self) -> None:
        """Releases the folder to other processes and removes it if it is empty."""
        if self._lock is not None and self._lock.is_locked:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._lock.release()
            if not any(self.folder.iterdir()):
                self.folder.rmdir()

    def _path(self, step: int) -> Path:
        return self.folder / f"{self.stage:02}-{step:010}.safetensors"

    def _newest(self) -> dict[str, Any]:
        """Reads the newest checkpoint that is not damaged."""
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
                self._delete([path])

    def _refuse_changes(self, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = list(differences(then, now))
        if changed:
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise UsageError(
                f"{self.folder} holds another run: {'; '.join(changed[:4])}{more}. Give the command as it was, or "
                "begin anew with --force (force=True)"
            )

    def _acquire_lock(self) -> filelock.BaseFileLock:
        lock = filelock.FileLock(self.folder / LOCK)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except filelock.Timeout as exc:
            raise ResourceError(f"another process is at work in {self.folder}: wait for it, or stop it first") from exc
        except OSError as exc:
            raise ResourceError(f"{self.folder} cannot be written: {exc.strerror or exc}") from exc
        return lock

    def _delete(self, paths: list[Path]) -> None:
        for path in paths:
            path.unlink(missing_ok=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """Returns the checkpoint files in a folder, oldest first; none where there is no such folder."""
    return sorted(folder.glob("[0-9]*-[0-9]*.safetensors"))


def _with_longer_stages(then: Mapping[str, Any], now: Mapping[str, Any], stage: int) -> dict[str, Any]:
    """Returns what a run was about, with the epochs of today in those stages of its recipe that are not done."""
    stages, longer = ((about.get("recipe") or {}).get("stage", []) for about in (then, now))
    if len(stages) != len(longer):
        return dict(then)
    grown = [
        with_more_epochs(*pair) if number >= stage else pair[0]
        for number, pair in enumerate(zip(stages, longer, strict=True), 1)
    ]
    return {**then, "recipe": {**then["recipe"], "stage": grown}} if grown else dict(then)
