"""The target of ``compress MODEL``: the size or accuracy that the price of a coded bit is searched for, or the price.

Nothing here imports torch, timm or pydantic, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from compressor.cli.click_options import byte_size, given_flags
from compressor.config_fields import config_field
from compressor.formats.errors import UsageError
from compressor.report.size_text import size_text

__all__ = ["TARGETS", "TargetConfig", "number"]

TARGETS = ("target_size", "target_bits", "max_drop", "rate")


@dataclass(frozen=True)
class TargetConfig:
    """What the price of a coded bit is searched for, or that price; None where the command does not say."""

    target_size: int | None = config_field(
        None, "Largest size of the file, as 450KB.", metavar="BYTES", click={"type": byte_size}
    )
    target_bits: float | None = config_field(
        None, "Likewise, as bits: all of the file over all shared weights.", gt=0, metavar="BITS"
    )
    max_drop: float | None = config_field(
        None, "The smallest file whose validation top-1 drops at most so much.", ge=0, metavar="POINTS"
    )
    rate: float | None = config_field(
        None, "Price of a coded bit, in loss of one image; useful are 1e-9 to 1e-6.", gt=0, le=1, metavar="LOSS"
    )
    calibration: str | None = config_field(
        None,
        "Images that weights are judged by: of the data, made from the model, or none. [default: data if used]",
        choices=("data", "synthetic", "none"),
    )
    calibration_memory: int | None = config_field(
        None,
        "Memory for what is measured of layers on them, as 200MB. [default: 512MiB]",
        metavar="BYTES",
        click={"type": byte_size},
    )

    @property
    def measuring(self) -> dict[str, Any]:
        """The memory of the measurements as an argument of ``Compressor.prepare``; none where it was not named."""
        return {} if self.calibration_memory is None else {"memory": self.calibration_memory}

    @property
    def flag(self) -> str | None:
        """The option that asks for a target; None where there is none."""
        return next(iter(self._flags()), None)

    @property
    def is_of_size(self) -> bool:
        """Whether it is the size of the file that is asked for."""
        return self.target_size is not None or self.target_bits is not None

    @property
    def is_searched(self) -> bool:
        """Whether the price is searched for, and not named."""
        return self.flag is not None and self.rate is None

    @property
    def arguments(self) -> dict[str, Any]:
        """The target as a keyword argument of ``Compressor``; none where there is no target."""
        return {name: value for name in TARGETS if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        """Raises UsageError for more than one target, or one that is no amount."""
        if len(flags := self._flags()) > 1:
            raise UsageError(f"{' and '.join(flags)}: name one")
        for flag, value in zip(flags, self.arguments.values(), strict=True):
            if not math.isfinite(value) or (value == 0 and self.max_drop is None):
                least = "of at least" if self.max_drop is not None else "above"
                raise UsageError(f"{flag} {value:g}: expected a finite number {least} 0")
        if self.calibration_memory == 0:
            raise UsageError("--calibration-memory 0: expected at least 1 byte, better 200MB or more")
        if self.calibration_memory is not None and self.calibration == "none":
            raise UsageError("--calibration-memory and --calibration none, by which nothing is measured: leave out one")

    def label(self) -> str:
        """Returns the target for names of files.

        >>> [TargetConfig(target_size=size).label() for size in (450_000, 1_500_000, 1_048_576, 999)]
        ['450KB', '1.5MB', '1048.576KB', '999B']
        >>> TargetConfig(target_bits=0.5).label(), TargetConfig(max_drop=0.3).label(), TargetConfig(rate=1e-7).label()
        ('0.5bits', 'drop0.3', 'rate1e-7')
        """
        if self.target_size is not None:
            return size_text(self.target_size)
        if self.target_bits is not None:
            return f"{number(self.target_bits)}bits"
        return f"drop{number(self.max_drop)}" if self.max_drop is not None else f"rate{number(self.rate or 0)}"

    def command_line(self) -> str:
        """Returns the options that ask for the same, after a blank; "" for none."""
        value = next(iter(self.arguments.values()), None)
        shown = "" if value is None else self.label() if self.target_size is not None else number(value)
        target = "" if self.flag is None else f" {self.flag} {shown}"
        return target if self.calibration in (None, "data") else f"{target} --calibration {self.calibration}"

    def _flags(self) -> list[str]:
        return given_flags(self, *TARGETS)


def number(value: float) -> str:
    """Writes a number in up to six digits.

    >>> number(0.5), number(1e-7), number(1.3e-10)
    ('0.5', '1e-7', '1.3e-10')
    """
    return f"{value:g}".replace("e-0", "e-")
