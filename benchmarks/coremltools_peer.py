"""coremltools' palettes as a peer of the benchmarks, in an environment of their own."""

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
    """Post-training palettization by k-means, as coremltools does it for torch models."""

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
