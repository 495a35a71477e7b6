"""Makes a network's weights integers by torchao; ``torchao_peer.py`` runs this in an environment that has it.

    python torchao_worker.py JOB.json

The job names the network, its weights, the bits of a weight and a folder, into which BITS.zip and, for the weights that
come out of it, BITS.safetensors are written.

torchao quantises Linear layers. A convolution is given to it as the Linear layer of its matrix, so that its weights
become what torchao makes of such a matrix. Its own files are pickles; BITS.zip has the same numbers in one deflated
file, without names and shapes: integers of so many bits, scales in float16, and all else in float16.
"""

from __future__ import annotations

import json
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

GROUP = 32  # weights of an output channel that have a scale, where they have 4 bits
DTYPES = {4: "int4", 8: "int8"}  # by name: torch does not tell type checkers of the first


def main() -> None:
    """Quantises to each number of bits, and prints the seconds it took as JSON."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    model = timm.create_model(job["net"], **job["args"])
    model.load_state_dict(load_file(job["weights"]))
    print(json.dumps({bits: quantised(model, bits, Path(job["folder"])) for bits in job["bits"]}))


def quantised(model: nn.Module, bits: int, folder: Path) -> float:
    """Writes the files of one number of bits, and returns the seconds of the processor until the zip was written."""
    start, state, parts = time.process_time(), {}, []
    shared = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue  # the count of batches that BatchNorm has seen
        if name in shared:
            state[name], content = integers(tensor, bits)
            parts += content
        else:
            state[name] = tensor.half().float()
            parts.append(tensor.half().numpy().tobytes())
    with zipfile.ZipFile(folder / f"{bits}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        file.writestr("weights.bin", b"".join(parts))
    seconds = time.process_time() - start
    save_file(state, folder / f"{bits}.safetensors")
    return seconds


def integers(weights: Tensor, bits: int) -> tuple[Tensor, list[bytes]]:
    """Returns a tensor as its integers and scales in float16 give it, and the bytes of both.

    Args:
        weights: float32[out, ...].
        bits: of an integer, 4 or 8.
    """
    matrix = weights.reshape(len(weights), -1)
    layer = nn.Linear(matrix.shape[1], len(matrix), bias=False)
    layer.weight.data = matrix.clone()
    grouped = bits == 4 and matrix.shape[1] % GROUP == 0
    granularity: Any = PerGroup(GROUP) if grouped else PerAxis(0)
    quantize_(layer, IntxWeightOnlyConfig(weight_dtype=getattr(torch, DTYPES[bits]), granularity=granularity))
    made: Any = layer.weight
    codes, scales = made.qdata, made.scale.reshape(len(matrix), -1).half()
    spread = scales.float().repeat_interleave(matrix.shape[1] // scales.shape[1], dim=1)
    if not torch.allclose(made.dequantize(), codes.float() * spread, rtol=2e-3, atol=1e-6):
        raise ValueError(f"weights of {list(weights.shape)} are not their integers times their scales")
    return (codes.float() * spread).reshape(weights.shape), [pack(codes.numpy(), bits), scales.numpy().tobytes()]


def pack(codes: np.ndarray[Any, np.dtype[np.int8]], bits: int) -> bytes:
    """Returns integers as bytes, or two in a byte where they have four bits."""
    flat = codes.reshape(-1).view(np.uint8)
    if bits == 8:
        return flat.tobytes()
    flat = np.pad(flat & 15, (0, flat.size % 2))
    return (flat[::2] | flat[1::2] << 4).tobytes()


if __name__ == "__main__":
    main()
