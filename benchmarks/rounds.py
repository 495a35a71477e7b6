"""Fashion-MNIST: methods that work in rounds or stages compared with learnt, at equal epochs and distillation.

    python benchmarks/rounds.py [--dense FOLDER] [--minutes 10] [--net resnet18] [--seed 0]

Rows: Weight Fixing Networks, INQ and Deep Compression, learnt with a codebook per tensor and one for the network, and
the dense network trained further (*dense-continued*). Each row is appended to ``results/rounds.jsonl`` as soon as it is
measured and is not measured again, so the run can be cut into slices. The table between the markers of ``README.md``
is rewritten from all rows. ``--dense`` is that of ``fashion_mnist.py``. Training uses 25,000 of the images, and 8,000
for resnet18, which takes ten times as long per image, so that all rows take about 90 minutes of a processor.
"""

from __future__ import annotations

from comparison import Comparison, Stages

from compressor import Rule

EPOCHS = 2
METHODS: dict[str, Stages] = {
    "dense-continued": [],
    **{f"wfn, delta {delta}": [([Rule("*", "wfn", delta=delta)], EPOCHS)] for delta in (0.01, 0.02, 0.05)},
    **{f"inq, {bits} bits": [([Rule("*", "inq", bits=bits)], EPOCHS)] for bits in (5, 4, 3, 2)},
    **{
        f"deep compression, {sparsity:.0%} zeros": [
            ([Rule("*", "dense", sparsity=sparsity, sparsity_by=0.5)], EPOCHS // 2),
            ([Rule("*", "kmeans", types=["Linear"], bits=5), Rule("*", "kmeans", bits=8)], EPOCHS - EPOCHS // 2),
        ]
        for sparsity in (0.8, 0.9, 0.95)
    },
    **{f"learnt, {bits} bits": [([Rule("*", "learnt", bits=bits)], EPOCHS)] for bits in (4, 3, 2)},
    **{
        f"learnt, network, {bits} bits": [([Rule("*", "learnt", bits=bits, group="network")], EPOCHS)]
        for bits in (4, 3, 2)
    },
}


IMAGES = {"test_resnet": 25_000, "resnet18": 8_000}
NETS = ("test_resnet", 0), ("resnet18", 0), ("test_resnet", 1), ("test_resnet", 2)
ROUNDS = Comparison(
    "rounds", METHODS, [(net, method, seed) for net, seed in NETS for method in METHODS], EPOCHS, IMAGES
)

if __name__ == "__main__":
    ROUNDS.command()()
