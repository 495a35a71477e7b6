"""The device a process trains on, and how processes that were launched together meet.

torchrun and ``accelerate launch`` both describe the processes in environment variables; only those are read here.
"""

from __future__ import annotations

import os

import torch
from torch import distributed

from compressor.distributed import collectives
from compressor.formats.errors import ResourceError, UsageError

__all__ = ["find_device", "half_precision", "init_processes"]

SPLITS = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM",
          "ACCELERATE_USE_PARALLELISM_CONFIG")  # fmt: skip
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}  # of torch.distributed, by device type


def find_device(asked: str | None) -> torch.device:
    """Returns the device this process trains on; processes that were launched together meet here.

    Args:
        asked: such as "cuda:1"; None: the fastest there is. Several processes each have a device of the type.

    Raises:
        UsageError: torch knows no such device, one of several processes asks for a device of its own, or the launcher
            was told to split the model among processes.
        ResourceError: there is no such device here, or the processes could not meet.
    """
    _refuse_splitting()
    if collectives.launched_world_size() == 1:
        return _fastest() if asked is None else _checked(asked)
    fastest = _fastest()
    if asked not in (None, "cpu", fastest.type):
        raise UsageError(f"device {asked!r}: of several processes each has its own; leave it out, or name cpu")
    device = fastest if asked is None else torch.device(asked)
    if device.type != "cpu":
        device = torch.device(device.type, int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
        torch.accelerator.set_device_index(device.index)
    _meet(BACKENDS.get(device.type))
    return device


def init_processes(device: str | None = None) -> None:
    """Makes processes that were launched together meet, unless they have; raises as ``find_device`` does."""
    if collectives.launched_world_size() > collectives.world_size():
        find_device(device)


def half_precision(device: torch.device) -> torch.dtype:
    """Returns bfloat16 where the device computes in it, for it needs no scaling of the loss; else float16."""
    if device.type == "cuda":  # GPUs before Ampere emulate bfloat16, slowly
        supported = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "xpu":
        supported = torch.xpu.is_bf16_supported()
    elif device.type == "mps":
        supported = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        supported = True
    return torch.bfloat16 if supported else torch.float16


def _fastest() -> torch.device:
    """Returns the accelerator, without a number; the processor where there is none or ``launch --cpu`` was used."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1") or not torch.accelerator.is_available():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return accelerator


def _checked(asked: str) -> torch.device:
    """Returns the device of this name where it is here."""
    accelerator = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if accelerator is not None else 0
    present = ["cpu", *(f"{accelerator}:{number}" for number in range(count))]
    if asked in [*present, *(name.partition(":")[0] for name in present)]:
        return torch.device(asked)
    try:
        torch.device(asked)
    except RuntimeError:
        raise UsageError(f"device {asked!r}: torch knows none such; here it has {', '.join(present)}") from None
    raise ResourceError(
        f"device {asked!r}: torch {torch.__version__} has none such here; it has {', '.join(present)}; "
        "without --device (device=None) the fastest of them is taken"
    )


def _refuse_splitting() -> None:
    """Raises UsageError where accelerate was configured to split the model among processes."""
    if splits := [name for name in SPLITS if os.environ.get(name, "").lower() in ("true", "1")]:
        raise UsageError(
            f"{splits[0]}: the model cannot be split among processes, as FSDP does, for a codebook has to see the "
            "whole of its tensors; leave it out: each process then holds the model, and takes its share of the images"
        )


def _meet(backend: str | None) -> None:
    """Initialises torch.distributed from the launcher's environment variables, unless the caller has."""
    if distributed.is_initialized():
        return
    try:
        distributed.init_process_group(backend, timeout=collectives.PATIENCE)
    except (RuntimeError, ValueError, OSError) as exc:
        reason = " ".join(str(exc).split())[:200]
        raise ResourceError(f"process {collectives.rank()} could not meet the others: {reason}") from exc
    if backend == BACKENDS["cpu"] and "OMP_NUM_THREADS" not in os.environ:  # torchrun sets it, other launchers need not
        local = int(os.environ.get("LOCAL_WORLD_SIZE", collectives.world_size()))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local))
