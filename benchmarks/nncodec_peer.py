"""NNCodec as a peer of the benchmarks, in an environment of its own: it needs numpy 1, and the package numpy 2."""

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
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

__all__ = ["VERSION", "Coded", "NNCodec"]

VERSION = "2.1.3"
SETTINGS = {"ioq": False, "use_dq": True, "nonweight_qp": -75}  # trellis on; fine steps for norms and biases
WORKER = Path(__file__).with_name("nncodec_worker.py")


@dataclass(frozen=True)
class Coded:
    """A network that NNCodec has coded.

    Args:
        size: bytes of the stream.
        state: the tensors decoded from it, by name.
        seconds: of coding.
    """

    size: int
    state: dict[str, Tensor]
    seconds: float


class NNCodec:
    """NNCodec in a virtual environment, which is made when it is first needed.

    torch, timm and all else that does not depend on numpy's version are borrowed from the environment of this process,
    so the other one takes 0.4 GB instead of 5.5.

    Args:
        folder: of the environment.
        keep: leave the environment there when ``close`` is called.
    """

    def __init__(self, folder: Path, keep: bool) -> None:
        self.folder, self.keep = folder, keep
        self.streams = tempfile.TemporaryDirectory()
        self.seconds: dict[Path, dict[str, float]] = {}

    def coded(self, net: str, args: dict[str, Any], weights: Path, qp: int, qps: list[int], only: list[str]) -> Coded:
        """Returns a network coded with one step size; all those of ``qps`` are coded at the first call.

        Args:
            net: name of the timm model.
            args: of ``timm.create_model``.
            weights: safetensors file of the state dict.
            qp: step size, as NNCodec counts it: 4 more are twice the step.
            qps: all step sizes that are going to be asked for.
            only: names of the tensors that are coded; none: the whole network.
        """
        folder = Path(self.streams.name) / f"{weights.stem}-{'alone' if only else 'whole'}"
        if folder not in self.seconds:
            folder.mkdir()
            job = {"net": net, "args": args, "weights": str(weights), "qps": qps, "only": only}
            job |= {"settings": SETTINGS, "folder": str(folder)}
            (folder / "job.json").write_text(json.dumps(job))
            self.seconds[folder] = json.loads(self.run(str(WORKER), str(folder / "job.json")).splitlines()[-1])
        state = load_file(folder / f"{qp}.safetensors")
        return Coded((folder / f"{qp}.nnc").stat().st_size, state, self.seconds[folder][str(qp)])

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
        """Makes the environment where there is none; NNCodec is compiled, which takes about five minutes."""
        done = self.folder / "installed"
        if done.exists():
            return
        print(f"NNCodec {VERSION} is being installed in {self.folder}", flush=True)
        venv.create(self.folder, clear=True, with_pip=True)
        pip = [str(self.python), "-m", "pip", "install", "--quiet", "numpy<2"]
        subprocess.run(pip, check=True)
        own = sysconfig.get_path("purelib", vars={"base": str(self.folder)})
        (Path(own) / "borrowed.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")  # searched after its own
        subprocess.run([*pip, f"nncodec=={VERSION}"], check=True)
        done.touch()

    def close(self) -> None:
        """Removes the streams, and the environment unless it is to be kept."""
        self.streams.cleanup()
        if not self.keep and self.folder.exists():
            shutil.rmtree(self.folder)


def default_folder() -> Path:
    """Returns the folder of the environment if none is named."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "timm-compressor" / f"nncodec-{VERSION}-{sys.version_info.major}.{sys.version_info.minor}"
