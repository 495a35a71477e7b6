"""The best file so far of a run that trains towards a target: on disk from the first seconds, whatever ends the run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import nn

import compressor
from compressor.cli.files import EVAL_BATCH
from compressor.cli.setup import Run
from compressor.cli.show import percent, say
from compressor.compressor import Compressor
from compressor.distributed.collectives import broadcast_tensors, is_main_process, main_process_first
from compressor.formats.errors import CompressorError, InterruptionError, ResourceError
from compressor.formats.file.memory import MAX_MEMORY
from compressor.formats.file.reader import PackedFile
from compressor.lifecycle.drop_control import DropControl
from compressor.lifecycle.packed import Packed
from compressor.policy.recipe import Stage
from compressor.rng import seeded
from compressor.training.evaluation import evaluate

__all__ = ["BestSoFar"]

_log = logging.getLogger(__name__)
NAME = "best.safetensors"


class BestSoFar:
    """Keeps, beside the checkpoints, the best file so far: by top-1 on the validation images, or as the target ranks.

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
        with seeded(self.work.execution.seed):
            packed = self.finish(copied := job.copied())
            top1 = self._top1_of(copied.model)
            packed.note(validation=top1)
            if self._rank_of(job, packed, top1) > self._rank(job, self.top1, self.size):
                self._write(packed, top1)
        return top1

    def chosen(self, job: Compressor, packed: Packed) -> Packed:
        """Returns the file of a run: that of the whole training, or the best so far where a drop asks for that.

        Args:
            job: finished; its model gets the weights of the file.
            packed: what it has come to.
        """
        control = job.control
        if not self.is_kept or not isinstance(control, DropControl):
            return packed
        top1 = self._top1_of(job.model)
        if self._rank(job, self.top1, self.size) > self._rank_of(job, packed, top1):
            top1 = self.top1
            packed = _read(self.path, job.model) if is_main_process() else packed
            broadcast_tensors(job.model.state_dict().values())
            say(f"the file is the best so far: {self.size:,} bytes, validation {percent(top1)}")
        packed.note(target={**packed.content.provenance["target"], "drop": round(control.drop(top1), 4)})
        return packed

    def _rank_of(self, job: Compressor, packed: Packed, top1: float) -> tuple[float, ...]:
        is_ranked_by_size = isinstance(job.control, DropControl)  # to pack takes seconds
        size = main_process_first(lambda: len(packed.to_bytes(self.codec))) if is_ranked_by_size else 0
        return self._rank(job, top1, size)

    def _rank(self, job: Compressor, top1: float, size: int) -> tuple[float, ...]:
        """Returns how good a file is, to be compared with others of the job; a negative top-1 stands for none."""
        return (top1,) if job.control is None else job.control.rank(top1, size)

    def _top1_of(self, model: nn.Module) -> float:
        """Returns top-1 of a model on the validation images, in full precision, as anyone has it who loads the file."""
        assert self.work.data is not None
        return evaluate(model, self.work.data.eval_loader(EVAL_BATCH, "validation")).top1

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


def _read(path: Path, model: nn.Module) -> Packed:
    """Returns the content of a packed file, without what was noted for comparisons, and loads it into a model."""
    compressor.load(path, model)
    with PackedFile.open(path, MAX_MEMORY) as file:
        content = file.content()
    kept = {key: value for key, value in content.provenance.items() if key != "validation"}
    return Packed(replace(content, provenance=kept))


def _noted(path: Path) -> tuple[float, int]:
    """Returns top-1 and size of the best file of an earlier run; -1 where there is none, or it is damaged."""
    try:
        with PackedFile.open(path) as file:
            return float(file.provenance["validation"]), path.stat().st_size
    except (CompressorError, OSError, KeyError, TypeError, ValueError):
        return -1.0, 0
