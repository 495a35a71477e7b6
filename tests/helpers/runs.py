"""Runs of the command on given weights and few digits, for the tests of interrupted runs."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.cli.main import run
from compressor.cli.show import Step
from tests.helpers.tiny import few_digits, tiny

OUT, FOLDER = Path("out"), Path("out.checkpoints")
TINY = ("tiny", "--epochs", "4", "--batch-size", "16", "--lr", "0.01", "--bits", "2", "-o", "out")
STEPS = 24
WHOLE: dict[tuple[str, ...], bytes] = {}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "dense.safetensors"
    torch.manual_seed(0)
    save_file(tiny().state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def _here(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("compressor.cli.setup.load_data", lambda *_, **__: few_digits())
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in signals:  # which may be ignored, where the tests run in the background
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    yield
    for number, handler in signals.items():
        signal.signal(number, handler)
    torch.set_num_threads(before)


class Runs:
    """Runs the command on given weights; a function may be called at the end of a step."""

    def __init__(self, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.words: tuple[str, ...] = (*TINY, "--dataset", "digits", "--checkpoint-path", str(weights))
        self.capsys = capsys

    def __call__(self, code: int, *more: str, at: int = 0, act: Callable[[], object] = lambda: None) -> str:
        """Returns the text on stderr."""

        def on_step(step: Step, done: int, *_: object) -> None:
            if done == at:
                act()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Step, "on_step", on_step)
            assert run([*self.words, *more]) == code
        said = self.capsys.readouterr().err
        assert "Traceback" not in said
        return said

    def without_bits(self, *more: str) -> Runs:
        """Returns itself, with other words in place of --bits."""
        bits = self.words.index("--bits")
        self.words = (*self.words[:bits], *self.words[bits + 2 :], *more)
        return self

    def refused(self, code: int, *more: str, at: int = 0, act: Callable[[], object] = lambda: None) -> str:
        """Returns the error message of a run that fails."""
        *_, line = self(code, *more, at=at, act=act).splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    def whole(self) -> bytes:
        """Returns the file of an uninterrupted run, and deletes it."""
        if self.words not in WHOLE:
            self(0)
            WHOLE[self.words] = OUT.read_bytes()
            OUT.unlink()
        return WHOLE[self.words]


@pytest.fixture
def runs(weights: Path, capsys: pytest.CaptureFixture[str]) -> Runs:
    return Runs(weights, capsys)


def tell(number: int, times: int = 1) -> Callable[[], None]:
    def act() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    return act


class GoneError(BaseException):
    """Stands for the death of the process: no code catches it."""


def die() -> None:
    raise GoneError


def killed(runs: Runs, at: int, *more: str) -> None:
    with pytest.raises(GoneError):
        runs(0, *more, at=at, act=die)
    runs.capsys.readouterr()


def kept() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir())
