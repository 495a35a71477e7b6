"""``compress sweep``: its rows and their commands, what it refuses before the long work, and how a row is run."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.cli import sweep_row
from compressor.cli.compress import compress
from compressor.cli.sweep_options import SINGLE, words
from compressor.formats.errors import UsageError
from compressor.formats.io.locking import holding
from compressor.sweep.grid import Row
from compressor.sweep.ledger import Entry, Ledger
from compressor.sweep.outcome import Outcome
from tests.helpers.file_commands import Ran, pack_module, type_
from tests.helpers.tiny import few_digits, tiny

__all__ = ["type_"]  # the fixture

ROOT = Path(__file__).resolve().parents[2]
OFFERED: dict[str, Any] = {
    "scheme": "learnt", "recipe": "mixed3", "settings": ("soft=0.5", "init=linear"), "target_size": 450_000,
    "calibration": "synthetic", "dataset": "digits", "data_dir": Path("a folder"), "crop_mode": "center",
    "mean": (0.5, 0.25), "std": (0.5,), "interpolation": "bicubic", "input_size": (3, 8, 8),
    "class_map": Path("names.txt"), "checkpoint_path": Path("x.pth"), "teacher_checkpoint": Path("y"),
    "torchcompile": "eager", "untouched": "f16", "fold_norms": False, "log": "tensorboard", "require_size": 1000,
    "calibration_memory": 2_000_000,
}  # fmt: skip
"""A value of each option that has more to it than a number, a word or a flag."""


@pytest.fixture(autouse=True)
def _here(own_folder: Path) -> None:
    pass


def plan(out: str) -> dict[str, dict[str, Any]]:
    return {row["row"]: row for row in json.loads(out)["rows"]}


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_words_of_any_option_are_read_back_as_its_value(name: str) -> None:
    option = SINGLE[name]
    default = True if option.is_flag else 1 if option.type in (click.INT, click.FLOAT) else None
    value = OFFERED.get(name, default)
    if value is None:
        value = 0.5 if isinstance(option.type, click.FloatRange) else 2
        value = "word" if option.type is click.STRING else value
    said = words({name: value})
    assert said[0].startswith("--")
    with compress.make_context("run", ["model", *said]) as context:
        assert context.params[name] == value


def test_rows_are_all_combinations_and_their_commands_are_of_compress(type_: Callable[..., Ran]) -> None:
    code, out, _ = type_(
        "sweep", "test_resnet", "--bits", "2,3", "--scheme", "learnt,kmeans", "--seed", "0,1", "--lr", "0.01",
        "--batch-size", "16", "-o", "a b", "--dry-run", "--json",
    )  # fmt: skip
    assert code == 0
    rows = plan(out)
    assert list(rows)[:3] == ["learnt-bits2-lr0.01-seed0", "learnt-bits2-lr0.01-seed1", "learnt-bits3-lr0.01-seed0"]
    assert len(rows) == 8
    command = rows["kmeans-bits3-lr0.01-seed1"]["command"]
    options = "--batch-size 16 --scheme kmeans --bits 3 --lr 0.01 --seed 1"
    assert command == f"compress test_resnet {options} -o 'a b/rows/kmeans-bits3-lr0.01-seed1.safetensors'"
    compress.make_context("run", shlex.split(command)[1:])
    assert not Path("a b").exists()


FILE = """
model = "test_resnet"
[options]
epochs = 1
batch-size = 16
amp = true
set = ["soft=0.5"]
[[grid]]
scheme = ["learnt", "kmeans"]
bits = [2, 3]
[[grid]]
target-size = ["20KB", 30000]
seed = [0, 1]
"""


def test_a_file_has_grids(type_: Callable[..., Ran]) -> None:
    Path("sweep.toml").write_text(FILE)
    code, out, _ = type_("sweep", "sweep.toml", "--dry-run", "--json")
    assert code == 0
    rows = plan(out)
    assert list(rows) == [
        "learnt-bits2", "learnt-bits3", "kmeans-bits2", "kmeans-bits3", "target-size20000-seed0",
        "target-size20000-seed1", "target-size30000-seed0", "target-size30000-seed1",
    ]  # fmt: skip
    assert (
        "--epochs 1 --batch-size 16 --amp --set soft=0.5 --scheme learnt --bits 2 " in rows["learnt-bits2"]["command"]
    )
    code, out, _ = type_("sweep", "sweep.toml", "--epochs", "2,4", "--batch-size", "32", "--dry-run", "--json")
    rows = plan(out)
    assert (code, len(rows)) == (0, 16)
    assert "--batch-size 32" in rows["learnt-bits2-epochs4"]["command"]
    assert "--epochs 4" in rows["learnt-bits2-epochs4"]["command"]
    assert "--epochs 1" not in rows["learnt-bits2-epochs4"]["command"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model = ", "sweep.toml is not TOML: "),
        ("modl = 'x'", "sweep.toml: unknown key 'modl'. Did you mean 'model'?"),
        ("model = 3", 'sweep.toml: expected model = "NAME", got 3'),
        ("model = 'x'\n[options]\nepoch = 3", "sweep.toml: unknown key 'epoch'. Did you mean 'epochs'?"),
        ("model = 'x'\n[options]\noutput = 'y'", "sweep.toml: unknown key 'output'."),
        ("model = 'x'\n[[grid]]\nbatch_size = [3]", "sweep.toml: unknown key 'batch_size'."),
        ("model = 'x'\n[[grid]]\nbits = ['four']", "sweep.toml: bits: 'four', expected a whole number at least 1"),
        (
            "model = 'x'\n[options]\ncrop-mode = 'middle'",
            "sweep.toml: crop_mode: 'middle', expected center, squash or border",
        ),
        ("model = 'x'\ngrid = 3", "sweep.toml: expected one table [options] and tables [[grid]]"),
        ("model = 'x'\n[[grid]]\nbits = [2, 2]", "two rows are bits2: leave out one"),
    ],
)
def test_a_file_that_cannot_be_is_refused(type_: Callable[..., Ran], text: str, message: str) -> None:
    Path("sweep.toml").write_text(text)
    code, out, (line,) = type_("sweep", "sweep.toml")
    assert (code, out) == (2, "")
    assert message in line
    assert os.listdir() == ["sweep.toml"]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--bits", "2,four"], 2, "Invalid value for '--bits': 'four', expected a whole number at least 1"),
        (["--bits", "2,3", "--codewords", "5"], 2, "row bits2-codewords5: --bits and --codewords: name one"),
        (["--scheme", "learnt,lernt"], 2, "row lernt: "),
        (["--scheme", "learnt,wfn", "--bits", "3"], 2, "row wfn-bits3: "),
        (["--recipe", "mixed3,none.toml"], 4, "row none.toml: --recipe none.toml: cannot be read"),
        (["--rate", "1e-7,2"], 2, "Invalid value for '--rate': '2', expected a number above 0 and at most 1"),
        (["--target-size", "20KB", "--scheme", "learnt,wfn"], 2, "row wfn-target-size20000: "),
        (["-o", "no/folder"], 6, "folder no does not exist: make it first"),
        (["--bits", "2", "--dataset", "nonsense"], 4, "nonsense"),
        (["--bits", "2", "--finalists", "1", "--from-scratch"], 2, "--finalists: --from-scratch has no dense model"),
        (["--bits", "2", "--finalists", "1", "--pretrained"], 2, "--finalists: nothing is trained without data"),
    ],
)
def test_what_any_row_would_refuse_is_refused_before(
    type_: Callable[..., Ran], options: list[str], code: int, message: str
) -> None:
    got, out, (line,) = type_("sweep", "test_resnet", *options)
    assert (got, out) == (code, "")
    assert message in line
    assert set(os.listdir()) <= {"cache"}  # of names of models


def test_the_processes_of_a_row_are_part_of_a_sweep(type_: Callable[..., Ran]) -> None:
    words = "sweep", "test_resnet", "--bits", "2", "-o", "s", "--processes-per-row"
    code, out, _ = type_(*words, "2", "--dry-run", "--json")
    command = "torchrun --nproc-per-node 2 -m compressor.cli test_resnet --bits 2 -o s/rows/bits2.safetensors"
    assert (code, plan(out)["bits2"]["command"]) == (0, command)
    code, _, lines = type_(*words, "2", "--device", "cuda:1")
    wanted = "--device cuda:1: of several processes each has its own; leave it out, or name cpu"
    assert (code, lines) == (2, [f"error: {wanted}"])
    Path("s").mkdir()
    facts = {"schema_version": 1, "id": "x", "fixed": "test_resnet --processes-per-row 3"}
    Path("s/sweep.json").write_text(json.dumps(facts))
    code, _, (line,) = type_(*words, "2")
    assert code == 2
    assert "of 'test_resnet --processes-per-row 3', not of 'test_resnet --processes-per-row 2'" in line


def test_a_folder_of_another_sweep_is_refused(type_: Callable[..., Ran]) -> None:
    Path("s").mkdir()
    facts = {"schema_version": 1, "id": "x", "fixed": "test_resnet --batch-size 16"}
    Path("s/sweep.json").write_text(json.dumps(facts))
    code, _, lines = type_("sweep", "test_resnet", "--bits", "2", "-o", "s")
    wanted = "s holds a sweep of 'test_resnet --batch-size 16', not of 'test_resnet': give another folder with -o"
    assert (code, lines) == (2, [f"error: {wanted}"])
    Path("s/sweep.json").write_text("[]")
    code, _, (line,) = type_("sweep", "test_resnet", "--bits", "2", "-o", "s")
    assert code == 2
    assert "s/sweep.json: not the notes of a sweep" in line


RECIPE = """
[[stage]]
[[stage.rule]]
match = "*"
scheme = "kmeans"
bits = 2
"""


def test_a_recipe_that_was_edited_is_refused(type_: Callable[..., Ran]) -> None:
    Path("recipe.toml").write_text(RECIPE)
    ledger = Ledger(Path("s"))
    ledger.rows.mkdir(parents=True)
    outcome = Outcome("test_resnet", "s/rows/recipe.toml.safetensors", 10, 80, 20)
    ledger.append(Entry("recipe.toml", {"recipe": "recipe.toml"}, "compress", 1.0, outcome))
    command = ["sweep", "test_resnet", "--recipe", "recipe.toml", "-o", "s"]
    for _ in range(2):
        code, _, lines = type_(*command)
        assert (code, lines) == (0, ["1 row in s, 1 of them done before"])
    Path("recipe.toml").write_text(RECIPE + "# a comment\n")
    code, _, (line,) = type_(*command)
    wanted = "recipe.toml has changed since s was begun with it: give another folder with -o"
    assert (code, line) == (2, f"error: {wanted}")


def test_the_logs_of_untrained_files_are_named(type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def run_none(_: object, rows: list[Row]) -> dict[str, str]:
        return {row.name: "no room" for row in rows}

    monkeypatch.setattr("compressor.cli.setup.load_data", lambda *_, **__: few_digits())
    monkeypatch.setattr("compressor.sweep.workers.Worker.run", run_none)
    save_file(tiny().state_dict(), "dense.safetensors")
    words = ["--bits", "2,3", "--checkpoint-path", "dense.safetensors", "--dataset", "digits", "--finalists", "1"]
    code, _, lines = type_("sweep", "tiny", *words, "-o", "s")
    assert code == 5
    assert "2 of 2 rows failed, such as bits2 (no room); their logs are in s/untrained/rows, and" in lines[-1]


def test_divergences_are_measured_once_for_all_workers() -> None:
    from compressor.cli.sweep_finalists import noted_divergences

    measured: list[str] = []

    def measure(files: Mapping[str, Path]) -> dict[str, float]:
        measured.extend(files)
        return {name: math.nan if name == "c" else len(measured) / 3 for name in files}

    first = noted_divergences(Path("notes"), {"a": Path("a")}, measure)
    second = noted_divergences(Path("notes"), {"a": Path("a"), "c": Path("c")}, measure)
    assert (second["a"], math.isnan(second["c"])) == (first["a"], True)
    assert noted_divergences(Path("notes"), {"a": Path("a")}, measure) == first
    assert measured == ["a", "c"]
    Path("notes").write_text("[]")
    with pytest.raises(UsageError, match="notes: no divergences of untrained files"):
        noted_divergences(Path("notes"), {}, measure)


def test_untrained_files_are_judged_by_their_answers_to_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from compressor.cli.configs import Request
    from compressor.cli.sweep_finalists import divergences

    monkeypatch.setattr("compressor.cli.setup.load_data", lambda *_, **__: few_digits())
    torch.manual_seed(0)
    save_file(tiny().state_dict(), "dense.safetensors")
    for bits in (1, 3, 8):
        net = tiny()
        net.load_state_dict(load_file("dense.safetensors"))
        pack_module(f"{bits}.safetensors", net, bits, {"num_classes": 10, "in_chans": 1})
    values = {"checkpoint_path": Path("dense.safetensors"), "dataset": "digits", "dry_run": True}
    request = Request.from_command_line("tiny", values)
    found = divergences(request, {str(bits): Path(f"{bits}.safetensors") for bits in (1, 3, 8)})
    assert found["1"] > 2 * found["3"] > 4 * found["8"] > 0


def test_a_folder_that_another_command_works_on_is_refused(type_: Callable[..., Ran]) -> None:
    Path("s").mkdir()
    Path("file").touch()
    with holding("s/sweep.json"):
        wanted = "another command works on s: wait until it has ended, or begin all with the same --storage"
        code, _, (line,) = type_("sweep", "test_resnet", "--bits", "2", "-o", "s")
        assert (code, line) == (6, f"error: {wanted}")
        code, _, (line,) = type_("sweep", "test_resnet", "--bits", "2", "-o", "s", "--storage", "journal.log")
        assert (code, line) == (6, f"error: {wanted}")
        assert not Path("journal.log").exists()
    with holding("s/sweep.json", shared=True):  # by a worker with a storage
        code, _, (line,) = type_("sweep", "test_resnet", "--bits", "2", "-o", "s")
        assert (code, line) == (6, f"error: {wanted}")
    code, _, (line,) = type_("sweep", "test_resnet", "--bits", "2", "-o", "file")
    assert (code, line) == (6, "error: folder file cannot be made (File exists)")


def test_what_a_run_prints_is_read(type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compressor.cli.setup.load_data", lambda *_, **__: few_digits())
    torch.manual_seed(0)
    save_file(tiny().state_dict(), "dense.safetensors")
    words = ["--checkpoint-path", "dense.safetensors", "--dataset", "digits", "--epochs", "0", "--seed", "3"]
    code, out, _ = type_("tiny", "--bits", "2", *words, "-o", "out.safetensors", "--json")
    found = Outcome.of(json.loads(out))
    assert (code, found.model, found.file, found.seed) == (0, "tiny", "out.safetensors", 3)
    assert found.bytes == Path("out.safetensors").stat().st_size < found.dense_bytes
    assert (found.n, found.summary, found.rate, found.missed) == (32, None, None, ())
    assert found.top1 is not None
    assert found.dense_top1 is not None
    assert found.lost is not None
    assert found.gained is not None
    assert round(32 * (found.top1 - found.dense_top1)) == found.gained - found.lost
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.top1 <= found.high
    assert found.classes is not None
    assert (sum(one.lost for one in found.classes), sum(one.gained for one in found.classes)) == (
        found.lost,
        found.gained,
    )
    assert all(one.packed - one.dense == one.gained - one.lost for one in found.classes)


class Commands:
    """Stands for the command, whose words and exit codes are noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *codes: int) -> None:
        self.said: list[list[str]] = []
        self.codes = list(codes)
        monkeypatch.setattr(sweep_row, "main", self)

    def __call__(self, arguments: list[str]) -> None:
        self.said.append(list(arguments))
        sys.exit(self.codes.pop(0))


