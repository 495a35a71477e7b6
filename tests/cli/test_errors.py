"""Bad input: one clear line on stderr, the right exit code, no traceback, and before the long work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from compressor.cli import main as command
from compressor.cli.main import run
from compressor.formats.errors import IntegrityError
from tests.helpers.forging import forged_from

MODEL = "test_resnet"
SHARE = ("--scheme", "kmeans", "--bits", "4")


@pytest.fixture(autouse=True)
def _here(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training a baseline would be a mistake."""
    monkeypatch.setattr("compressor.models.baseline.train", forbidden)


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("the long work began")


class Fails:
    """Runs a command line that must fail; gives its one line."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, code: int, *words: str) -> str:
        assert run(list(words)) == code
        captured = self.capsys.readouterr()
        assert captured.out == ""
        *progress, line = captured.err.splitlines()
        assert line.startswith("error: ")
        assert not [said for said in progress if "error" in said or "Traceback" in said]
        return line.removeprefix("error: ")


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]) -> Fails:
    return Fails(capsys)


def packed(path: str = "good.safetensors") -> Path:
    """Make a packed file quickly."""
    from compressor import Compressor, Policy, Rule

    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16))
    Compressor(model, Policy([Rule("*", scheme="kmeans", bits=2)])).prepare().finish().save(path)
    return Path(path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("inspec", "f"), "no command 'inspec'. Did you mean 'compress inspect'?"),
        (("schmes",), "no command 'schmes'. Did you mean 'compress schemes'?"),
        ((MODEL, "--scheme", "lernt"), "no scheme 'lernt'. Did you mean 'learnt'? Known schemes: "),
        ((MODEL, "--scheme", "learnt", "--bits", "40"), "scheme 'learnt' takes 1 to 16 bits, got 40"),
        ((MODEL, "--bits", "four"), "Invalid value for '--bits': 'four', expected a whole number at least 1"),
        (
            (MODEL, "--seed", "9" * 23),
            f"Invalid value for '--seed': '{'9' * 23}', expected a whole number at least 0 and at most 4294967295",
        ),
        ((MODEL, "--max-drop", "inf"), "--max-drop inf: expected a finite number of at least 0"),
        ((MODEL, "--target-bits", "inf"), "--target-bits inf: expected a finite number above 0"),
        ((MODEL, "--bitss", "4"), "No such option '--bitss'. (Did you mean one of: '--bits', '--target-bits'?)"),
        ((MODEL, "--set", "codeword=3"), "scheme 'learnt' has no setting 'codeword'. Did you mean 'codewords'?"),
        ((MODEL, "--set", "codewords"), "--set codewords: expected KEY=VALUE"),
        ((MODEL, "--bits", "4", "--codewords", "16"), "--bits and --codewords: name one"),
        ((MODEL, "--recipe", "learnt4", "--bits", "4"), "--recipe says what is shared and how: leave out --bits"),
        ((MODEL, "--pretrained", "--from-scratch"), "--from-scratch starts from random weights"),
        ((MODEL, "--pretrained", "--epochs", "3"), "no data to train on for --epochs: name --dataset or --data-dir"),
        ((MODEL, "--in-chans", "3"), "--in-chans 3: the images of digits have 1; leave it out"),
        ((MODEL, "--codec", "hufman"), "--codec hufman: no such codec. Did you mean 'huffman'? Known: "),
        ((MODEL, "--opt", "adamm"), "opt 'adamm' with sched 'cosine'"),
        ((MODEL, "--sched", "cosin"), "opt 'adamw' with sched 'cosin'"),
        ((MODEL, "--lr", "-1"), "Invalid value for '--lr': '-1', expected a number at least 0"),
        ((MODEL, "--distill", "2"), "Invalid value for '--distill': '2', expected a number at least 0 and at most 1"),
    ],
)
def test_usage(fails: Fails, words: tuple[str, ...], line: str) -> None:
    assert fails(2, *words).startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((MODEL, "--recipe", "lernt4"), "no recipe 'lernt4'. Did you mean 'learnt4'?"),
        ((MODEL, "--recipe", "none.toml"), "--recipe none.toml: cannot be read (No such file or directory)"),
        ((MODEL, "--checkpoint-path", "none.safetensors"), "--checkpoint-path none.safetensors: no such file"),
        ((MODEL, "--checkpoint-path", "."), "--checkpoint-path .: a folder, expected a file"),
        ((MODEL, "--data-dir", "nowhere"), "--data-dir nowhere: no such folder"),
        ((MODEL, "--dataset", "fashion-mnist", "--data-dir", "."), "Fashion-MNIST: no file train-images"),
        ((MODEL, "--num-classes", "7"), "--num-classes 7: digits has 10 classes"),
    ],
)
def test_missing(fails: Fails, words: tuple[str, ...], line: str) -> None:
    assert fails(4, *words).startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[[stage]\n", "r.toml is not TOML: "),
        ("[[stage]]\nlr = 1\nlr = 2\n", "r.toml is not TOML: Cannot overwrite a value (at line 3, column 7)"),
        ("[[stage]]\nepochs = no\n", "r.toml is not TOML: Invalid value (at line 2, column 10)"),
        ("[[stage]]\nepochs = *a\n", "r.toml is not TOML: Invalid value (at line 2, column 10)"),
        ("[[stages]]\n", "r.toml: unknown key 'stages'. Did you mean 'stage'?"),
        ("[[stage]]\nepoch = 2\n", "r.toml, stage 1: unknown key 'epoch'. Did you mean 'epochs'?"),
        ('[[stage]]\nepochs = "two"\n[[stage.rule]]\nbits = 4\nscheme = "learnt"', "r.toml, stage 1, epochs: "),
        ('[[stage]]\n[[stage.rule]]\nscheme = "learnt"\nbits = "4"', "r.toml, stage 1, rule 1: scheme 'learnt': bits "),
        ('[[stage]]\n[[stage.rule]]\nmatch = "layer9"\nscheme = "learnt"', "rule 1 ('layer9') matches no tensor"),
        ('[[stage]]\n[[stage.rule]]\nignore = true', "nothing to share: "),
    ],
)  # fmt: skip
def test_invalid_recipes(fails: Fails, text: str, line: str) -> None:
    Path("r.toml").write_text(text)
    said = fails(2, MODEL, "--recipe", "r.toml")
    assert line in said


def test_a_rule_that_matches_nothing_names_the_nearest_site(fails: Fails) -> None:
    Path("r.toml").write_text('[[stage]]\n[[stage.rule]]\nmatch = "layer1.0.conv7"\nscheme = "learnt"\nbits = 4')
    assert "Did you mean 'layer1.0.conv" in fails(2, MODEL, "--recipe", "r.toml")


def test_the_first_of_two_matching_rules_wins(capsys: pytest.CaptureFixture[str]) -> None:
    rules = "".join(f'[[stage.rule]]\nmatch = "{match}"\nscheme = "learnt"\nbits = {bits}\n' for match, bits in RULES)
    Path("r.toml").write_text(f"[[stage]]\n{rules}")
    assert run([MODEL, "--recipe", "r.toml", "--dry-run", "--json"]) == 0
    plans = {site["site"]: site for site in json.loads(capsys.readouterr().out)["sites"]}
    assert [plans["fc.weight"][key] for key in ("rule", "plan")] == ["fc", "learnt codewords=8"]
    assert [plans["layer1.0.conv1.weight"][key] for key in ("rule", "plan")] == ["*", "learnt codewords=4"]


RULES = ("fc", 3), ("*", 2), ("layer1.0.conv1", 5)


def test_numbers_as_toml_writes_them() -> None:
    Path("r.toml").write_text('[[stage]]\n\tlr = 1e-4\n[[stage.rule]]\nscheme = "learnt"\nbits = 2\n')
    assert run([MODEL, "--recipe", "r.toml", "--dry-run"]) == 0


def test_existing_output_is_refused(fails: Fails) -> None:
    Path("there.safetensors").write_text("mine")
    assert "there.safetensors exists" in fails(2, MODEL, "-o", "there.safetensors")
    assert Path("there.safetensors").read_text() == "mine"


def test_folder_that_is_not_there_or_cannot_be_written(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "does not exist" in fails(6, MODEL, "-o", "no/file.safetensors")

    def refuse(*_: object, **__: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # root may write anywhere
        patch.setattr("compressor.formats.io.atomic.os.open", refuse)
        assert "cannot be written: Permission denied" in fails(6, MODEL)


def test_weights_that_are_not_finite(fails: Fails) -> None:
    state = timm.create_model(MODEL).state_dict()
    state["layer1.0.conv1.weight"][0, 0] = float("nan")
    save_file(state, "nan.safetensors")
    said = fails(4, MODEL, "--checkpoint-path", "nan.safetensors", *SHARE)
    assert said.startswith("layer1.0.conv1.weight: 9 of 9,216 weights are NaN or infinite")


def test_checkpoint_of_another_head(fails: Fails) -> None:
    save_file(timm.create_model(MODEL, num_classes=7).state_dict(), "seven.safetensors")
    said = fails(4, MODEL, "--checkpoint-path", "seven.safetensors", *SHARE)
    assert said.endswith("seven.safetensors: 7 classes in the checkpoint: --num-classes 7")


def test_layer_smaller_than_its_codebook_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    rules = ('"conv1.0"\nscheme="kmeans"\nbits=10', '"fc"\nscheme="kmeans"\nbits=2', '"*"\nignore=true')
    Path("r.toml").write_text("[[stage]]\n" + "".join(f"[[stage.rule]]\nmatch={rule}\n" for rule in rules))
    assert run([MODEL, "--dry-run", "--recipe", "r.toml"]) == 0
    assert "weights are no more than the 1,024 values they would share" in capsys.readouterr().out


def test_classes_unlike_the_file(fails: Fails) -> None:
    from compressor import Compressor, Policy, Rule

    model = timm.create_model(MODEL, num_classes=7, in_chans=1)
    args = {"num_classes": 7, "in_chans": 1}
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", bits=4)]), model_args=args)
    job.prepare().finish().save("seven.safetensors")
    said = fails(4, "eval", "seven.safetensors", "--dataset", "digits")
    assert said == "the file's model tells 7 classes apart, digits has 10"


def test_classes_of_the_splits_differ(fails: Fails) -> None:
    for place in ("train/cat", "train/dog", "val/cat"):
        Path(place).mkdir(parents=True)
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(f"{place}/0.png")
    assert fails(4, MODEL, "--data-dir", ".").startswith(".: train and validation have different classes: dog")


@pytest.mark.parametrize("words", [("inspect",), ("eval",)])
def test_files_of_another_kind(fails: Fails, words: tuple[str, ...]) -> None:
    save_file({"a": torch.zeros(3)}, "plain.safetensors")
    Path("old.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    Path("empty.safetensors").write_bytes(b"")
    for name in ("plain.safetensors", "old.pth", "empty.safetensors"):
        assert name in fails(3, *words, name)
    assert "none.safetensors" in fails(4, *words, "none.safetensors")


def test_truncated_or_flipped(fails: Fails) -> None:
    good = packed().read_bytes()
    Path("short.safetensors").write_bytes(good[:-10])
    assert "short.safetensors" in fails(3, "inspect", "short.safetensors")
    for position in (20, len(good) // 2, len(good) - 3):
        flipped = bytearray(good)
        flipped[position] ^= 1
        Path("flip.safetensors").write_bytes(flipped)
        assert "flip.safetensors" in fails(3, "inspect", "flip.safetensors")


def test_data_of_a_file_is_not_known(fails: Fails) -> None:
    packed()
    ask = "name --dataset, or the folder of your images with --data-dir"
    assert fails(2, "eval", "good.safetensors") == f"good.safetensors names no data set: {ask}"


@pytest.mark.parametrize("name", ["hfds/someone/anything", "torch/mnist", "wds/shards", "folder", "", "Digits"])
def test_a_file_names_built_in_data_only(fails: Fails, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Any other name could make timm fetch, or run, what the author of the file wants."""
    packed()
    fields = {"data": {"name": name, "version": "1", "split": "test", "n": 1}}
    data = Path("good.safetensors").read_bytes()
    Path("evil.safetensors").write_bytes(forged_from(data, lambda f: f["provenance"].update(fields)))
    monkeypatch.setattr("timm.data.create_dataset", None)
    monkeypatch.setattr("compressor.formats.loader.load", None)
    said = fails(2, "eval", "evil.safetensors")
    assert said.startswith(f"evil.safetensors was measured on {name!r}, which is not built in: name --dataset")


@pytest.mark.parametrize("name", ["torch/mnist", "image_folder", "any", ""])
def test_data_of_timms_needs_its_folder(fails: Fails, name: str) -> None:
    packed()
    said = fails(4, "eval", "good.safetensors", "--dataset", name)
    assert said == f"data set {name or 'folder'}: name the folder of its files with --data-dir"


def test_a_bug_asks_for_a_report(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError("division by\nzero")

    monkeypatch.setattr("compressor.cli.run.run", broken)
    assert fails(1, MODEL).startswith("ZeroDivisionError: division by zero (this is a bug; please report it")
    monkeypatch.setenv("COMPRESS_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run([MODEL])


def test_an_error_in_a_loaders_process_is_one_line() -> None:
    wrapped = IntegrityError(
        "Caught MissingError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1\ncompressor.formats.errors.MissingError: cat/1.png: not a readable picture'
    )
    assert command.one_line(wrapped) == "cat/1.png: not a readable picture"


def test_no_arguments_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    assert "Usage: compress" in capsys.readouterr().err
