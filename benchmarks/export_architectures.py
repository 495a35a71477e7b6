"""Exports of many architectures: the difference of logits, and bytes against those of the codec ``bits``.

    python benchmarks/export_architectures.py [MODEL ...] [--to onnx]

MODEL is a name of timm; without one, all ``test_*`` models and twelve architectures of other families. Weights are
random, shared by ``uniform`` in 2, 3, 4, 5 and 8 bits, in turn. "of bits" is the export over the index streams of the
codec ``bits``, codebooks, and untouched tensors as they are in the model.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from tabulate import tabulate

import compressor
from compressor import Compressor, Policy, Rule
from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.errors import CompressorError
from compressor.formats.file.reader import PackedFile

OTHERS = [
    "resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_100", "efficientnet_b0", "convnext_atto",
    "swin_tiny_patch4_window7_224", "regnety_002", "densenet121", "mixer_s32_224", "ghostnet_050", "coatnet_0_rw_224",
    "nfnet_l0",
]  # fmt: skip
BITS = [2, 3, 4, 5, 8]
CLASSES: dict[str, Any] = {"num_classes": 10}


def measure(name: str, bits: int, to: str, folder: Path) -> list[str]:
    """Returns the row of one architecture."""
    torch.manual_seed(0)
    packed = folder / "model.safetensors"
    model = timm.create_model(name, **CLASSES)
    job = Compressor(model, Policy([Rule("*", scheme="uniform", bits=bits)]), model_args=CLASSES, teacher=None)
    job.prepare().finish().save(packed, codec="bits", force=True)
    try:
        done = compressor.export(packed, to, folder / "exported", force=True)
    except CompressorError as error:
        return [name, str(bits), str(error)[:80], "", "", ""]
    with PackedFile.open(packed) as file:
        sizes = file.sizes()
        untouched = sum(math.prod(raw.shape) * ITEM_SIZES[raw.dtype] for raw in file.untouched.values())
    share = done.exported / (sizes.indices + sizes.codebooks + untouched)
    figures = f"{done.difference:.1e}", f"{done.dense:,}", f"{done.exported:,}", f"{share:.3f}"
    return [name, str(bits), *figures]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--to", default="onnx")
    options = parser.parse_args()
    names = options.models or [*timm.list_models("test_*"), *OTHERS]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(names):
            rows.append(measure(name, BITS[number % len(BITS)], options.to, Path(folder)))
            print(*rows[-1], flush=True)
    heads = ["model", "bits", "difference", "dense bytes", "exported", "of bits"]
    print(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
