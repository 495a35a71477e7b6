"""Shares a network's weights by coremltools' k-means or DKM; ``coremltools_peer.py`` runs this in an environment of it.

    python coremltools_worker.py JOB.json

The job names the network, its weights, the bits of an index, coremltools' settings and a folder, into which BITS.zip
and, for the weights that come out of it, BITS.safetensors are written. A job that says how to train is done by DKM,
with its defaults for all but the bits.

coremltools codes no entropy: a model is a folder of files, and gets smaller as it is zipped. BITS.zip has all the
numbers of the network in one file, as in such a model, but neither the program nor names and shapes: indices of so many
bits without gaps, palettes and scales in float16, and all else in float16.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import coremltools  # noqa: F401 - sets up the logging that main() makes quiet
import numpy as np
import timm
import torch
from coremltools.optimize.torch.palettization import (
    DKMPalettizer,
    DKMPalettizerConfig,
    PostTrainingPalettizer,
    PostTrainingPalettizerConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional


def main() -> None:
    """Makes palettes of each number of bits, and prints the seconds it took as JSON."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    model = timm.create_model(job["net"], **job["args"])
    model.load_state_dict(load_file(job["weights"]))
    print(json.dumps({bits: palettized(model, bits, job) for bits in job["bits"]}))


def palettized(model: nn.Module, bits: int, job: dict[str, Any]) -> float:
    """Writes the files of one number of bits, and returns the seconds of the processor until the zip was written."""
    start, names = time.process_time(), list(model.state_dict())
    if "training" in job:
        state = dkm(model, bits, job["training"])
    else:
        settings = PostTrainingPalettizerConfig.from_dict({"global_config": {"n_bits": bits, **job["config"]}})
        state = PostTrainingPalettizer(model, settings).compress().state_dict()
    decoded = zipped(names, state, bits, Path(job["folder"]) / f"{bits}.zip")
    seconds = time.process_time() - start
    save_file(decoded, Path(job["folder"]) / f"{bits}.safetensors")
    return seconds


def dkm(model: nn.Module, bits: int, training: dict[str, Any]) -> dict[str, Tensor]:
    """Returns the state of a network that was trained with DKM from the first step to the last."""
    batches, temperature = load_file(training["batches"]), training["temperature"]
    images, labels, logits = (batches[name] for name in ("images", "labels", "logits"))
    palettizer = DKMPalettizer(model, DKMPalettizerConfig.from_dict({"global_config": {"n_bits": bits}}))
    trained = palettizer.prepare(inplace=True).train()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=training["lr"], weight_decay=0.0)
    count = len(images) // training["epochs"]  # images of an epoch
    starts = [
        start for epoch in range(0, len(images), count) for start in range(epoch, epoch + count, training["batch"])
    ]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(starts))
    for start in starts:
        chosen = slice(start, min(start + training["batch"], (start // count + 1) * count))
        palettizer.step()
        output = trained(images[chosen])
        student = functional.log_softmax(output / temperature, dim=1)
        teacher = functional.log_softmax(logits[chosen] / temperature, dim=1)
        distance = functional.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2
        loss = (1 - training["distill"]) * functional.cross_entropy(output, labels[chosen])
        optimizer.zero_grad()
        (loss + training["distill"] * distance).backward()
        optimizer.step()
        schedule.step()
    state: dict[str, Tensor] = palettizer.finalize(inplace=True).state_dict()
    return state


def zipped(names: list[str], shared: dict[str, Tensor], bits: int, path: Path) -> dict[str, Tensor]:
    """Writes the numbers of a network as a zip, and returns its tensors as the numbers in the zip give them."""
    state: dict[str, Tensor] = {}
    parts: list[bytes] = []
    for name in names:
        if not shared[name].is_floating_point():
            continue  # the count of batches that BatchNorm has seen
        module, _, parameter = name.rpartition(".")
        palette = shared.get(f"{module}._COREML_/{parameter}/lut")
        if palette is None:
            state[name] = shared[name].half()
            parts.append(state[name].numpy().tobytes())
        else:
            scale = shared.get(f"{module}._COREML_/{parameter}/palettization_scale")
            state[name], content = split(shared[name], palette, scale, bits)
            parts += content
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        file.writestr("weight.bin", b"".join(parts))
    return {name: tensor.float().contiguous() for name, tensor in state.items()}


def split(weights: Tensor, palette: Tensor, scale: Tensor | None, bits: int) -> tuple[Tensor, list[bytes]]:
    """Returns a tensor as its palettes and scales in float16 give it, and their bytes and those of the indices.

    Args:
        weights: float32[out, ...], as coremltools leaves them.
        palette: float32[groups, 1, ..., K, 1], one for so many output channels.
        scale: float32[out, 1, ...]; None: there is none.
        bits: of an index.

    Raises:
        ValueError: if the weights are not what palettes and scales say.
    """
    rows = weights.reshape(len(weights), -1)
    scales = torch.ones(len(rows), 1) if scale is None else scale.reshape(-1, 1)
    books = palette.reshape(palette.shape[0], -1).repeat_interleave(len(rows) // palette.shape[0], dim=0)
    pairs = zip(rows / scales, books, strict=True)
    indices = torch.stack([(row[:, None] - book).abs().argmin(1) for row, book in pairs])
    if not torch.allclose(books.gather(1, indices) * scales, rows, rtol=1e-5, atol=1e-7):
        raise ValueError(f"weights of {list(weights.shape)} are not those of their palettes")
    half, half_scales = books.half(), scales.half()
    content = [pack(indices.numpy(), bits), palette.half().numpy().tobytes()]
    if scale is not None:
        content.append(half_scales.numpy().tobytes())
    return (half.gather(1, indices).float() * half_scales.float()).reshape(weights.shape), content


def pack(indices: np.ndarray[Any, np.dtype[np.int64]], bits: int) -> bytes:
    """Returns indices as a stream of so many bits each, the lowest first."""
    digits = indices.reshape(-1, 1) >> np.arange(bits) & 1
    return np.packbits(digits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


if __name__ == "__main__":
    main()
