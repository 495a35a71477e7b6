"""``compress sensitivity MODEL``: what the model loses when one tensor alone is rounded at a price."""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.compress import MODEL, OPTIONS, SectionedCommand
from compressor.cli.configs import Request
from compressor.cli.preprocessing import PreprocessingConfig
from compressor.cli.values import Number
from compressor.config_fields import config_fields
from compressor.formats.errors import MissingError, UsageError
from compressor.wording import counted

if TYPE_CHECKING:
    from compressor.lifecycle.sensitivity import Sensitivity

__all__ = ["sensitivity"]

SHARED = {
    "pretrained", "checkpoint_path", "num_classes", "in_chans", "dataset", "data_dir", "workers", "seed",
    "device", "baseline_epochs", "calibration", "calibration_memory", "calibration_images", "batch_size", "as_json",
    *(one.name for one in config_fields(PreprocessingConfig)),
}  # fmt: skip


def _sensitivity(
    model: str, prices: tuple[float, ...], csv_path: Path | None, plot: Path | None, **values: Any
) -> None:
    _check(csv_path, plot)
    named, rows = _measure(Request.from_command_line(model, {**values, "dry_run": True, "rate": 1e-7}), prices)
    if csv_path is not None:
        with csv_path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(asdict(rows[0]))
            writer.writerows([*row[:1], "x".join(map(str, row[1])), *row[2:]] for row in map(_values, rows))
    if plot is not None:
        _draw(rows, plot)
    _show(named, rows, bool(values.get("as_json")))


def _check(csv_path: Path | None, plot: Path | None) -> None:
    """Refuses what would fail after the long work."""
    from compressor.formats.io.atomic import check_writable

    for path in (csv_path, plot):
        if path is not None:
            check_writable(path, force=True)
    if plot is not None and find_spec("matplotlib") is None:
        raise MissingError("--plot needs matplotlib: pip install 'timm-compressor[report]'")


def _values(row: Sensitivity) -> list[Any]:
    return list(asdict(row).values())


def _measure(request: Request, prices: tuple[float, ...]) -> tuple[dict[str, Any], list[Sensitivity]]:
    """Returns the model as timm makes it, and the figures of its tensors."""
    request.check()
    from compressor.cli.search import training_images
    from compressor.cli.setup import set_up
    from compressor.cli.show import Step
    from compressor.cli.weights import dense_model
    from compressor.lifecycle.sensitivity import RATES, sensitivity

    if request.target.calibration == "none":
        raise UsageError("--calibration none: sensitivity is measured on images, of the data or synthetic")
    request.target.check()
    work = set_up(request)
    model = dense_model(work.source, work.data, work.execution, None, lambda name: Step("1/2", name))
    step = Step("2/2", "sensitivity")
    images = training_images(work, work.recipe.stages[-1]) if work.calibration == "data" else "synthetic"
    rows = list(sensitivity(model, images, prices or RATES, work.execution.seed, **request.target.measuring))
    step.done(f"{counted(len({row.site for row in rows}), 'tensor')} at {counted(len(prices or RATES), 'price')}")
    return {"name": work.source.named.architecture, "args": dict(work.source.args)}, rows


def _show(model: dict[str, Any], rows: list[Sensitivity], as_json: bool) -> None:
    from compressor.cli.show import echo, print_json, print_table

    if as_json:
        print_json({"model": model, "sensitivity": [asdict(row) for row in rows]})
        return
    header = ["site", "shape", "rate", "step", "bits", "predicted", "measured"]
    shown = [
        [r.site, "x".join(map(str, r.shape)), f"{r.rate:.0e}", f"{r.step:.3g}", f"{r.bits:.3f}", f"{r.predicted:.2e}",
         f"{r.measured:.2e}"]
        for r in rows
    ]  # fmt: skip
    print_table([header, *shown], spare=("shape",))
    echo("bits of an index; loss of one image that the curvature predicts, and measured divergence, in nats")


def _draw(rows: list[Sensitivity], path: Path) -> None:
    """Draws the measured loss of each tensor, a line for each price."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    sites = list(dict.fromkeys(row.site for row in rows))
    figure, axes = pyplot.subplots(figsize=(max(6.0, 0.25 * len(sites)), 5.0), layout="constrained")
    for number, rate in enumerate(sorted({row.rate for row in rows})):
        chosen = [row for row in rows if row.rate == rate]
        places = [sites.index(row.site) for row in chosen]
        smallest = sys.float_info.min
        axes.plot(
            places, [max(r.measured, smallest) for r in chosen], f"C{number}o-", label=f"price {rate:.0e}, measured"
        )
        axes.plot(places, [max(r.predicted, smallest) for r in chosen], f"C{number}x:", label="predicted")
    axes.set(yscale="log", ylabel="loss of one image, nats", title="What rounding one tensor alone costs")
    axes.set_xticks(range(len(sites)), sites, rotation=90, fontsize=7)
    figure.legend(loc="outside lower center", ncols=3, fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)


sensitivity = SectionedCommand(
    "sensitivity",
    params=[
        MODEL,
        *(option for option in OPTIONS if option.name in SHARED),
        click.Option(
            ["--price", "prices"],
            type=Number(0, 1, min_open=True),
            multiple=True,
            help="Price of a bit, useful are 1e-9 to 1e-6; may be repeated. [default: 1e-8, 1e-7, 1e-6]",
        ),
        click.Option(["--csv", "csv_path"], type=click.Path(path_type=Path), help="Write the rows to this file."),
        click.Option(["--plot"], type=click.Path(path_type=Path), help="Draw them, as PNG or SVG."),
    ],
    callback=_sensitivity,
    help="Show what MODEL loses when one tensor alone is rounded.",
)
"""The command."""
