"""Packed files changed at random but with sense: whatever is in them, one of our errors or good tensors come out.

In the tests some 10,000 within a time limit;
``python -m tests.formats.file.test_mutated_files 1000000 [SEED]`` for more; a hundredth as many models are loaded.
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import timm
import torch
from timm.data import create_transform

from compressor.cli.evaluation import _check_head, _data
from compressor.cli.files import open_packed
from compressor.cli.preprocessing import PreprocessingConfig
from compressor.data import datasets
from compressor.data.built_in import BUILT_IN
from compressor.data.datasets import Dataset, _digits
from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, RawTensor, SharedTensor, Table
from compressor.formats.errors import FileError, MissingError, UsageError
from compressor.formats.file.container import BLOBS
from compressor.formats.file.opening import TENSOR
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.formats.loader import load
from compressor.report.provenance import read_provenance
from tests.formats.file.test_golden import tensors
from tests.formats.test_content import RECORDS
from tests.helpers import slow_reader
from tests.helpers.forging import assembled, deflated, forged_from, head, small, split, text_of

MAX_MEMORY = 16 << 20
SLOW_MEMORY = 16 << 10  # bytes of tensors that the slow reader can be asked for
NASTY_MODEL: list[Any] = [
    "test_vit", "test_resnet2", "hf-hub:a/b", {"num_classes": 10**6}, {"img_size": 1}, {"img_size": []},
    {"global_pool": "\x1b[2J"}, {"checkpoint_path": "/etc/passwd"}, [3, 10**9, 10**9], [0.0], [1e308], "torch/mnist",
]  # fmt: skip
NASTY: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, 2**64, 10**30,
    -0.0, 0.5, 1e308, 1e-320, -1e39, "", "F32", "F16", "BF16", "F64", "U8", "bits", "huffman", "ans", "hashed", "auto",
    "classes", "grid", "mirrored", "fc.weight", "a b", "\x00", "\x1b[2J", "x" * 600, "__metadata__", "\ud800", [], {},
    [0], [[]], "fc.weight b.bias", ["steps", 0, 0.5, 4], "steps",
    [1, 1], [2**40, 0], {"a": 1}, {"axis": 0}, {"block": 1}, {"scale": "F32"}, {"vector_axis": 0}, {"dtype": "BF16"},
]  # fmt: skip


def good_files() -> list[bytes]:
    """Pack small files of every codec and kind of record."""
    records = [make() for make in RECORDS.values()]
    files = [small(codec, version) for codec in sorted(CODECS) for version in (1, 2)]
    for content in records:
        for codec in sorted(name for name, found in CODECS.items() if found.general):
            if all(book.shape[1] <= min(1 << 12, CODECS[codec].max_codewords) for book in content.books):
                files.append(pack(content, codec))
    return [data for data in files if len(data) < 8_000]


def places(node: Any) -> list[tuple[Any, Any]]:
    """List every (container, key) of a JSON tree."""
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else []
    found = [(node, key) for key in keys]
    return found + [place for key in keys for place in places(node[key])]


def edit_metadata(data: bytes, chance: random.Random) -> bytes:
    """Replace, double, remove or swap values; checksums made right."""

    def edit(fields: dict[str, Any]) -> None:
        for _ in range(chance.randint(1, 3)):
            container, key = chance.choice(places(fields))
            act = chance.random()
            if act < 0.6:
                value = container[key]
                near = [value + 1, value - 1, value * 2, -value] if type(value) is int else []
                container[key] = json.loads(json.dumps(chance.choice(near + NASTY)))
            elif act < 0.75:
                del container[key]
                if not places(fields):
                    return
            elif isinstance(container, list):
                container.insert(key, json.loads(json.dumps(chance.choice([container[key], *NASTY]))))
            else:
                container[str(chance.choice(NASTY))[:20]] = json.loads(
                    json.dumps(chance.choice([container[key], *NASTY]))
                )

    return forged_from(data, edit)


def edit_blobs(data: bytes, chance: random.Random) -> bytes:
    """Change bytes of a blob, checksums made right."""
    _, blobs = split(data)
    blob = chance.choice([name for name in BLOBS[:3] if blobs[name]])
    return forged_from(data, lambda fields: None, {blob: edit_bytes(blobs[blob], chance, chance.random() < 0.9)})


def edit_bytes(data: bytes, chance: random.Random, keep_size: bool = False) -> bytes:
    """Change, and unless sizes are kept remove or add, bytes."""
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 8])):
        at = chance.randrange(len(changed))
        act = chance.random()
        if keep_size or act < 0.6:
            changed[at] = chance.choice(
                [0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256), changed[at] ^ 1 << chance.randrange(8)]
            )
        elif act < 0.8:
            del changed[at : at + chance.randint(1, 9)]
        else:
            changed[at:at] = chance.randbytes(chance.randint(1, 9))
        if not changed:
            break
    return bytes(changed)


def edit_header(data: bytes, chance: random.Random) -> bytes:
    """Change the text of the header, or what stands between it and the parts, its checksum made right."""
    header, end = head(data)
    if TENSOR in header and chance.random() < 0.8:
        return edit_deflated(data, chance)
    text = edit_bytes(data[8:end], chance, chance.random() < 0.5)
    start = struct.pack("<Q", len(text)) + text
    if TENSOR not in header:
        return start + data[end:-4] + struct.pack("<I", zlib.crc32(start))
    stop = end + 8 + struct.unpack_from("<I", data, end + 4)[0]
    opening = start + data[end:stop]
    return opening + struct.pack("<I", zlib.crc32(opening)) + data[stop + 4 :]


def edit_deflated(data: bytes, chance: random.Random) -> bytes:
    """Change the text of the metadata, their deflate stream, or the size declared."""
    text, parts = text_of(data), b"".join(split(data)[1].values())
    act = chance.random()
    if act < 0.3:
        return assembled(edit_bytes(text, chance), parts)
    if act < 0.4:
        return assembled(text, parts, size=chance.choice([0, 1, len(text) - 1, len(text) + 1, 1 << 16, (1 << 32) - 1]))
    return assembled(text, parts, edit_bytes(deflated(text), chance, chance.random() < 0.7))


EDITS: list[Callable[[bytes, random.Random], bytes]] = [
    edit_metadata,
    edit_metadata,
    edit_blobs,
    edit_blobs,
    edit_header,
    edit_bytes,
]


def read_all(data: bytes) -> bool:
    """Read everything; tell whether the file was found good. What is good, the slow reader reads alike."""
    try:
        with PackedFile.from_bytes(data, MAX_MEMORY) as file:
            if file.check():
                return False
            if file.decoded_size <= SLOW_MEMORY:
                with np.errstate(over="ignore"):  # what is too large for float16 becomes infinite
                    assert tensors(file) == slow_reader.read(data)
            else:
                assert all(file.tensor(name).shape == file.sites[name].shape for name in file.sites)
            return True
    except FileError:
        return False


def built_in_data(name: str, data_dir: object, config: dict[str, Any], bad: object, class_map: object) -> Dataset:
    """Returns the digits, once for all, after making the transforms that the file asks for."""
    assert name in BUILT_IN, "timm would have been asked to open it"
    create_transform(**config, is_training=False)
    return datasets._digits()


def load_all(path: Path, weights: str) -> bool:
    """Load a model from a file, as ``load`` and ``eval`` do up to the data; tell whether there was one."""
    try:
        with open_packed(path, None) as file:
            made, preprocessing = read_provenance(file), dict(file.preprocessing or {})
    except FileError:
        return False
    try:
        data = _data(path, None, None, made, preprocessing, 0, PreprocessingConfig())
    except UsageError:
        data = None
    try:
        model = load(path, weights=weights, max_memory=MAX_MEMORY)
        if data is not None:
            _check_head(model, data)
    except (FileError, MissingError):
        return False
    if weights == "dense":
        with PackedFile.open(path) as file:
            read = {name: data for name, (_, _, data) in tensors(file).items()}
        assert {name: to_bytes(tensor) for name, tensor in model.state_dict().items()} == read
    return True


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def model_file() -> bytes:
    """Pack a model of timm's in a few kilobytes: all its weights are one codeword."""
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    sites = {
        name: SharedTensor(tuple(tensor.shape), 0, np.zeros(tensor.numel(), np.uint8))
        for name, tensor in model.state_dict().items()
        if tensor.ndim
    }
    counts = {name: RawTensor("I64", (), bytes(8)) for name in model.state_dict() if name not in sites}
    facts = {"seed": 0, "data": {"name": "digits", "version": "digits-1", "split": "test", "n": 360}}
    named = {"name": "test_resnet", "args": {"num_classes": 10, "in_chans": 1}}
    preprocessing = {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5], "crop_pct": 0.9}
    return pack(Content(sites, (Table.of([0.5]),), counts, {}, named, preprocessing, provenance=facts), "bits")


