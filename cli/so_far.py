"""The best file so far of a run that trains towards a target: on disk from the first seconds, whatever ends the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from compressor.cli.files import EVAL_BATCH
from compressor.cli.setup import Run
from compressor.cli.show import percent, say
from compressor.compressor import Compressor
from compressor.distributed.collectives import main_process_first
from compressor.formats.errors import CompressorError, InterruptionError, ResourceError
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.packed import Packed
from compressor.policy.recipe import Stage
from compressor.rng import seeded
from compressor.training.evaluation import evaluate

__all__ = ["BestSoFar"]

_log = logging.getLogger(__name__)
NAME = "best.safetensors"


class BestSoFar:
    """Keeps, beside the checkpoints, the file that is best on the validation images.

    Args:
        work: has the data, the seed, and the folder of the checkpoints.
        stage: that is trained.
        finish: packs a job.
        codec: how the file is written.
    """

    def __init__(self, work: Run, stage: Stage, finish: Callable[[Compressor], Packed], codec: str) -> None:
        assert work.checkpoints is not None
        self.work, self.finish, self.codec = work, finish, codec
        self.path = work.checkpoints.folder / NAME
        self.is_kept = work.target_of(stage).flag is not None
        self.top1, self.size = -1.0, 0
        if self.is_kept and work.checkpoints.found is not None:
            self.top1, self.size = main_process_first(lambda: _noted(self.path))

    def offer(self, job: Compressor) -> float | None:
        """Writes what training has come to, where it is the best so far; returns its top-1 on the validation images.

        Args:
            job: goes on as if nothing had happened. None is returned, and nothing done, where there is no target.
        """
        if not self.is_kept:
            return None
        assert self.work.data is not None
        with seeded(self.work.execution.seed):
            packed = self.finish(copied := job.copied())
            top1 = evaluate(copied.model, self.work.data.eval_loader(EVAL_BATCH, "validation")).top1
            if top1 > self.top1:
                packed.note(validation=top1)
                self._write(packed, top1)
        return top1

    def _write(self, packed: Packed, top1: float) -> None:
        try:
            self.size = main_process_first(lambda: packed.save(self.path, codec=self.codec, force=True))
            self.top1 = top1
        except ResourceError as exc:  # such as a full disk, which may be emptied before the training ends
            _log.warning("the best file so far is not kept: %s; the training goes on", exc)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Says where the best file so far is if the run is interrupted inside."""
        try:
            yield
        except (InterruptionError, KeyboardInterrupt):
            if self.top1 >= 0:
                say(f"the best file so far: {self.path}  {self.size:,} bytes, validation {percent(self.top1)}")
            raise

    def clear(self) -> None:
        """Deletes the file, which is of no more use when that of the whole training is written."""
        if self.is_kept:
            main_process_first(lambda: self.path.unlink(missing_ok=True))


def _noted(path: Path) -> tuple[float, int]:
    """Returns top-1 and size of the best file of an earlier run; -1 where there is none, or it is damaged."""
    try:
        with PackedFile.open(path) as file:
            return float(file.provenance["validation"]), path.stat().st_size
    except (CompressorError, OSError, KeyError, TypeError, ValueError):
        return -1.0, 0
