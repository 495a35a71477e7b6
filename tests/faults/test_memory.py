"""Memory that is asked for by a few bytes, or is not to be had: one line, the exit code, nothing spoilt."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
import tracemalloc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import compressor
from compressor.cli.files import open_packed
from compressor.cli.main import run
from compressor.formats.content import Content, RawTensor, SharedTensor, Table
from compressor.formats.errors import FormatError, UsageError
from compressor.formats.file import memory, source
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack, write
from compressor.formats.io import atomic
from compressor.formats.loader import build_model
from compressor.models.teacher import load_teacher
from tests.faults.test_damaged_files import Says, says
from tests.formats.test_content import RECORDS
from tests.helpers.forging import Fields, forged_from, small

__all__ = ["says"]  # the fixture


def giant(shape: list[int], codec: str = "hashed") -> bytes:
    """Declare any number of generated indices, in some 600 bytes."""
    lie = Content({"fc.weight": SharedTensor((2,), 0, np.zeros(2, np.uint8))}, (Table.of([1.0]),))

    def edit(fields: Fields) -> None:
        fields["requires"] = [codec]
        fields["sites"][0][1:] = [shape, 0, codec, 8]

    return forged_from(pack(lie), edit, {"indices": bytes(8)})


@pytest.mark.parametrize("command", [["verify"], ["inspect"], ["inspect", "--json"], ["diff", "good"]])
def test_a_few_bytes_that_decode_to_gigabytes(says: Says, command: list[str]) -> None:
    """No codec but those below a bit an index can say it, and none of its weights is made before it is asked."""
    Path("good").write_bytes(small())
    Path("bad").write_bytes(giant([5 << 10, 1 << 20]))
    tracemalloc.start()
    said = says(3, *command, "bad")
    assert tracemalloc.get_traced_memory()[1] < 16 << 20
    tracemalloc.stop()
    assert "bytes that decode to 21,474,836,480, more than the 268,435,456 allowed" in said
    assert said.endswith("if you trust the file: --max-memory 20\n")
    assert "--max-memory 20\n" in says(3, *command, "bad", "--max-memory", "19")


def test_max_memory_admits_larger_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(giant([5 << 10, 1 << 20]))
    with open_packed(path, 20) as file:
        assert file.decoded_size == 20 << 30
    path.write_bytes(giant([9, 1024]))
    assert run(["verify", str(path)]) == 0
    monkeypatch.setattr(memory, "ALWAYS_ALLOWED", 1 << 10)
    monkeypatch.setattr(memory, "MAX_EXPANSION", 2)
    assert run(["verify", str(path)]) == 3
    assert run(["verify", str(path), "--max-memory", "1"]) == 0


def test_well_compressed_models_are_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 million float32 weights at a thirtieth of a bit, on a machine of 2 GB."""
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 500_000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert memory.believable_memory(200_000_000 // 30 // 8) >= 4 * 200_000_000
    assert memory.believable_memory(1_000) == 256 << 20
    assert memory.believable_memory(1 << 40) == 500_000 * 4096 // 2
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1 << 40, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert memory.believable_memory(1 << 40) == memory.MAX_MEMORY


def a_million_classes(classes: int = 1_000_000, **args: Any) -> bytes:
    """A resnet18 with a million classes in some 7 kB: one codeword everywhere, and with it no byte of indices."""
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in timm.create_model("resnet18").state_dict().items()}
    sites = {name: SharedTensor((1,), 0, np.zeros(1, np.uint8)) for name, shape in shapes.items() if shape}
    counts = {name: RawTensor("I64", (), bytes(8)) for name, shape in shapes.items() if not shape}
    content = Content(sites, (Table.of([0.5]),), counts, model={"name": "resnet18", "args": {}})

    def edit(fields: Fields) -> None:
        fields["model"]["args"] = {"num_classes": classes, **args}
        for entry in fields["sites"]:
            first = classes if entry[0].startswith("fc.") else shapes[entry[0]][0]
            entry[1] = [first, *shapes[entry[0]][1:]]

    return forged_from(pack(content, "bits"), edit)


@pytest.mark.parametrize("weights", ["dense", "packed"])
def test_a_million_classes_are_refused_before_a_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    (tmp_path / "a").write_bytes(a_million_classes())
    assert (tmp_path / "a").stat().st_size < 8_000
    monkeypatch.setattr(timm, "create_model", None)
    monkeypatch.setattr(np, "empty", None)
    tracemalloc.start()
    fault = r"a: the tensors take 2,096,744,608 bytes, more than the 268,435,456 allowed \(max_memory\); if you trust"
    with pytest.raises(FormatError, match=fault):
        compressor.load(tmp_path / "a", weights=weights)
    with pytest.raises(FormatError, match="max_memory=2096744608"):
        compressor.load_state_dict(tmp_path / "a", ["fc.bias"])
    with pytest.raises(FormatError, match="more than the 2,096,744,607 allowed"):
        compressor.load(tmp_path / "a", weights=weights, max_memory=2_096_744_607)
    with pytest.raises(FormatError, match="more than the"):
        load_teacher(tmp_path / "a", "resnet18", {"num_classes": 10}, [0.5], [0.5])
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


