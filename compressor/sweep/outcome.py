"""What is kept of the JSON document that a run of ``compress MODEL --json`` prints: the one reader of its keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from compressor.report.class_flips import ClassFlips

__all__ = ["Outcome"]

Size = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Outcome:
    """The figures of one run.

    Args:
        model: timm's name.
        file: path of the packed file.
        bytes, dense_bytes: sizes of the packed file, and of the dense one.
        parameters: number of parameters.
        n: number of images that top-1 was measured on; 0: none were.
        top1, dense_top1: shares of them, 0 to 1; None where it was not measured.
        low, high: 95 % interval of ``top1``.
        lost, gained: images that only the dense model gets right, and that only the packed one does.
        rate: price of a bit; None where there was none.
        seed: of everything random.
        summary: path of the figures of each epoch; None where nothing was trained.
        missed: a phrase for each gate that the file misses.
        classes: those of which the packed model gets other images right than the dense one; None where no model was
            compared.
    """

    model: str
    file: str
    bytes: Size
    dense_bytes: Size
    parameters: Count
    n: Count = 0
    top1: Share | None = None
    dense_top1: Share | None = None
    low: Share | None = None
    high: Share | None = None
    lost: Count | None = None
    gained: Count | None = None
    rate: float | None = None
    seed: int = 0
    summary: str | None = None
    missed: tuple[str, ...] = ()
    classes: tuple[ClassFlips, ...] | None = None

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Outcome:
        """Reads the document of a run.

        Raises:
            KeyError: it lacks a figure that every run has.
        """
        totals, accuracy = document["totals"], document.get("top1") or {}
        return cls(
            model=document["model"]["name"], file=document["file"], bytes=totals["file"], dense_bytes=totals["dense"],
            parameters=totals["parameters"], n=accuracy.get("n", 0), top1=accuracy.get("packed"),
            dense_top1=accuracy.get("dense"), low=accuracy.get("low"), high=accuracy.get("high"),
            lost=accuracy.get("lost"), gained=accuracy.get("gained"), rate=(document.get("target") or {}).get("rate"),
            seed=document["seed"], summary=document.get("summary"), missed=tuple(document.get("missed", ())),
            classes=_classes(document),
        )  # fmt: skip


def _classes(document: Mapping[str, Any]) -> tuple[ClassFlips, ...] | None:
    rows = document.get("classes")
    return None if rows is None else tuple(ClassFlips(**row) for row in rows)
