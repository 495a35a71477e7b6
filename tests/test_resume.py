"""Runs that are interrupted in every way a user can, and go on: exit code, message, and the bytes of the file."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_faults_write import refusing
from tiny import few_digits, tiny

from compressor.baseline import create_model
from compressor.cli.main import run
from compressor.cli.show import Step
from compressor.core import Compressor
from compressor.datasets import load_data
from compressor.formats.reader import PackedFile
from compressor.state_file import read_state

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
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TIMM_COMPRESSOR_CACHE", str(tmp_path / "cache"))
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
    """Runs the command on ready weights; something may be done when a step is over."""

    def __init__(self, weights: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.words: tuple[str, ...] = (*TINY, "--dataset", "digits", "--checkpoint-path", str(weights))
        self.capsys = capsys

    def __call__(self, code: int, *more: str, at: int = 0, act: Callable[[], object] = lambda: None) -> str:
        """Give what was said on stderr."""

        def on_step(step: Step, done: int, *_: object) -> None:
            if done == at:
                act()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Step, "on_step", on_step)
            assert run([*self.words, *more]) == code
        said = self.capsys.readouterr().err
        assert "Traceback" not in said
        return said

    def refused(self, code: int, *more: str, at: int = 0, act: Callable[[], object] = lambda: None) -> str:
        """Give the line that says why."""
        *_, line = self(code, *more, at=at, act=act).splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")

    def whole(self) -> bytes:
        """Run from the beginning to the end; give the file, and take it away."""
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
    """As if the process were no more: nobody catches it."""


def die() -> None:
    raise GoneError


def killed(runs: Runs, at: int, *more: str) -> None:
    with pytest.raises(GoneError):
        runs(0, *more, at=at, act=die)
    runs.capsys.readouterr()


def kept() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_69_told_once_the_step_is_finished_and_kept(runs: Runs, number: signal.Signals) -> None:
    whole = runs.whole()
    before = signal.getsignal(number)
    said = runs(7, at=9, act=tell(number)).splitlines()
    assert "stopping after this step; once more, to stop at once" in said
    assert said[-1] == (
        "error: stopped after step 10 of 24, which is kept in out.checkpoints: the same command with --resume "
        "(resume=True) goes on"
    )
    assert signal.getsignal(number) == before
    assert not OUT.exists()
    assert kept() == ["01-0000000006.safetensors", "01-0000000010.safetensors"]
    assert "Resuming stage 1 of 1 after step 10, from out.checkpoints" in runs(0, "--resume")
    assert OUT.read_bytes() == whole
    assert not FOLDER.exists()


def test_69_told_twice_it_ends_at_once(runs: Runs) -> None:
    assert runs(130, at=9, act=tell(signal.SIGINT, 2)).splitlines()[-1] == "interrupted"
    assert kept() == ["01-0000000000.safetensors", "01-0000000006.safetensors"]
    for number, code in ((signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        with pytest.raises(SystemExit) as ended:
            runs(0, "--force", at=9, act=tell(number, 2))
        assert ended.value.code == code


def test_69_told_between_trainings(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing kept it is as without checkpoints; at the end, the whole training is kept."""
    whole = runs.whole()

    def instead(name: str, number: int) -> Callable[..., Any]:
        return lambda *_, **__: signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr("compressor.cli.weights.create_model", instead("model", signal.SIGINT))
        assert runs(130).splitlines()[-1] == "interrupted"
        patch.setattr("compressor.cli.weights.create_model", instead("model", signal.SIGTERM))
        with pytest.raises(SystemExit):
            runs(0)
    assert not FOLDER.exists()
    with monkeypatch.context() as patch:
        patch.setattr("compressor.cli.run._write", instead("file", signal.SIGTERM))
        said = runs(7)
    assert said.endswith("stopped; out.checkpoints keeps how far it had come: the same command with --resume "
                         "(resume=True) goes on\n")  # fmt: skip
    assert " epoch " not in runs(0, "--resume")  # nothing is left to train
    assert OUT.read_bytes() == whole