def test_eval_of_a_million_classes(says: Says, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a").write_bytes(a_million_classes())
    monkeypatch.setattr(timm, "create_model", None)
    assert says(3, "eval", "a", "--dataset", "digits").endswith("if you trust the file: --max-memory 2\n")
    assert says(3, "eval", "a", "--dataset", "digits", "--max-memory", "1").endswith("--max-memory 2\n")


def test_more_memory_for_a_file_that_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "ALWAYS_ALLOWED", 1 << 20)
    (tmp_path / "a").write_bytes(a_million_classes(10))
    with pytest.raises(FormatError, match="max_memory"):
        compressor.load(tmp_path / "a")
    size = 4 * (11_181_642 + 9_600) + 8 * 20  # parameters and statistics in float32, and the counters of batches
    assert float(compressor.load(tmp_path / "a", max_memory=size).state_dict()["fc.bias"][0]) == 0.5
    with pytest.raises(FormatError, match="max_memory"):
        compressor.load(tmp_path / "a", max_memory=size - 1)
    mine = timm.create_model("resnet18", num_classes=10)
    assert compressor.load(tmp_path / "a", model=mine) is mine  # no larger than what the caller has
    assert len(compressor.load_state_dict(tmp_path / "a", ["fc.bias"], max_memory=size)["fc.bias"]) == 10


@pytest.mark.parametrize("size", [0, -1, 1.5, True, "1 GiB"])
def test_max_memory_is_a_number_of_bytes(tmp_path: Path, size: Any) -> None:
    (tmp_path / "a").write_bytes(small())
    for read in (compressor.load, compressor.load_state_dict, PackedFile.open):
        with pytest.raises(UsageError, match=r"max_memory=.* expected a whole number of bytes"):
            read(tmp_path / "a", max_memory=size)


def test_buffers_that_a_constructor_computes_are_bounded(tmp_path: Path) -> None:
    """The state dict of a BEiT has no relative positions: of images of 8,192 pixels they would take six terabytes."""
    name, args = "beit_base_patch16_224", {"img_size": 8192, "num_classes": 0}
    shapes = {key: tensor.shape for key, tensor in build_model(name, args).state_dict().items()}
    sites = {key: SharedTensor((1,), 0, np.zeros(1, np.uint8)) for key in shapes}
    data = pack(Content(sites, (Table.of([0.5]),), model={"name": name, "args": args}), "bits")

    def edit(fields: Fields) -> None:
        for entry in fields["sites"]:
            entry[1] = list(shapes[entry[0]])

    (tmp_path / "a").write_bytes(forged_from(data, edit))
    with pytest.raises(FormatError, match=r"its model takes 6,5..,...,...,... bytes, more than the .* \(max_memory\)"):
        compressor.load(tmp_path / "a", max_memory=32 << 30)


def test_tied_names_count_each(tmp_path: Path) -> None:
    """A checkpoint that is unpacked holds a copy under each name."""
    aliases = {f"a{number}": "fc.weight" for number in range(9)}
    (tmp_path / "a").write_bytes(forged_from(giant([32, 1 << 20]), lambda fields: fields.update(aliases=aliases)))
    with pytest.raises(FormatError, match="the tensors take 1,342,177,280 bytes"):
        PackedFile.open(tmp_path / "a")


@pytest.mark.parametrize("size", ["0", "-1", "nan", "1e3", "many"])
def test_max_memory_is_a_number_of_gibibytes(says: Says, size: str) -> None:
    assert "--max-memory" in says(2, "verify", "any", "--max-memory", size)


# -- the n-th allocation fails

ALLOCATORS = (
    "arange", "array", "ascontiguousarray", "bincount", "concatenate", "cumsum", "empty", "frombuffer", "full",
    "repeat", "where", "zeros",
)  # fmt: skip


Place = tuple[tuple[types.CodeType, int], ...]
"""Code and line of a call, and of each of its callers."""


