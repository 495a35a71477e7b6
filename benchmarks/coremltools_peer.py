"""coremltools' palettes, after training and while training, as peers of the benchmarks, in their own environment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_environment import Coded, Peer

__all__ = ["PALETTES", "CoreMLTools"]

PALETTES: dict[str, dict[str, Any]] = {
    "tensor": {"granularity": "per_tensor"},
    "groups": {"granularity": "per_grouped_channel", "group_size": 8, "enable_per_channel_scale": True},
}
"""Settings of coremltools by name: a palette for each tensor, or one for 8 output channels, each with a scale."""


class CoreMLTools(Peer):
    """Palettes as coremltools makes them for torch models: after training by k-means, or while training by DKM."""

    PACKAGE, VERSION = "coremltools", "9.0"
    WORKER = Path(__file__).with_name("coremltools_worker.py")

    def coded(
        self, net: str, args: dict[str, Any], weights: Path, palette: str, bits: int, all_bits: list[int]
    ) -> Coded:
        """Returns a network with palettes of 2^bits values; those of ``all_bits`` are made at the first call.

        Args:
            net: name of the timm model.
            args: of ``timm.create_model``.
            weights: safetensors file of the state dict.
            palette: one of ``PALETTES``.
            bits: of an index.
            all_bits: all numbers of bits that are going to be asked for.
        """
        job = {"net": net, "args": args, "weights": str(weights), "bits": all_bits, "config": PALETTES[palette]}
        return self.read(self.done(f"{weights.stem}-{palette}", job), bits, "zip")

    def trained(self, net: str, args: dict[str, Any], weights: Path, bits: int, training: dict[str, Any]) -> Coded:
        """Returns a network that DKM has trained to a palette of 2^bits values a tensor.

        Args:
            net: name of the timm model.
            args: of ``timm.create_model``.
            weights: safetensors file of the state dict.
            bits: of an index.
            training: the file of the batches, and how to train, as ``peers.py`` has it.
        """
        job = {"net": net, "args": args, "weights": str(weights), "bits": [bits], "training": training}
        return self.read(self.done(f"dkm-{bits}-{Path(training['batches']).stem}", job), bits, "zip")
