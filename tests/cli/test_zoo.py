"""``zoo:NAME`` wherever a command takes a file, and the list of what there is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from safetensors.torch import load_file

import compressor
from compressor import model_zoo
from compressor.cli.main import run
from compressor.data.datasets import FASHION_MNIST_DIR
from compressor.formats.errors import IntegrityError, MissingError
from compressor.formats.file.reader import PackedFile
from tests.model_zoo.test_checkpoints import NAMES, SMALL, Ran, other_index

__all__ = ["other_index"]  # the fixtures


@pytest.fixture
def type_(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Run a command line in an empty folder; give its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def typed(*words: str) -> Ran:
        code = run(list(words))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return typed


def test_file_that_was_damaged(other_index: Path, type_: Callable[..., Ran]) -> None:
    data = bytearray(other_index.read_bytes())
    data[-1] ^= 1
    other_index.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"zoo:{SMALL}: the sha256 of .* expected .*: install it again"):
        model_zoo.load(SMALL)
    code, out, err = type_("inspect", f"zoo:{SMALL}")
    assert (code, out) == (IntegrityError.exit_code, "")
    assert len(err.splitlines()) == 1


def test_file_commands_take_a_checkpoint(type_: Callable[..., Ran]) -> None:
    entry, file = model_zoo.checkpoint(SMALL), f"zoo:{SMALL}"
    code, out, _ = type_("inspect", file, "--json")
    assert (code, json.loads(out)["model"]["name"]) == (0, entry.model)
    code, out, _ = type_("verify", file, "--sha256", entry.sha256)
    assert (code, entry.sha256 in out) == (0, True)
    code, out, _ = type_("diff", file, str(model_zoo.packed_path(file)))
    assert (code, out.startswith("identical content")) == (0, True)
    code, out, _ = type_("diff", file, "zoo:test_resnet-balanced", "--json")
    assert (code, bool(json.loads(out)["rows"])) == (0, True)
    assert type_("unpack", file, "-o", "dense.safetensors")[0] == 0
    plain, wanted = load_file("dense.safetensors"), compressor.load_state_dict(model_zoo.packed_path(file))
    assert plain.keys() == wanted.keys()
    assert all(torch.equal(plain[key], wanted[key]) for key in wanted)


def test_eval_takes_a_checkpoint(type_: Callable[..., Ran]) -> None:
    if not FASHION_MNIST_DIR.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    code, out, _ = type_("eval", f"zoo:{SMALL}", "--json")
    assert code == 0
    assert json.loads(out)["top1"]["packed"] == model_zoo.checkpoint(SMALL).top1


@pytest.mark.parametrize("name", [SMALL, "test_resnet-balanced"])
def test_recipe_of_a_checkpoint(name: str, type_: Callable[..., Ran]) -> None:
    words = ("--recipe", f"zoo:{name}", "--baseline-epochs", "0", "--epochs", "0", "--calibration-images", "0")
    code, _, err = type_("test_resnet", *words)
    assert code == 0, err
    with PackedFile.open(f"test_resnet-digits-{name}.safetensors") as file:
        own = file.recipe
    with PackedFile.open(model_zoo.packed_path(f"zoo:{name}")) as file:
        shipped = file.recipe
    assert own is not None
    assert shipped is not None
    later = {"rate": 0.0, "group_size": 0, "channel_scale": False, "vector": 1}  # settings that there were not always
    before = [rule for stage in shipped["stage"] for rule in stage["rule"]]
    rules = [rule for stage in own["stage"] for rule in stage["rule"]]
    assert rules == [{**later, **rule} if "scheme" in rule else rule for rule in before]


@pytest.mark.parametrize(
    "words",
    [("inspect", "zoo:none"), ("verify", "zoo:"), ("diff", "zoo:none", "a"), ("resnet18", "--recipe", "zoo:no")],
)
def test_unknown_checkpoint_of_a_command(words: tuple[str, ...], type_: Callable[..., Ran]) -> None:
    code, out, err = type_(*words)
    assert (code, out) == (MissingError.exit_code, "")
    assert err.startswith("error: no checkpoint '")
    assert len(err.splitlines()) == 1


def test_a_file_may_be_called_like_a_checkpoint(type_: Callable[..., Ran]) -> None:
    Path(f"zoo:{SMALL}").write_bytes(b"not a packed file")
    assert type_("verify", f"zoo:{SMALL}")[0] == 0
    assert type_("verify", f"./zoo:{SMALL}")[0] == 3


def test_zoo_list(type_: Callable[..., Ran]) -> None:
    code, out, _ = type_("zoo", "list")
    assert code == 0
    for name in NAMES:
        (line,) = [line for line in out.splitlines() if line.startswith(f"zoo:{name} ")]
        assert f"{model_zoo.checkpoint(name).bytes:,}" in line
    found = json.loads(type_("zoo", "list", "--json")[1])
    assert [entry["name"] for entry in found["checkpoints"]] == NAMES
    assert [entry["name"] for entry in found["recipes"]] == model_zoo.list_recipes()


def test_every_command_with_a_file_takes_a_checkpoint() -> None:
    from compressor.cli.files import PackedPath
    from compressor.cli.main import cli

    def arguments(command: click.Command) -> list[click.Parameter]:
        return [given for given in command.params if isinstance(given, click.Argument)]

    paths = {
        (name, given.name): given.type
        for name, command in cli.commands.items()
        for given in arguments(command)
        if isinstance(given.type, click.Path) and given.name != "folder"
    }
    assert {name for name, _ in paths} >= {"inspect", "verify", "diff", "eval", "unpack"}
    assert all(isinstance(kind, PackedPath) for kind in paths.values())
