"""``compress MODEL``: its options. Names and meaning are those of timm's scripts where timm has them."""

from __future__ import annotations

from typing import Any

import click

from compressor.cli.click_options import click_options
from compressor.cli.completion import completing, models
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

__all__ = ["MODEL", "OPTIONS", "SectionedCommand", "compress"]

MODEL = click.Argument(["model"], shell_complete=completing(models))
SECTIONS: dict[str, list[click.Option]] = {
    "Compression": click_options(SharingConfig),
    "Target": click_options(TargetConfig),
    "Data": [*click_options(DataConfig), *click_options(PreprocessingConfig)],
    "Model": click_options(ModelConfig),
    "Training": [*click_options(TrainingConfig, overrides=True), *click_options(TeacherConfig)],
    "Execution": click_options(ExecutionConfig),
    "Output": [*click_options(OutputConfig), *click_options(GateConfig), *click_options(DisplayConfig)],
}
OPTIONS = tuple(option for options in SECTIONS.values() for option in options)


class SectionedCommand(NumbersCommand):
    """A command whose help lists the options in sections; those that are its own come first."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a list of options for each section."""
        own = [option for option in self.params if isinstance(option, click.Option) and option not in OPTIONS]
        last = [option for option in [self.get_help_option(ctx)] if option is not None]
        offered = [*self.params, *last]
        for title, options in {"Options": own, **SECTIONS, "Help": last}.items():
            records = [option.get_help_record(ctx) for option in options if option in offered]
            if shown := [record for record in records if record is not None]:
                with formatter.section(title):
                    formatter.write_dl(shown)


def _run(model: str, **values: Any) -> None:
    request = Request.from_command_line(model, values)
    request.check()
    from compressor.cli.run import run  # imports torch, which help and errors of usage do without

    run(request)


class CompressCommand(SectionedCommand):
    """The command that is typed without its name."""

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the usage as it is typed: the model stands for the command."""
        formatter.write_usage(ctx.find_root().command_path, "MODEL [OPTIONS]")


compress = CompressCommand(
    "run",
    params=[MODEL, *OPTIONS],
    callback=_run,
    help="Compress a timm MODEL. The commands beside this one: compress help",
)