def test_69_a_signal_that_is_ignored_stays_ignored(runs: Runs) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runs(0, at=9, act=tell(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert OUT.exists()


def test_69_without_the_main_thread_there_are_no_signals(runs: Runs) -> None:
    whole = runs.whole()
    thread = threading.Thread(target=run, args=([*runs.words],))
    thread.start()
    thread.join()
    assert OUT.read_bytes() == whole
    assert not FOLDER.exists()


def test_67_killed_again_and_again(runs: Runs) -> None:
    """Between checkpoints, at the end of an epoch, and after the last step; by number of steps, too."""
    whole = runs.whole()
    killed(runs, 5, "--checkpoint-steps", "2")
    for step, more in ((6, ("--checkpoint-steps", "1")), (15, ()), (18, ()), (STEPS, ())):
        killed(runs, step, "--resume", *more)
    runs(0, "--resume")
    assert OUT.read_bytes() == whole


def test_67_killed_in_the_dense_baseline(runs: Runs) -> None:
    runs.words = (*TINY, "--baseline-epochs", "5")
    whole = runs.whole()
    for entry in Path("cache").iterdir():
        entry.unlink()
    killed(runs, 7, "--checkpoint-steps", "3")  # of ten
    assert kept() == ["00-0000000004.safetensors", "00-0000000006.safetensors"]
    said = runs(0, "--resume", "--checkpoint-steps", "3")
    assert "Resuming the dense baseline after step 6, from out.checkpoints" in said
    assert "epoch 4 of 5" in said
    assert "epoch 3 of 5" not in said
    assert OUT.read_bytes() == whole


RECIPE = """
[[stage]]
epochs = 2
lr = 0.01
batch_size = 16
rule = [{ match = "*", scheme = "dense", sparsity = 0.5, sparsity_by = 0.5 }]
[[stage]]
epochs = 2
lr = 0.01
batch_size = 16
rule = [{ match = "8", scheme = "wfn" }, { match = "*", scheme = "kmeans", bits = 2 }]
"""


@pytest.mark.parametrize("done", [8, 12])
def test_67_killed_in_each_stage_of_a_recipe(runs: Runs, done: int) -> None:
    Path("two.toml").write_text(RECIPE)
    at = TINY.index("--epochs")
    runs.words = (*TINY[:at], *runs.words[len(TINY) :], "-o", "out", "--recipe", "two.toml")
    whole = runs.whole()
    seen: list[int] = []

    def in_second_stage() -> None:
        seen.append(done)
        if len(seen) == 2:
            die()

    with pytest.raises(GoneError):
        runs(0, "--checkpoint-steps", "5", at=done, act=in_second_stage)
    said = runs(0, "--resume")
    assert f"Resuming stage 2 of 2 after step {6 if done < 12 else 10}, from" in said
    assert said.count("stage 1 was done before") == 2
    assert OUT.read_bytes() == whole


def test_70_another_recipe_seed_or_data(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    killed(runs, 9)
    begin = "out.checkpoints holds another run: "
    end = ". Give the command as it was, or begin anew with --force (force=True)"
    assert runs.refused(2, "--resume", "--seed", "1") == f"{begin}seed was 0, is 1{end}"
    assert runs.refused(2, "--resume", "--lr", "0.001") == f"{begin}recipe.stage 1.lr was 0.01, is 0.001{end}"
    said = runs.refused(2, "--resume", "--bits", "3", "--epochs", "5")
    assert said == f"{begin}recipe.stage 1.epochs was 4, is 5; recipe.stage 1.rule 1.codewords was 4, is 8{end}"
    other = replace(few_digits(), version="digits-2")
    with monkeypatch.context() as patch:
        patch.setattr("compressor.cli.setup.load_data", lambda *_, **__: other)
        assert runs.refused(2, "--resume") == f'{begin}data.version was "digits-1", is "digits-2"{end}'
    runs(0, "--resume")


def test_70_other_weights_under_the_same_name(runs: Runs, weights: Path) -> None:
    killed(runs, 9)
    save_file(create_model("tiny", {}, seed=1).state_dict(), "other.safetensors")
    runs.words = tuple("other.safetensors" if word == str(weights) else word for word in runs.words)
    said = runs.refused(2, "--resume")
    assert said.startswith("out.checkpoints holds another run: weights was ")


@pytest.mark.parametrize("cut", [0, 7, 400, -1])
def test_70_the_newest_is_damaged(runs: Runs, caplog: pytest.LogCaptureFixture, cut: int) -> None:
    whole = runs.whole()
    killed(runs, 14)
    *_, older, newest = sorted(FOLDER.glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:cut])
    assert "Resuming stage 1 of 1 after step 6" in runs(0, "--resume")
    (warning,) = caplog.messages
    assert warning.startswith(f"{newest} is damaged, or holds no state of a training (")
    assert warning.endswith(f"): going back to {older.name}")
    assert "\n" not in warning
    assert OUT.read_bytes() == whole


def test_70_all_are_damaged(runs: Runs) -> None:
    killed(runs, 14)
    for path in FOLDER.glob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    said = runs.refused(3, "--resume")
    assert "(its checksum differs); no other is left: begin anew with --force (force=True)" in said
    runs(0, "--force")


def test_nothing_to_resume(runs: Runs) -> None:
    line = "nothing to resume: no checkpoint in out.checkpoints; leave out --resume (resume=True)"
    assert runs.refused(4, "--resume") == line
    assert not FOLDER.exists()
    assert run(["tiny", "--checkpoint-path", "x", "--resume"]) == 2
    assert "no data to train on for --resume: name --dataset or --data-dir" in runs.capsys.readouterr().err


def test_an_interrupted_run_is_not_overwritten(runs: Runs) -> None:
    killed(runs, 9)
    line = (
        "out.checkpoints holds a run that was interrupted: go on with --resume (resume=True), or begin anew with "
        "--force (force=True)"
    )
    assert runs.refused(2) == line
    runs(0, "--force")
    assert not FOLDER.exists()


def test_64_another_process_is_at_work(runs: Runs) -> None:
    FOLDER.mkdir()
    with filelock.FileLock(FOLDER / ".lock"):
        line = "another process is at work in out.checkpoints: wait for it, or stop it first"
        assert runs.refused(6) == runs.refused(6, "--resume") == line
    assert kept() == [".lock"]


def test_60_a_file_is_in_the_way_of_the_folder(runs: Runs) -> None:
    FOLDER.touch()
    assert runs.refused(6) == "out.checkpoints cannot be written: File exists"


def test_59_the_disk_is_full(runs: Runs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that need not stop goes on; one that is told to cannot be said to be kept."""
    whole = runs.whole()
    with monkeypatch.context() as patch:
        fill = patch.setattr
        runs(0, at=1, act=lambda: fill("compressor.checkpoint.write_state", refused))
    assert OUT.read_bytes() == whole
    assert len(caplog.messages) == 4
    assert caplog.messages[0] == (
        "no checkpoint of step 6: out.checkpoints/01-0000000006.safetensors needs 3 bytes; the training goes on"
    )
    OUT.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", refusing(28))
        said = runs(6, at=9, act=tell(signal.SIGTERM))
    assert "01-0000000010.safetensors cannot be written: No space left on device" in said.splitlines()[-1]
    assert not FOLDER.exists()


def refused(path: Path, state: object) -> None:
    from compressor.formats.errors import ResourceError

    raise ResourceError(f"{path} needs 3 bytes")


def test_72_what_has_diverged_is_given_up(runs: Runs, caplog: pytest.LogCaptureFixture) -> None:
    """After three tries at smaller steps; what is kept is the state from before."""
    said = runs.refused(5, "--lr", "1e38", "--opt", "sgd", "--checkpoint-steps", "1")
    assert said.startswith("training has diverged: the loss is ")
    assert said.endswith(
        ", with a learning rate of an 8th, too; try a lower --lr, or look at the data. The state after step 0 is kept "
        "in out.checkpoints: the same command with --resume (resume=True) goes on, at a 16th"
    )
    assert [message[-14:] for message in caplog.messages] == [f"({time} of 3 times)" for time in (1, 2, 3)]
    assert kept() == ["01-0000000000.safetensors"]
    weights = read_state(FOLDER / kept()[0])["state"]["parts"]["subject"]["model"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    assert not OUT.exists()


def test_72_a_run_that_went_back_is_killed(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends in the same bytes as one that went back and was not killed."""
    real, calls = Compressor.loss, 0

    def loss(job: Compressor, *given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(job, *given, **named) * (float("nan") if calls == 10 else 1)

    monkeypatch.setattr(Compressor, "loss", loss)
    runs(0)
    whole = OUT.read_bytes()
    OUT.unlink()
    calls = 0
    killed(runs, 8, "--checkpoint-steps", "1")  # the first time it comes there, so before it goes back
    calls = 8
    assert "Resuming stage 1 of 1 after step 8" in runs(0, "--resume")
    assert OUT.read_bytes() == whole


def test_accumulated_batches(runs: Runs) -> None:
    """Six batches of 16 an epoch make two steps of four; either name is known."""
    assert "after step 2 of 8" in runs(7, "--grad-accum", "4", at=2, act=tell(signal.SIGTERM))
    runs(0, "--grad-accum-steps", "4", "--resume")
    with PackedFile.open(OUT) as file:
        assert dict(file.recipe or {})["stage"][0]["grad_accum"] == 4


def test_mixed_averaged_and_decayed(runs: Runs) -> None:
    """timm's --mixup, --cutmix, --smoothing, --layer-decay and --model-ema-decay, stopped in the middle."""
    how = ("--mixup", "0.2", "--cutmix", "1", "--smoothing", "0.1", "--layer-decay", "0.7", "--model-ema-decay", "0.9")
    runs.words = (*runs.words, *how)
    whole = runs.whole()
    assert "after step 9 of 24" in runs(7, at=8, act=tell(signal.SIGTERM))
    assert "layer_decay" in runs.refused(2, "--resume", "--layer-decay", "0.8")
    runs(0, "--resume")
    assert OUT.read_bytes() == whole
    with PackedFile.open(OUT) as file:
        stage = dict(file.recipe or {})["stage"][0]
        assert [stage[name.removeprefix("--").replace("-", "_")] for name in how[::2]] == [0.2, 1, 0.1, 0.7, 0.9]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--mixup", "-1"), "mixup: Input should be greater than or equal to 0, got -1.0"),
        (("--cutmix", "inf"), "cutmix: Input should be a finite number, got inf"),
        (("--smoothing", "1"), "smoothing: Input should be less than 1, got 1.0"),
        (("--layer-decay", "0"), "layer_decay: Input should be greater than 0, got 0.0"),
        (("--model-ema-decay", "1"), "model_ema_decay: Input should be less than 1, got 1.0"),
    ],
)
def test_shares_that_are_none(runs: Runs, option: tuple[str, str], said: str) -> None:
    assert said in runs.refused(2, *option)


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    random = np.random.RandomState(0)
    for split, count in (("train", 10), ("val", 2)):
        for name in ("a", "b"):
            (tmp_path / "own" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(0, 256, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / "own" / split / name / f"{number}.png")
    monkeypatch.setattr("compressor.cli.setup.load_data", load_data)
    monkeypatch.setattr("compressor.pictures.os.cpu_count", lambda: 2)
    return tmp_path / "own"


OWN = ("tiny", "--data-dir", "own", "--img-size", "32", "--epochs", "3", "--baseline-epochs", "1", "--batch-size", "4",
       "-o", "out")  # fmt: skip


def test_71_a_worker_is_killed(runs: Runs, pictures: Path) -> None:
    """A line names it; what was kept is gone on from, in this process alone, to the same file."""
    runs.words = (*OWN, "--in-chans", "3")
    whole = runs.whole()

    def kill() -> None:
        for child in multiprocessing.active_children():
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()

    said = runs.refused(6, "--checkpoint-steps", "1", at=7, act=kill)
    assert re.fullmatch(
        r"DataLoader worker \(pid(\(s\))? [\d, ]+\) (is killed by signal: Killed|exited unexpectedly): a process that "
        r"opens pictures died; try --workers 0",
        said,
    )
    # The loader may find out a step later: a batch was ready.
    assert re.search(r"after step \d+,", runs(0, "--resume", "--workers", "0"))
    assert OUT.read_bytes() == whole


def test_55_grey_pictures(runs: Runs, pictures: Path) -> None:
    """Of a model made for colours; the normalisation is the mean of its own."""
    runs.words = ("test_resnet", *OWN[1:], "--workers", "0")
    runs(0, "--in-chans", "1")
    with PackedFile.open(OUT) as file:
        known = dict(file.preprocessing or {})
    assert (known["input_size"], len(known["mean"]), len(known["std"])) == ([1, 32, 32], 1, 1)
    assert runs.refused(2, "--in-chans", "4", "--force") == "--in-chans 4: pictures are opened with 1 channel or with 3"


def test_pictures_that_are_opened_by_workers(runs: Runs, pictures: Path) -> None:
    """What is random about a picture follows from its place in the order, and so does not depend on the process."""
    runs.words = (*OWN, "--in-chans", "3")
    whole = runs.whole()
    killed(runs, 8, "--checkpoint-steps", "1")
    assert "after step 8" in runs(0, "--resume")
    assert OUT.read_bytes() == whole
    killed(runs, 8, "--force")
    OUT.unlink()
    (pictures / "train" / "a" / "0.png").unlink()
    said = runs.refused(2, "--resume")
    assert said.startswith('out.checkpoints holds another run: data.version was "pictures-')
