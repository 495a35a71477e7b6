"""Everything about a run that can be refused before the long work: model, recipe, data, output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from compressor import model_zoo
from compressor.checkpointing.manager import Checkpoints
from compressor.checkpointing.serialization import checksum
from compressor.cli.logs import Logs
from compressor.cli.options import Options
from compressor.data.bad_images import BadImages
from compressor.data.datasets import Dataset, load_data
from compressor.distributed.collectives import is_main_process, main_process_first, raise_on_all
from compressor.distributed.devices import find_device
from compressor.formats.codecs.registry import CODECS
from compressor.formats.errors import MissingError, UsageError, did_you_mean
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.atomic import check_writable
from compressor.formats.loader import build_model
from compressor.models.teacher import load_teacher
from compressor.policy.policy import Policy, Rule
from compressor.policy.recipe import Recipe, Stage, Training
from compressor.training.compilation import check_backend
from compressor.training.optim import make_optimizer

__all__ = ["Run", "set_up"]


@dataclass(frozen=True)
class Teacher:
    """A model to distil from.

    Args:
        options: those it is started by.
        args: arguments of ``timm.create_model``.
        model: with the weights of its checkpoint; None where it is to be trained, or timm's.
    """

    options: Options
    args: Mapping[str, Any]
    model: nn.Module | None


@dataclass(frozen=True)
class Run:
    """What is going to be done, all of it checked.

    Args:
        options: as given.
        recipe: what is shared, and how it is trained.
        data: the data set; None for a post-training run.
        args: arguments of ``timm.create_model``.
        output: the file to write.
        device: where the models are measured.
        checkpoints: of the training; None where there is none.
        teacher: the model to distil from, where that is not the dense one.
        logs: what is noted of every epoch; None where there is none.
    """

    options: Options
    recipe: Recipe
    data: Dataset | None
    args: Mapping[str, Any]
    output: Path
    device: torch.device
    checkpoints: Checkpoints | None = None
    teacher: Teacher | None = None
    logs: Logs | None = None


def set_up(options: Options) -> Run:
    """Check everything that can be checked before the long work, in each of several processes; they meet here."""
    options.check()
    device = find_device(options.device)
    if options.dataset_download:
        main_process_first(lambda: _data(options) and None)
    with raise_on_all():
        work = _checked(options, device)
    if work.data is None or options.dry_run:
        return work
    return replace(work, checkpoints=_checkpoints(work, work.data))


def _checked(options: Options, device: torch.device) -> Run:
    for model in filter(None, (options.model, options.teacher)):
        if not timm.is_model(model):
            hint = did_you_mean(model, timm.list_models())
            raise MissingError(f"timm {timm.__version__} has no model {model!r}.{hint}")
    recipe = _recipe(options)
    _check_names(options.codec, recipe)
    check_backend(options.torchcompile)
    output = options.output_path()
    if is_main_process() and not options.dry_run:
        check_writable(output, options.force)
    if options.checkpoint_path is not None and not options.checkpoint_path.is_file():
        raise MissingError(f"--checkpoint-path {options.checkpoint_path}: no such file")
    data = None if options.post_training else _data(options)
    args = _model_args(options, data)
    sketch = build_model(options.model, args)
    for stage in recipe.stages:
        stage.policy.plan(sketch)
    if data is not None:
        _check_head(sketch, data, options)
    logs = Logs.of(options, output) if is_main_process() and data is not None and not options.dry_run else None
    return Run(options, recipe, data, args, output, device, teacher=_teacher(options, recipe, data), logs=logs)


def _checkpoints(work: Run, data: Dataset) -> Checkpoints:
    """Open the folder of checkpoints beside the output: those of the dense baseline, stage 0, and of each stage."""
    options, given = work.options, None if work.teacher is None else work.teacher.model
    about = {
        "model": options.model,
        "args": dict(work.args),
        "recipe": work.recipe.to_dict(),
        "data": {"name": data.name, "version": data.version, "input": data.input_size},
        "pretrained": options.pretrained,
        "from scratch": options.from_scratch,
        "weights given": options.checkpoint_path is not None,
        "baseline epochs": options.baseline_epochs,
        "calibration images": options.calibration_images,
        "seed": options.seed,
        "amp": options.amp,
        "channels last": options.channels_last,
        "torchcompile": options.torchcompile,
        "teacher": options.teacher,
        "weights of the teacher": None if given is None else f"CRC-32 {checksum(given.state_dict()):08x}",
    }
    return Checkpoints(
        work.output.with_name(f"{work.output.name}.checkpoints"), about, minutes=options.checkpoint_minutes,
        steps=options.checkpoint_steps, resume=options.resume, force=options.force,
    )  # fmt: skip


def _teacher(options: Options, recipe: Recipe, data: Dataset | None) -> Teacher | None:
    """Give the teacher, its weights read where it has any, for what the student is given and has to tell apart."""
    if options.teacher is None or data is None:
        return None
    if not any(stage.training.epochs and stage.training.distill for stage in recipe.stages):
        raise UsageError(f"--teacher {options.teacher}: nothing is distilled, epochs or distill are 0; leave it out")
    own = replace(options, model=options.teacher, checkpoint_path=None, from_scratch=False)
    args = _model_args(own, data)
    _check_head(build_model(own.model, args), data, own)
    path = options.teacher_checkpoint
    try:
        model = None if path is None else load_teacher(path, own.model, args, data.mean, data.std)
    except MissingError as exc:
        raise MissingError(f"--teacher-checkpoint {exc}") from exc
    return Teacher(own, args, model)


def _check_names(codec: str, recipe: Recipe) -> None:
    """Try codec, optimiser and schedule, which are not asked for before the end of the long work."""
    known = ["auto", *(name for name in sorted(CODECS) if CODECS[name].general)]
    if codec not in known:
        raise UsageError(f"--codec {codec}: no such codec.{did_you_mean(codec, known)} Known: {', '.join(known)}")
    for training in (stage.training for stage in recipe.stages if stage.training.epochs):
        parameter = [{"params": [nn.Parameter(torch.zeros(2, 2))]}]
        make_optimizer(parameter, training.opt, training.lr, training.sched, training.epochs, 2)


def _recipe(options: Options) -> Recipe:
    if options.recipe is not None:
        recipe = _named_recipe(options.recipe)
        if not (named := options.training()):
            return recipe
        return Recipe(tuple(replace(stage, training=_training(stage.training, named)) for stage in recipe.stages))
    policy = Policy([Rule("*", **options.rule())])
    return Recipe((Stage(policy, _training(Training(), options.training())),))


def _training(training: Training, changes: Mapping[str, Any]) -> Training:
    """Change settings through the recipe's own checks."""
    stage = {**training.__dict__, **changes, "rule": [{"match": "*", "scheme": "learnt"}]}
    checked = Recipe.from_dict({"stage": [{k: v for k, v in stage.items() if not k.startswith("_")}]}, "options")
    return checked.stages[0].training


