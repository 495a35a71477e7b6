"""Devices, as accelerate chooses them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import is_bf16_available, patch_environment

from compressor.formats.errors import UsageError

__all__ = ["accelerating", "find_device", "half_precision"]


def find_device(asked: str | None) -> torch.device:
    """Give the device asked for, None for accelerate's choice; raises UsageError for one that torch does not have."""
    if asked is None:
        with accelerating(None, amp=False) as accelerator:
            return torch.device(accelerator.device)
    found = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if found is not None else 0
    known = ["cpu", *(f"{found}:{number}" for number in range(count))]
    if asked not in [*known, *(name.partition(":")[0] for name in known)]:
        raise UsageError(f"device {asked!r}: torch {torch.__version__} has none such here; it has {', '.join(known)}")
    return torch.device(asked)


@contextmanager
def accelerating(device: str | None, amp: bool) -> Iterator[Accelerator]:
    """Give an Accelerator with settings of its own: accelerate keeps the first one's for all the process otherwise.

    Those of an Accelerator that the caller may have are put back in the end.
    """
    chosen = {} if device is None else {"ACCELERATE_TORCH_DEVICE": find_device(device)}
    states = AcceleratorState._shared_state, PartialState._shared_state
    before = [dict(state) for state in states]
    for state in states[: 1 + len(chosen)]:  # where no device is asked for, a caller's choice holds
        state.clear()
    try:
        with patch_environment(**chosen):
            half = half_precision(PartialState().device) if amp else None
            accelerator = Accelerator(mixed_precision=half)
        yield accelerator
        accelerator.free_memory()
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)


def half_precision(device: torch.device) -> str:
    """Name bf16 where the device computes in it, for it needs no scaling of the loss; else fp16."""
    if device.type == "cuda":  # older ones emulate it, slowly
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" or is_bf16_available(True) else "fp16"
