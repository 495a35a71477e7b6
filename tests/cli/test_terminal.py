"""What a terminal of 80 columns shows: a bar that fits, lines that break between words, and colour unless unwanted."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from compressor.formats.file.writer import write
from tests.helpers.file_commands import small

COLUMNS = 80
COLOUR = re.compile(r"\x1b\[\d[\d;]*m")
WATCHED = """
from types import SimpleNamespace
from compressor.cli.show import Step

sharing = SimpleNamespace(bits=1.234, fixed=0.5, changed=0.021, size=1_234_567, price=2.8e-11)
step = Step("3/4", "fine-tuning")
for done in range(100_001, 100_004):
    step.on_step(done, 123_456, 12.3456)
step.bar.refresh()
step.on_epoch(SimpleNamespace(number=2, epochs=30, loss=0.736, sharing=sharing), 0.25)
step.bar.refresh()
step.done("30 epochs  validation 30.0 %")
"""


def typed(*words: str, **environment: str) -> str:
    """Run Python on a terminal, and give all that it has written there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    clean = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS")}
    with subprocess.Popen(
        [sys.executable, *words], stdin=theirs, stdout=theirs, stderr=theirs, env={**clean, **environment}
    ) as process:
        os.close(theirs)
        parts = []
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # Linux's way to say that the other end is closed
                part = b""
            if not part:
                break
            parts.append(part)
    os.close(ours)
    text = b"".join(parts).decode()
    assert process.returncode == 0, text
    return text


@pytest.mark.parametrize("no_color", ["", "1"])
def test_a_training_fits_the_terminal(no_color: str) -> None:
    raw = typed("-c", WATCHED, NO_COLOR=no_color)
    assert bool(COLOUR.search(raw)) != bool(no_color)
    shown = [line.rstrip() for line in re.split(r"\r\n|\r|\n", COLOUR.sub("", raw)) if line.strip()]
    assert max(map(len, shown)) <= COLUMNS
    bars = [line for line in shown if "|" in line]
    assert any(bar.endswith("loss 12.346") for bar in bars)
    for bar in bars:
        found = re.fullmatch(r"3/4 fine-tuning +81%\|(.+)\| 10000\d/123456, .+ left(, loss 12\.346)?", bar)
        assert found is not None, bar
        assert len(found[1]) >= 5
    lines = [re.sub(r"\d:\d\d$", "0:00", line) for line in shown if "|" not in line]
    assert lines == [
        "3/4 fine-tuning    epoch 2 of 30  loss 0.736  validation 25.0 %  1.23",
        "                   bits/weight of the 50.0 % fixed  2.1 % of indices changed",
        "                   1,234,567 bytes at a price of 2.8e-11  0:00",
        "3/4 fine-tuning    30 epochs  validation 30.0 %  0:00",
    ]


def test_a_table_has_a_bold_head_unless_colour_is_unwanted(tmp_path: Path) -> None:
    write(tmp_path / "small.safetensors", small())
    words = ("-m", "compressor", "inspect", str(tmp_path / "small.safetensors"))
    bold, plain = typed(*words), typed(*words, NO_COLOR="1")
    (head,) = [line for line in bold.splitlines() if "site " in line]
    assert head.startswith("\x1b[1msite ")
    assert "\x1b" not in plain
    assert COLOUR.sub("", bold) == plain
    assert max(map(len, plain.splitlines())) <= COLUMNS


def test_an_error_is_red_on_a_terminal_only() -> None:
    code = "from compressor.cli.main import run; run(['inspect', 'none.safetensors'])"
    assert typed("-c", code).startswith("\x1b[31m\x1b[1merror: \x1b[0m")
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert piped.startswith("error: none.safetensors")
