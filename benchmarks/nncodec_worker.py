"""Codes a network by NNCodec at several step sizes; ``nncodec_peer.py`` runs this in an environment that has NNCodec.

    python nncodec_worker.py JOB.json

The job names the network, its weights, the step sizes (``qps``), the settings and a folder, into which QP.nnc and, for
the weights that come out of it, QP.safetensors are written. Nothing of the package is imported here: NNCodec needs
numpy 1.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from nncodec.nn import decode, encode
from safetensors.numpy import load_file, save_file


def content(job: dict[str, Any]) -> Any:
    """Returns what is coded: the network, or the arrays of the tensors that are named."""
    arrays = load_file(job["weights"])
    if job["only"]:
        return {name: arrays[name] for name in job["only"]}
    model = timm.create_model(job["net"], **job["args"])
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model


def main() -> None:
    """Codes and decodes by each step size, and prints the seconds of coding as JSON."""
    job = json.loads(Path(sys.argv[1]).read_text())
    folder = Path(job["folder"])
    torch.set_num_threads(1)
    seconds = {}
    for qp in job["qps"]:
        settings = {**job["settings"], "qp": qp, "results": str(folder), "verbose": False}
        coded = content(job)
        start = time.process_time()
        stream = encode(coded, settings)
        seconds[qp] = time.process_time() - start
        (folder / f"{qp}.nnc").write_bytes(stream)
        arrays = {name: np.ascontiguousarray(array) for name, array in decode(stream).items()}
        save_file(arrays, folder / f"{qp}.safetensors")
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
