"""Everything about a run that can be refused before the long work: model, recipe, data, output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_data_config
from torch import nn

from compressor import model_zoo
from compressor.checkpointing.manager import Checkpoints
from compressor.checkpointing.serialization import checksum
from compressor.cli.configs import DataConfig, ExecutionConfig, ModelConfig, Request, TeacherConfig
from compressor.cli.logs import Logs
from compressor.cli.sharing import SharingConfig
from compressor.cli.targets import TargetConfig
from compressor.data.bad_images import BadImages
from compressor.data.datasets import Dataset, load_data
from compressor.distributed.collectives import is_main_process, main_process_first, raise_on_all
from compressor.distributed.devices import find_device
from compressor.formats.codecs.registry import CODECS
from compressor.formats.errors import MissingError, UsageError, did_you_mean
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.atomic import check_writable
from compressor.formats.loader import build_model
from compressor.lifecycle.norms import check_foldable
from compressor.models.teacher import load_teacher
from compressor.policy.policy import Policy, Rule
from compressor.policy.recipe import Recipe, Stage
from compressor.sharing.registry import SCHEMES
from compressor.training.compilation import check_backend
from compressor.training.config import TrainingConfig
from compressor.training.optim import make_optimizer

__all__ = ["ModelSource", "Run", "Teacher", "set_up"]


@dataclass(frozen=True)
class ModelSource:
    """A model that timm can build, and where its weights come from.

    Args:
        config: as asked for.
        args: arguments of ``timm.create_model``.
    """

    config: ModelConfig
    args: Mapping[str, Any]


@dataclass(frozen=True)
class Teacher:
    """A model to distil from, other than the dense one.

    Args:
        source: the model.
        checkpoint: the file of its weights; None where they are timm's, or trained.
        model: with the weights of the checkpoint; None without one.
    """

    source: ModelSource
    checkpoint: Path | None
    model: nn.Module | None


@dataclass(frozen=True)
class Run:
    """The work of a run, all of it checked.

    Args:
        source: the model to compress.
        recipe: what is shared, and how it is trained.
        data: the data set; None for a post-training run.
        execution: how the work is carried out.
        device: where the models are evaluated.
        output: the file to write.
        checkpoints: of the training; None where there is none.
        teacher: the model to distil from, where it is not the dense one.
        logs: of every epoch; None where there are none.
        target: what the price of a bit is searched for in the last stage, or that price.
        calibration: the images that weights are judged by: data, synthetic or none.
    """

    source: ModelSource
    recipe: Recipe
    data: Dataset | None
    execution: ExecutionConfig
    device: torch.device
    output: Path
    checkpoints: Checkpoints | None = None
    teacher: Teacher | None = None
    logs: Logs | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    calibration: str = "data"

    @property
    def has_dense_model(self) -> bool:
        """Whether the run starts from a dense model, and not from random weights."""
        return not self.source.config.from_scratch

    @property
    def teacher_name(self) -> str | None:
        """The name of the model to distil from; None where it is not one of its own."""
        return None if self.teacher is None else self.teacher.source.config.name

    def trains(self, stage: Stage) -> bool:
        """Whether a stage is fine-tuned."""
        return self.data is not None and stage.training.epochs > 0

    def target_of(self, stage: Stage) -> TargetConfig:
        """Returns the target of a stage, which only the last may have."""
        return self.target if stage is self.recipe.stages[-1] else TargetConfig()


def set_up(request: Request) -> Run:
    """Checks everything that can be checked before the long work; where there are several processes, all call it.

    Raises:
        CompressorError: something that was asked for cannot be done.
    """
    request.check()
    device = find_device(request.execution.device)
    if request.data.dataset_download:
        main_process_first(lambda: _download(request))
    with raise_on_all():
        run = _checked(request, device)
    if run.data is None or request.display.dry_run:
        return run
    return replace(run, checkpoints=_checkpoints(request, run, run.data))


def _download(request: Request) -> None:
    """Downloads the data set, which loading it does where it is not there yet."""
    _load_data(request)


def _checked(request: Request, device: torch.device) -> Run:
    """Checks and resolves everything but the checkpoints."""
    _check_models(request.model, request.teacher)
    _check_has_price(request)
    recipe = _recipe(request)
    _check_codec(request.output.codec)
    _check_optimizers(recipe)
    check_backend(request.execution.torchcompile)
    output, writes = request.output_path(), is_main_process() and not request.display.dry_run
    if writes:
        check_writable(output, request.output.force)
    if (path := request.model.checkpoint_path) is not None and not path.is_file():
        raise MissingError(f"--checkpoint-path {path}: no such file")
    data = None if request.post_training else _load_data(request)
    source = ModelSource(request.model, _model_args(request.model, data))
    sketch = build_model(request.model.name, source.args)
    plans = [stage.policy.plan(sketch) for stage in recipe.stages]
    if request.has_price and not any(plan.scheme and plan.scheme.has_price for plan in plans[-1]):
        raise UsageError(f"{request.target.flag}: nothing that the recipe shares last has a price of bits{_priced()}")
    if request.output.fold_norms:
        check_foldable(sketch, [plan.site.name for plan in plans[-1] if plan.scheme])
    if data is not None:
        _check_head(sketch, data, request.model)
    logs = Logs.of(request.output, output) if writes and data is not None else None
    teacher = None if data is None else _teacher(request.teacher, request.model, recipe, data)
    return Run(
        source, recipe, data, request.execution, device, output, teacher=teacher, logs=logs, target=request.target,
        calibration=request.calibration,
    )  # fmt: skip


def _checkpoints(request: Request, run: Run, data: Dataset) -> Checkpoints:
    """Opens the folder of checkpoints beside the output: those of the dense baseline, stage 0, and of each stage."""
    model, execution, output = request.model, request.execution, request.output
    teacher = None if run.teacher is None else run.teacher.model
    about = {
        "model": model.name,
        "args": dict(run.source.args),
        "recipe": run.recipe.to_dict(),
        "data": {"name": data.name, "version": data.version, "input": data.input_size},
        "pretrained": model.pretrained,
        "from scratch": model.from_scratch,
        "weights given": model.checkpoint_path is not None,
        "baseline epochs": model.baseline_epochs,
        "calibration images": execution.calibration_images,
        "seed": execution.seed,
        "amp": execution.amp,
        "channels last": execution.channels_last,
        "torchcompile": execution.torchcompile,
        "teacher": request.teacher.teacher,
        "weights of the teacher": None if teacher is None else f"CRC-32 {checksum(teacher.state_dict()):08x}",
        **({"target": request.target.arguments, "calibration": run.calibration} if request.has_price else {}),
    }
    return Checkpoints(
        run.output.with_name(f"{run.output.name}.checkpoints"), about, minutes=output.checkpoint_minutes,
        steps=output.checkpoint_steps, resume=output.resume, force=output.force,
    )  # fmt: skip


def _teacher(config: TeacherConfig, student: ModelConfig, recipe: Recipe, data: Dataset) -> Teacher | None:
    """Returns the teacher, with the weights of its checkpoint where it has one, for the images of the student."""
    if config.teacher is None:
        return None
    if not any(stage.training.epochs and stage.training.distill for stage in recipe.stages):
        raise UsageError(f"--teacher {config.teacher}: nothing is distilled, epochs or distill are 0; leave it out")
    model_config = replace(student, name=config.teacher, checkpoint_path=None, from_scratch=False)
    args = _model_args(model_config, data)
    _check_head(build_model(model_config.name, args), data, model_config)
    path = config.teacher_checkpoint
    try:
        model = None if path is None else load_teacher(path, model_config.name, args, data.mean, data.std)
    except MissingError as exc:
        raise MissingError(f"--teacher-checkpoint {exc}") from exc
    return Teacher(ModelSource(model_config, args), path, model)


def _check_models(model: ModelConfig, teacher: TeacherConfig) -> None:
    for name in filter(None, (model.name, teacher.teacher)):
        if not timm.is_model(name):
            hint = did_you_mean(name, timm.list_models())
            raise MissingError(f"timm {timm.__version__} has no model {name!r}.{hint}")


def _check_has_price(request: Request) -> None:
    """Raises UsageError where a target meets options that its price makes pointless, or a scheme without a price."""
    if not request.has_price:
        return
    sharing, flag = request.sharing, request.target.flag
    if fixed := sharing.fixed_by_price():
        raise UsageError(
            f"{flag} finds the shared values by the price of bits: leave out {', '.join(fixed)}{_priced()}"
        )
    if sharing.recipe is None and not _has_price(scheme := sharing.rule(has_price=True)["scheme"]):
        raise UsageError(f"{flag} and --scheme {scheme}, which has no price of bits: name another one{_priced()}")


def _has_price(scheme: str) -> bool:
    """Whether a scheme has a price of bits, which is its setting ``rate``."""
    return any(setting.name == "rate" for setting in fields(SCHEMES.find(scheme)))  # type: ignore[arg-type]


def _priced() -> str:
    return f"; schemes with a price: {', '.join(filter(_has_price, sorted(SCHEMES)))}"


def _check_codec(codec: str) -> None:
    """Checks the name of the codec, which is needed only at the end of the long work."""
    if codec == "auto" or (codec in CODECS and CODECS[codec].general):
        return
    known = ["auto", *(name for name in sorted(CODECS) if CODECS[name].general)]
    raise UsageError(f"--codec {codec}: no such codec.{did_you_mean(codec, known)} Known: {', '.join(known)}")


def _check_optimizers(recipe: Recipe) -> None:
    """Builds optimiser and schedule of each stage for a small parameter, which checks their names and settings."""
    for training in (stage.training for stage in recipe.stages if stage.training.epochs):
        parameters = [{"params": [nn.Parameter(torch.zeros(2, 2))]}]
        make_optimizer(parameters, training.opt, training.lr, training.sched, training.epochs, 2)


def _recipe(request: Request) -> Recipe:
    """Returns the recipe that was named, or one of a single stage, with the training options that were named."""
    recipe = _named_recipe(request.sharing, request.has_price)
    overrides = request.training_overrides()
    stages = [
        replace(stage, training=TrainingConfig.resolve(stage.training, overrides)) if overrides else stage
        for stage in recipe.stages
    ]
    return Recipe(tuple(stages))


def _named_recipe(sharing: SharingConfig, has_price: bool) -> Recipe:
    if sharing.recipe is None:
        return Recipe((Stage(Policy([Rule("*", **sharing.rule(has_price))])),))
    path = model_zoo.packed_path(sharing.recipe)
    if path.suffix == ".safetensors":
        with PackedFile.open(path) as file:
            if not file.recipe:
                raise MissingError(f"{path} holds no recipe")
            return Recipe.from_dict(file.recipe, str(path))
    if path.suffix != ".toml":
        return Recipe.from_toml(model_zoo.recipe_text(sharing.recipe), f"recipe {sharing.recipe}")
    try:
        return Recipe.from_toml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as exc:
        raise MissingError(f"--recipe {path}: cannot be read ({getattr(exc, 'strerror', None) or exc})") from exc


def _load_data(request: Request) -> Dataset:
    """Loads the data set, prepared for the model."""
    model, config = request.model, request.data
    bad = BadImages(config.max_bad_images, request.output_path().with_name("bad_images.txt"))
    data = load_data(
        config.name, config.data_dir, config=_preprocessing(model), download=config.dataset_download, bad=bad,
        augment=_augmentation(config),
    )  # fmt: skip
    if config.workers is not None and data.workers:  # data in memory needs no workers
        data = replace(data, workers=config.workers)
    channels, size, _ = data.input_size
    for flag, asked, has in (("--img-size", model.img_size, size), ("--in-chans", model.in_chans, channels)):
        if asked not in (None, has):
            raise UsageError(f"{flag} {asked}: the images of {data.name} have {has}; leave it out")
    return replace(data, channels_last=request.execution.channels_last)


def _preprocessing(model: ModelConfig) -> dict[str, Any]:
    """Returns timm's data config of the model, with the image size and channels that were asked for."""
    cfg = timm.models.get_pretrained_cfg(model.name)
    asked = {"img_size": model.img_size, "in_chans": model.in_chans}
    own = cfg.to_dict() if cfg else {"input_size": None}  # type: ignore[no-untyped-call]
    config: dict[str, Any] = resolve_data_config({k: v for k, v in asked.items() if v}, own)  # type: ignore[no-untyped-call]
    return config


