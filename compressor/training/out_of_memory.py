"""Memory that runs out: how it is recognised, freed, and evaluated with less of."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from compressor.formats.errors import ResourceError
from compressor.sharing.parametrization import release_buffers

__all__ = ["describe", "free_memory", "is_out_of_memory", "predict"]

# What backends say that raise a plain RuntimeError.
MESSAGES = (
    " out of memory.",
    "MPS backend out of memory",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED.",  # what cuDNN raises where it cannot have its workspace
    "DefaultCPUAllocator: can't allocate memory",
    "FATAL ERROR :: MODULE:PT_DEVMEM Allocation failed",
)


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an error means that memory ran out, on the processor or a GPU.

    Example:
        >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
        True
        >>> is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if isinstance(exc, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(exc, RuntimeError) and any(message in str(exc) for message in MESSAGES)


def describe(exc: BaseException) -> str:
    """Returns what torch says of memory that ran out, without the place in its sources."""
    text = " ".join(str(exc).split()) or "no more is known"
    return text[max(0, text.find("you tried to allocate")) :][:200].rstrip(". ")


def free_memory(model: nn.Module, device: torch.device) -> None:
    """Frees what no tensor uses: the model's buffers, objects in reference cycles, and the device's cache."""
    release_buffers(model)
    gc.collect()
    if device.type != "cpu":
        torch.get_device_module(device).empty_cache()


def class_of(scores: Tensor) -> Tensor:
    """Returns the class with the highest score of each image, int64[n]."""
    return scores.argmax(dim=1)


def predict(
    model: nn.Module, inputs: Tensor, device: torch.device, read: Callable[[Tensor], Tensor] = class_of
) -> Tensor:
    """Returns the class of each image, int64[n], on the processor; where memory runs out, for half of them at a time.

    Args:
        model: gives a score for each class, on ``device``.
        inputs: n images.
        device: that the images are moved to.
        read: what is returned of the scores, a row an image.

    Raises:
        ResourceError: there is no memory for one image.
    """
    try:
        return read(model(inputs.to(device))).cpu()
    except (RuntimeError, MemoryError) as exc:
        if not is_out_of_memory(exc):
            raise
        if len(inputs) == 1:
            shape = "x".join(map(str, inputs.shape[1:]))
            raise ResourceError(f"out of memory in evaluation, with 1 image of {shape} ({describe(exc)})") from exc
    free_memory(model, device)  # out here, for the exception refers to all that is to be freed
    return torch.cat([predict(model, half, device, read) for half in inputs.chunk(2)])
