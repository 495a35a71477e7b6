"""The shipped checkpoints are what their index says, and the commands take zoo:NAME where they take a file."""

from __future__ import annotations

import hashlib
import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import compressor
from compressor import Recipe, model_zoo
from compressor.cli.compress import compress
from compressor.cli.main import run
from compressor.datasets import FASHION_MNIST_DIR
from compressor.evaluation import Evaluation
from compressor.formats.errors import IntegrityError, MissingError
from compressor.formats.reader import PackedFile
from compressor.model_zoo import index
from compressor.provenance import Accuracy, Measured, read_provenance
from compressor.splits import ArraySplit

NAMES = model_zoo.list_checkpoints()
SMALL = "test_resnet-tiny"
SLICE = Path(__file__).parent / "data" / "fashion-mnist-200.safetensors"
BUDGET = 4_000_000  # bytes that all checkpoints may add to the wheel
TINY = 1.5  # bits per weight

Ran = tuple[int, str, str]


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


@pytest.fixture
def other_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of the small checkpoint alone, free to be damaged; give its file."""
    path = tmp_path / "checkpoints" / f"{SMALL}.safetensors"
    path.parent.mkdir()
    path.write_bytes(model_zoo.packed_path(f"zoo:{SMALL}").read_bytes())
    monkeypatch.setattr(index, "INDEX", tmp_path / "index.toml")  # the index itself was read before
    return path


def first_200(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the first 200 test images as the model's own preprocessing asks for them, and their labels."""
    stored = load_file(SLICE)
    cfg: Any = model.pretrained_cfg
    (mean,), (std,) = cfg["mean"], cfg["std"]
    pad = (cfg["input_size"][-1] - stored["images"].shape[-1]) // 2
    return ArraySplit(stored["images"][:, None], stored["labels"].long(), mean=mean, std=std, pad=pad).__getitems__(
        range(200)
    )


@pytest.mark.parametrize("weights", ["dense", "packed"])
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_on_the_stored_slice(name: str, weights: str) -> None:
    model = model_zoo.load(name, weights)
    images, labels = first_200(model)
    with torch.inference_mode():
        correct = int((model(images).argmax(1) == labels).sum())
    assert correct == model_zoo.checkpoint(name).correct_of_first_200


def test_slice_is_of_the_test_images() -> None:
    if not FASHION_MNIST_DIR.is_dir():
        pytest.skip("needs Debian's package dataset-fashion-mnist")
    from compressor.datasets import load_data

    images, labels = load_data("fashion-mnist").test.__getitems__(range(200))  # type: ignore[union-attr]
    kept = first_200(model_zoo.load(SMALL))
    assert torch.equal(images, kept[0])
    assert torch.equal(labels, kept[1])


@pytest.mark.parametrize("name", NAMES)
def test_index_is_true_of_the_file(name: str) -> None:
    entry = model_zoo.checkpoint(name)
    path = model_zoo.packed_path(f"zoo:{name}")
    data = path.read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (entry.sha256, entry.bytes)
    with PackedFile.open(path) as file:
        made, recipe, named = read_provenance(file), file.recipe, file.model
        assert not list(file.check())
    assert recipe is not None
    assert named is not None
    assert named["name"] == entry.model
    assert made.top1 == Accuracy(packed=entry.top1, dense=entry.dense_top1)
    assert made.data == Measured(name=entry.dataset, version="fashion-mnist-1", split="test", n=entry.n)
    assert (made.seed, made.parameters) == (entry.seed, entry.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_command_is_the_one_that_made_the_file(name: str) -> None:
    entry = model_zoo.checkpoint(name)
    program, *words = shlex.split(entry.command)
    asked = compress.make_context("run", words).params
    assert program == "compress"
    assert (asked["model"], asked["dataset"], asked["recipe"]) == (entry.model, entry.dataset, entry.recipe)
    assert (asked["seed"], str(asked["output"])) == (entry.seed, f"{name}.safetensors")
    assert bool(asked["checkpoint_path"]) == bool(entry.dense_sha256)
    shipped = Recipe.from_toml(model_zoo.recipe_text(entry.recipe)).to_dict()
    for stage in shipped["stage"]:
        stage.update({key: asked[key] for key in ("epochs", "lr", "batch_size") if asked[key] is not None})
    with PackedFile.open(model_zoo.packed_path(f"zoo:{name}")) as file:
        assert Recipe.from_dict(dict(file.recipe or {})).to_dict() == shipped  # what it leaves out is as ever


@pytest.mark.parametrize("name", NAMES)
def test_interval_is_wilsons(name: str) -> None:
    entry = model_zoo.checkpoint(name)
    correct = torch.arange(entry.n) < round(entry.top1 * entry.n)
    assert entry.n == 10_000
    assert entry.interval == pytest.approx(Evaluation(correct).interval, abs=1e-5)


def test_families_and_sizes() -> None:
    entries = {name: model_zoo.checkpoint(name) for name in NAMES}
    balanced = {entry.model for name, entry in entries.items() if name.endswith("-balanced")}
    tiny = {name: entry for name, entry in entries.items() if name.endswith("-tiny")}
    assert {"test_resnet", "resnet18", "mobilenetv3_small_050", "test_vit"} <= balanced
    assert {"test_resnet", "resnet18"} <= {entry.model for entry in tiny.values()}
    assert all(entry.bits_per_weight < TINY for entry in tiny.values())
    assert sum(entry.bytes for entry in entries.values()) <= BUDGET


def test_folder_holds_what_the_index_names() -> None:
    folder = index.INDEX.parent / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [f"{name}.safetensors" for name in NAMES]


def test_wheel_holds_all_of_it() -> None:
    root = Path(__file__).parent.parent
    setup = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    shipped = {
        path for glob in setup["package-data"]["compressor.model_zoo"] for path in (root / "model_zoo").glob(glob)
    }
    kept = {path for path in (root / "model_zoo").rglob("*") if path.suffix in (".toml", ".safetensors")}
    assert shipped == kept


def test_unknown_checkpoint() -> None:
    with pytest.raises(MissingError, match=r"no checkpoint 'resnet18-tin'\. Did you mean 'resnet18-tiny'\? Shipped"):
        model_zoo.load("resnet18-tin")


def test_file_that_was_lost(other_index: Path) -> None:
    other_index.unlink()
    with pytest.raises(MissingError, match=rf"zoo:{SMALL}: .* cannot be read \(No such file .*\): install the package"):
        model_zoo.load(SMALL)


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


def test_recipe_of_a_checkpoint(type_: Callable[..., Ran]) -> None:
    words = ("--recipe", f"zoo:{SMALL}", "--baseline-epochs", "0", "--epochs", "0", "--calibration-images", "0")
    code, _, err = type_("test_resnet", *words)
    assert code == 0, err
    with PackedFile.open(f"test_resnet-digits-{SMALL}.safetensors") as file:
        own = file.recipe
    with PackedFile.open(model_zoo.packed_path(f"zoo:{SMALL}")) as file:
        shipped = file.recipe
    assert own is not None
    assert shipped is not None
    assert [stage["rule"] for stage in own["stage"]] == [stage["rule"] for stage in shipped["stage"]]


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
        if isinstance(given.type, click.Path)
    }
    assert {name for name, _ in paths} >= {"inspect", "verify", "diff", "eval", "unpack"}
    assert all(isinstance(kind, PackedPath) for kind in paths.values())
