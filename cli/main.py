"""The command ``compress``: its sub-commands, and how it reports errors.

Nothing here imports torch or timm; the commands do so when they run.
"""

from __future__ import annotations

import difflib
import io
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem

import compressor
from compressor.cli.about import env, schemes, zoo
from compressor.cli.check import diff, verify
from compressor.cli.completion import completing
from compressor.cli.compress import MODEL, compress
from compressor.cli.convert import pack, unpack
from compressor.cli.data import check_data
from compressor.cli.evaluation import evaluate
from compressor.cli.export import export, targets
from compressor.cli.files import inspect
from compressor.cli.init import init
from compressor.cli.push import push
from compressor.cli.report import report
from compressor.cli.sensitivity import sensitivity
from compressor.cli.show import Invocation, styled
from compressor.cli.sweep import sweep
from compressor.formats.errors import CompressorError, printable

__all__ = ["cli", "main"]

INTERRUPTED = 130
SHARED = (2, 5, 7)  # exit codes of errors that all of several processes raise: usage, quality, interruption
IN_PYTHON = re.compile(r" \((resume|force)=True\)")  # what a message names beside the option, for callers in Python
_RANK = int(os.environ.get("RANK", "0")) if "LOCAL_RANK" in os.environ else 0  # set by torchrun
# Parts of torch's messages; to tell its exceptions by their types, torch would have to be imported.
OUT_OF_MEMORY = " out of memory.", "DefaultCPUAllocator: can't allocate memory"


class DefaultGroup(click.Group):
    """A group of commands, whose first argument may be a model instead of a command."""

    default = "run"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Takes a leading option that is not the group's own as one of the default command."""
        if args and args[0].startswith("-") and args[0] not in ("--help", "--version"):
            args = [self.default, *args]
        return super().parse_args(ctx, args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Returns the command; another word is a model, unless it looks like a misspelt command."""
        if args[0] in self.commands:
            return super().resolve_command(ctx, args)
        if near := nearest_command(args[0]):
            raise click.UsageError(f"no command {args[0]!r}. Did you mean 'compress {near}'?")
        return super().resolve_command(ctx, [self.default, *args])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes commands; where none begins so, models."""
        return super().shell_complete(ctx, incomplete) or MODEL.shell_complete(ctx, incomplete)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Lists the commands in the order in which they were added."""
        del ctx
        return [name for name in self.commands if name != self.default]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Shows the options of the default command with the group's own."""
        self.commands[self.default].format_options(ctx, formatter)
        self.format_commands(ctx, formatter)


def nearest_command(word: str) -> str | None:
    """Returns the command that a word looks like a misspelling of; None where there is none.

    >>> nearest_command("inspec"), nearest_command("resnet34")
    ('inspect', None)
    """
    commands = [name for name in cli.commands if name != DefaultGroup.default]
    return next(iter(difflib.get_close_matches(word, commands, n=1, cutoff=0.75)), None)


@click.group(
    cls=DefaultGroup,
    no_args_is_help=True,
    options_metavar="",
    subcommand_metavar="MODEL [OPTIONS] | COMMAND [ARGS]...",
    context_settings={"max_content_width": 110},
)
@click.version_option(compressor.__version__, prog_name="timm-compressor")
def cli() -> None:
    """Let the weights of a timm MODEL share a few values, fine-tune it, and write one small .safetensors file.

    With no data named, the built-in handwritten digits are used: compress resnet34 --scheme learnt --bits 4

    For the FILE of a command, zoo:NAME is a checkpoint that comes with the package: compress zoo list; and
    hf-hub:OWNER/NAME one that was put on the Hugging Face hub by compress push.
    """


@click.command("help")
@click.argument("command", required=False, shell_complete=completing(lambda: cli.list_commands(click.Context(cli))))
@click.pass_context
def show_help(ctx: click.Context, command: str | None) -> None:
    """Show this help, or that of a COMMAND; of compress MODEL itself: compress help MODEL."""
    root = ctx.find_root()
    if command is None:
        click.echo(cli.get_help(root))
        return
    _, found, _ = cli.resolve_command(root, [command])
    is_default = found is None or found.name == DefaultGroup.default
    if found is None or (is_default and command not in ("MODEL", DefaultGroup.default)):
        hint = "'compress help' lists them, 'compress help MODEL' has the options of compress MODEL"
        raise click.UsageError(f"no command {command!r}: {hint}")
    with click.Context(found, info_name=command, parent=root) as context:
        click.echo(found.get_help(context))


cli.add_command(compress, DefaultGroup.default)
COMMANDS = (
    inspect, verify, diff, evaluate, pack, unpack, export, push, check_data, sensitivity, init, sweep, report, schemes,
    targets, zoo, env,
    show_help,
)  # fmt: skip
for command in COMMANDS:
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits: with 0, or with one line on stderr and the code of the error."""
    _silence_other_processes()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.captureWarnings(not _debugging())
    logging.getLogger("py.warnings").setLevel(logging.ERROR)
    logging.addLevelName(logging.WARNING, styled("warning", fg="yellow") if sys.stderr.isatty() else "warning")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # the name of a file may hold bytes that are no text
    code = run(list(sys.argv[1:] if arguments is None else arguments))
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Runs the command, and returns its exit code."""
    if _debugging():
        return int(_invoke(arguments) or 0)
    try:
        return int(_invoke(arguments) or 0)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.format_message(), err=True)
        return exc.exit_code
    except click.ClickException as exc:
        return _say(exc.format_message(), exc.exit_code, shared=True)
    except CompressorError as exc:
        return _say(one_line(exc), exc.exit_code, shared=exc.shared or exc.exit_code in SHARED)
    except (KeyboardInterrupt, click.Abort):
        return _say("interrupted", INTERRUPTED, "")
    except BrokenPipeError:
        return 0
    except Exception as exc:
        if isinstance(exc, MemoryError) or any(text in str(exc) for text in OUT_OF_MEMORY):
            return _say("out of memory; training and eval take less with a smaller --batch-size", 6)
        if "DataLoader worker (pid" in str(exc):
            return _say(f"{one_line(exc).rstrip('. ')}: a process that opens images died; try --workers 0", 6)
        hint = "this is a bug; please report it with the traceback that COMPRESS_DEBUG=1 shows"
        return _say(f"{type(exc).__name__}: {one_line(exc)} ({hint})", 1)


def _invoke(arguments: list[str]) -> Any:
    return cli.main(arguments, prog_name="compress", standalone_mode=False, obj=Invocation(arguments))


def _debugging() -> bool:
    return os.environ.get("COMPRESS_DEBUG", "") not in ("", "0")


def one_line(exc: BaseException) -> str:
    """Returns the message of an error in one line; a DataLoader's worker puts it last, below its traceback."""
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    if lines and "in DataLoader worker process" in lines[0]:
        return lines[-1].partition(": ")[2]
    return " ".join(lines)


def _silence_other_processes() -> None:
    """Silences all but the first of several processes; ``_say`` still prints their errors."""
    if _RANK and not _debugging():
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)


def _say(message: str, code: int, kind: str = "error: ", shared: bool = False) -> int:
    """Prints a line and returns the exit code; an error that all processes share is printed by the first alone."""
    line = IN_PYTHON.sub("", printable(" ".join(message.split())))  # it may quote a file of a stranger
    if not _RANK:
        click.echo(styled(kind, fg="red", bold=True) + line, err=True)
    elif not shared and kind:
        click.echo(f"process {_RANK}: {kind}{line}", file=sys.__stderr__)
    return code
