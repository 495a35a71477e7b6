"""verify and diff, as a user types them; and what is no packed file."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from compressor.formats.content import RawTensor
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack, write
from tests.helpers.file_commands import MODEL, Ran, damage, floats, small, timm_file, type_
from tests.helpers.forging import as_version_1

__all__ = ["timm_file", "type_"]  # the fixtures

pytestmark = pytest.mark.usefixtures("own_folder")


def test_verify_tells_both_sums(timm_file: Path, type_: Callable[..., Ran]) -> None:
    digest = hashlib.sha256(timm_file.read_bytes()).hexdigest()
    with PackedFile.open(timm_file) as packed:
        content = packed.content_sha256()
    code, out, err = type_("verify", str(timm_file), "--sha256", digest.upper())
    assert (code, err) == (0, [])
    first, whole, inner = out.splitlines()
    assert first.startswith(f"{timm_file}: good, {timm_file.stat().st_size:,} bytes, ")
    assert whole.split() == ["sha256", digest]
    assert inner.split() == ["content", "sha256", content]
    document = json.loads(type_("verify", str(timm_file), "--json")[1])
    assert document["good"]
    assert (document["sha256"], document["content_sha256"], document["bad"]) == (digest, content, [])


def test_verify_lists_every_bad_part(type_: Callable[..., Ran]) -> None:
    Path("f.safetensors").write_bytes(as_version_1(pack(small(), "auto")))
    damage(Path("f.safetensors"), floats(-1, 0, 0.5, 2).tobytes(), floats(1, np.nan).tobytes())
    code, out, err = type_("verify", "f.safetensors")
    assert code == 3
    assert err == ["error: f.safetensors: 2 of 8 parts are bad: fetch it again"]
    book, bias = out.splitlines()
    assert book.startswith("f.safetensors: checksum of the codebook 0 does not match")
    assert bias.startswith("f.safetensors: checksum of the untouched of 'one.bias' does not match")
    code, out, err = type_("verify", "f.safetensors", "--json")
    document = json.loads(out)
    assert (code, len(err), document["good"], document["bad"]) == (3, 1, False, [book, bias])


def test_verify_names_a_bad_section_once(type_: Callable[..., Ran]) -> None:
    """The parts of a small file have one checksum; a tensor of one value has no part that could be damaged."""
    write("f.safetensors", small())
    damage(Path("f.safetensors"), floats(-1, 0, 0.5, 2).tobytes())
    code, out, err = type_("verify", "f.safetensors")
    assert (code, err) == (3, ["error: f.safetensors: 7 of 8 parts are bad: fetch it again"])
    (line,) = out.splitlines()
    assert "checksum of the indices of 'one.weight' to the untouched of 'mask' does not match" in line


def test_verify_another_file_than_was_meant(type_: Callable[..., Ran]) -> None:
    write("f.safetensors", small())
    digest = hashlib.sha256(Path("f.safetensors").read_bytes()).hexdigest()
    code, out, err = type_("verify", "f.safetensors", "--sha256", "ab" * 32)
    assert (code, out) == (3, "")
    assert err == [f"error: f.safetensors: its sha256 is {digest}, expected {'ab' * 32}"]
    code, out, err = type_("verify", "f.safetensors", "--sha256", "ab" * 32, "--json")
    assert (code, json.loads(out)["good"], len(err)) == (3, False, 1)


def test_verify_finds_every_flipped_byte(type_: Callable[..., Ran]) -> None:
    write("f.safetensors", small())
    good = Path("f.safetensors").read_bytes()
    for position in range(0, len(good), 7):
        flipped = bytearray(good)
        flipped[position] ^= 4
        Path("f.safetensors").write_bytes(flipped)
        code, _, err = type_("verify", "f.safetensors")
        assert (code, len(err)) == (3, 1), position


def test_diff_of_the_same_content(type_: Callable[..., Ran]) -> None:
    write("a.safetensors", small(provenance={"seed": 1}))
    write("b.safetensors", small(provenance={"seed": 2}))
    code, out, err = type_("diff", "a.safetensors", "b.safetensors")
    assert (code, err) == (0, [])
    assert out.startswith("identical content, sha256 ")
    document = json.loads(type_("diff", "a.safetensors", "b.safetensors", "--json")[1])
    assert document["identical_content"]
    assert (document["rows"], document["metadata"], document["weights"][1]) == ([], {}, 0)


def test_diff_counts_weights_and_errors(type_: Callable[..., Ran]) -> None:
    write("a.safetensors", small())
    sites = dict(small().sites)
    for name in ("one.weight", "two.weight"):  # two entries of each: -1 becomes 0, and 2 becomes 0.5
        indices = sites[name].indices.copy()
        indices[np.flatnonzero(indices == 0)[0]] = 1
        indices[np.flatnonzero(indices == 3)[0]] = 2
        sites[name] = replace(sites[name], indices=indices)
    write("b.safetensors", small(sites=sites))
    document = json.loads(type_("diff", "a.safetensors", "b.safetensors", "--json")[1])
    signal = 16 * (1 + 0 + 0.25 + 4)
    expected = {"weights": 64, "differ": 2, "max_abs": 1.5, "sqnr": pytest.approx(10 * np.log10(signal / 3.25))}
    for row, name in zip(document["rows"], ("one.weight", "two.weight"), strict=True):
        assert row["tensor"] == name
        assert {key: row[key] for key in expected} == expected
        assert row["what"][:2] == ["values", "indices"]
    assert document["weights"] == [199, 4]
    assert document["tensors"] == 6


def test_diff_of_tensors_that_cannot_be_compared(type_: Callable[..., Ran]) -> None:
    write("a.safetensors", small())
    content = small()
    sites = {"one.weight": replace(content.sites["one.weight"], shape=(4, 16)), **dict(list(content.sites.items())[2:])}
    untouched = {
        "one.bias": RawTensor("F32", (2,), floats(np.inf, np.nan).tobytes()),
        "two.weight": RawTensor("BF16", (8, 8), bytes(128)),
        "mask": RawTensor("F8_E4M3", (4,), b"\0\0\1\0"),
        "new": RawTensor("BOOL", (3,), bytes(3)),
    }
    write("b.safetensors", small(sites=sites, untouched=untouched))
    code, out, _ = type_("diff", "a.safetensors", "b.safetensors")
    assert code == 0
    assert "-> none" in out
    rows = {
        row["tensor"]: row for row in json.loads(type_("diff", "a.safetensors", "b.safetensors", "--json")[1])["rows"]
    }
    assert rows["one.weight"]["what"][0] == "shape"
    assert rows["one.weight"]["differ"] is None
    assert rows["two.weight"]["what"] == ["values", "kind"]
    assert rows["two.weight"]["differ"] == 48
    assert rows["two.weight"]["sqnr"] == 0
    assert (rows["one.bias"]["differ"], rows["one.bias"]["max_abs"], rows["one.bias"]["sqnr"]) == (1, None, None)
    assert (rows["mask"]["differ"], rows["mask"]["max_abs"]) == (1, None)
    assert (rows["steps"]["what"], rows["steps"]["bytes"]) == (["only in A"], [0, None])
    assert (rows["new"]["what"], rows["new"]["bytes"]) == (["only in B"], [None, 0])


def test_diff_of_how_the_same_values_are_stored(type_: Callable[..., Ran]) -> None:
    write("a.safetensors", small(), codec="bits")
    write("b.safetensors", small(), codec="huffman")
    (row, *_) = json.loads(type_("diff", "a.safetensors", "b.safetensors", "--json")[1])["rows"]
    assert row["differ"] == 0
    assert "codec" in row["what"]
    assert "values" not in row["what"]
    assert "exact" in type_("diff", "a.safetensors", "b.safetensors")[1]


def test_diff_of_metadata_by_path(timm_file: Path, type_: Callable[..., Ran]) -> None:
    with PackedFile.open(timm_file) as packed:
        content = packed.content()
    model = {"name": MODEL, "args": {"num_classes": 10}}
    recipe = {"stage": [{"rule": [{"match": "*b", "scheme": "kmeans", "codewords": 8}]}]}
    write("b.safetensors", replace(content, model=model, recipe=recipe, preprocessing={"mean": [0.5]}))
    code, out, _ = type_("diff", str(timm_file), "b.safetensors")
    lines = out.splitlines()
    assert code == 0
    assert "model.args.in_chans  1 -> nothing" in lines
    assert 'recipe.stage[0].rule[0].match  "*" -> "*b"' in lines
    assert any(line.startswith("preprocessing.mean  ") and line.endswith(" -> [0.5]") for line in lines)
    assert lines[-2].startswith("0 of ")
    assert lines[-1].startswith(f"bytes  file {timm_file.stat().st_size:,} -> ")


@pytest.mark.parametrize("words", [("verify",), ("unpack", "-o", "out.safetensors"), ("diff", "f.safetensors")])
def test_files_of_another_kind(type_: Callable[..., Ran], words: tuple[str, ...]) -> None:
    write("f.safetensors", small())
    save_file({"a": torch.zeros(3)}, "plain.safetensors")
    Path("old.pth").write_bytes(b"PK\x03\x04" + bytes(100))
    Path("empty.safetensors").write_bytes(b"")
    Path("short.safetensors").write_bytes(Path("f.safetensors").read_bytes()[:-9])
    for name in ("plain.safetensors", "old.pth", "empty.safetensors", "short.safetensors", "."):
        code, out, err = type_(*words, name)
        assert (code, out, len(err)) == (3, "", 1)
        assert err[0].startswith(f"error: {name}: ")
    code, out, err = type_(*words, "none.safetensors")
    assert (code, out) == (4, "")
    assert err == ["error: none.safetensors: no such file, expected a packed file"]


def test_diff_of_a_damaged_file(type_: Callable[..., Ran]) -> None:
    write("a.safetensors", small())
    write("b.safetensors", small())
    damage(Path("b.safetensors"), floats(-3, -1, 1, 3).tobytes())
    code, out, err = type_("diff", "a.safetensors", "b.safetensors")
    assert (code, out, len(err)) == (3, "", 1)
    assert err[0].startswith(
        "error: b.safetensors: checksum of the indices of 'one.weight' to the untouched of 'mask' "
    )


@pytest.mark.parametrize("words", [("--sha256", "12"), ("--sha256", "z" * 64)])
def test_verify_wants_64_digits(type_: Callable[..., Ran], words: tuple[str, ...]) -> None:
    write("f.safetensors", small())
    code, _, err = type_("verify", "f.safetensors", *words)
    assert (code, err) == (2, [f"error: --sha256 {words[1]}: expected 64 hexadecimal digits"])


@pytest.mark.parametrize("words", [["verify", "f.safetensors"], ["diff", "f.safetensors", "g.safetensors"]])
def test_verify_and_diff_need_no_torch(words: list[str]) -> None:
    write("f.safetensors", small())
    write("g.safetensors", small(aliases={}))
    code = (
        f"import sys; from compressor.cli.main import run; code = run({words!r});"
        "sys.exit(code or 'torch' in sys.modules or 'timm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL).returncode == 0
