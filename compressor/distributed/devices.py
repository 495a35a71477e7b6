"""Devices and processes, as accelerate chooses them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import is_bf16_available, parse_flag_from_env, patch_environment
from torch import nn
from torch.optim import Optimizer

from compressor.distributed import collectives
from compressor.formats.errors import ResourceError, UsageError

__all__ = ["accelerating", "find_device", "half_precision", "init_processes", "prepared"]

SPLITS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM",
          "ACCELERATE_USE_PARALLELISM_CONFIG")  # fmt: skip


def find_device(asked: str | None) -> torch.device:
    """Give the device asked for, None for accelerate's choice.

    Raises UsageError for what torch does not call a device, ResourceError for one that is not here.
    Processes that were launched together meet here.
    """
    if asked is None or collectives.launched_world_size() > 1:
        with accelerating(asked, amp=False) as accelerator:
            return torch.device(accelerator.device)
    return _known(asked)


def _known(asked: str) -> torch.device:
    found = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if found is not None else 0
    known = ["cpu", *(f"{found}:{number}" for number in range(count))]
    if asked in [*known, *(name.partition(":")[0] for name in known)]:
        return torch.device(asked)
    try:
        torch.device(asked)
    except RuntimeError:
        raise UsageError(f"device {asked!r}: torch knows none such; here it has {', '.join(known)}") from None
    raise ResourceError(
        f"device {asked!r}: torch {torch.__version__} has none such here; it has {', '.join(known)}; "
        "without --device (device=None) the fastest of them is taken"
    )


def init_processes(device: str | None = None) -> None:
    """Let processes that were launched together meet, unless they have."""
    if collectives.launched_world_size() > collectives.world_size():
        find_device(device)


@contextmanager
def accelerating(device: str | None, amp: bool) -> Iterator[Accelerator]:
    """Give an Accelerator with settings of its own: accelerate keeps the first one's for all the process otherwise.

    Those of an Accelerator that the caller may have are put back in the end.

    Raises UsageError for a device that cannot be, or where accelerate was told to split the model among collectives.
    """
    chosen = _environment(device)
    states = AcceleratorState._shared_state, PartialState._shared_state
    before = [dict(state) for state in states]
    for state in states[: 1 + bool(chosen)]:  # where no device is asked for, a caller's choice holds
        state.clear()
    try:
        with patch_environment(**chosen):
            where = _device_of_state(parse_flag_from_env("ACCELERATE_USE_CPU"))
            accelerator = Accelerator(mixed_precision=half_precision(where) if amp else None)
        yield accelerator
        accelerator.free_memory()
    finally:
        for state, kept in zip(states, before, strict=True):
            state.clear()
            state.update(kept)


def _environment(device: str | None) -> dict[str, str]:
    """Give what accelerate has to be told; nothing where all is left to it."""
    if splits := [name for name in SPLITS if os.environ.get(name, "").lower() in ("true", "1")]:
        raise UsageError(
            f"{splits[0]}: the model cannot be split among processes, as FSDP does, for a codebook has to see the "
            "whole of its tensors; leave it out: each process then holds the model, and takes its share of the images"
        )
    if collectives.launched_world_size() == 1:
        return {} if device is None else {"ACCELERATE_TORCH_DEVICE": str(_known(device))}
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device not in (None, "cpu", found and found.type):
        raise UsageError(f"device {device!r}: of several processes each has its own; leave it out, or name cpu")
    return {"ACCELERATE_USE_CPU": "true"} if found is None or device == "cpu" else {}


def _device_of_state(on_cpu: bool) -> torch.device:
    """Give this process's device; several meet here."""
    try:
        state = PartialState(on_cpu, timeout=collectives.PATIENCE)
    except (RuntimeError, ValueError, OSError) as exc:
        if collectives.launched_world_size() == 1:
            raise
        said = " ".join(str(exc).split())[:200]
        raise ResourceError(f"process {collectives.rank()} could not meet the others: {said}") from exc
    return torch.device(state.device)


def half_precision(device: torch.device) -> str:
    """Name bf16 where the device computes in it, for it needs no scaling of the loss; else fp16."""
    if device.type == "cuda":  # older ones emulate it, slowly
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return "bf16" if device.type == "cpu" or is_bf16_available(True) else "fp16"


@contextmanager
def prepared(accelerator: Accelerator, model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[nn.Module, Optimizer]]:
    """Let accelerate prepare both, and take off the model again what it leaves there.

    It marks the model, so that the next run would not place it, and has its forward pass run under autocast. To it the
    model is for evaluation, or it would wrap it for several processes; and the loader is not its to prepare: its own
    loads a batch ahead, so that what is drawn for it could not be drawn again. See docs/decisions/0010.
    """
    left = "_is_accelerate_prepared", "_original_forward", "forward"
    before = {name: vars(model)[name] for name in left if name in vars(model)}
    try:
        yield (
            cast(nn.Module, accelerator.prepare_model(model, evaluation_mode=True)),
            cast(Optimizer, accelerator.prepare_optimizer(optimizer)),
        )
    finally:
        for name in left:
            vars(model).pop(name, None)
        vars(model).update(before)
