"""The epochs of a training, as rows of figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, overload

from tabulate import tabulate

from compressor.training.loop import Epoch
from compressor.training.progress_bar import percent
from compressor.wording import counted

__all__ = ["History"]

HEADS = {
    "epoch": "epoch", "loss": "loss", "lr": "learning rate", "top1": "top-1", "bits": "bits/weight",
    "fixed": "fixed", "changed": "indices changed", "price": "price of a bit", "size": "bytes",
    "target_size": "target",
}  # fmt: skip
SHARES = ("top1", "fixed", "changed")  # 0 to 1


class History(Sequence[dict[str, Any]]):
    """A row for each epoch, as a dictionary of JSON values.

    Its keys: ``epoch`` and ``epochs``, from 1; ``loss``, the mean over the epoch; ``lr``; ``top1`` on the validation
    images, 0 to 1; and where weights share values ``bits`` per weight, and ``fixed``, ``changed``, ``price``, ``size``,
    ``target_size`` as in ``SharingMetrics``. What is not known is None. Of a training that was resumed, it has the
    epochs since then.

    Example:
        >>> history = History()
        >>> history.add(Epoch(1, 2, loss=0.5, lr=0.1), top1=0.75)
        >>> history[-1]["top1"], len(history)
        (0.75, 1)
        >>> print(history)
          epoch    loss    learning rate  top-1
              1     0.5              0.1  75.0 %
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []

    def add(self, epoch: Epoch, top1: float | None) -> None:
        """Adds an epoch.

        Args:
            epoch: its figures.
            top1: on the validation images, 0 to 1; None where there are none.
        """
        sharing = None if epoch.sharing is None else asdict(epoch.sharing)
        figures = {"epoch": epoch.number, "epochs": epoch.epochs, "loss": epoch.loss, "lr": epoch.lr, "top1": top1}
        keys = ("bits", "fixed", "changed", "price", "size", "target_size")
        self._rows.append({**figures, **{key: None if sharing is None else sharing[key] for key in keys}})

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        """Returns one row, or some."""
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self._rows)

    def __str__(self) -> str:
        return self._table("plain")

    def __repr__(self) -> str:
        return f"<History of {counted(len(self), 'epoch')}>\n{self}" if self._rows else "<History of no epochs>"

    def _repr_html_(self) -> str:
        """Returns a table for a notebook."""
        return self._table("html")

    def _table(self, form: str) -> str:
        """Returns the columns that have a figure in any row."""
        columns = [key for key in HEADS if any(row.get(key) is not None for row in self._rows)]
        rows = [[_shown(key, row.get(key)) for key in columns] for row in self._rows]
        return tabulate(rows, [HEADS[key] for key in columns], form, floatfmt=".4g", missingval="")


def _shown(key: str, value: float | None) -> float | str | None:
    """Returns a figure as a table has it: shares in percent."""
    return percent(value) if key in SHARES and value is not None else value
