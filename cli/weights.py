"""The models a run starts from: the dense one that is compressed, and a bigger one to distil from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from compressor.checkpointing.manager import Checkpoints
from compressor.cli.configs import ExecutionConfig
from compressor.cli.files import EVAL_BATCH
from compressor.cli.setup import ModelSource, Teacher
from compressor.cli.show import Step, counts, percent
from compressor.data.datasets import Dataset
from compressor.formats.errors import FileError, IntegrityError, MissingError
from compressor.formats.loader import updated_cfg
from compressor.models.baseline import create_model, train_baseline
from compressor.models.checkpoint import ARRAYS, load_checkpoint, read_checkpoint
from compressor.models.teacher import with_normalization
from compressor.training.evaluation import evaluate
from compressor.wording import counted

__all__ = ["dense_model", "named_model", "teacher_model"]


def dense_model(
    source: ModelSource,
    data: Dataset | None,
    execution: ExecutionConfig,
    checkpoints: Checkpoints | None,
    step: Callable[[str], Step],
) -> nn.Module:
    """Returns the model to compress, with the preprocessing of its images in its ``pretrained_cfg``.

    Args:
        source: the model.
        data: what a baseline is trained on; None for a post-training run.
        checkpoints: of the training of a baseline.
        step: makes the step of the run that the terminal shows, from its name.
    """
    if source.config.from_scratch:
        model = create_model(source.config.name, source.args, seed=execution.seed)
    elif data is None or _needs_no_training(source, data):
        model = _given_model(source, execution.seed, step("weights"))
    else:
        model = _trained_model(source, data, execution, checkpoints, step("dense baseline"))
    if source.preprocessing:
        model.pretrained_cfg = updated_cfg(model, source.preprocessing)  # type: ignore[assignment]
    return model


def teacher_model(
    teacher: Teacher, data: Dataset, execution: ExecutionConfig, device: torch.device, step: Step
) -> nn.Module:
    """Returns the model to distil from, for images that are preprocessed as the student's.

    A training of the teacher has no checkpoints: where it is stopped, it starts again.
    """
    if teacher.model is not None:
        top1 = evaluate(teacher.model.to(device), data.eval_loader(EVAL_BATCH, "validation")).top1
        step.done(f"{teacher.source.config.name}  {teacher.checkpoint}  validation {percent(top1)}")
        return teacher.model
    if not _needs_no_training(teacher.source, data):
        # It was trained on what the student is given.
        model = _trained_model(teacher.source, data, execution, None, step)
        return with_normalization(model, data.mean, data.std, {})
    model = _given_model(teacher.source, execution.seed, step)
    preprocessing: Any = model.pretrained_cfg
    return with_normalization(model, data.mean, data.std, preprocessing)


def _given_model(source: ModelSource, seed: int, step: Step) -> nn.Module:
    """Returns the model with the weights that were named."""
    model = named_model(source, seed)
    size = counts(sum(p.numel() for p in model.parameters()))
    step.done(f"{source.config.checkpoint_path or 'pretrained'}  {size} parameters")
    return model


def _trained_model(
    source: ModelSource, data: Dataset, execution: ExecutionConfig, checkpoints: Checkpoints | None, step: Step
) -> nn.Module:
    """Returns the model with the weights of a dense baseline, trained here or by an earlier run."""
    config = source.config
    with _explained_damage(config.name):
        baseline = train_baseline(
            config.name, source.args, data, seed=execution.seed, epochs=config.baseline_epochs,
            pretrained=config.pretrained, on_epoch=step.on_epoch, on_step=step.on_step, device=execution.device,
            amp=execution.amp, checkpoints=checkpoints,
        )  # fmt: skip
    kept = "not kept" if baseline.path is None else f"{'reused from' if baseline.reused else 'kept in'} {baseline.path}"
    epochs, top1 = counted(int(baseline.figures["epochs"]), "epoch"), percent(baseline.figures["validation_top1"])
    step.done(f"{epochs}  validation {top1}  {kept}")
    model = create_model(config.name, source.args, seed=execution.seed)
    model.load_state_dict(dict(baseline.state))
    return model


def _needs_no_training(source: ModelSource, data: Dataset) -> bool:
    """Whether weights were named that need no training on the data before they are shared."""
    config, cfg = source.config, source.named.cfg
    if config.checkpoint_path is not None:
        return True
    channels = cfg.get("input_size", data.input_size)[0]
    fits = cfg.get("num_classes") == data.num_classes and source.args.get("in_chans", channels) == channels
    return config.pretrained and (config.baseline_epochs == 0 or (fits and config.baseline_epochs is None))


def named_model(source: ModelSource, seed: int) -> nn.Module:
    """Builds a model, with pretrained weights or those of a checkpoint where they are named.

    Args:
        source: the model.
        seed: of the weights, where they are random.

    Raises:
        MissingError: timm cannot build the model, or the weights are absent or do not fit.
        IntegrityError: the weights in the hub's cache are damaged.
        UnsupportedError: the checkpoint is damaged, or holds more than tensors.
        FileError: the checkpoint is a packed file that is damaged.
    """
    config, path = source.config, source.config.checkpoint_path
    if path is None:
        with _explained_damage(config.name):
            return create_model(config.name, source.args, pretrained=config.pretrained, seed=seed)
    if path.suffix.lower() in ARRAYS:  # each model's own format, which timm knows
        return create_model(config.name, {**source.args, "checkpoint_path": str(path)}, seed=seed)
    model = create_model(config.name, source.args, seed=seed)
    try:
        load_checkpoint(read_checkpoint(path, pickles=True), model, source.named.architecture)
    except (FileError, MissingError) as exc:
        raise type(exc)(f"--checkpoint-path {exc}") from exc
    return model


@contextmanager
def _explained_damage(model: str) -> Iterator[None]:
    """Raises IntegrityError, with the folder to delete, where the weights in the hub's cache are damaged."""
    try:
        yield
    except SafetensorError as exc:
        from huggingface_hub import constants

        source, place = timm.models.parse_model_name(model)
        if source == "local-dir":
            raise IntegrityError(f"--pretrained: the weights in {place} are damaged ({exc})") from exc
        cfg = timm.models.get_pretrained_cfg(model)
        repository = place.partition("@")[0] if source else "" if cfg is None else cfg.hf_hub_id or model
        name = f"models--{repository.replace('/', '--')}" if repository else ""
        raise IntegrityError(
            f"--pretrained: the weights of {model} in the hub's cache are damaged ({exc}): delete "
            f"{Path(constants.HF_HUB_CACHE) / name} and run again, to fetch them anew"
        ) from exc
