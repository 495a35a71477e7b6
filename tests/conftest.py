"""Shared by all tests: nothing here may reach the network, and small models run fastest on one thread each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is first imported
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

# The asserts of what the tests share say as much as their own.
pytest.register_assert_rewrite("tests.helpers")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lines whole; tests/cli/test_widths.py has narrow ones."""
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in a fresh folder, where the cache is, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have pictures opened by one process, however many cores there are."""
    monkeypatch.setattr("compressor.data.images.os.cpu_count", lambda: 1)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have machine code, on however few weights, done in two threads."""
    import torch

    monkeypatch.setattr("compressor.ops.parallel.LEAST_WEIGHTS_A_THREAD", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
