"""Files that are damaged, hostile or of another kind, as a user meets them: one line, the exit code, no traceback.

What is wrong in a file has tests of its own in tests/formats/file/test_invalid_*.py and in those of the codecs;
here is one of each kind, through the command.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

from compressor.cli.main import run
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.errors import FormatError, IntegrityError, UnsupportedError
from compressor.formats.file.container import header_bytes
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack, write
from tests.formats.file.test_invalid_data import changed, floats
from tests.helpers.forging import (
    assembled,
    deflated,
    forged,
    forged_from,
    header,
    read_all,
    sealed,
    small,
    split,
    spoilt,
)

Says = Callable[..., str]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Says:
    """Run a command line that must fail with this code; give all it says, one line of it on stderr."""
    monkeypatch.chdir(tmp_path)

    def typed(code: int, *words: str) -> str:
        assert run(list(words)) == code
        out, said = capsys.readouterr()
        *heads, err = said.splitlines(keepends=True)  # what a run says of its data, before what it says of its end
        assert all(line.startswith(("data   ", "images   ")) for line in heads)
        assert err.startswith("error: ")
        assert "Traceback" not in out + err
        assert (out + err).replace("\n", "").isprintable()
        return out + err

    return typed


def archive() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as file:
        file.writestr("a", "b")
    return data.getvalue()


def flipped(word: bytes) -> bytes:
    data = bytearray(small(version=1))
    data[data.index(word)] ^= 1
    return bytes(data)


def site(field: int, value: Any) -> bytes:
    """Lie in one field of the first site: name, shape, book, codec, bytes."""
    return forged(lambda fields: fields["sites"][0].__setitem__(field, value))


def book(value: Any) -> bytes:
    return forged(lambda fields: fields["books"].__setitem__(0, value))


def top(key: str, value: Any) -> bytes:
    return forged(lambda fields: fields.__setitem__(key, value))


def metadata(text: str) -> bytes:
    """Put any text in place of the metadata of a file of version 1."""
    _, blobs = split(small(version=1))
    data = b"".join(blobs.values())
    return sealed(header_bytes(text, {blob: len(part) for blob, part in blobs.items()}), data)


def huffman(place: int | slice, value: bytes) -> bytes:
    """Write over the stream of 5 codewords: 3 bytes of code lengths, 4 of the chunk's size, the chunk."""
    good = small("huffman")
    fields, blobs = split(good)
    size = fields["sites"][0][4]
    stream = bytearray(blobs["indices"][:size])
    stream[place if isinstance(place, slice) else slice(place, place + 1)] = value
    rest = blobs["indices"][size:]
    return forged_from(good, lambda f: f["sites"][0].__setitem__(4, len(stream)), {"indices": bytes(stream) + rest})


