"""The command, as a user types it: what a run prints and writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import compressor
from compressor.cli.compress import SECTIONS
from compressor.cli.main import nearest_command, run

QUICK = ("--baseline-epochs", "1", "--epochs", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(autouse=True)
def _here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(folder / "cache"))


@pytest.fixture
def type_(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command line that must succeed; give stdout and stderr."""

    def typed(*words: str) -> tuple[str, str]:
        assert run(list(words)) == 0, capsys.readouterr().err
        captured = capsys.readouterr()
        return captured.out, captured.err

    return typed


@pytest.fixture(scope="module")
def digits_file(folder: Path) -> Path:
    """The packed file of a quick run on the built-in digits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TIMM_COMPRESSOR_CACHE", str(folder / "cache"))
        assert run(["test_resnet", "--scheme", "learnt", "--bits", "4", *QUICK]) == 0
    return folder / "test_resnet-digits-learnt4.safetensors"


def test_a_run_without_data(digits_file: Path, type_: Any) -> None:
    out, err = type_("test_resnet", "--scheme", "learnt", "--bits", "4", *QUICK, "--force")
    first, data, images, *steps = err.splitlines()
    assert first.startswith("No data named: using the built-in digits (1,797 handwritten images).")
    assert data == "data               digits: 1,078 train, 359 validation, 360 test images of 10 classes"
    assert images == "images             1x32x32, mean 0.3056, std 0.3231"
    (before,) = [line for line in steps if "before it" in line]
    assert re.fullmatch(r"3/4 fine-tuning +before it: validation \d+\.\d %", before)
    finished = [line for line in steps if not re.search(r" epoch \d| step | before ", line)]
    assert [line[:18].strip() for line in finished] == [
        "1/4 dense baseline", "2/4 codebooks", "3/4 fine-tuning", "4/4 file",
    ]  # fmt: skip
    assert "reused from" in finished[0]
    assert f"{digits_file.stat().st_size:,} bytes, reopened and verified" in finished[3]
    empty, smaller, accuracy, load, _, *table, split, _, _, last = out.splitlines()
    assert not empty
    assert load == "load it as a timm model: compressor.load('test_resnet-digits-learnt4.safetensors')"
    assert table[0].startswith("site ")
    assert split.startswith("whole file ")
    numbers = [int(word.replace(",", "")) for word in split.split() if word.replace(",", "").isdigit()]
    dense, whole, *parts = numbers
    assert whole == sum(parts) == digits_file.stat().st_size
    assert smaller == f"{dense / whole:.2f} times smaller: {dense:,} -> {whole:,} bytes"
    assert accuracy.startswith("top-1 on 360 test images  dense ")
    assert "  95 % interval [" in accuracy
    assert "lost, " in accuracy
    assert accuracy.endswith("seed 0")
    assert last == ("compress test_resnet --pretrained --data-dir IMAGES --scheme learnt --bits 4")


def test_the_same_seed_gives_the_same_bytes(digits_file: Path, type_: Any) -> None:
    before = digits_file.read_bytes()
    type_("test_resnet", "--scheme", "learnt", "--bits", "4", *QUICK, "--force")
    assert digits_file.read_bytes() == before


def test_eval_repeats_the_accuracy_to_the_last_digit(digits_file: Path, type_: Any) -> None:
    document = json.loads(type_("eval", str(digits_file), "--json")[0])
    assert document["schema_version"] == 2
    assert document["top1"]["packed"] == document["top1"]["recorded"]
    assert document["data"] == {"name": "digits", "version": "digits-1", "split": "test", "n": 360}
    assert "as recorded in the file" in type_("eval", str(digits_file))[0]


def test_inspect(digits_file: Path, type_: Any) -> None:
    text = type_("inspect", str(digits_file), "--all")[0]
    assert "layer4.0.conv2.weight" in text
    assert "as recorded when it was written" in " ".join(text.split())
    assert text.startswith("model     test_resnet(in_chans=1, num_classes=10)\n")
    document = json.loads(type_("inspect", str(digits_file), "--json")[0])
    assert document["schema_version"] == 2
    totals = document["totals"]
    parts = ("indices", "codebooks", "untouched", "header", "checksums")
    assert sum(totals[part] for part in parts) == totals["file"] == digits_file.stat().st_size
    assert type_("inspect", str(digits_file), "--markdown")[0].startswith("| site")


def test_inspect_needs_no_torch(digits_file: Path) -> None:
    code = (
        f"import sys; from compressor.cli.main import run; run(['inspect', {str(digits_file)!r}]);"
        "sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0


def test_json_is_one_document(type_: Any) -> None:
    out, err = type_("test_resnet", "--scheme", "kmeans", "--codewords", "5", *QUICK, "--json")
    document = json.loads(out)
    assert document["file"] == "test_resnet-digits-kmeans-5.safetensors"
    assert document["top1"]["n"] == 360
    assert {site["allowed"] for site in document["sites"]} == {5}
    assert err.startswith("No data named")


def test_dry_run_lists_what_stays_dense(type_: Any) -> None:
    out, _ = type_("--dry-run", "test_vit", "--scheme", "kmeans", "--bits", "2")
    (line,) = [line for line in out.splitlines() if line.startswith("pos_embed")]
    assert "left alone: a position or token, by its name; shared only by a rule that names it" in line
    (line,) = [line for line in out.splitlines() if line.startswith("vectors")]
    assert line.split(": ")[1] == "dense, shared only by rules that name them"


def test_dry_run_writes_nothing(folder: Path, type_: Any) -> None:
    before = sorted(folder.iterdir())
    out, _ = type_("--dry-run", "test_resnet", "--recipe", "mixed3")
    assert sorted(folder.iterdir()) == before
    assert "learnt codewords=8" in out
    assert "ignored by rule 1" in out
    assert "predicted  " in out.splitlines()[-1]
    document = json.loads(type_("test_resnet", "--dry-run", "--json")[0])
    assert document["predicted"]["file"] < document["predicted"]["dense"] / 6


def test_recipe_of_a_packed_file_runs_again(digits_file: Path, type_: Any) -> None:
    type_("test_resnet", "--recipe", str(digits_file), "--baseline-epochs", "1", "-o", "again.safetensors")
    first, again = compressor.load_state_dict(digits_file), compressor.load_state_dict("again.safetensors")
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_recipe_with_two_stages(folder: Path, type_: Any) -> None:
    stage = '[[stage]]\nepochs = 0\n[[stage.rule]]\nmatch = "*"\nscheme = "kmeans"\nbits = {}\n'
    (folder / "two.toml").write_text(stage.format(3) + stage.format(2))
    _, err = type_("test_resnet", "--recipe", "two.toml", "--baseline-epochs", "1")
    assert "3/4 codebooks" in err
    assert "test_resnet-digits-two.safetensors" in err
    loaded: Any = compressor.load("test_resnet-digits-two.safetensors")
    assert len(loaded.fc.weight.unique()) == 4


def test_from_scratch(type_: Any) -> None:
    out, err = type_("test_resnet", "--from-scratch", "--epochs", "1", "-o", "scratch.safetensors")
    assert "1/3 codebooks" in err
    assert "dense" not in out


def test_post_training_from_a_checkpoint(folder: Path, type_: Any) -> None:
    model = timm.create_model("test_vit", num_classes=7)
    save_file(model.state_dict(), folder / "own.safetensors")
    words = (
        "test_vit",
        "--checkpoint-path",
        "own.safetensors",
        "--num-classes",
        "7",
        "--scheme",
        "kmeans",
        "--bits",
        "5",
    )
    out, err = type_(*words)
    assert "1/3 weights" in err
    assert "digits" not in out + err
    assert "top-1" not in out
    loaded: Any = compressor.load("test_vit-kmeans5.safetensors")
    assert loaded.num_classes == 7
    assert len(loaded.head.weight.unique()) <= 32


@pytest.mark.slow
def test_pretrained_from_a_local_hub_cache(folder: Path, type_: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg: Any = timm.models.get_pretrained_cfg("test_resnet")
    repo = folder / "hub" / f"models--{cfg.hf_hub_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    torch.manual_seed(1)
    weights = timm.create_model("test_resnet").state_dict()
    save_file(weights, snapshot / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    _, err = type_("test_resnet", "--pretrained", "--scheme", "kmeans", "--bits", "8")
    assert "digits" not in err
    packed = compressor.load_state_dict("test_resnet-kmeans8.safetensors")
    assert torch.equal(packed["fc.bias"], weights["fc.bias"])
    assert (packed["fc.weight"] - weights["fc.weight"]).abs().max() < 0.02


@pytest.mark.slow
def test_model_without_batch_norm(type_: Any) -> None:
    type_("test_vit", "--scheme", "kmeans", "--bits", "4", *QUICK)
    loaded: Any = compressor.load("test_vit-digits-kmeans4.safetensors")
    assert loaded.patch_embed.img_size == (32, 32)


@pytest.mark.parametrize("words", [("schemes",), ("env",), ("zoo", "list")])
def test_lists(type_: Any, words: tuple[str, ...]) -> None:
    assert type_(*words)[0]
    assert json.loads(type_(*words, "--json")[0])["schema_version"] == 2


def test_help_lists_options_and_commands(type_: Any) -> None:
    out = type_("--help")[0]
    for word in ("--scheme", "--dry-run", "inspect", "eval", "schemes", "zoo", "zoo:NAME", "env"):
        assert word in out
    sections = re.findall(r"^(\w+):$", out, flags=re.MULTILINE)
    assert sections == [*SECTIONS, "Help", "Commands"]
    assert out.count("--bits INTEGER ") == 1


def test_help_shows_the_help_of_a_command(type_: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert type_("help")[0] == type_("--help")[0]
    out = type_("help", "pack")[0]
    assert out == type_("pack", "--help")[0]
    own, _, shared = out.partition("Compression:")
    assert "--checkpoint-path" in own
    assert "--bits" in shared
    assert "--epochs" not in out
    assert run(["help", "resnet34"]) == 2
    assert "no command 'resnet34': 'compress help' lists them, 'compress help MODEL' has" in capsys.readouterr().err


def test_the_command_without_a_name_is_shown_as_it_is_typed(type_: Any) -> None:
    texts = {type_(*words)[0] for words in (("help", "MODEL"), ("help", "run"), ("test_resnet", "--help"))}
    (text,) = texts
    assert text.startswith("Usage: compress MODEL [OPTIONS]\n\n  Compress a timm MODEL.")
    assert "--epochs" in text


def test_no_model_is_taken_for_a_misspelt_command() -> None:
    assert not [name for name in timm.list_models() if nearest_command(name)]


def test_output_closed_early_is_no_error() -> None:
    code = "from compressor.cli.main import main; main(['--help'])"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -1', shell=True, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
