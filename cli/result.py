"""What ``compress MODEL`` prints at its end: the table of the file, and its accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import click

from compressor.cli.configs import DisplayConfig
from compressor.cli.search import target_facts, target_line
from compressor.cli.setup import Run
from compressor.cli.show import WHOLE_WORDS, accuracy_line, class_rows, echo, flips, print_json, say, styled, width
from compressor.lifecycle.packed import Packed
from compressor.report.report import Report
from compressor.training.evaluation import Evaluation

__all__ = ["Result", "show_result", "warn_of_loss"]

HARD_LOSS = 0.05  # of all images


@dataclass(frozen=True, eq=False)
class Result:
    """What a run has written, and how good it is.

    Args:
        packed: the packed model.
        path: the file that was written.
        accuracy: of the model that the file holds; None without data.
        dense: accuracy of the dense model; None where there is none, or no data.
        missed: a phrase for each gate that the file misses.
    """

    packed: Packed
    path: Path
    accuracy: Evaluation | None
    dense: Evaluation | None
    missed: list[str]


def show_result(result: Result, run: Run, codec: str, display: DisplayConfig, own_data: str | None) -> None:
    """Prints the result of a run.

    Args:
        codec: how the file was written.
        display: what to print of it.
        own_data: the command for images of the user's own; None where the run was on those.
    """
    report = result.packed.report(codec)
    target = target_facts(run, result.packed, report.totals.file)
    if display.as_json:
        accuracy = None if result.accuracy is None else _accuracy(result.accuracy, result.dense)
        facts = {"file": str(result.path), "top1": accuracy, "missed": result.missed, "target": target}
        classes = {"classes": _changed_classes(result, run)}
        print_json(facts | classes | _training_facts(run) | report.to_dict())
    else:
        first, *more = (
            fill(line, width(), subsequent_indent="  ", **WHOLE_WORDS) for line in _answer(result, report, run, target)
        )
        head, _, rows = report.table(width(), display.everything, "--all").partition("\n")
        answer = styled(first, bold=True, fg="yellow" if result.missed else "green")
        click.echo("\n".join(["", answer, *more, "", styled(head, bold=True), rows]))
        if own_data is not None:
            echo("For your own images (in IMAGES/train/CLASS and IMAGES/val/CLASS):")
            click.echo(own_data)  # on a line of its own, to be copied
    if result.accuracy is not None and result.dense is not None:
        warn_of_loss(result.dense.top1 - result.accuracy.top1, run.source.config.name, run.target.flag is not None)


def _answer(result: Result, report: Report, run: Run, target: Mapping[str, Any] | None) -> Iterator[str]:
    """Yields what the run was for: how much smaller the file is, how good, and how to load it."""
    totals = report.totals
    yield f"{totals.ratio:.2f} times smaller: {totals.dense:,} -> {totals.file:,} bytes"
    if result.accuracy is not None and run.data is not None:
        yield accuracy_line(result.accuracy, result.dense, run.data.evaluated, run.execution.seed)
    if target is not None:
        yield target_line(target, run.target)
    yield f"load it as a timm model: compressor.load({str(result.path)!r})"


def warn_of_loss(fallen: float, model: str, has_price: bool) -> None:
    """Warns where top-1 fell by more than ``HARD_LOSS``, and says what to try.

    Args:
        fallen: by how much, as a share of all images.
        model: its name.
        has_price: whether a target or a price decided how fine the values are.
    """
    if fallen > HARD_LOSS:
        finer = "a larger target or a lower --rate" if has_price else "more --bits"
        say(
            f"warning: top-1 fell by {100 * fallen:.1f} points; try {finer}, or more --epochs; "
            f"'compress sensitivity {model}' shows which tensors lose most"
        )


def _training_facts(run: Run) -> dict[str, Any]:
    """Returns how the model was trained: the teacher, the seed, its epochs, and where they are logged."""
    trained = [stage for stage in run.recipe.stages if run.trains(stage)]
    distilled = any(stage.training.distill for stage in trained)
    teacher = run.teacher_name or ("dense" if run.has_dense_model else None)
    return {
        "teacher": teacher if distilled else None,
        "seed": run.execution.seed,
        "history": run.history,
        "summary": str(run.logs.summary) if run.logs is not None and trained else None,
    }


def _changed_classes(result: Result, run: Run) -> list[dict[str, Any]] | None:
    """Returns the classes of which the packed model answers for any image otherwise; None where that is not known."""
    if result.accuracy is None or result.dense is None or run.data is None:
        return None
    rows = class_rows(result.accuracy, result.dense, run.data.class_names)
    return [row for row in rows if row["lost"] or row["gained"]]


def _accuracy(packed: Evaluation, dense: Evaluation | None) -> dict[str, Any]:
    low, high = packed.interval
    facts: dict[str, Any] = {"packed": packed.top1, "n": packed.n, "low": low, "high": high}
    if dense is not None:
        lost, gained = flips(packed, dense)
        facts |= {"dense": dense.top1, "lost": lost, "gained": gained}
    return facts
