"""A run that is killed at any moment of its training and resumed ends in the same file, byte for byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# One process imports once; forked children are the runs, and write a byte into a pipe after each step.
CODE = """
import gc, os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv.pop(1))
import torch
from tests.helpers import tiny
from compressor.cli import setup
from compressor.cli.main import run
from compressor.cli.show import Step

torch.set_num_threads(1)
digits = tiny.few_digits()
setup.load_data = lambda *_, **__: digits
folder, trials, options = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
gc.freeze()  # what is imported is not to be looked through in each child
STEPS = 3 * 2 + 4 * 6  # of the dense baseline, and of fine-tuning

def start(name, *more):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.environ["TIMM_COMPRESSOR_CACHE"] = str(folder / name / "cache")
        os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os.dup2(2, 1)
        Step.on_step = lambda *_: os.write(writing, b".")
        words = ["tiny", "--baseline-epochs", "3", "--epochs", "4", "--batch-size", "16", "--lr", "0.01"]
        code = run([*words, "--checkpoint-steps", "4", "-o", str(folder / name / "out"), *options, *more])
        os._exit(code)
    os.close(writing)
    return child, reading

def end(child, reading):
    while os.read(reading, 100):
        pass
    os.close(reading)
    return os.waitpid(child, 0)[1]

(folder / "whole").mkdir()
assert end(*start("whole")) == 0
whole = (folder / "whole" / "out").read_bytes()
chance, resumed = random.Random(0), 0
for trial in range(trials):
    name = str(trial)
    (folder / name).mkdir()
    child, reading = start(name)
    for _ in range(chance.randint(1, STEPS)):
        assert os.read(reading, 1) == b"."
    time.sleep(chance.uniform(0, 0.03))  # in the next step, in saving, in evaluation
    os.kill(child, signal.SIGKILL)
    status = end(child, reading)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not (folder / name / "out").exists()
    kept = list((folder / name / "out.checkpoints").glob("[0-9]*.safetensors"))  # and the best file of a target
    assert len(kept) <= 2
    resumed += bool(kept)
    assert end(*start(name, *(["--resume"] if kept else []))) == 0, trial
    assert (folder / name / "out").read_bytes() == whole, trial
    assert sorted(path.name for path in (folder / name).iterdir()) == ["cache", "out", "out.summary.csv"]
    rows = (folder / name / "out.summary.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows] == ["epoch", "0", "1", "2", "3"], trial
print(resumed)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trials", "options"),
    [
        (20, "--scheme learnt --bits 2"),
        (20, "--scheme inq --bits 5 --sparsity 0.3"),
        (5, "--target-size 2KB"),  # each of these runs searches a price
    ],
)
def test_kills_end_in_the_same_file(tmp_path: Path, trials: int, options: str) -> None:
    command = [sys.executable, "-c", CODE, str(Path(__file__).parents[2]), str(tmp_path), str(trials), *options.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
    assert int(done.stdout) > trials / 2  # or it was the beginning that was tested
