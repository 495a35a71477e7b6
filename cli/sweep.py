"""``compress sweep MODEL``: many compressions of one model, recorded as they end, and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor.cli.click_options import click_options, from_values
from compressor.cli.compress import MODEL, SectionedCommand
from compressor.cli.configs import Request
from compressor.cli.show import echo, percent, print_json, print_table, say
from compressor.cli.sweep_options import SWEEP_OPTIONS, Plan, SweepConfig, given, read_plan, words
from compressor.config_fields import config_fields
from compressor.formats.errors import (
    CompressorError,
    InterruptionError,
    QualityError,
    ResourceError,
    UsageError,
    printable,
)
from compressor.formats.io.atomic import make_folder, write_atomically
from compressor.formats.io.locking import holding
from compressor.report.interval import interval_text
from compressor.wording import counted

if TYPE_CHECKING:
    from compressor.sweep.grid import Row
    from compressor.sweep.ledger import Entry, Ledger
    from compressor.sweep.workers import RowCommand

__all__ = ["DENSE", "sweep"]

SCHEMA_VERSION = 1
DENSE, FACTS, UNTRAINED = "dense.safetensors", "sweep.json", "untrained"
DIVERGENCES, PROCESSES = "finalists.json", "--processes-per-row"


@click.pass_context
def _sweep(ctx: click.Context, /, model: str, **values: Any) -> None:
    own = from_values(SweepConfig, values)
    names = {one.name for one in config_fields(SweepConfig)}
    values = {name: value for name, value in values.items() if name not in names}
    plan = replace(read_plan(model, given(ctx, values)), processes=own.processes_per_row)
    request, *_ = (plan.request(row, dry_run=True) for row in plan.rows)  # which checks all of them
    folder = own.folder or Path(f"{request.model.label}-sweep")
    if own.finalists is not None and (request.post_training or request.model.from_scratch):
        what = "--from-scratch has no dense model" if request.model.from_scratch else "nothing is trained without data"
        raise UsageError(f"--finalists: {what}; leave it out")
    device = request.execution.device or ""
    if plan.processes > 1 and ":" in device:
        raise UsageError(f"--device {device}: of several processes each has its own; leave it out, or name cpu")
    if own.dry_run:
        _show_plan(plan, folder, own.as_json)
        return
    _check_rows(plan)
    make_folder(folder)
    failed = _run(plan, folder, own)
    from compressor.sweep.ledger import Ledger

    ledger = Ledger(folder)
    _show(ledger, plan, own.as_json)
    if failed:
        first, why = next(iter(failed.items()))
        logs = " and ".join(dict.fromkeys(str(log.parent) for log in failed))
        raise QualityError(
            f"{len(failed)} of {len(plan.rows)} rows failed, such as {first.stem} ({why}); their logs are in {logs}, "
            "and the same command tries them again"
        )


def _check_rows(plan: Plan) -> None:
    """Refuses, before the long work, what any row would refuse; the model and the data are looked at once."""
    from compressor.cli.setup import check_sharing, set_up

    run = set_up(plan.request(plan.rows[0], dry_run=True))
    for row in plan.rows[1:]:
        try:
            check_sharing(plan.request(row), run)
        except CompressorError as exc:
            raise type(exc)(f"row {row.name}: {exc}") from exc


def _run(plan: Plan, folder: Path, own: SweepConfig) -> dict[Path, str]:
    """Runs the rows that are not recorded yet; returns why rows failed, by their logs."""
    from compressor.sweep.ledger import Ledger

    with _undisturbed(folder, own.storage is not None), _stoppable():
        study = f"compress sweep {_facts(plan, folder)['id']}"
        ledger = Ledger(folder)
        ledger.restore_table()
        done = len(ledger.recorded(plan.rows))
        say(f"{counted(len(plan.rows), 'row')} in {folder}, {done} of them done before")
        if done == len(plan.rows):
            return {}
        plan = replace(plan, fixed=_with_dense(plan, folder))
        _divide_processors(own.jobs * plan.processes)
        failed: dict[Path, str] = {}
        if own.finalists is not None:
            plan, failed = _with_finalists(plan, Ledger(folder / UNTRAINED), own, f"{study} {UNTRAINED}")
        return {**failed, **_work(plan, ledger, own, study)}


@contextmanager
def _undisturbed(folder: Path, is_shared: bool) -> Iterator[None]:
    """Keeps others from the sweep, unless all share it by a storage."""
    with ExitStack() as stack:
        try:
            stack.enter_context(holding(folder / FACTS, shared=is_shared))
        except ResourceError as exc:
            raise ResourceError(
                f"another command works on {folder}: wait until it has ended, or begin all with the same --storage"
            ) from exc
        yield


def _work(plan: Plan, ledger: Ledger, own: SweepConfig, study: str) -> dict[Path, str]:
    """Runs those rows of a plan that a ledger does not have; returns why rows failed, by their logs."""
    from compressor.sweep.leases import Leases, SoleLeases
    from compressor.sweep.workers import Worker

    ledger.rows.mkdir(parents=True, exist_ok=True)
    leases: Leases = SoleLeases()
    if own.storage is not None:
        from compressor.sweep.shared_leases import SharedLeases

        leases = SharedLeases(own.storage, study, own.heartbeat)
    worker = Worker(
        ledger, leases, lambda row: _command(plan, ledger, row), own.jobs,
        on_end=lambda entry: _say_entry(entry, ledger, plan),
        on_failure=lambda row, why: say(f"failed  {row.name}  {printable(why)}"),
        on_wait=lambda names: say(f"waiting for rows that other workers have: {', '.join(names)}"),
    )  # fmt: skip
    recorded = ledger.recorded(plan.rows)
    failed = worker.run([row for row in plan.rows if row.name not in recorded])
    return {_log(ledger, name): why for name, why in failed.items()}


def _log(ledger: Ledger, name: str) -> Path:
    return ledger.rows / f"{name}.log"


def _with_finalists(plan: Plan, ledger: Ledger, own: SweepConfig, study: str) -> tuple[Plan, dict[Path, str]]:
    """Returns a plan of the rows that are worth training, and why untrained ones failed, by their logs."""
    from compressor.cli.sweep_finalists import divergences, noted_divergences
    from compressor.sweep.finalists import by_sharing, finalists, untrained
    from compressor.sweep.ledger import waiting_for

    assert own.finalists is not None
    groups = {group[0].name: group for group in by_sharing(plan.rows)}
    say(f"{counted(len(groups), 'configuration')} without training, to find {own.finalists} to train")
    first = replace(plan, rows=[untrained(group[0]) for group in groups.values()])
    failed = _work(first, ledger, own, study)
    entries = {entry.row: entry for entry in ledger.entries() if entry.row in groups}
    files = {name: ledger.file_of(one) for name, one in entries.items()}
    path = ledger.folder / DIVERGENCES
    with waiting_for(path, lambda: say("waiting for another worker that compares them")):
        losses = noted_divergences(path, files, lambda new: divergences(_request(plan, plan.rows[0]), new))
    chosen = finalists({name: (entries[name].outcome.bytes, loss) for name, loss in losses.items()}, own.finalists)
    for name, loss in losses.items():
        trained = "is trained" if name in chosen else "is not"
        say(f"{name}  {entries[name].outcome.bytes:,} bytes  divergence from dense {loss:.3g}  {trained}")
    return replace(plan, rows=[row for name in chosen for row in groups[name]]), failed


def _request(plan: Plan, row: Row) -> Request:
    """Returns what a row asks for, from the dense model of the sweep."""
    return Request.from_command_line(plan.model, {**_values(plan, row), "dry_run": True})


def _values(plan: Plan, row: Row) -> dict[str, Any]:
    """Returns the options of a row, from the dense model of the sweep."""
    values = {**plan.fixed, **row.options}
    request = Request.from_command_line(plan.model, values)
    if request.model.checkpoint_path is not None and not request.teacher.is_trained_here:
        values.pop("baseline_epochs", None)  # there is none to train
    return values


def _facts(plan: Plan, folder: Path) -> dict[str, Any]:
    """Returns what is noted of the sweep in its folder, and notes it where that is new.

    Raises:
        UsageError: the folder holds another sweep.
    """
    from compressor.sweep.ledger import waiting_for

    said = [plan.model, *words(plan.fixed), *([PROCESSES, str(plan.processes)] if plan.processes > 1 else [])]
    path, fixed, recipes = folder / FACTS, shlex.join(said), _recipes(plan)
    with waiting_for(path.with_suffix(".lock")):
        facts = _noted(path) or {"schema_version": SCHEMA_VERSION, "id": secrets.token_hex(8), "fixed": fixed}
        if facts["fixed"] != fixed:
            theirs = facts["fixed"]
            raise UsageError(f"{folder} holds a sweep of {theirs!r}, not of {fixed!r}: give another folder with -o")
        known = facts.get("recipes", {})
        for recipe, digest in recipes.items():
            if known.get(recipe, digest) != digest:
                raise UsageError(f"{recipe} has changed since {folder} was begun with it: give another folder with -o")
        noted = {**facts, "recipes": {**known, **recipes}}
        if noted != facts:
            write_atomically(path, (json.dumps(noted, indent=2) + "\n").encode(), force=True)
    return noted


def _noted(path: Path) -> dict[str, Any] | None:
    """Returns what was noted of a sweep; None where nothing was."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _ = found["fixed"], found["id"], {**found.get("recipes", {})}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise UsageError(f"{path}: not the notes of a sweep ({exc!r}); give another folder with -o") from exc
    return found