def edit_objects(data: bytes, chance: random.Random) -> bytes:
    """Replace a value or two of what a file says of its model, its images or its making; checksums made right."""

    def edit(fields: dict[str, Any]) -> None:
        for _ in range(chance.randint(1, 2)):
            top = chance.choice(["model", "model", "preprocessing", "provenance"])
            container, key = chance.choice([(fields, top), *places(fields.get(top))])
            container[key] = json.loads(json.dumps(chance.choice([*NASTY, *NASTY_MODEL, *NASTY_MODEL])))

    return forged_from(data, edit)


@patch("compressor.data.datasets.load_data", built_in_data)
@patch("compressor.data.datasets._digits", cache(_digits))
def run_loads(count: int, seed: int, limit: float, folder: Path) -> tuple[int, int, float]:
    """Load mutants of a model's file: how many, how many were good, the longest seconds."""
    chance, good, done, longest = random.Random(seed), 0, 0, 0.0
    path, start, sound = folder / "mutant", time.monotonic(), model_file()
    path.write_bytes(sound)
    assert load_all(path, "dense")
    assert load_all(path, "packed")
    while done < count and time.monotonic() - start < limit:
        path.write_bytes(chance.choice([edit_objects, edit_objects, edit_metadata, edit_blobs])(sound, chance))
        begun = time.monotonic()
        good += load_all(path, chance.choice(["dense", "packed"]))
        longest, done = max(longest, time.monotonic() - begun), done + 1
    return done, good, longest


