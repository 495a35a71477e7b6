"""An upper bound of what sharing frequency tables between tensors could save: the size of all ``ans`` tables.

    python benchmarks/table_bytes.py

The networks are timm models with random weights, packed without training by k-means at 2, 4, 16 and 256 values per
tensor.
"""

from __future__ import annotations

import numpy as np
import timm
import torch

from compressor import Compressor, Policy, Rule
from compressor.formats.codecs.frequencies import choose_frequencies, write_frequencies
from compressor.formats.file.reader import PackedFile


def measure(name: str, codewords: int) -> str:
    """Returns a line of the table: number of tensors, bytes of their index streams, bytes of the tables in these."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, in_chans=1)
    job = Compressor(model, Policy([Rule("*", scheme="kmeans", codewords=codewords)]), teacher=None, copy=False)
    with PackedFile.from_bytes(job.prepare().finish().to_bytes("ans")) as file:
        counts = [np.bincount(file.indices(site.name), minlength=site.codewords) for site in file.sites.values()]
        tables = sum(len(write_frequencies(choose_frequencies(histogram)[1])) for histogram in counts)
        total = file.sizes().indices
    return f"| {name} | {codewords} | {len(counts)} | {total:,} | {tables:,} | {100 * tables / total:.2f} % |"


def main() -> None:
    """Prints the table."""
    print("| network | values | tensors | index bytes | tables | share |\n|---|--:|--:|--:|--:|--:|")
    for name in ("test_resnet", "mobilenetv3_small_050", "resnet18"):
        for codewords in (2, 4, 16, 256):
            print(measure(name, codewords), flush=True)


if __name__ == "__main__":
    main()
