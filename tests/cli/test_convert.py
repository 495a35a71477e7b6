"""unpack and pack, as a user types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import compressor
from compressor.formats.file.writer import write
from tests.helpers.file_commands import ARGS, MODEL, Ran, damage, floats, pack_module, small, timm_file, type_

__all__ = ["timm_file", "type_"]  # the fixtures

pytestmark = pytest.mark.usefixtures("own_folder")


def test_unpack_gives_what_timm_loads(timm_file: Path, type_: Callable[..., Ran]) -> None:
    code, out, err = type_("unpack", str(timm_file), "-o", "dense.safetensors")
    assert (code, err) == (0, [])
    written, how = out.splitlines()
    size = Path("dense.safetensors").stat().st_size
    assert written == f"dense.safetensors  {size:,} bytes, reopened and verified"
    line = how.removeprefix("load it with: ")
    begin = (
        f"timm.create_model('{MODEL}', in_chans=1, num_classes=10, checkpoint_path='dense.safetensors', pretrained_cfg"
    )
    assert line.startswith(begin)
    loaded: Any = eval(line)
    x = torch.randn(2, 1, 32, 32)
    assert torch.equal(loaded.eval()(x), compressor.load(timm_file)(x))
    with safe_open("dense.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    before = Path("dense.safetensors").read_bytes()
    assert type_("unpack", str(timm_file), "-o", "dense.safetensors", "--force")[0] == 0
    assert Path("dense.safetensors").read_bytes() == before


def test_unpack_writes_tied_tensors_under_each_name(type_: Callable[..., Ran]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = model[0].weight
    pack_module("tied.safetensors", model.bfloat16())
    code, out, _ = type_("unpack", "tied.safetensors", "-o", "dense.safetensors")
    assert code == 0
    assert "model.load_state_dict(safetensors.torch.load_file('dense.safetensors'))" in out
    dense = load_file("dense.safetensors")
    assert torch.equal(dense["0.weight"], dense["1.weight"])
    assert dense["0.weight"].dtype == torch.bfloat16
    model.load_state_dict(dense)
    state = compressor.load_state_dict("tied.safetensors")
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_unpack_keeps_every_dtype_and_nan(type_: Callable[..., Ran]) -> None:
    write("f.safetensors", small())
    assert type_("unpack", "f.safetensors", "-o", "dense.safetensors")[0] == 0
    dense = load_file("dense.safetensors")
    assert {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in dense.items()} == {
        "one.weight": "float32", "two.weight": "bfloat16", "three.weight": "float16", "tied.weight": "float32",
        "one.bias": "float32", "steps": "int64", "mask": "float8_e4m3fn",
    }  # fmt: skip
    assert dense["one.bias"].isnan().tolist() == [False, True]


def test_unpack_refuses_before_the_work(
    timm_file: Path, type_: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the work began")

    monkeypatch.setattr("compressor.formats.loader.load_state_dict", forbidden)
    Path("there.safetensors").write_text("mine")
    cases = {
        "there.safetensors": (2, "error: there.safetensors exists: give another name"),
        "dense.pth": (2, "error: -o dense.pth: name a folder, or a file that ends in .safetensors, such as dense.saf"),
        "no/dense.safetensors": (6, "error: folder "),
    }
    for output, (expected, line) in cases.items():
        code, out, err = type_("unpack", str(timm_file), "-o", output)
        assert (code, out, len(err)) == (expected, "", 1)
        assert err[0].startswith(line)
    assert Path("there.safetensors").read_text() == "mine"


def test_unpack_of_a_damaged_file_writes_nothing(type_: Callable[..., Ran]) -> None:
    write("f.safetensors", small())
    damage(Path("f.safetensors"), floats(-1, 0, 0.5, 2).tobytes())
    code, out, err = type_("unpack", "f.safetensors", "-o", "dense.safetensors")
    assert (code, out, len(err)) == (3, "", 1)
    assert sorted(path.name for path in Path().iterdir()) == ["f.safetensors"]


def test_unpack_of_a_damaged_file_makes_no_folder(timm_file: Path, type_: Callable[..., Ran]) -> None:
    data = bytearray(timm_file.read_bytes())
    data[-200] ^= 1
    Path("damaged.safetensors").write_bytes(data)
    assert type_("unpack", "damaged.safetensors", "-o", "folder")[0] == 3
    assert not Path("folder").exists()


def test_unpack_reads_back_what_it_wrote(timm_file: Path, type_: Callable[..., Ran], monkeypatch: Any) -> None:
    monkeypatch.setattr("safetensors.torch.save", lambda tensors, _: wrong(tensors))
    code, _, err = type_("unpack", str(timm_file), "-o", "dense.safetensors")
    assert code == 3
    assert "reads back differently" in err[0]
    assert not Path("dense.safetensors").exists()


def wrong(tensors: dict[str, torch.Tensor]) -> bytes:
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, "wrong.safetensors")
    return Path("wrong.safetensors").read_bytes()


def test_pack_is_a_run_without_data(type_: Callable[..., Ran]) -> None:
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, **ARGS).state_dict(), "own.safetensors")
    words = [MODEL, "--checkpoint-path", "own.safetensors", "--num-classes", "10", "--in-chans", "1"]
    words += ["--scheme", "kmeans", "--bits", "3", "--codec", "bits"]
    code, out, _ = type_("pack", *words, "-o", "a.safetensors", "--json")
    assert code == 0
    document = json.loads(out)
    assert (document["file"], document["top1"]) == ("a.safetensors", None)
    assert {site["codec"] for site in document["sites"]} == {"bits"}
    assert type_(*words, "-o", "b.safetensors")[0] == 0
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert type_("pack", *words)[0] == 0
    assert Path(f"{MODEL}-kmeans3.safetensors").exists()
    words[words.index("own.safetensors")] = "a.safetensors"
    assert type_("pack", *words, "-o", "again.safetensors")[0] == 0, "a packed file is a checkpoint"
    again, first = (compressor.load(f"{name}.safetensors").state_dict() for name in ("again", "a"))
    assert all(torch.equal(again[name], first[name]) for name in first)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        ((MODEL,), 2, "error: Missing option '--checkpoint-path'."),
        (
            (MODEL, "--checkpoint-path", "none.safetensors"),
            4,
            "error: --checkpoint-path none.safetensors: no such file",
        ),
        ((MODEL, "--checkpoint-path", "f", "--epochs", "3"), 2, "error: No such option '--epochs'."),
        ((MODEL, "--checkpoint-path", "f", "--bits", "4", "--codewords", "3"), 2, "error: --bits and --codewords"),
        (("test_resnett", "--checkpoint-path", "f"), 4, "error: timm "),
    ],
)
def test_pack_refuses(type_: Callable[..., Ran], words: tuple[str, ...], code: int, line: str) -> None:
    given, out, err = type_("pack", *words)
    assert (given, out, len(err)) == (code, "", 1)
    assert err[0].startswith(line)


@pytest.mark.parametrize(
    "words",
    [
        ("unpack", "in.safetensors", "-o", "other.safetensors"),
        ("export", "in.safetensors", "--to", "torch", "-o", "other.safetensors"),
        ("report", "in.safetensors", "-o", "other.safetensors"),
        (MODEL, "--checkpoint-path", "in.safetensors", "-o", "other.safetensors"),
        ("pack", MODEL, "--checkpoint-path", "in.safetensors", "-o", "in.safetensors"),
    ],
)
def test_no_command_replaces_what_it_reads(timm_file: Path, type_: Callable[..., Ran], words: tuple[str, ...]) -> None:
    before = timm_file.read_bytes()
    Path("in.safetensors").write_bytes(before)
    Path("other.safetensors").symlink_to("in.safetensors")
    code, out, err = type_(*words, "--force")
    line = f"error: {words[-1]} is the file that is read, and is never replaced: give another name"
    assert (code, out, err) == (2, "", [line])
    assert Path("in.safetensors").read_bytes() == before


def test_a_folder_of_timms_is_not_written_over_the_packed_file(timm_file: Path, type_: Callable[..., Ran]) -> None:
    Path("folder").mkdir()
    Path("folder/model.safetensors").write_bytes(timm_file.read_bytes())
    code, _, err = type_("unpack", "folder/model.safetensors", "-o", "folder", "--force")
    assert (code, "is the file that is read" in err[0]) == (2, True)