def run(count: int, seed: int, limit: float) -> tuple[int, int, float, float]:
    """Try mutants: how many, how many were good, the longest seconds, the most megabytes above the beginning."""
    chance = random.Random(seed)
    files = good_files()
    assert all(read_all(data) for data in files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    good = done = 0
    longest = 0.0
    while done < count and time.monotonic() - start < limit:
        data = chance.choice(EDITS)(chance.choice(files), chance)
        begun = time.monotonic()
        good += read_all(data)
        longest = max(longest, time.monotonic() - begun)
        done += 1
    return done, good, longest, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.slow
def test_mutants() -> None:
    done, good, longest, memory = run(10_000, 0, 30)
    assert done >= 1_000  # on a slow or busy machine; 10,000 take some 15 seconds
    assert 0 < good < done
    assert longest < 2
    assert memory < 64


@pytest.mark.slow
def test_mutants_of_a_model(tmp_path: Path) -> None:
    done, good, longest = run_loads(150, 0, 12, tmp_path)
    assert done >= 20
    assert 0 < good < done
    assert longest < 5


if __name__ == "__main__":
    wanted, first = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, int(sys.argv[2]) if len(sys.argv) > 2 else 0
    print("mutants, good, longest s, MB above base:", *run(wanted, first, 1e9))  # noqa: T201
    with tempfile.TemporaryDirectory() as place:
        print("loaded, good, longest s:", *run_loads(wanted // 100, first, 1e9, Path(place)))  # noqa: T201