def _recipes(plan: Plan) -> dict[str, str]:
    """Returns the checksums of the files among the recipes of a sweep."""
    named = {
        str(options["recipe"]) for options in [plan.fixed, *(row.options for row in plan.rows)] if "recipe" in options
    }
    files = [name for name in sorted(named) if Path(name).is_file()]
    return {name: hashlib.sha256(Path(name).read_bytes()).hexdigest() for name in files}


def _with_dense(plan: Plan, folder: Path) -> dict[str, Any]:
    """Returns the options that all rows share, with the one dense model that they start from, trained if need be."""
    from compressor.cli.setup import set_up
    from compressor.sweep.ledger import waiting_for

    request = plan.request(plan.rows[0])
    model = request.model
    if request.post_training or model.from_scratch or model.checkpoint_path is not None:
        return dict(plan.fixed)
    path = folder / DENSE
    with waiting_for(path, lambda: say(f"waiting for another worker that makes {path}")):
        if not path.exists():
            _write_dense(set_up(plan.request(plan.rows[0], dry_run=True)), path)
    instead = {"checkpoint_path": path, **({} if request.data.is_named else {"dataset": request.data.name})}
    return {**{name: value for name, value in plan.fixed.items() if name != "pretrained"}, **instead}


def _write_dense(run: Any, path: Path) -> None:
    """Trains the dense model of a run, or takes it from the cache, and writes its weights."""
    from safetensors.torch import save

    from compressor.cli.show import Step
    from compressor.cli.weights import dense_model

    model = dense_model(
        run.source, run.data, run.execution, None, lambda name: Step("dense", name.removeprefix("dense "))
    )
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    write_atomically(path, save(state))


