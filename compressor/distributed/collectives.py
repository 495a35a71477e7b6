"""Several processes that train one model: their ranks, and how they agree.

torchrun and ``accelerate launch`` start them. All compute the same, each on its share of the images; files, caches,
checkpoints and everything that is printed are left to the first. In a single process every function here returns at
once.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from compressor.formats import errors
from compressor.formats.errors import CompressorError, ResourceError

__all__ = [
    "PATIENCE",
    "all_gather_object",
    "all_reduce_mean",
    "all_reduce_sum",
    "broadcast_tensors",
    "destroy",
    "is_main_process",
    "launched_world_size",
    "main_process_first",
    "raise_on_all",
    "rank",
    "world_size",
]  # fmt: skip

PATIENCE = timedelta(minutes=30)
"""How long a process waits for another that hangs; of one that has ended it hears at once."""

BUCKET = 1 << 23  # numbers that are reduced at a time


def launched_world_size() -> int:
    """Returns the number of processes that this one was launched with, whether or not they have met."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def world_size() -> int:
    """Returns the number of processes that have met, 1 where there is no process group."""
    return distributed.get_world_size() if _is_initialized() else 1


def rank() -> int:
    """Returns the number of this process, from 0, among those it was launched with."""
    if _is_initialized():
        return distributed.get_rank()
    return int(os.environ.get("RANK", "0")) if launched_world_size() > 1 else 0


def is_main_process() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _device() -> torch.device:
    """Returns the device that the backend sends tensors from: only gloo sends them from the processor."""
    if "gloo" in distributed.get_backend():
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turns what torch raises where a process is gone into a ResourceError of one line."""
    try:
        yield
    except RuntimeError as exc:
        reason = " ".join(str(exc).split())[:120]
        raise ResourceError(
            f"process {rank()} of {world_size()} waits for another that has ended or hangs; its own message says why, "
            f"or the system's log, if it was killed ({reason})"
        ) from exc


def all_gather_object(value: Any) -> list[Any]:
    """Returns the values of all processes, each of which JSON can represent, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    with _one_line_errors():
        sizes = [torch.zeros(1, dtype=torch.int64, device=text.device) for _ in range(world_size())]
        distributed.all_gather(sizes, torch.tensor([len(text)], device=text.device))
        longest = max(int(size) for size in sizes)
        texts = [text.new_zeros(longest) for _ in sizes]
        distributed.all_gather(texts, torch.cat([text, text.new_zeros(longest - len(text))]))
    return [json.loads(bytes(padded[: int(size)].tolist())) for padded, size in zip(texts, sizes, strict=True)]


@contextmanager
def raise_on_all() -> Iterator[None]:
    """Raises an error that one process raises inside in all of them; nothing inside may wait for other processes.

    Raises:
        CompressorError: the error of the process with the lowest rank that has one.

    Example:
        >>> with raise_on_all():
        ...     value = 1
    """
    error: CompressorError | None = None
    try:
        yield
    except CompressorError as exc:
        if world_size() == 1 or exc.shared:
            raise
        error = exc
    reports = all_gather_object(None if error is None else [type(error).__name__, str(error)])
    failed = [(process, *report) for process, report in enumerate(reports) if report is not None]
    if not failed:
        return
    process, kind, message = failed[0]
    raised: CompressorError = getattr(errors, kind)(message if not process else f"process {process}: {message}")
    raised.shared = True
    raise raised from error


def main_process_first(do: Callable[[], Any]) -> Any:
    """Calls ``do`` in the first process; returns its result, a JSON value, in all of them, and raises its error in all.

    Example:
        >>> main_process_first(lambda: 2 + 2)
        4
    """
    if world_size() == 1:
        return do()
    result = None
    with raise_on_all():
        result = do() if is_main_process() else None
    return all_gather_object(result)[0]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Sets tensors in all processes, in place, to the values they have in the first; shapes and dtypes are the same."""
    if world_size() == 1:
        return
    device = _device()
    with _one_line_errors(), torch.no_grad():
        for tensor in tensors:
            if tensor.numel():
                sent = tensor.detach().to(device).contiguous()
                distributed.broadcast(sent.reshape(-1).view(torch.uint8), 0)  # as bytes: gloo does not know all dtypes
                tensor.detach().copy_(sent)


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sums tensors over all processes, in place.

    Args:
        tensors: on one device, and of the same shapes in all processes.
    """
    _reduce(tensors, None)


def all_reduce_mean(tensors: Sequence[Tensor], weight: float) -> None:
    """Averages tensors over all processes, in place, with a result that is the same in all bit for bit.

    Args:
        tensors: float, on one device, and of the same shapes in all processes.
        weight: of this process's tensors in the mean.
    """
    if world_size() == 1 or not tensors:
        return
    share = torch.tensor([weight], dtype=torch.float64).to(tensors[0].device, torch.float32)
    total = share.clone()
    all_reduce_sum([total])
    _reduce(tensors, share / total)


def _reduce(tensors: Sequence[Tensor], factor: Tensor | None) -> None:
    """Sums tensors over all processes, each multiplied by its process's factor."""
    if world_size() == 1:
        return
    with _one_line_errors(), torch.no_grad():
        for bucket in _buckets(tensors):
            dtype = functools.reduce(torch.promote_types, {tensor.dtype for tensor in bucket})
            if factor is not None:
                dtype = torch.promote_types(dtype, torch.float32)  # no sum is taken in half precision
            flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in bucket])
            flat = (flat if factor is None else flat.mul_(factor)).to(_device())
            distributed.all_reduce(flat)
            for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.detach().copy_(summed.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yields the tensors in lists of at most ``BUCKET`` numbers, or of one tensor that has more."""
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        if bucket and numbers + tensor.numel() > BUCKET:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    yield bucket


def destroy() -> None:
    """Leaves the process group, where there is one, at the end of the work."""
    if _is_initialized():
        distributed.destroy_process_group()
