"""The cache of dense baselines: one file for each, used by one process at a time.

A file is named ``<key>.safetensors``, where the key is the SHA-256 of all that the result depends on. With several
training processes, only the first reads and writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import safetensors.torch
from torch import nn

from compressor.cache import cache_dir
from compressor.checkpointing.serialization import DAMAGE_ERRORS, checksum, read_checked
from compressor.distributed.collectives import broadcast_tensors, main_process_first
from compressor.formats.errors import ResourceError
from compressor.formats.io.atomic import write_atomically

__all__ = ["keep_baseline", "locked", "path_of", "read_baseline"]

_log = logging.getLogger(__name__)
_KEY = "timm-compressor-baseline"
_MINUTE = 60.0


def path_of(identity: Mapping[str, Any]) -> Path:
    """Returns the cache file of a baseline.

    Args:
        identity: all that the baseline depends on, as JSON values.
    """
    return cache_dir() / f"{hashlib.sha256(_canonical(identity).encode()).hexdigest()[:16]}.safetensors"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Holds the lock of a cache entry inside a ``with`` block, waiting for it as long as needed.

    Args:
        path: the file of the entry.

    Yields:
        Whether the entry can be written; if not, a warning is logged and there is no lock.
    """
    lock, seconds = filelock.FileLock(path.with_suffix(".lock")), 0.0
    try:
        # The first process asks again every minute, or the other processes would take its waiting for a hang.
        while (usable := main_process_first(partial(_acquired, lock, path, seconds))) is None:
            if not seconds:
                _log.warning("another process is training this baseline: waiting for it")
            seconds = _MINUTE
        yield usable
    finally:
        lock.release()


def _acquired(lock: filelock.BaseFileLock, path: Path, seconds: float) -> bool | None:
    """Returns whether the lock is held; None while another process holds it, False if the folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=seconds)
    except filelock.Timeout:
        return None
    except OSError as exc:
        _log.warning("%s cannot be written (%s): the baseline will not be kept", path.parent, exc.strerror or exc)
        return False
    return True


def read_baseline(path: Path, identity: Mapping[str, Any], model: nn.Module) -> dict[str, Any] | None:
    """Loads a cached baseline into the model.

    Args:
        path: the cache file.
        identity: all that the baseline depends on, as JSON values; the file must hold the same.
        model: receives the weights.

    Returns:
        The figures stored with the baseline; None if there is no such file or it is damaged.
    """
    figures: dict[str, Any] | None = main_process_first(lambda: _read(path, identity, model))
    if figures is not None:
        broadcast_tensors(model.state_dict().values())
    return figures


def _read(path: Path, identity: Mapping[str, Any], model: nn.Module) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        facts, state = read_checked(path, _KEY, lambda _, state: checksum(state))
        if facts["identity"] != json.loads(_canonical(identity)):
            raise ValueError("it is of another baseline")
        model.load_state_dict(state)
    except (*DAMAGE_ERRORS, RuntimeError) as exc:
        _log.warning("%s is damaged (%s): training the baseline anew", path, " ".join(str(exc).split())[:100])
        return None
    figures: dict[str, Any] = facts["figures"]
    return figures


def keep_baseline(path: Path, identity: Mapping[str, Any], model: nn.Module, figures: Mapping[str, Any]) -> bool:
    """Writes a trained model to the cache.

    Args:
        path: the cache file.
        identity: all that the baseline depends on, as JSON values.
        model: the trained model.
        figures: measured results, as JSON values.

    Returns:
        Whether it could be written; if not, a warning is logged.
    """
    written: bool = main_process_first(lambda: _write(path, identity, model, figures))
    return written


def _write(path: Path, identity: Mapping[str, Any], model: nn.Module, figures: Mapping[str, Any]) -> bool:
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    facts = {"identity": identity, "figures": figures, "crc32": checksum(state)}
    try:  # a single metadata key, because safetensors writes several in random order
        write_atomically(path, safetensors.torch.save(state, {_KEY: _canonical(facts)}), force=True)
    except ResourceError as exc:
        _log.warning("%s: the baseline will not be kept", exc)
        return False
    return True