FAULTS: dict[str, tuple[Callable[[], bytes], type[Exception], str]] = {
    "empty file": (lambda: b"", FormatError, "an empty file"),
    "text": (lambda: b"just a note\n", UnsupportedError, "this is a text file, not a safetensors file"),
    "short text": (lambda: b"a note", FormatError, "6 bytes, too short"),
    "an image": (lambda: b"\x89PNG" + bytes(99), UnsupportedError, "this is an image (PNG), not a safetensors file"),
    "noise": (lambda: bytes(range(1, 99)), FormatError, "not a safetensors file, and so no packed one"),
    "seven bytes": (lambda: bytes(7), FormatError, "7 bytes, too short"),
    "flipped bit in a section": (
        lambda: small()[:-8] + bytes(8),
        IntegrityError,
        "checksum of the indices of 'fc.weight' to the untouched of",
    ),
    "deflate bomb": (
        lambda: assembled(b"", b"", deflated(b" " * (1 << 20)), 1 << 20),
        FormatError,
        "metadata of 1,048,576 bytes",
    ),
    "deflate stream that lies": (
        lambda: assembled(b"", b"", deflated(b" " * (1 << 20)), 99),
        FormatError,
        "exactly the 99 bytes declared",
    ),
    "no deflate stream": (lambda: assembled(b"", b"", b"\xff" * 9, 99), FormatError, "not a deflate stream"),
    "cut in the header": (lambda: small()[:90], FormatError, "in a file of 90: not a packed file, or cut"),
    "cut in the data": (lambda: small()[:-5], FormatError, "ends 5 bytes early"),
    "archive at the end": (lambda: small() + archive(), FormatError, "bytes after the end of the data"),
    "header of 2**63": (lambda: struct.pack("<Q", 1 << 63) + small()[8:], FormatError, "header of 9,223,372,036"),
    "header is not UTF-8": (lambda: header(b"\xff\xfe{}"), FormatError, "not valid JSON"),
    "NaN in the metadata": (lambda: metadata('{"version":NaN}'), FormatError, "NaN is not a number"),
    "deeply nested metadata": (lambda: metadata("[" * 100_000), FormatError, "nested too deeply"),
    "key given twice": (lambda: metadata('{"version":1,"version":1}'), FormatError, "'version' given twice"),
    "tensor given twice": (lambda: site(0, "head.weight"), FormatError, "'head.weight' given twice"),
    "unknown field": (lambda: spoilt(extra={"data_offsets": [0, 0]}), FormatError, "unknown field 'extra'"),
    "unknown key": (lambda: top("shards", 2), FormatError, "unknown key 'shards'"),
    "flipped bit in the header": (lambda: flipped(b"seed"), IntegrityError, "checksum of the header"),
    "flipped bit in a codebook": (
        lambda: flipped(floats(-1.0, 0.0, 0.5)),
        IntegrityError,
        "checksum of the codebook 0",
    ),
    "flipped bit in an untouched tensor": (
        lambda: flipped(b"\x00\x3c\x00\x38\x00"),
        IntegrityError,
        "untouched of 'norm.weight'",
    ),
    "flipped bit in a checksum": (
        lambda: flipped(split(small(version=1))[1]["checksums"]),
        IntegrityError,
        "indices of 'fc.weight'",
    ),
    "overlapping blobs": (lambda: spoilt(codebooks={"data_offsets": [1, 25]}), FormatError, "hole or overlap"),
    "wrong size of a blob": (lambda: site(4, 16), FormatError, "67 bytes of data, expected 68 by the metadata"),
    "huge number of indices": (lambda: site(1, [1 << 30]), FormatError, "1073741824 indices in 15 bytes"),
    "shape whose product overflows": (lambda: site(1, [1 << 30] * 3), FormatError, "shape"),
    "huge axis beside an empty one": (lambda: site(1, [1 << 40, 0]), FormatError, "shape"),
    "size is a string": (lambda: site(4, "15"), FormatError, "bytes of tensor 'fc.weight'"),
    "size is true": (lambda: site(4, True), FormatError, "bytes of tensor 'fc.weight'"),
    "codebook without codewords": (lambda: book(["F32", 0]), FormatError, "codebook 0"),
    "longer codebook": (lambda: book(["F32", 6]), FormatError, "67 bytes of data, expected 71 by the metadata"),
    "index out of range": (
        lambda: changed("indices", 0, b"\x07"),
        FormatError,
        "index 7 at position 0, expected less than 5",
    ),
    "NaN codeword": (lambda: changed("codebooks", 4, floats(np.nan)), FormatError, "codeword 1 is not finite"),
    "unsorted codewords": (lambda: changed("codebooks", 4, floats(5.0)), FormatError, "codewords do not ascend"),
    "integer codebook": (lambda: book(["I32", 5]), FormatError, "codebook 0"),
    "over-subscribed Huffman code": (
        lambda: huffman(slice(0, 3), b"\x11\x11\x01"),
        FormatError,
        "over-subscribed code",
    ),
    "incomplete Huffman code": (
        lambda: huffman(slice(0, 3), b"\x55\x55\x05"),
        FormatError,
        "incomplete code",
    ),
    "more lengths than codewords": (lambda: huffman(2, b"\xf3"), FormatError, "code length given for more than 5"),
    "stream cut": (lambda: huffman(slice(-1, None), b""), FormatError, "indices of 'fc.weight'"),
    "stream too long": (lambda: huffman(slice(99, 99), b"\0"), FormatError, "indices of 'fc.weight'"),
    "too few indices": (lambda: huffman(slice(7, None), b"\0\0"), FormatError, "indices of 'fc.weight'"),
    "float64 codebook": (lambda: book(["F64", 5]), FormatError, "codebook 0"),
    "codebook that does not exist": (lambda: site(2, 7), FormatError, "codebook of tensor 'fc.weight'"),
    "codebook without tensors": (lambda: site(2, 1), FormatError, "codebook 0 is used by no tensor"),
    "path and escape codes in a tensor name": (lambda: site(0, "../../\x1b[2J\0\n"), FormatError, "tensor name"),
    "reserved tensor name": (lambda: site(0, "__metadata__"), FormatError, "tensor name '__metadata__'"),
    "unknown codec": (lambda: site(3, "zstd"), UnsupportedError, "no codec 'zstd'"),
    "unknown feature": (
        lambda: top("requires", ["bits", "delta"]),
        UnsupportedError,
        "'delta', unknown to this release",
    ),
    "newer version": (lambda: top("version", 3), UnsupportedError, "version 3, this release reads up to 2: upgrade"),
    "plain safetensors file": (
        lambda: safetensors.torch.save({"a": torch.zeros(1)}),
        UnsupportedError,
        "plain safetensors",
    ),
    "zip archive": (archive, UnsupportedError, "zip archive"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_file(says: Says, fault: str) -> None:
    make, kind, text = FAULTS[fault]
    Path("bad.safetensors").write_bytes(make())
    with pytest.raises(kind, match=re.escape(text)) as caught, PackedFile.open("bad.safetensors") as file:
        read_all(file)
    assert type(caught.value) is kind
    said = says(3, "verify", "bad.safetensors")
    assert text in said
    assert "bad.safetensors: " in said


@pytest.mark.parametrize("name", ["folder", "fifo", "/dev/zero"])
def test_no_file_at_all(says: Says, name: str) -> None:
    Path("folder").mkdir()
    os.mkfifo("fifo")
    for command in ("verify", "inspect", "eval"):
        assert f"error: {name}: " in says(3, command, name)


def test_big_endian_machines_are_refused(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of untouched tensors and the kernels are of this machine: nobody has tried another."""
    write("a.safetensors", Content({}, ()))
    content = Content({"a": SharedTensor((2,), 0, np.zeros(2, np.uint8))}, (Table.of([1.0]),))
    monkeypatch.setattr("sys.byteorder", "big")
    assert "little-endian" in says(3, "verify", "a.safetensors")
    with pytest.raises(UnsupportedError, match="little-endian"):
        pack(content)


def named(name: str, args: dict[str, Any], **more: Any) -> None:
    fields = {"model": {"name": name, "args": args}, **more}
    Path("a.safetensors").write_bytes(forged(lambda f: f.update(fields)))


@pytest.mark.parametrize("name", ["resnet34x", "hf-hub:timm/resnet18", "local-dir:/etc", "../resnet18"])
def test_models_unknown_to_timm(says: Says, name: str) -> None:
    named(name, {})
    assert f"has no model {name!r}" in says(4, "eval", "a.safetensors", "--dataset", "digits")


@pytest.mark.parametrize("args", [{"pretrained": True}, {"checkpoint_path": "/etc/passwd"}, {"num_classes": 10**9}])
def test_model_arguments_that_could_do_harm(says: Says, args: dict[str, Any]) -> None:
    named("test_resnet", args)
    assert "is not allowed" in says(4, "eval", "a.safetensors", "--dataset", "digits")


def test_tensors_that_do_not_fit_the_model(says: Says) -> None:
    """The keys that differ, and the timm of both sides."""
    named("test_resnet", {}, provenance={"versions": {"timm": "0.9.1\x1b[2J"}})
    said = says(4, "eval", "a.safetensors", "--dataset", "digits")
    assert "fc.weight (4, 10) vs (1000, 96)" in said
    assert "conv1.0.weight (16, 3, 3, 3) is missing" in said
    assert f"in_chans and the timm version (here {timm.__version__}, of the file '0.9.1\\x1b[2J')" in said
