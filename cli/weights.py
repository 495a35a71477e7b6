"""The model that the options name, with the weights that they name."""

from __future__ import annotations

from pathlib import Path

import timm
from safetensors import SafetensorError
from torch import nn

from compressor.baseline import create_model
from compressor.cli.setup import Run
from compressor.formats.errors import MissingError, UnsupportedError

__all__ = ["named_model"]


def named_model(work: Run) -> nn.Module:
    """Build the model, with pretrained weights or those of a checkpoint where the options name them.

    Raises:
        MissingError: timm cannot build it, or the weights are absent or do not fit.
        UnsupportedError: the checkpoint is damaged, or holds more than tensors.
    """
    options, path = work.options, work.options.checkpoint_path
    given = {"checkpoint_path": str(path)} if path is not None else {}
    try:
        return create_model(options.model, {**work.args, **given}, pretrained=options.pretrained, seed=options.seed)
    except (EOFError, SafetensorError, MissingError):
        if path is not None:
            _check_readable(path)
        raise


def _check_readable(checkpoint: Path) -> None:
    """Read a checkpoint that did not load, alone: does it not fit, or is it none?

    timm lets torch unpickle tensors and plain values only, and torch names what it refused.
    """
    try:
        timm.models.load_state_dict(str(checkpoint))
    except (EOFError, RuntimeError, ValueError, SafetensorError) as exc:  # EOFError, click would take for Ctrl-D
        raise UnsupportedError(f"--checkpoint-path {checkpoint}: damaged, or no checkpoint ({exc})") from exc
