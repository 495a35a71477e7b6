"""NNCodec as a peer of the benchmarks, in an environment of its own: it needs numpy 1, and the package numpy 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peer_environment import Coded, Peer

__all__ = ["NNCodec"]

SETTINGS = {"ioq": False, "use_dq": True, "nonweight_qp": -75}  # trellis on; fine steps for norms and biases


class NNCodec(Peer):
    """NNCodec, the reference implementation of ISO's neural network coding."""

    PACKAGE, VERSION = "nncodec", "2.1.3"
    WORKER = Path(__file__).with_name("nncodec_worker.py")
    OWN = ("numpy<2",)

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
        job = {"net": net, "args": args, "weights": str(weights), "qps": qps, "only": only, "settings": SETTINGS}
        return self.read(self.done(f"{weights.stem}-{'alone' if only else 'whole'}", job), qp, "nnc")
