"""The cache of dense baselines, one file each, used by one process at a time.

In ``$TIMM_COMPRESSOR_CACHE``, else ``$XDG_CACHE_HOME/timm-compressor``, else ``~/.cache/timm-compressor``, as
``<key>.safetensors``; the key is the SHA-256 of all that the result depends on. Of several processes that train
together the first one reads and writes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import safetensors
import safetensors.torch
from torch import nn

from compressor.checkpointing.serialization import checksum
from compressor.distributed.collectives import broadcast_tensors, main_process_first
from compressor.formats.errors import ResourceError
from compressor.formats.io.atomic import write_atomically

__all__ = ["cache_dir", "keep_baseline", "locked", "path_of", "read_baseline"]

_log = logging.getLogger(__name__)
_KEY = "timm-compressor-baseline"
_MINUTE = 60.0


def cache_dir() -> Path:
    """Give the folder baselines are kept in."""
    if own := os.environ.get("TIMM_COMPRESSOR_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "timm-compressor"


def path_of(identity: Mapping[str, Any]) -> Path:
    """Give the file of the baseline that all this, JSON values, makes."""
    return cache_dir() / f"{hashlib.sha256(_canonical(identity).encode()).hexdigest()[:16]}.safetensors"


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the entry's lock; where the folder cannot be written, say so and go on without."""
    lock, seconds = filelock.FileLock(path.with_suffix(".lock")), 0.0
    try:
        # asked again every minute, lest the others take the first, which waits, for one that hangs
        while (usable := main_process_first(partial(_acquired, lock, path, seconds))) is None:
            if not seconds:
                _log.warning("another process is training this baseline: waiting for it")
            seconds = _MINUTE
        yield usable
    finally:
        lock.release()


def _acquired(lock: filelock.BaseFileLock, path: Path, seconds: float) -> bool | None:
    """Tell whether the lock is held; None while another process holds it, False where there can be none."""
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
    """Load a kept baseline into the model, and give its figures; None where there is none, or it is damaged."""
    figures: dict[str, Any] | None = main_process_first(lambda: _read(path, identity, model))
    if figures is not None:
        broadcast_tensors(model.state_dict().values())
    return figures


def _read(path: Path, identity: Mapping[str, Any], model: nn.Module) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[_KEY])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (a file is no mapping)
        if facts["crc32"] != checksum(state) or facts["identity"] != json.loads(_canonical(identity)):
            raise ValueError("checksum or key differ")
        model.load_state_dict(state)
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as exc:
        _log.warning("%s is damaged (%s): training the baseline anew", path, " ".join(str(exc).split())[:100])
        return None
    figures: dict[str, Any] = facts["figures"]
    return figures


def keep_baseline(path: Path, identity: Mapping[str, Any], model: nn.Module, figures: Mapping[str, Any]) -> bool:
    """Write a trained model; tell whether it could be."""
    kept: bool = main_process_first(lambda: _kept(path, identity, model, figures))
    return kept


def _kept(path: Path, identity: Mapping[str, Any], model: nn.Module, figures: Mapping[str, Any]) -> bool:
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    facts = {"identity": identity, "figures": figures, "crc32": checksum(state)}
    try:  # one metadata key: safetensors writes several in random order
        write_atomically(path, safetensors.torch.save(state, {_KEY: _canonical(facts)}), force=True)
    except ResourceError as exc:
        _log.warning("%s: the baseline will not be kept", exc)
        return False
    return True
