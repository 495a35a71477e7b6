"""export and targets, as a user types them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import compressor
from compressor.cli.main import cli
from compressor.model_zoo import checkpoint
from tests.helpers.file_commands import Ran, timm_file, type_

__all__ = ["timm_file", "type_"]  # the fixtures

pytestmark = pytest.mark.usefixtures("own_folder")


def test_the_reader_is_written_beside_nothing_of_the_zoo(type_: Callable[..., Ran]) -> None:
    code, out, err = type_("export", "zoo:test_resnet-tiny", "--to", "reader")
    assert (code, err) == (0, [])
    head, dense, packed, reader, limits, *_, how = out.splitlines()
    size = Path("packed_reader.py").stat().st_size
    assert head == f"packed_reader.py  {size:,} bytes, run and compared: equal bit for bit"
    assert dense.split() == ["dense", "1,509,760", "bytes", "100.0", "%", "of", "dense"]
    assert packed.split() == [
        "packed",
        f"{checkpoint('test_resnet-tiny').bytes:,}",
        "bytes",
        "1.2",
        "%",
        "of",
        "dense",
    ]
    assert reader.split()[:2] == ["reader", f"{size:,}"]
    assert limits.startswith("limits  goes with the packed file, and gives arrays")
    assert how.startswith("run it  python packed_reader.py ")


def test_what_it_says_to_run_runs(timm_file: Path, type_: Callable[..., Ran]) -> None:
    code, out, _ = type_("export", str(timm_file), "--to", "reader", "-o", "own.py", "--json")
    assert code == 0
    done = json.loads(out)
    assert (done["path"], done["target"], done["difference"]) == ("own.py", "reader", 0)
    assert done["packed"] == timm_file.stat().st_size
    python, *words = shlex.split(done["usage"])
    assert (python, words) == ("python", ["own.py", str(timm_file), f"{timm_file.stem}.npz"])
    namespace: dict[str, object] = {"__name__": "own"}
    exec(Path("own.py").read_text(encoding="utf-8"), namespace)
    arrays = namespace["read"](str(timm_file))  # type: ignore[operator]
    state = compressor.load_state_dict(timm_file)
    assert arrays.keys() == state.keys()
    assert all(np.array_equal(arrays[name], tensor.numpy()) for name, tensor in state.items())


def test_an_estimate_is_a_table_and_writes_nothing(type_: Callable[..., Ran]) -> None:
    pytest.importorskip("ethosu", reason="needs the extra [ethos-u]")
    code, out, err = type_("export", "zoo:test_resnet-tiny", "--to", "ethos-u", "--estimate")
    assert (code, err) == (0, [])
    head, *rows = out.splitlines()
    assert head.split() == ["layer", "shape", "uncoded", "coded", "bits", "by", "channel"]
    assert max(map(len, [head, *rows[:17]])) <= 80
    total = next(row for row in rows if row.startswith("total")).split()
    document = json.loads(type_("export", "zoo:test_resnet-tiny", "--to", "ethos-u", "--estimate", "--json")[1])
    assert total[1:3] == [f"{document['total'][kind]:,}" for kind in ("uncoded", "per_tensor")]
    assert document["total"]["per_tensor"] == sum(layer["per_tensor"] for layer in document["layers"])
    assert document["units"]["layers.per_tensor"] == "bytes"
    assert not list(Path().iterdir())
    code, out, (line,) = type_("export", "zoo:test_resnet-tiny", "--to", "ethos-u")
    assert (code, out) == (2, "")
    assert line.startswith("error: target 'ethos-u' writes no file: --estimate")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("zoo:test_resnet-tiny", "--to", "redaer"), 2, "no target 'redaer'. Did you mean 'reader'? Known targets: "),
        (
            ("zoo:test_resnet-tiny", "--to", "gguf"),
            2,
            "a packed file cannot be exported to 'gguf': GGUF has number form",
        ),
        (
            ("zoo:test_resnet-tiny", "--to", "reader", "--dense"),
            2,
            "target 'reader' has no setting 'dense'. It has none.",
        ),
        (
            ("zoo:test_resnet-tiny", "--to", "reader", "--half"),
            2,
            "target 'reader' has no setting 'half'. It has none.",
        ),
        (
            ("zoo:test_resnet-tiny", "--to", "reader", "--estimate"),
            2,
            "target 'reader' gives no estimate: without --estimate it writes the file",
        ),
        (
            ("zoo:test_resnet-tiny", "--to", "ethos-u", "--estimate", "-o", "x.txt"),
            2,
            "-o x.txt: --estimate writes no file, leave it out",
        ),
        (("none.safetensors", "--to", "reader"), 4, "none.safetensors: no such file, expected a packed file"),
        (("zoo:test_resnet-tiny", "--to", "reader", "-o", "no/reader.py"), 6, "folder "),
    ],
)
def test_refusals_are_one_line(words: tuple[str, ...], code: int, message: str, type_: Callable[..., Ran]) -> None:
    exit_code, out, (line,) = type_("export", *words)
    assert (exit_code, out) == (code, "")
    assert line.startswith(f"error: {message}")
    assert not list(Path().iterdir())


def test_targets_are_listed(type_: Callable[..., Ran]) -> None:
    code, out, err = type_("targets")
    assert (code, err) == (0, [])
    assert "reader: One Python file, to be sent with the packed one" in out
    assert "python -m pip install 'timm-compressor[onnx]'" in out
    listed = json.loads(type_("targets", "--json")[1])["targets"]
    assert [target["id"] for target in listed] == sorted(target["id"] for target in listed)
    assert {target["id"]: target["settings"] for target in listed}["onnx"] == {"dense": False, "opset": 25}


def test_a_misspelt_command_is_not_taken_for_a_model(type_: Callable[..., Ran]) -> None:
    assert "Did you mean 'compress export'?" in type_("exprt", "f")[2][0]
    assert "export" in cli.commands
