"""``compress MODEL``: its options. Names and meaning are those of timm's scripts where timm has them."""

from __future__ import annotations

from typing import Any

import click

from compressor.cli.click_options import click_options
from compressor.cli.configs import (
    DataConfig,
    DisplayConfig,
    ExecutionConfig,
    GateConfig,
    ModelConfig,
    OutputConfig,
    Request,
    TeacherConfig,
)
from compressor.cli.preprocessing import NumbersCommand, PreprocessingConfig
from compressor.cli.sharing import SharingConfig
from compressor.cli.targets import TargetConfig
from compressor.training.config import TrainingConfig

__all__ = ["OPTIONS", "compress"]

OPTIONS = (
    *click_options(SharingConfig),
    *click_options(TargetConfig),
    *click_options(DataConfig),
    *click_options(ModelConfig),
    *click_options(PreprocessingConfig),
    *click_options(TrainingConfig, overrides=True),
    *click_options(TeacherConfig),
    *click_options(ExecutionConfig),
    *click_options(OutputConfig),
    *click_options(GateConfig),
    *click_options(DisplayConfig),
)


def _run(model: str, **values: Any) -> None:
    request = Request.from_command_line(model, values)
    request.check()
    from compressor.cli.run import run  # imports torch, which help and errors of usage do without

    run(request)


compress = NumbersCommand("run", params=[click.Argument(["model"]), *OPTIONS], callback=_run, help="Compress a MODEL.")
