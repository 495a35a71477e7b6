"""Clustering by TensorFlow Model Optimization as a peer of the benchmarks, in an environment of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peer_environment import Coded, Peer
from safetensors.torch import save_file
from torch import fx, nn

__all__ = ["TFMOT", "graph"]

SIZES = {  # attributes of the layers that the worker builds in Keras
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "groups"),
    nn.BatchNorm2d: ("num_features", "eps"),
    nn.MaxPool2d: ("kernel_size", "stride", "padding"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding"),
    nn.Linear: ("in_features", "out_features"),
}
PLAIN = nn.ReLU, nn.AdaptiveAvgPool2d
THROUGH = nn.Identity, nn.Flatten, nn.Dropout


class TFMOT(Peer):
    """Clustering of weights while they are trained: ``cluster_weights``, ``fit``, ``strip_clustering``, and zip."""

    PACKAGE, VERSION = "tensorflow-model-optimization", "0.8.1"
    WORKER = Path(__file__).with_name("tfmot_worker.py")
    OWN = "tensorflow-cpu==2.21.0", "tf_keras==2.21.0"

    def trained(self, model: nn.Module, name: str, clusters: int, training: dict[str, Any]) -> Coded:
        """Returns a network whose layers have so many values each, trained by the batches of a file.

        Args:
            model: with the dense weights, in eval mode.
            name: of the network.
            clusters: values of a layer.
            training: as ``Comparison.training`` has it.
        """
        folder = Path(self.files.name)
        weights = folder / f"{name}.safetensors"
        save_file(model.state_dict(), weights)
        job = {"layers": graph(model), "weights": str(weights), "clusters": clusters, **training}
        return self.read(self.done(f"{name}-{clusters}-{Path(training['batches']).stem}", job), clusters, "zip")


def graph(model: nn.Module) -> list[dict[str, Any]]:
    """Returns the layers of a network in the order of their computation, and where the input of each comes from.

    Raises:
        ValueError: the worker knows no such layer.

    Example:
        >>> [layer["kind"] for layer in graph(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Identity(), nn.ReLU()).eval())]
        ['Input', 'Conv2d', 'ReLU']
    """
    layers: list[dict[str, Any]] = []
    sources: dict[str, str] = {}
    for node in fx.symbolic_trace(model).graph.nodes:
        inputs = [sources[source.name] for source in node.all_input_nodes]
        module = model.get_submodule(node.target) if node.op == "call_module" else None
        if node.op == "output":
            break
        if isinstance(module, THROUGH):
            sources[node.name] = inputs[0]
            continue
        sources[node.name] = node.name
        entry = {"id": node.name, "inputs": inputs, "name": str(node.target)}
        layers.append(entry | described(node, module))
    return layers


def described(node: fx.Node, module: nn.Module | None) -> dict[str, Any]:
    """Returns what a layer is."""
    if node.op == "placeholder":
        return {"kind": "Input"}
    if module is None and getattr(node.target, "__name__", "") in ("add", "iadd"):
        return {"kind": "Add"}
    for kind, names in SIZES.items():
        if isinstance(module, kind):
            return {"kind": kind.__name__, **{name: getattr(module, name) for name in names}, "bias": has_bias(module)}
    if isinstance(module, PLAIN):
        return {"kind": type(module).__name__}
    raise ValueError(f"{node.target}: expected a layer of {[kind.__name__ for kind in (*SIZES, *PLAIN)]}, got {module}")


def has_bias(module: nn.Module | None) -> bool:
    """Returns whether a layer adds a bias."""
    return isinstance(getattr(module, "bias", None), torch.Tensor)
