"""Gates: what a packed file must reach to be written under its own name."""

from __future__ import annotations

import re
from pathlib import Path

import click

from compressor.cli.options import Options
from compressor.formats.errors import QualityError

__all__ = ["in_bytes", "missed_gates", "refuse", "rejected"]

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def in_bytes(context: click.Context, option: click.Parameter, text: str | None) -> int | None:
    """Read a size as people write it: 250000, 250kB, 1.5MB, 1MiB."""
    del context, option
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", (text or "").lower())
    if text is None:
        return None
    if found is None or found[2] not in UNITS:
        raise click.BadParameter(f"{text!r} is no size: expected 250000, 250kB, 1.5MB or 1MiB")
    return int(float(found[1]) * UNITS[found[2]])


def missed_gates(options: Options, size: int, packed: float | None, dense: float | None) -> list[str]:
    """Say which gates are missed, and by what.

    Args:
        size: of the file, in bytes.
        packed, dense: top-1, 0 to 1, where measured.
    """
    missed = []
    if options.require_top1 is not None and packed is not None and round(100 * packed, 9) < options.require_top1:
        missed.append(f"top-1 is {100 * packed:.2f} %, --require-top1 {options.require_top1:g}")
    if options.require_drop is not None and packed is not None and dense is not None:
        drop = round(100 * (dense - packed), 9)  # 0.925 - 0.92 is a little over half a point otherwise
        if drop > options.require_drop:
            missed.append(f"top-1 fell by {drop:.2f} points, --require-drop {options.require_drop:g}")
    if options.require_size is not None and size > options.require_size:
        missed.append(f"the file has {size:,} bytes, --require-size {options.require_size:,}")
    return missed


def rejected(output: Path) -> Path:
    """Give the name a file gets that missed a gate."""
    return output.with_name(output.name + ".rejected")


def refuse(missed: list[str], output: Path) -> None:
    """Raise QualityError where a gate was missed."""
    if missed:
        raise QualityError(f"{'; '.join(missed)}: kept as {rejected(output)}, {output} was not written")
