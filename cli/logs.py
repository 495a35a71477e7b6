"""Logs of fine-tuning: for every epoch a row of a CSV file, and TensorBoard's scalars."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from timm.utils.summary import update_summary

from compressor.cli.configs import OutputConfig
from compressor.formats.errors import MissingError
from compressor.formats.io.atomic import check_writable
from compressor.training.loop import Epoch

__all__ = ["Logs"]

_log = logging.getLogger(__name__)


class Logs:
    """Logs every epoch; what an earlier run has logged of the same epoch and of later ones is dropped.

    Args:
        summary: a CSV file with timm's columns: epoch from 0, accuracy in per cent.
        board: TensorBoard's folder; None where it was not asked for.
    """

    def __init__(self, summary: Path, board: Path | None = None) -> None:
        self.summary, self.board = summary, board
        self._writer: Any = None
        self._has_logged = False

    @classmethod
    def of(cls, config: OutputConfig, output: Path) -> Logs:
        """Returns logs beside the output, after a check, before the long work, that they can be written.

        Raises:
            MissingError: TensorBoard is asked for, and not installed.
            ResourceError: the summary cannot be written.
        """
        summary = config.summary or output.with_name(f"{output.name}.summary.csv")
        check_writable(summary, force=True)
        if config.log is None:
            return cls(summary)
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as exc:
            raise MissingError(f"--log tensorboard: {exc}; pip install 'timm-compressor[tensorboard]'") from exc
        return cls(summary, output.with_name(f"{output.name}.tensorboard"))

    def on_epoch(self, epoch: Epoch, top1: float | None, before: int) -> None:
        """Logs an epoch; where that fails, it warns, and the training goes on.

        Args:
            top1: on the validation images, 0 to 1.
            before: number of epochs of earlier stages.
        """
        number, sharing = before + epoch.number - 1, epoch.sharing
        train = {
            "loss": epoch.loss,
            "bits_per_weight": None if sharing is None else sharing.bits,
            "changed": None if sharing is None else sharing.changed,
            "price": None if sharing is None else sharing.price,
            "size": None if sharing is None else sharing.size,
            "target_size": None if sharing is None else sharing.target_size,
        }
        measured = {"top1": None if top1 is None else 100 * top1}
        try:
            if not self._has_logged:
                _trim(self.summary, number)
            new = not self.summary.exists()
            update_summary(number, train, measured, str(self.summary), lr=epoch.lr, write_header=new)  # type: ignore[no-untyped-call]
            self._add_scalars(number, {**train, **measured, "lr": epoch.lr})
        except OSError as exc:
            _log.warning("epoch %s is not noted (%s); the training goes on", number + 1, exc)
        self._has_logged = True

    def _add_scalars(self, number: int, figures: dict[str, float | None]) -> None:
        if self.board is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.board), purge_step=number)
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, number)
        self._writer.flush()


def _trim(summary: Path, start: int) -> None:
    """Drops the rows of a summary from an epoch on."""
    if not summary.exists():
        return
    header, *rows = summary.read_text(encoding="utf-8").splitlines() or [""]
    kept = [row for row in rows if (epoch := row.partition(",")[0]).isdigit() and int(epoch) < start]
    summary.unlink()
    if kept:
        summary.write_text("\n".join([header, *kept, ""]), encoding="utf-8")