def _augmentation(config: DataConfig) -> dict[str, Any]:
    """Returns the augmentation that was asked for, by timm's names."""
    augment = {"auto_augment": config.aa, "re_prob": config.reprob}
    return {name: value for name, value in augment.items() if value}


def _model_args(config: ModelConfig, data: Dataset | None) -> dict[str, Any]:
    """Returns the arguments of ``timm.create_model`` that the data and the config call for."""
    args = {"num_classes": config.num_classes, "in_chans": config.in_chans, "img_size": config.img_size}
    cfg = timm.models.get_pretrained_cfg(config.name)
    if cfg is not None and not cfg.fixed_input_size:  # its constructor knows no size
        args["img_size"] = None
    if data is not None:
        channels, size, _ = data.input_size
        needs_size = cfg is not None and cfg.fixed_input_size and cfg.input_size[1] != size
        args["num_classes"] = config.num_classes or data.num_classes
        args["in_chans"] = channels if channels != 3 else config.in_chans
        args["img_size"] = size if needs_size else None
    return {name: value for name, value in args.items() if value is not None}


def _check_head(model: nn.Module, data: Dataset, config: ModelConfig) -> None:
    """Raises MissingError unless the model has the classes of the data."""
    if config.num_classes not in (None, data.num_classes):
        raise MissingError(f"--num-classes {config.num_classes}: {data.name} has {data.num_classes} classes")
    if getattr(model, "num_classes", data.num_classes) != data.num_classes:
        raise MissingError(f"{config.name} tells {model.num_classes} classes apart, {data.name} has {data.num_classes}")