class Rationed:
    """Whatever allocates, failing at its n-th use all together; 0: never."""

    def __init__(self, nth: int, patch: pytest.MonkeyPatch) -> None:
        self.nth, self.count = nth, 0
        self.places: dict[Place, list[int]] = {}  # which uses are made from each
        for name in ALLOCATORS:
            patch.setattr(np, name, self.of(getattr(np, name)))
        patch.setattr(source, "bytearray", self.of(bytearray), raising=False)
        for module in (atomic, source):
            patch.setattr(module, "memoryview", self.of(memoryview), raising=False)

    def of(self, allocate: Callable[..., Any]) -> Callable[..., Any]:
        def rationed(*args: Any, **options: Any) -> Any:
            self.count += 1
            if self.count == self.nth:
                raise MemoryError
            if not self.nth:
                place = tuple((frame.f_code, line) for frame, line in traceback.walk_stack(None))
                self.places.setdefault(place, []).append(self.count)
            return allocate(*args, **options)

        return rationed


def attempt(act: Callable[[], object], nth: int) -> Rationed:
    """Returns what was allocated when the n-th allocation failed."""
    with pytest.MonkeyPatch.context() as patch:
        rationed = Rationed(nth, patch)
        try:
            act()
            done = True
        except MemoryError:
            done = False
    assert done == (not nth or rationed.count < nth), "a MemoryError was swallowed, or is another error now"
    return rationed


def each_failing(act: Callable[[], object], after: Callable[[bool], None]) -> int:
    """Makes allocations of ``act`` fail in turn: from each place in the code, with all its callers, the first and last.

    Returns how many allocations there were.
    """
    attempt(act, 0)  # caches are filled
    whole = attempt(act, 0)
    after(True)
    for nth in sorted({end for uses in whole.places.values() for end in (uses[0], uses[-1])}):
        after(attempt(act, nth).count < nth)
    return whole.count


@pytest.mark.parametrize("record", sorted(RECORDS))
def test_nth_allocation_fails_while_writing(tmp_path: Path, record: str) -> None:
    content, path = RECORDS[record](), tmp_path / "a"
    good = pack(content)

    def act() -> None:
        path.write_bytes(b"old")
        write(path, content, force=True)

    def after(done: bool) -> None:
        assert path.read_bytes() == (good if done else b"old")
        assert os.listdir(tmp_path) == ["a"]

    assert each_failing(act, after) > 10


@pytest.mark.parametrize("codec", ["ans", "bits", "classes", "hashed", "huffman"])
def test_nth_allocation_fails_while_reading(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(small(codec))
    opened = len(os.listdir("/proc/self/fd"))

    def read() -> None:
        with PackedFile.open(path) as file:
            assert not file.check()
            assert file.tensor("fc.weight").shape == (4, 10)

    def after(done: bool) -> None:
        assert len(os.listdir("/proc/self/fd")) == opened

    assert each_failing(read, after) > 10


def test_nth_allocation_fails_while_loading(tmp_path: Path) -> None:
    """In several threads, from which the error must come back."""
    path = tmp_path / "a"
    path.write_bytes(small("ans"))
    assert each_failing(lambda: compressor.load_state_dict(path), lambda done: None) > 10


@pytest.mark.parametrize("command", ["verify", "inspect", "unpack"])
def test_nth_allocation_fails_in_a_command(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    path, output = tmp_path / "a", tmp_path / "out.safetensors"
    path.write_bytes(small("ans"))

    def act() -> None:
        output.write_bytes(b"old")
        code = run([command, str(path), *(["-o", str(output), "--force"] if command == "unpack" else [])])
        err = capsys.readouterr().err
        if code:
            assert (code, err.count("\n")) == (6, 1)
            assert err.startswith("error: out of memory; ")
            raise MemoryError

    def after(done: bool) -> None:
        assert done or output.read_bytes() == b"old"
        assert sorted(os.listdir(tmp_path)) == ["a", "out.safetensors"]

    assert each_failing(act, after) > 10


def test_real_want_of_memory(tmp_path: Path) -> None:
    """In a child that may take half a gigabyte more than it has, a file of a few bytes that is trusted with four."""
    path = tmp_path / "a"
    path.write_bytes(giant([1 << 10, 1 << 20]))
    code = (
        "import resource, sys\n"
        "from compressor.cli.main import main\n"
        "import compressor.formats.file.reader\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), used + (1 << 29)))\n"
        "main(['verify', sys.argv[1], '--max-memory', '4'])"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (6, "")
    assert done.stderr.startswith("error: out of memory; ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "said", ["[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes", "CUDA out of memory. Tried 9 GiB"]
)
def test_torch_reports_out_of_memory(says: Says, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """Where nothing can be tried with less, as in making codebooks."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("compressor.lifecycle.fitting.fit_groups", fail)
    line = says(6, "test_resnet", "--dataset", "digits", "--from-scratch", "-o", "out")
    assert line.startswith("error: out of memory; ")
