"""The memory that a fine-tuning step will need, predicted without allocating it."""

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
TEMPORARIES = 3  # copies of the largest tensor: the gradient of its gathered values, and two of the optimiser
PROBE_SIZE = 64  # rows and columns of the parameter that an optimiser is tried on


@dataclass(frozen=True)
class StepMemory:
    """Bytes at the peak of a step, in float32, without those of Python, torch and the data.

    Args:
        models: parameters and buffers of all models in memory, including indices and codebooks.
        optimizer: the optimiser's state.
        shared: the values gathered for shared weights, and an index of each, stored for the backward pass.
        saved: activations stored for the backward pass; None if the model cannot run on ``meta``.
        passing: gradients of all trained values plus the optimiser's temporary copies of the largest tensor; or, if
            that is more, the inputs and outputs of the largest layer.
    """

    models: int
    optimizer: int
    shared: int
    saved: int | None
    passing: int

    @property
    def total(self) -> int:
        """The sum of all. A C library that returns freed memory late was measured to need a fifth more."""
        return self.models + self.optimizer + self.shared + (self.saved or 0) + self.passing

    @classmethod
    def of(
        cls, model: nn.Module, groups: Sequence[Group], sketch: nn.Module, images: Tensor, opt: str, other_models: int
    ) -> StepMemory:
        """Predicts the memory of a step in which all weights are trained; schemes that train fewer need less.

        Args:
            model: the model, its weights shared.
            groups: its groups.
            sketch: the dense model, on ``meta``.
            images: a batch of a step, on ``meta``: float32[batch, C, H, W].
            opt: timm's name of the optimiser.
            other_models: bytes of the other models in memory, and of the dense weights that are kept.
        """
        trained = list(model.parameters())
        saved, largest = activations(sketch, images)
        gradients = size_of(trained) + TEMPORARIES * max(map(_bytes, trained), default=0)
        return cls(
            models=size_of(model.state_dict().values()) + other_models,
            optimizer=round(_state_bytes(opt) * sum(p.numel() for p in trained)),
            shared=sum(group.weights * (VALUE + _index_bytes(group)) for group in groups),
            saved=saved,
            passing=max(gradients, largest),
        )


def _index_bytes(group: Group) -> int:
    return 1 if not hasattr(group, "values") or group.codeword_count <= 256 else 4


def activations(sketch: nn.Module, images: Tensor) -> tuple[int | None, int]:
    """Returns the bytes that are stored for the backward pass, without parameters, and those of the largest layer.

    Args:
        sketch: the model, on ``meta``, where nothing is computed.
        images: a batch, on ``meta``.

    Returns:
        Bytes stored for the backward pass, and bytes of inputs and outputs of the largest layer; (None, 0) if the model
        cannot run on ``meta``.

    Example:
        >>> with torch.device("meta"):
        ...     net, images = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2)), torch.empty(10, 4)
        >>> activations(net, images)  # the images, the sigmoid's output; in and out of the sigmoid
        (480, 640)
    """
    parameters = {parameter.untyped_storage()._cdata for parameter in sketch.parameters()}
    saved: dict[int, Tensor] = {}  # keeps the tensors alive, so that no two storages get the same address
    sizes: list[int] = [0]

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in parameters:
            saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def measure(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        sizes.append(size_of(value for value in (*inputs, output) if isinstance(value, Tensor)))

    leaves = [module for module in sketch.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(measure) for module in leaves]
    was_training = sketch.training
    try:
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            sketch.train()(images)
    except RuntimeError:  # the model reads a value, or an operator does not support ``meta``
        return None, 0
    finally:
        sketch.train(was_training)
        for hook in hooks:
            hook.remove()
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values()), max(sizes)


def _state_bytes(opt: str) -> float:
    """Returns the bytes that an optimiser stores per value, measured by a step on a small parameter."""
    values = nn.Parameter(torch.zeros(PROBE_SIZE, PROBE_SIZE))
    optimizer, _ = make_optimizer([{"params": [values]}], opt, 1e-3, "cosine", 1, 2)
    values.grad = torch.ones_like(values)
    optimizer.step()
    state: Mapping[str, Any] = optimizer.state[values]
    return size_of(value for value in state.values() if isinstance(value, Tensor)) / values.numel()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Returns the total size of some tensors in bytes."""
    return sum(map(_bytes, tensors))


def _bytes(tensor: Tensor) -> int:
    return tensor.nbytes