def _command(plan: Plan, ledger: Ledger, row: Row) -> RowCommand:
    from compressor.sweep.workers import RowCommand

    output = str(ledger.rows / f"{row.name}.safetensors")
    arguments = [plan.model, *words(_values(plan, row))]
    count = str(plan.processes)
    several = ["torchrun", "--nproc-per-node", count, "-m", "compressor.cli"]
    return RowCommand(
        shown=shlex.join([*(several if plan.processes > 1 else ["compress"]), *arguments, "-o", output]),
        arguments=[sys.executable, "-m", "compressor.cli.sweep_row", count, output, *arguments],
        log=_log(ledger, row.name),
    )


def _divide_processors(jobs: int) -> None:
    """Gives each of several processes its part of the processors, where the user has not."""
    if jobs > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))


@contextmanager
def _stoppable() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM end the sweep: its rows save how far they have come."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptionError("stopped; rows that have ended are kept, and the same command goes on") from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _say_entry(entry: Entry, ledger: Ledger, plan: Plan) -> None:
    wanted = {row.name for row in plan.rows}
    done = sum(one.row in wanted for one in ledger.entries())
    top1 = "" if entry.outcome.top1 is None else f"  top-1 {percent(entry.outcome.top1)}"
    say(f"{done}/{len(plan.rows)}  {entry.row}  {entry.outcome.bytes:,} bytes{top1}  {entry.seconds:.0f} s")


def _show_plan(plan: Plan, folder: Path, as_json: bool) -> None:
    from compressor.sweep.ledger import Ledger

    commands = {row.name: _command(plan, Ledger(folder), row).shown for row in plan.rows}
    if as_json:
        rows = [{"row": row.name, "options": dict(row.options), "command": commands[row.name]} for row in plan.rows]
        print_json({"rows": rows})
        return
    click.echo("Each row, and its command, which starts from one dense model:")
    for name, command in commands.items():
        click.echo(f"{name}\n  {command}")  # in one line, to be copied
    click.echo(f"{counted(len(plan.rows), 'row')}; nothing was written")


def _show(ledger: Ledger, plan: Plan, as_json: bool) -> None:
    wanted = {row.name for row in plan.rows}
    entries = sorted((one for one in ledger.entries() if one.row in wanted), key=lambda one: one.outcome.bytes)
    if as_json:
        print_json({"folder": str(ledger.folder), "rows": [asdict(entry) for entry in entries]})
        return
    heads = ["row", "bytes", "smaller", "top-1", "95 % interval", "dense"]
    print_table([heads, *map(_cells, entries)])
    echo(f"rows: {ledger.path}; a page of them: compress report {shlex.quote(str(ledger.folder))}")


def _cells(entry: Entry) -> list[str]:
    one = entry.outcome
    interval = "" if one.low is None or one.high is None else interval_text(one.low, one.high)
    shares = ["" if share is None else percent(share) for share in (one.top1, one.dense_top1)]
    return [entry.row, f"{one.bytes:,}", f"{one.dense_bytes / one.bytes:.1f}x", shares[0], interval, shares[1]]


sweep = SectionedCommand(
    "sweep",
    params=[
        click.Argument(["model"], metavar="MODEL|FILE.toml", shell_complete=MODEL.shell_complete),
        *click_options(SweepConfig),
        *SWEEP_OPTIONS,
    ],
    callback=_sweep,
    help="Compress MODEL by every combination of several values, such as --bits 2,3,4 --seed 0,1.",
)
"""The command."""