def _named_recipe(name: str) -> Recipe:
    path = model_zoo.packed_path(name)
    if path.suffix == ".safetensors":
        with PackedFile.open(path) as file:
            if not file.recipe:
                raise MissingError(f"{path} holds no recipe")
            return Recipe.from_dict(file.recipe, str(path))
    if path.suffix != ".toml":
        return Recipe.from_toml(model_zoo.recipe_text(name), f"recipe {name}")
    try:
        return Recipe.from_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise MissingError(f"--recipe {path}: cannot be read ({getattr(exc, 'strerror', None) or exc})") from exc


def _data(options: Options) -> Dataset:
    cfg = timm.models.get_pretrained_cfg(options.model)
    asked = {"img_size": options.img_size, "in_chans": options.in_chans}
    config = resolve_data_config({k: v for k, v in asked.items() if v}, cfg.to_dict() if cfg else {"input_size": None})  # type: ignore[no-untyped-call]
    bad = BadImages(options.max_bad_images, options.output_path().with_name("bad_images.txt"))
    augment = {"auto_augment": options.aa, "re_prob": options.reprob}
    data = load_data(
        options.data_name, options.data_dir, config=config, download=options.dataset_download, bad=bad,
        augment={name: value for name, value in augment.items() if value},
    )  # fmt: skip
    if options.workers is not None and data.workers:  # data in memory need none
        data = replace(data, workers=options.workers)
    channels, size, _ = data.input_size
    for option, asked_for, has in (("--img-size", options.img_size, size), ("--in-chans", options.in_chans, channels)):
        if asked_for not in (None, has):
            raise UsageError(f"{option} {asked_for}: the images of {data.name} have {has}; leave it out")
    return replace(data, channels_last=options.channels_last)


def _model_args(options: Options, data: Dataset | None) -> dict[str, Any]:
    """Give the arguments of ``timm.create_model`` that data and options call for."""
    args = {"num_classes": options.num_classes, "in_chans": options.in_chans, "img_size": options.img_size}
    if data is not None:
        channels, size, _ = data.input_size
        cfg = timm.models.get_pretrained_cfg(options.model)
        fixed = cfg is not None and cfg.fixed_input_size and cfg.input_size[1] != size
        args["num_classes"] = options.num_classes or data.num_classes
        args["in_chans"] = channels if channels != 3 else options.in_chans
        args["img_size"] = size if fixed else None
    return {name: value for name, value in args.items() if value is not None}


def _check_head(model: nn.Module, data: Dataset, options: Options) -> None:
    if options.num_classes not in (None, data.num_classes):
        raise MissingError(f"--num-classes {options.num_classes}: {data.name} has {data.num_classes} classes")
    if getattr(model, "num_classes", data.num_classes) != data.num_classes:
        raise MissingError(
            f"{options.model} tells {model.num_classes} classes apart, {data.name} has {data.num_classes}"
        )