@pytest.mark.parametrize(
    ("checkpoint", "codes", "resumes"),
    [
        (None, [0], [False]),
        ("01-0000000004.safetensors", [0], [True]),
        ("best.safetensors", [0], [False]),
        ("01-0000000004.safetensors", [2, 0], [True, False]),  # it is of another version
        ("01-0000000004.safetensors", [3, 0], [True, False]),  # it is damaged
        ("01-0000000004.safetensors", [6], [True]),
    ],
)
def test_a_row_goes_on_where_there_is_something_to_go_on_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], checkpoint: str | None, codes: list[int],
    resumes: list[bool],
) -> None:  # fmt: skip
    commands = Commands(monkeypatch, *codes)
    if checkpoint is not None:
        Path("out.safetensors.checkpoints").mkdir()
        Path("out.safetensors.checkpoints", checkpoint).touch()
    reading, writing = os.pipe()  # stays open
    with pytest.raises(SystemExit) as ended:
        sweep_row.run_row(["1", "out.safetensors", "tiny", "--bits", "2", str(reading)])
    assert os.fstat(writing)
    assert ended.value.code == codes[-1]
    base = ["tiny", "--bits", "2", "-o", "out.safetensors", "--json", "--force"]
    assert commands.said == [[*base, *(["--resume"] if resume else [])] for resume in resumes]
    assert ("it starts again" in capsys.readouterr().err) == (len(codes) == 2)


def test_a_row_that_another_worker_has_recorded_is_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    commands, ledger = Commands(monkeypatch), Ledger(Path("s"))
    ledger.rows.mkdir(parents=True)
    ledger.append(Entry("bits2", {}, "compress", 1.0, Outcome("tiny", "s/rows/bits2.safetensors", 10, 80, 20)))
    reading, writing = os.pipe()
    with pytest.raises(SystemExit) as ended:
        sweep_row.run_row(["1", "s/rows/bits2.safetensors", "tiny", "--bits", "2", str(reading)])
    assert os.fstat(writing)
    assert (ended.value.code, commands.said) == (7, [])
