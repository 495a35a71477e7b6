"""The reader of one file agrees with ours bit for bit, on every golden file and on random content of every codec."""

from __future__ import annotations

import ast
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compressor.formats import packed_reader
from compressor.formats.content import Content, RawTensor, SharedTensor, Table
from compressor.formats.errors import FileError
from compressor.formats.file.deflate import DICTIONARY
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack
from compressor.model_zoo import packed_path
from tests.formats.file.test_golden import tensors
from tests.formats.file.test_mutated_files import EDITS, MAX_MEMORY, good_files
from tests.formats.file.test_packed_file import random_content
from tests.helpers.forging import assembled, small
from tests.helpers.forging import forged_from as forged
from tests.helpers.slow_reader import read as slow_read

GOLDEN = sorted((Path(__file__).resolve().parents[1] / "golden").glob("v*/*.safetensors"))
SOURCE = Path(packed_reader.__file__).read_text(encoding="utf-8")
LINES = 300
MUTANTS = 240
BITS = {"BF16": "<u2", "F8_E5M2": "u1", "F8_E4M3": "u1", "BOOL": "?"}


def as_array(dtype: str, shape: tuple[int, ...], data: bytes) -> Any:
    """Returns the array that the reader should give: BF16 widened by its bits, 8-bit floats as bytes."""
    kind = BITS.get(dtype) or f"<{dtype[0].lower()}{int(dtype[1:]) // 8}"
    values = np.frombuffer(data, kind).reshape(shape)
    return (values.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else values


def assert_agrees(path: Path) -> None:
    """Compares with the slow reader of the tests, which shares no line with either."""
    expected = {name: as_array(*tensor) for name, tensor in slow_read(path.read_bytes()).items()}
    found = packed_reader.read(str(path))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden_files(path: Path) -> None:
    assert_agrees(path)


@pytest.mark.parametrize("seed", range(40))
def test_random_content(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "random.safetensors"
    path.write_bytes(pack(random_content(seed + 100), ["auto", "ans", "bits", "huffman", "classes"][seed % 5]))
    assert_agrees(path)


@pytest.mark.parametrize("name", ["test_resnet-tiny", "test_vit-balanced"])
def test_checkpoints_of_the_zoo(name: str) -> None:
    path = packed_path(f"zoo:{name}")
    found = packed_reader.read(str(path))
    with PackedFile.open(path) as file:
        assert found.keys() == {*file.slices, *file.aliases}
        for entry in file.sites:
            if entry in file.slices:
                assert found[entry].tobytes() == file.tensor(entry).tobytes()
        for entry in file.untouched:
            assert found[entry].tobytes() == file.raw(entry).data


def test_a_flipped_bit_anywhere_is_found(tmp_path: Path) -> None:
    golden = next(path for path in GOLDEN if path.name == "tied_tensors.bits.safetensors" and path.parent.name == "v2")
    data, path = golden.read_bytes(), tmp_path / "flipped.safetensors"
    for place in range(0, 8 * len(data), 7):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="cannot be read"):
            packed_reader.read(str(path))


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_a_part_of_a_file_is_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    path.write_bytes(packed_path("zoo:test_resnet-tiny").read_bytes()[:size])
    with pytest.raises(ValueError, match="cannot be read"):
        packed_reader.read(str(path))


def test_a_file_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    """A tensor of one value takes no bytes; 8 bytes an entry are allowed up to half a gigabyte."""
    count, path = (1 << 26) + 1, tmp_path / "large.safetensors"
    path.write_bytes(pack(Content({}, (), {"zeros": RawTensor("U8", (count,), bytes(count))})))
    assert path.stat().st_size < 1_000
    with pytest.raises(ValueError, match="it asks for too much memory"):
        packed_reader.read(str(path))


def grid_of(count: int) -> bytes:
    return forged(small("bits", 2), lambda fields: fields["books"].__setitem__(0, ["grid", 0.0, 0.5, count]))


def inflating(size: int) -> bytes:
    """Returns a file whose metadata are 16 MB of spaces and claim another size."""
    return assembled(b" " * (16 << 20), b"", size=size)


HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "metadata of no size": (lambda: inflating(0), "size of the metadata"),
    "metadata of less": (lambda: inflating(1 << 10), "size of the metadata"),
    "metadata above the bound": (lambda: inflating(64 << 20), "size of the metadata"),
    "a grid of 65,537": (lambda: grid_of((1 << 16) + 1), "codewords of a grid"),
    "a grid of 20 million": (lambda: grid_of(20_000_000), "codewords of a grid"),
    "a grid of 10^12": (lambda: grid_of(10**12), "a size of a tensor"),
    "a codebook before the first": (lambda: forged(small("bits", 2), lambda fields: put_book(fields, -1)), "a field"),
    "a codebook after the last": (lambda: forged(small("bits", 2), lambda fields: put_book(fields, 9)), "a field"),
    "brackets": (lambda: assembled(b"[" * 100_000, b""), "RecursionError"),
}


def put_book(fields: dict[str, Any], book: int) -> None:
    fields["sites"][0][2] = book


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_in_little_memory(case: str, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(make())
    with pytest.raises(ValueError, match=message), at_most(4 << 20):
        packed_reader.read(str(path))


def test_a_block_far_beyond_the_tensor_takes_no_memory(tmp_path: Path) -> None:
    path, indices = tmp_path / "block.safetensors", np.array([0, 1, 2, 3, 0, 1], np.uint8)
    site = SharedTensor((6,), 0, indices, block=6, scale=np.full(1, 2, np.float32))
    good = pack(Content({"w": site}, (Table.of([0.0, 0.5, 1.0, 3.0]),)), "bits")
    path.write_bytes(forged(good, lambda fields: fields["sites"][0][5].update(block=400_000_000)))
    with at_most(1 << 20):
        assert packed_reader.read(str(path))["w"].tolist() == [0, 1, 2, 6, 0, 1]


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Checks how much memory is allocated at once in a block."""
    tracemalloc.start()
    try:
        yield
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= size, f"{peak:,} bytes, expected at most {size:,}"


def test_mutants_are_refused_or_read_as_by_the_loader(tmp_path: Path) -> None:
    """What the loader takes is read alike, or refused for its size; all else is at least no other error."""
    files, chance, path, good = good_files(), random.Random(0), tmp_path / "mutant.safetensors", 0
    for number in range(MUTANTS):
        data = EDITS[number % len(EDITS)](chance.choice(files), chance)
        path.write_bytes(data)
        expected = by_the_loader(data)
        with at_most(48 << 20):
            try:
                found = packed_reader.read(str(path))
            except ValueError:
                assert expected is None, number
                continue
        if expected is not None:
            good += 1
            assert {name: array.tobytes() for name, array in found.items()} == {
                name: as_array(*tensor).tobytes() for name, tensor in expected.items()
            }, number
    assert good > MUTANTS // 50


def by_the_loader(data: bytes) -> dict[str, Any] | None:
    """Returns what our loader reads in a file, None where it refuses it."""
    try:
        with PackedFile.from_bytes(data, MAX_MEMORY) as file:
            return None if file.check() else tensors(file)
    except FileError:
        return None


def test_it_is_short_and_needs_numpy_alone() -> None:
    assert len(SOURCE.splitlines()) <= LINES
    imported = {
        (node.module or "").split(".")[0] if isinstance(node, ast.ImportFrom) else alias.name.split(".")[0]
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert imported - sys.stdlib_module_names == {"numpy"}


def test_its_dictionary_is_that_of_the_format() -> None:
    assert packed_reader.DICTIONARY == DICTIONARY
