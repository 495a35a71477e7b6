"""The list of faults is true: each is of text that its file has exactly once, and names tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutation.faults import ROOT, Fault, read_faults

FAULTS = read_faults()
LEAST = 120
ROOMS = {
    "cli/": 10, "model_zoo/": 3, "compressor/api/": 5, "compressor/checkpointing/": 5, "compressor/clustering/": 5,
    "compressor/data/": 5, "compressor/deployment/": 5, "compressor/distributed/": 5, "compressor/lifecycle/": 5,
    "compressor/models/": 5, "compressor/ops/": 5, "compressor/policy/": 5, "compressor/publishing/": 5,
    "compressor/report/": 5,
    "compressor/schemes/": 30, "compressor/sharing/": 5, "compressor/sweep/": 5, "compressor/targets/": 5,
    "compressor/training/": 20, "formats/codecs/": 10, "formats/file/": 20, "formats/inference/": 5, "formats/io/": 5,
    "formats/jit/": 5,
}  # fmt: skip
"""The fewest faults of a room."""


def test_a_fault_is_of_text_that_its_file_has_once() -> None:
    texts = {fault.file: (ROOT / fault.file).read_text(encoding="utf-8") for fault in FAULTS}
    counts = {f"{fault.file}: {fault.name}": texts[fault.file].count(fault.old) for fault in FAULTS}
    assert {name: count for name, count in counts.items() if count != 1} == {}
    assert [fault.name for fault in FAULTS if fault.new == fault.old] == []


def test_the_tests_of_a_fault_exist() -> None:
    words = {fault.name: [word for word in fault.tests.split() if not word.startswith("-")] for fault in FAULTS}
    paths = [(name, word.partition("::")[0]) for name, found in words.items() for word in found]
    missing = [(name, path) for name, path in paths if not (ROOT / path).exists()]
    assert missing == []
    assert all(words.values())


def test_every_room_has_its_faults() -> None:
    assert len(FAULTS) >= LEAST
    counts = {room: sum(fault.file.startswith(room) for fault in FAULTS) for room in ROOMS}
    assert {room: count for room, count in counts.items() if count < ROOMS[room]} == {}


def test_every_scheme_and_every_codec_has_faults() -> None:
    touched = {fault.file for fault in FAULTS}
    for folder in ("compressor/schemes", "formats/codecs"):
        files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).glob("*.py"))]
        without = {"__init__.py", "base.py", "registry.py", "bits.py", "kernels.py"}
        assert [file for file in files if file not in touched and Path(file).name not in without] == []


def test_a_fault_whose_text_is_gone_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("a = 1\nb = 1\n")
    fault = Fault("half", "one.py", "a = 1", "a = 2", "tests/mutation")
    assert fault.apply(tmp_path) == "a = 1\nb = 1\n"
    assert (tmp_path / "one.py").read_text() == "a = 2\nb = 1\n"
    with pytest.raises(ValueError, match=r"^half: one\.py has 0 times 'a = 1', expected once$"):
        fault.apply(tmp_path)
    with pytest.raises(ValueError, match=r"^twice: one\.py has 2 times ' = ', expected once$"):
        Fault("twice", "one.py", " = ", " == ", "tests/mutation").apply(tmp_path)
    with pytest.raises(ValueError, match=r"^gone: two\.py has 0 times"):
        Fault("gone", "two.py", "a", "b", "tests/mutation").apply(tmp_path)


def test_bytecode_of_a_fault_is_not_kept(tmp_path: Path) -> None:
    (tmp_path / "__pycache__").mkdir()
    for name in ("one.cpython-311.pyc", "other.cpython-311.pyc"):
        (tmp_path / "__pycache__" / name).write_bytes(b"")
    (tmp_path / "one.py").write_text("a = 1\n")
    Fault("half", "one.py", "1", "2", "tests/mutation").apply(tmp_path)
    assert [path.name for path in (tmp_path / "__pycache__").iterdir()] == ["other.cpython-311.pyc"]


def test_two_faults_of_one_name_are_an_error(tmp_path: Path) -> None:
    one = "[[fault]]\nname = 'a'\nfile = 'b'\nold = 'c'\nnew = 'd'\ntests = 'e'\n"
    (tmp_path / "some.toml").write_text(one + one)
    with pytest.raises(ValueError, match="two faults have one name: a"):
        read_faults(tmp_path)
