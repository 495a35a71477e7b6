"""Peers of the benchmarks that run in an environment of their own, which is made when it is first needed.

Their versions of shared libraries do not suit the package, or they are no part of its environment for another reason.
Networks are exchanged as files: a script of the peer's environment reads a job and writes a file for each setting.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["Coded", "Peer", "default_folder"]


@dataclass(frozen=True)
class Coded:
    """A network that a peer has coded.

    Args:
        size: bytes of its file.
        state: the tensors decoded from it, by name.
        seconds: of coding, by the processor's clock.
    """

    size: int
    state: dict[str, Tensor]
    seconds: float


class Peer:
    """A package in a virtual environment; each peer is a subclass.

    torch, timm and all else that the package does not ask for in another version are borrowed from the environment of
    this process, so that the other one need not hold 5 GB of them.

    Args:
        folder: in which the environment is made.
        keep: leave the environment there when ``close`` is called.
    """

    PACKAGE: ClassVar[str]
    VERSION: ClassVar[str]
    WORKER: ClassVar[Path]
    """The script that codes; it is given the path of a job, and prints a JSON object: seconds of each setting."""
    OWN: ClassVar[tuple[str, ...]] = ()
    """Requirements of which the environment has its own version."""

    def __init__(self, folder: Path, keep: bool) -> None:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        self.folder, self.keep = folder / f"{self.PACKAGE}-{self.VERSION}-{python}", keep
        self.files = tempfile.TemporaryDirectory()
        self.seconds: dict[Path, dict[str, float]] = {}

    def done(self, name: str, job: dict[str, Any]) -> Path:
        """Returns the folder of a job's files; the job is done at the first call with its name."""
        folder = Path(self.files.name) / name
        if folder not in self.seconds:
            folder.mkdir()
            path = folder / "job.json"
            path.write_text(json.dumps(job | {"folder": str(folder)}))
            self.seconds[folder] = json.loads(self.run(str(self.WORKER), str(path)).splitlines()[-1])
        return folder

    def read(self, folder: Path, setting: int, suffix: str) -> Coded:
        """Returns the network that a job has coded with a setting, in a file of the suffix."""
        state = load_file(folder / f"{setting}.safetensors")
        return Coded((folder / f"{setting}.{suffix}").stat().st_size, state, self.seconds[folder][str(setting)])

    def run(self, *command: str) -> str:
        """Runs the environment's Python on one thread, and returns what it prints."""
        self.install()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([self.python, "-P", *command], stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} failed in {self.folder}, see above")
        return done.stdout

    @property
    def python(self) -> Path:
        """The Python of the environment."""
        return self.folder / "bin" / "python"

    def install(self) -> None:
        """Makes the environment where there is none; compiling what is in C++ may take some minutes."""
        done = self.folder / "installed"
        if done.exists():
            return
        print(f"{self.PACKAGE} {self.VERSION} is being installed in {self.folder}", flush=True)
        venv.create(self.folder, clear=True, with_pip=True)
        pip = [str(self.python), "-m", "pip", "install", "--quiet", *self.OWN]
        if self.OWN:
            subprocess.run(pip, check=True)
        own = sysconfig.get_path("purelib", vars={"base": str(self.folder)})
        (Path(own) / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # searched after its own
        subprocess.run([*pip, f"{self.PACKAGE}=={self.VERSION}"], check=True)
        done.touch()

    def close(self) -> None:
        """Removes the coded files, and the environment unless it is to be kept."""
        self.files.cleanup()
        if not self.keep and self.folder.exists():
            shutil.rmtree(self.folder)


def default_folder() -> Path:
    """Returns the folder in which environments are made if none is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm-compressor"
