"""Several processes that train one model: who is who, and how they agree.

torchrun and ``accelerate launch`` start them. All of them compute the same, each on its share of the images; files,
checkpoints, caches and all that is printed are left to the first. Alone, everything here is a moment's work.
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
"""How long a process waits for another one that neither answers nor ends; ended by then it has long since."""

BUCKET = 1 << 23  # numbers added up at a time


def launched_world_size() -> int:
    """Count the processes that this one was launched with, before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def world_size() -> int:
    """Count the processes that have met."""
    return distributed.get_world_size() if _is_initialized() else 1


def rank() -> int:
    """Number this process from 0, among those it was launched with."""
    return (
        distributed.get_rank()
        if _is_initialized()
        else int(os.environ.get("RANK", "0"))
        if launched_world_size() > 1
        else 0
    )


def is_main_process() -> bool:
    """Tell whether this is the one that writes."""
    return rank() == 0


def _is_initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _device() -> torch.device:
    """Give where tensors must lie for the others to get them: only gloo takes them from the CPU."""
    if "gloo" in distributed.get_backend():
        return torch.device("cpu")
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, torch.accelerator.current_device_index())


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what torch raises where a process is gone into one line."""
    try:
        yield
    except RuntimeError as exc:
        said = " ".join(str(exc).split())[:120]
        raise ResourceError(
            f"process {rank()} of {world_size()} waits for another that has ended or hangs; its own message says why, "
            f"or the system's log, if it was killed ({said})"
        ) from exc


def all_gather_object(value: Any) -> list[Any]:
    """Give the JSON values of all processes, in order of their numbers."""
    if world_size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    with _explained():
        sizes = [torch.zeros(1, dtype=torch.int64, device=text.device) for _ in range(world_size())]
        distributed.all_gather(sizes, torch.tensor([len(text)], device=text.device))
        longest = max(int(size) for size in sizes)
        texts = [text.new_zeros(longest) for _ in sizes]
        distributed.all_gather(texts, torch.cat([text, text.new_zeros(longest - len(text))]))
    return [json.loads(bytes(other[: int(size)].tolist())) for other, size in zip(texts, sizes, strict=True)]


@contextmanager
def raise_on_all() -> Iterator[None]:
    """Let an error that is raised inside in one process be raised in all of them; nothing in it may wait for others.

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
    told = all_gather_object(None if error is None else [type(error).__name__, str(error)])
    failed = [(number, *one) for number, one in enumerate(told) if one is not None]
    if not failed:
        return
    number, kind, message = failed[0]
    raised: CompressorError = getattr(errors, kind)(message if not number else f"process {number}: {message}")
    raised.shared = True
    raise raised from error


def main_process_first(do: Callable[[], Any]) -> Any:
    """Let the first process do something; give in all what it gives, a JSON value, and raise what it raises.

    Example:
        >>> main_process_first(lambda: 2 + 2)
        4
    """
    if world_size() == 1:
        return do()
    given = None
    with raise_on_all():
        given = do() if is_main_process() else None
    return all_gather_object(given)[0]


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give tensors in all processes, in place, the values they have in the first; shapes and dtypes are the same."""
    if world_size() == 1:
        return
    where = _device()
    with _explained(), torch.no_grad():
        for tensor in tensors:
            if tensor.numel():
                sent = tensor.detach().to(where).contiguous()
                distributed.broadcast(sent.reshape(-1).view(torch.uint8), 0)  # not all dtypes are known to gloo
                tensor.detach().copy_(sent)


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over all processes, in place.

    Args:
        tensors: on one device, and of the same shapes in all processes.
    """
    _reduce(tensors, None)


def all_reduce_mean(tensors: Sequence[Tensor], weight: float) -> None:
    """Take the weighted mean of tensors over all processes, in place, bit for bit the same in all.

    Args:
        tensors: on one device, and of the same shapes in all processes; float.
        weight: of this process's.
    """
    if world_size() == 1 or not tensors:
        return
    share = torch.tensor([weight], dtype=torch.float64).to(tensors[0].device, torch.float32)
    total = share.clone()
    all_reduce_sum([total])
    _reduce(tensors, share / total)


def _reduce(tensors: Sequence[Tensor], factor: Tensor | None) -> None:
    if world_size() == 1:
        return
    with _explained(), torch.no_grad():
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
    bucket: list[Tensor] = []
    held = 0
    for tensor in tensors:
        if bucket and held + tensor.numel() > BUCKET:
            yield bucket
            bucket, held = [], 0
        bucket.append(tensor)
        held += tensor.numel()
    yield bucket


def destroy() -> None:
    """Part from the others, at the end of the work."""
    if _is_initialized():
        distributed.destroy_process_group()
