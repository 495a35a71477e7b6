"""Models by every name that timm takes: its own, of a folder, and of a repository on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import compressor
from compressor.cli.main import run
from compressor.formats.errors import MissingError
from compressor.models.names import find_model

MODEL = "test_resnet"
pytestmark = pytest.mark.usefixtures("own_folder")


def write_model(folder: Path) -> dict[str, torch.Tensor]:
    """Write a folder as timm does, of a model of three classes and grey images of 48 pixels; return its weights."""
    torch.manual_seed(0)
    model: Any = timm.create_model(MODEL, num_classes=3, in_chans=1)
    folder.mkdir(parents=True)
    state: dict[str, torch.Tensor] = model.state_dict()
    save_file(state, folder / "model.safetensors")
    cfg = {"input_size": [1, 48, 48], "mean": [0.25], "std": [0.5], "num_classes": 3, "first_conv": "conv1.0",
           "classifier": "fc", "crop_pct": 1.0}  # fmt: skip
    config = {
        "architecture": MODEL, "num_classes": 3, "model_args": {"in_chans": 1, "num_classes": 3}, "pretrained_cfg": cfg,
        "label_names": ["a", "b", "c"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return state


def hub_folder(cache: Path, revision: str = "main") -> Path:
    """Return the folder of a snapshot in a cache of the hub's layout."""
    repo = cache / "models--me--mine"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / revision).write_text("0" * 40)
    return repo / "snapshots" / ("0" * 40)


def test_names_of_timm() -> None:
    found = find_model("test_resnet.r160_in1k")
    assert (found.name, found.architecture, dict(found.args)) == ("test_resnet.r160_in1k",) * 2 + ({},)
    assert found.cfg["input_size"] == (3, 160, 160)


def test_a_folder_says_its_architecture_and_arguments() -> None:
    write_model(Path("mine"))
    found = find_model("local-dir:mine")
    assert (found.architecture, dict(found.args)) == (MODEL, {"in_chans": 1, "num_classes": 3})
    assert (list(found.cfg["input_size"]), found.cfg["num_classes"]) == ([1, 48, 48], 3)


@pytest.mark.parametrize("name", ["local-dir:mine", "hf-hub:me/mine", "hf-hub:me/mine@v1"])
@pytest.mark.parametrize("away", [False, True], ids=["offline mode", "hub away"])
def test_the_command_takes_them(name: str, away: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    if away:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setattr("time.sleep", lambda *_: pytest.fail("waited"))
    revision = name.partition("@")[2] or "main"
    state = write_model(hub_folder(cache, revision) if name.startswith("hf") else Path("mine"))
    assert run([name, "--pretrained", "--scheme", "kmeans", "--bits", "4"]) == 0
    (file,) = Path().glob("*.safetensors")
    assert file.name == "mine-kmeans4.safetensors"
    loaded: Any = compressor.load(file)
    assert torch.equal(loaded.state_dict()["fc.bias"], state["fc.bias"]), "which is not shared"
    cfg = loaded.pretrained_cfg
    assert (cfg["input_size"], cfg["mean"], cfg["num_classes"], cfg["crop_pct"]) == ((1, 48, 48), (0.25,), 3, 1.0)
    assert cfg["label_names"] == ("a", "b", "c")


def test_other_classes_drop_the_names() -> None:
    write_model(Path("mine"))
    assert run(["local-dir:mine", "--pretrained", "--num-classes", "5", "--scheme", "kmeans", "-o", "out"]) == 0
    cfg: Any = compressor.load("out").pretrained_cfg
    assert (cfg["num_classes"], "label_names" in cfg) == (5, False)


def test_damaged_weights_of_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    write_model(Path("mine"))
    whole = Path("mine/model.safetensors").read_bytes()
    Path("mine/model.safetensors").write_bytes(whole[:1000])
    assert run(["local-dir:mine", "--pretrained", "--scheme", "kmeans"]) == 3
    assert capsys.readouterr().err.startswith("error: --pretrained: the weights in mine are damaged (")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("resnett18", "timm .* has no model 'resnett18'. Did you mean 'resnet18'"),
        ("timm/resnet18", "Use 'hf-hub:timm/resnet18'"),
        ("ftp:me/mine", "Unknown model source 'ftp'"),
        ("local-dir:none", "local-dir:none: none/config.json cannot be read .No such file"),
        ("local-dir:list", "local-dir:list: list/config.json is not the configuration of a model of timm's .TypeError"),
        ("local-dir:other", "other/config.json is not .* .KeyError: 'architecture'"),
        ("local-dir:text", "text/config.json is not .* .JSONDecodeError"),
        ("local-dir:unknown", "unknown/config.json is not .* .RuntimeError: Unknown model .nomodel"),
        ("hf-hub:me/none", "hf-hub:me/none is not in the hub's cache"),
    ],
)
def test_names_of_no_model(name: str, line: str) -> None:
    texts = {"list": "[]", "other": "{}", "text": "{", "unknown": '{"architecture": "nomodel"}'}
    for folder, text in texts.items():
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(text)
    with pytest.raises(MissingError, match=line):
        find_model(name)
