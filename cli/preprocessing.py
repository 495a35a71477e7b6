"""Options about how images are prepared for a model: names and meaning are those of timm's scripts.

Nothing here imports torch or timm, so that ``--help`` is quick.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from compressor.cli.values import WholeNumber
from compressor.config_fields import config_field
from compressor.formats.errors import UsageError

__all__ = ["NumbersCommand", "PreprocessingConfig"]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
LISTS = ("--mean", "--std")
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class NumbersCommand(click.Command):
    """A command whose options ``--mean`` and ``--std`` take several values, as those of timm's scripts do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parses arguments; ``--mean 0.5 0.4 0.3`` is read as ``--mean 0.5,0.4,0.3``."""
        joined: list[str] = []
        for word in args:
            is_more = len(joined) > 1 and joined[-2] in LISTS and NUMBER.fullmatch(joined[-1].rpartition(",")[2])
            if is_more and NUMBER.fullmatch(word):
                joined[-1] += f",{word}"
            else:
                joined.append(word)
        return super().parse_args(ctx, joined)


def numbers(text: str) -> tuple[float, ...]:
    """Returns the numbers of a text, between which there are commas; raises click.BadParameter for others.

    >>> numbers("0.485,0.456,.4")
    (0.485, 0.456, 0.4)
    """
    words = text.split(",")
    if not all(map(NUMBER.fullmatch, words)) or not all(math.isfinite(float(word)) for word in words):
        raise click.BadParameter(f"{text!r}: expected a number, or one for each channel")
    return tuple(map(float, words))


@dataclass(frozen=True)
class PreprocessingConfig:
    """How images are prepared, where not as the model's own configuration says."""

    img_size: int | None = config_field(None, "Height and width of the images. [default: the model's]", ge=1)
    input_size: tuple[int, ...] | None = config_field(
        None,
        "Channels, height and width of the images.",
        metavar="C H W",
        click={"type": WholeNumber(1), "nargs": 3},
    )
    crop_pct: float | None = config_field(
        None, "Part of the resized image that is kept, in evaluation. [default: the model's]", ge=0.1, le=10
    )
    crop_mode: str | None = config_field(None, "How it is cut out. [default: the model's]", choices=CROP_MODES)
    mean: tuple[float, ...] | None = config_field(
        None, "Mean of pixels, of all or by channel. [default: the model's]", metavar="MEAN...", click={"type": numbers}
    )
    std: tuple[float, ...] | None = config_field(
        None, "Their standard deviation. [default: the model's]", metavar="STD...", click={"type": numbers}
    )
    interpolation: str | None = config_field(
        None, "How images are resized. [default: the model's]", choices=INTERPOLATIONS
    )
    class_map: Path | None = config_field(
        None, "Text file with the name of a class a line, in their order. [default: sorted folders]", metavar="FILE"
    )

    @property
    def asked(self) -> dict[str, Any]:
        """What was asked for, by the names of ``timm.data.resolve_data_config``."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "class_map"}

    def check(self, in_chans: int | None = None) -> None:
        """Raises UsageError for options that contradict each other, or the number of channels."""
        if self.input_size is not None and self.img_size is not None:
            raise UsageError("--input-size and --img-size: name one")
        if self.input_size is not None and in_chans not in (None, self.input_size[0]):
            raise UsageError(f"--in-chans {in_chans} and --input-size with {self.input_size[0]} channels: name one")
        if self.std is not None and min(self.std) <= 0:
            raise UsageError(f"--std {min(self.std):g}: expected numbers above 0")
        if self.class_map is not None and self.class_map.suffix.lower() != ".txt":
            raise UsageError(f"--class-map {self.class_map}: expected a .txt with the name of a class a line")
