"""Gates: what a packed file must reach to be written under its own name."""

from __future__ import annotations

from pathlib import Path

from compressor.cli.configs import GateConfig
from compressor.formats.errors import QualityError

__all__ = ["missed_gates", "refuse", "rejected"]


def missed_gates(gates: GateConfig, size: int, packed: float | None, dense: float | None) -> list[str]:
    """Returns a phrase for each gate that is missed, with what was reached.

    Args:
        size: of the file, in bytes.
        packed, dense: top-1, 0 to 1; None where not measured.
    """
    missed = []
    if gates.require_top1 is not None and packed is not None and round(100 * packed, 9) < gates.require_top1:
        missed.append(f"top-1 is {100 * packed:.2f} %, --require-top1 {gates.require_top1:g}")
    if gates.require_drop is not None and packed is not None and dense is not None:
        drop = round(100 * (dense - packed), 9)  # unrounded, 0.925 - 0.92 is a little more than half a point
        if drop > gates.require_drop:
            missed.append(f"top-1 fell by {drop:.2f} points, --require-drop {gates.require_drop:g}")
    if gates.require_size is not None and size > gates.require_size:
        missed.append(f"the file has {size:,} bytes, --require-size {gates.require_size:,}")
    return missed


def rejected(output: Path) -> Path:
    """Returns the name of a file that missed a gate."""
    return output.with_name(output.name + ".rejected")


def refuse(missed: list[str], output: Path) -> None:
    """Raises QualityError where a gate was missed."""
    if missed:
        raise QualityError(f"{'; '.join(missed)}: kept as {rejected(output)}, {output} was not written")
