"""torchao's integer weights as a peer of the benchmarks, in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_environment import Coded, Peer

__all__ = ["TorchAO"]


class TorchAO(Peer):
    """Weight-only quantisation by torchao: integers with a scale for each output channel, or for 32 weights of it."""

    PACKAGE, VERSION = "torchao", "0.18.0"
    WORKER = Path(__file__).with_name("torchao_worker.py")

    def coded(self, net: str, args: dict[str, Any], weights: Path, bits: int, all_bits: list[int]) -> Coded:
        """Returns a network with weights of 4 or 8 bits; those of ``all_bits`` are made at the first call.

        Args:
            net: name of the timm model.
            args: of ``timm.create_model``.
            weights: safetensors file of the state dict.
            bits: of a weight.
            all_bits: all numbers of bits that are going to be asked for.
        """
        job = {"net": net, "args": args, "weights": str(weights), "bits": all_bits}
        return self.read(self.done(weights.stem, job), bits, "zip")
