"""Traces: what each layer of a model is and returns for one small random batch, to tell two models apart by."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import get_act_layer, get_norm_layer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compressor.training.modes import eval_flags

__all__ = ["Layer", "Trace"]

_TOLERANCE = 1e-5  # between digests, relative to the values: the same operations on the same tensors are mostly exact
_COARSE = 2e-2  # where values are of half precision, or a GPU may sum in another order in another run
_POOLS = {
    "AdaptiveAvgPool2d": "avg",
    "AdaptiveMaxPool2d": "max",
    "AdaptiveAvgMaxPool2d": "avgmax",
    "AdaptiveCatAvgMaxPool2d": "catavgmax",
}
"""timm's names of what its ``SelectAdaptivePool2d`` computes by."""


@dataclass(frozen=True)
class Layer:
    """One call of a layer.

    Args:
        text: its class and settings, as printed.
        argument: the argument of timm, and its value, by which a model gets such layers; None where it is not known.
        digest: root mean square, mean, and weighted mean of what it returned; empty where the model was not run.
        exact: whether another run on the same tensors returns the same bits.
    """

    text: str
    argument: tuple[str, str] | None
    digest: tuple[float, ...] = ()
    exact: bool = True

    def same(self, other: Layer) -> bool:
        """Returns whether both compute the same; layers of other settings do where they return the very same."""
        if not self.digest or not other.digest:
            return self.text == other.text
        exact = self.exact and other.exact
        tolerance = 0.0 if exact and self.text != other.text else _TOLERANCE if exact else _COARSE
        pair = torch.tensor([self.digest, other.digest], dtype=torch.float64)
        allowed = tolerance * float(pair[:, 0].max().nan_to_num())
        return torch.allclose(pair[0], pair[1], rtol=0.0, atol=allowed, equal_nan=True)


@dataclass(frozen=True)
class Trace:
    """The calls of all layers that have no layers in them, and of the model itself, named "".

    Args:
        shape: of the batch; () where the model was not run, and each layer is listed once.
        calls: the calls of each layer by its name, in the order of the first ones.
    """

    shape: tuple[int, ...]
    calls: Mapping[str, list[Layer]]

    @classmethod
    def of(cls, model: nn.Module, shapes: Sequence[tuple[int, ...]]) -> Trace:
        """Runs a model in eval mode without gradient, and leaves its modes and all random generators as they are.

        A model on ``meta``, or one that takes other inputs, is not run: its layers still tell it apart.

        Args:
            model: the model.
            shapes: of batches to try in this order.
        """
        tensors = [*model.parameters(), *model.buffers()]
        for shape in () if any(tensor.is_meta for tensor in tensors) else shapes:
            try:
                return cls(shape, _run(model, _batch(shape, tensors)))
            except Exception:  # whatever a model raises, it does not take this batch
                continue
        return cls((), {name: [_layer(module)] for name, module in _layers(model)})

    def first_difference(self, other: Trace) -> tuple[str, Layer, Layer] | None:
        """Returns name and calls of the first layer of both that computes something else; None where there is none."""
        for name, calls in self.calls.items():
            for mine, its in zip(calls, other.calls.get(name, ()), strict=False):
                if not mine.same(its):
                    return name, mine, its
        return None


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if not name or not any(module.children())]


def _batch(shape: tuple[int, ...], tensors: Sequence[Tensor]) -> Tensor:
    """Returns random numbers in the dtype and on the device of a model's tensors."""
    like = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(()))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)


def _run(model: nn.Module, batch: Tensor) -> dict[str, list[Layer]]:
    calls: dict[str, list[Layer]] = {}

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            calls.setdefault(name, []).append(_layer(module, output))

        return hook

    hooks = [module.register_forward_hook(listen(name)) for name, module in _layers(model)]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), eval_flags(model):
            model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _layer(module: nn.Module, output: Any = None) -> Layer:
    text = type(module).__name__ if any(module.children()) else f"{type(module).__name__}({module.extra_repr()})"
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.numel()]
    exact = all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64) for t in tensors)
    return Layer(text, _argument(module), tuple(number for t in tensors for number in _digest(t)), exact)


def _digest(tensor: Tensor) -> tuple[float, float, float]:
    values = tensor.detach().to("cpu", torch.float64).reshape(-1)
    ramp = torch.linspace(-1, 1, len(values), dtype=torch.float64)
    return float(values.square().mean().sqrt()), float(values.mean()), float((values * ramp).mean())


def _argument(module: nn.Module) -> tuple[str, str] | None:
    """Returns the argument of timm that makes such a layer, where timm knows the layer by a name."""
    kind = type(module)
    if kind.__name__ in _POOLS:
        return "global_pool", _POOLS[kind.__name__]
    for argument, get in (("act_layer", get_act_layer), ("norm_layer", get_norm_layer)):
        for name in (kind.__name__.lower(), re.sub("(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()):
            try:
                if get(name) is kind:
                    return argument, name
            except KeyError:
                continue
    return None
