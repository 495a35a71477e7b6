"""The memory that the steps of a fine-tuning will take, predicted without taking it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from compressor.sharing.group import Group
from compressor.training.optim import make_optimizer

__all__ = ["StepMemory", "activations", "size_of"]

VALUE = 4  # bytes of a float32
SCRATCH = 3  # times the largest tensor: the gradient of what is looked up, and two an optimiser may make on its way
PROBED = 64  # rows and columns of the parameter that an optimiser is tried on


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step, in float32, beside those of Python, torch and the data.

    Args:
        models: parameters and buffers of all models held, indices and codebooks among them.
        optimizer: what the optimiser remembers of the trained values.
        shared: the values looked up for shared weights, and an index of each that waits for the backward pass.
        saved: activations that wait for the backward pass; None where the model cannot be tried without memory.
        passing: gradients of all trained values, and what an optimiser's arithmetic takes of the largest tensor; or, if
            that is more, what passes through the largest layer.
    """

    models: int
    optimizer: int
    shared: int
    saved: int | None
    passing: int

    @property
    def total(self) -> int:
        """Sum of all; a C library that does not give memory back at once was seen to keep a fifth more."""
        return self.models + self.optimizer + self.shared + (self.saved or 0) + self.passing

    @classmethod
    def of(
        cls, model: nn.Module, groups: Sequence[Group], sketch: nn.Module, images: Tensor, opt: str, held: int
    ) -> StepMemory:
        """Predict it, as if all weights were trained: less, by their gradients and moments, where a scheme does not.

        Args:
            model: with its weights shared.
            groups: its groups.
            sketch: the dense model, on ``meta``.
            images: what a step gives the model at a time, on ``meta``: float32[batch, C, H, W].
            opt: timm's name of the optimiser.
            held: bytes of the models that are held beside it, and of the dense weights that are kept.
        """
        trained = list(model.parameters())
        saved, largest = activations(sketch, images)
        gradients = size_of(trained) + SCRATCH * max(map(_bytes, trained), default=0)
        return cls(
            models=size_of(model.state_dict().values()) + held,
            optimizer=round(_remembered(opt) * sum(p.numel() for p in trained)),
            shared=sum(group.weights * (VALUE + _index_bytes(group)) for group in groups),
            saved=saved,
            passing=max(gradients, largest),
        )


def _index_bytes(group: Group) -> int:
    values: Tensor | None = getattr(group, "values", None)
    return 1 if values is None or len(values) <= 256 else 4


def activations(sketch: nn.Module, images: Tensor) -> tuple[int | None, int]:
    """Give the bytes that wait for the backward pass, parameters apart, and those in and out of the largest layer.

    Args:
        sketch, images: on ``meta``, where nothing is computed. (None, 0) where the model cannot be run there.

    Example:
        >>> with torch.device("meta"):
        ...     net, images = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)), torch.empty(10, 4)
        >>> activations(net, images)  # the images, the sigmoid's output; in and out of the sigmoid
        (480, 640)
    """
    own = {parameter.untyped_storage()._cdata for parameter in sketch.parameters()}
    kept: dict[int, Tensor] = {}  # alive, so that no storage takes the place of another
    sizes: list[int] = [0]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def measure(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        sizes.append(size_of(value for value in (*given, output) if isinstance(value, Tensor)))

    leaves = [module for module in sketch.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(measure) for module in leaves]
    was_training = sketch.training
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            sketch.train()(images)
    except RuntimeError:  # torch's word for it where a model asks for a value, or an operator knows no ``meta``
        return None, 0
    finally:
        sketch.train(was_training)
        for hook in hooks:
            hook.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), max(sizes)


def _remembered(opt: str) -> float:
    """Give the bytes an optimiser keeps of each value, found by letting it take a step."""
    values = nn.Parameter(torch.zeros(PROBED, PROBED))
    optimizer, _ = make_optimizer([{"params": [values]}], opt, 1e-3, "cosine", 1, 2)
    values.grad = torch.ones_like(values)
    optimizer.step()
    state: Mapping[str, Any] = optimizer.state[values]
    return size_of(value for value in state.values() if isinstance(value, Tensor)) / values.numel()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Add up the bytes of some tensors."""
    return sum(map(_bytes, tensors))


def _bytes(tensor: Tensor) -> int:
    return tensor.nbytes
