"""The models a run starts from: the dense one that is compressed, and a bigger one to distil from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from torch import nn

from compressor.cli.files import EVAL_BATCH
from compressor.cli.setup import Run
from compressor.cli.show import Step, counts, percent
from compressor.formats.errors import IntegrityError, MissingError, UnsupportedError
from compressor.models.baseline import create_model, train_baseline
from compressor.models.teacher import with_normalization
from compressor.training.evaluation import evaluate

__all__ = ["dense_model", "named_model", "teacher_model"]


def dense_model(work: Run, step: Callable[[str], Step]) -> nn.Module:
    """Give the model to compress, with its preprocessing written on it."""
    model = _start(work, step)
    if work.data is not None:
        own = {"input_size": work.data.input_size, "mean": work.data.mean, "std": work.data.std}
        model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), **own}  # type: ignore[assignment]
    return model


def teacher_model(work: Run, step: Callable[[str], Step]) -> nn.Module | None:
    """Give the model to distil from, where one was named, for images as the student sees them."""
    teacher, data = work.teacher, work.data
    if teacher is None or data is None:
        return None
    if teacher.model is not None:
        here = step("teacher")
        top1 = evaluate(teacher.model.to(work.device), data.eval_loader(EVAL_BATCH, "validation")).top1
        here.done(f"{work.options.teacher}  {work.options.teacher_checkpoint}  validation {percent(top1)}")
        return teacher.model
    own = replace(work, options=teacher.options, args=teacher.args, checkpoints=None)  # begun anew where it is stopped
    model = _start(own, step, "teacher")
    known: Any = model.pretrained_cfg if _fits_as_it_is(own) else {}  # else it was trained on what the student sees
    return with_normalization(model, data.mean, data.std, known)


def _start(work: Run, step: Callable[[str], Step], name: str | None = None) -> nn.Module:
    options, args = work.options, dict(work.args)
    if options.from_scratch:
        return create_model(options.model, args, seed=options.seed)
    if work.data is None or _fits_as_it_is(work):
        here = step(name or "weights")
        model = named_model(work)
        size = counts(sum(p.numel() for p in model.parameters()))
        here.done(f"{options.checkpoint_path or 'pretrained'}  {size} parameters")
        return model
    here = step(name or "dense baseline")
    with _sound_cache(options.model):
        baseline = train_baseline(
            options.model, args, work.data, seed=options.seed, epochs=options.baseline_epochs,
            pretrained=options.pretrained, on_epoch=here.on_epoch, on_step=here.on_step, device=options.device,
            amp=options.amp, checkpoints=work.checkpoints,
        )  # fmt: skip
    kept = "not kept" if baseline.path is None else f"{'reused from' if baseline.reused else 'kept in'} {baseline.path}"
    here.done(f"{baseline.figures['epochs']} epochs  validation {percent(baseline.figures['validation_top1'])}  {kept}")
    model = create_model(options.model, args, seed=options.seed)
    model.load_state_dict(dict(baseline.state))
    return model


def _fits_as_it_is(work: Run) -> bool:
    """Tell whether the weights named need no training of their own before they are shared."""
    options = work.options
    if options.checkpoint_path is not None:
        return True
    cfg = timm.models.get_pretrained_cfg(options.model)
    assert work.data is not None
    fits = cfg is not None and cfg.num_classes == work.data.num_classes and "in_chans" not in work.args
    return options.pretrained and (options.baseline_epochs == 0 or (fits and options.baseline_epochs is None))


def named_model(work: Run) -> nn.Module:
    """Build the model, with pretrained weights or those of a checkpoint where the options name them.

    Raises:
        MissingError: timm cannot build it, or the weights are absent or do not fit.
        IntegrityError: the weights that the hub keeps here are damaged.
        UnsupportedError: the checkpoint is damaged, or holds more than tensors.
    """
    options, path = work.options, work.options.checkpoint_path
    if path is None:
        with _sound_cache(options.model):
            return create_model(options.model, work.args, pretrained=options.pretrained, seed=options.seed)
    try:
        return create_model(options.model, {**work.args, "checkpoint_path": str(path)}, seed=options.seed)
    except (EOFError, SafetensorError, MissingError):
        _check_readable(path)
        raise


@contextmanager
def _sound_cache(model: str) -> Iterator[None]:
    """Raise IntegrityError, with the folder to delete, where the weights that the hub keeps here are damaged."""
    try:
        yield
    except SafetensorError as exc:
        from huggingface_hub import constants

        cfg = timm.models.get_pretrained_cfg(model)
        name = "" if cfg is None else f"models--{(cfg.hf_hub_id or model).replace('/', '--')}"
        raise IntegrityError(
            f"--pretrained: the weights of {model} in the hub's cache are damaged ({exc}): delete "
            f"{Path(constants.HF_HUB_CACHE) / name} and run again, to fetch them anew"
        ) from exc


def _check_readable(checkpoint: Path) -> None:
    """Read a checkpoint that did not load, alone: does it not fit, or is it none?

    timm lets torch unpickle tensors and plain values only, and torch names what it refused.
    """
    try:
        timm.models.load_state_dict(str(checkpoint))
    except (EOFError, RuntimeError, ValueError, SafetensorError) as exc:  # EOFError, click would take for Ctrl-D
        raise UnsupportedError(f"--checkpoint-path {checkpoint}: damaged, or no checkpoint ({exc})") from exc
