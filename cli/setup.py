"""Everything about a run that can be refused before the long work: model, recipe, data, output."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compressor import model_zoo
from compressor.checkpointing.manager import Checkpoints, checkpoints_in
from compressor.checkpointing.serialization import checksum
from compressor.cli.configs import DataConfig, ExecutionConfig, OutputConfig, Request
from compressor.cli.logs import Logs
from compressor.cli.model_source import (
    ModelSource,
    check_fixed,
    check_head,
    model_args,
    model_source,
    own_preprocessing,
)
from compressor.cli.sharing import SharingConfig
from compressor.cli.targets import TargetConfig
from compressor.data.bad_images import BadImages
from compressor.data.datasets import Dataset, load_data
from compressor.data.preprocessing import resolve_preprocessing
from compressor.distributed.collectives import is_main_process, main_process_first, raise_on_all
from compressor.distributed.devices import find_device
from compressor.formats.errors import MissingError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.atomic import check_not_input, check_writable
from compressor.formats.loader import build_model
from compressor.lifecycle.norms import check_foldable
from compressor.models.checkpoint import why_no_file
from compressor.models.names import NamedModel, find_model
from compressor.models.teacher import load_teacher
from compressor.policy.policy import Policy, Rule
from compressor.policy.recipe import Recipe, Stage
from compressor.sharing.registry import SCHEMES
from compressor.training.compilation import check_backend
from compressor.training.config import TrainingConfig
from compressor.training.optim import make_optimizer

__all__ = ["ModelSource", "Run", "Teacher", "check_sharing", "set_up"]


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
        data_is_named: whether the data are the user's choice, and not the built-in digits.
        history: gets a row for each epoch of each stage.
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
    data_is_named: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)

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


def check_sharing(request: Request, run: Run) -> None:
    """Checks how weights share values by another request, for model and data of a run that is set up.

    Raises:
        CompressorError: that cannot be done.
    """
    _check_has_price(request)
    recipe = _recipe(request)
    _check_optimizers(recipe)
    sketch = build_model(run.source.named.architecture, run.source.args)
    for stage in recipe.stages:
        stage.policy.plan(sketch)


def _download(request: Request) -> None:
    """Downloads the data set, which loading it does where it is not there yet."""
    _load_data(request, find_model(request.model.name))


def _checked(request: Request, device: torch.device) -> Run:
    """Checks and resolves everything but the checkpoints."""
    named = find_model(request.model.name)
    teacher_named = None if request.teacher.teacher is None else find_model(request.teacher.teacher)
    _check_has_price(request)
    recipe = _recipe(request)
    _check_optimizers(recipe)
    check_backend(request.execution.torchcompile)
    output, writes = request.output_path(), is_main_process() and not request.display.dry_run
    inputs = request.model.checkpoint_path, request.teacher.teacher_checkpoint
    check_not_input(output, *filter(None, inputs))
    if writes:
        _check_output(output, request.output)
    if (path := request.model.checkpoint_path) is not None and not path.is_file():
        raise MissingError(f"--checkpoint-path {path}: {why_no_file(path)}")
    data = None if request.post_training else _load_data(request, named)
    source = model_source(request, named, data)
    sketch = build_model(named.architecture, source.args)
    plans = [stage.policy.plan(sketch) for stage in recipe.stages]
    if request.has_price and not any(plan.scheme and plan.scheme.has_price for plan in plans[-1]):
        raise UsageError(
            f"{request.target.flag}: nothing that the recipe shares last has a price of bits{_known_with_price()}"
        )
    if request.output.fold_norms:
        check_foldable(sketch, [plan.site.name for plan in plans[-1] if plan.scheme])
    if data is not None:
        check_head(sketch, data, request.model)
    logs = Logs.of(request.output, output) if writes and data is not None else None
    teacher = None
    if data is not None and teacher_named is not None:
        teacher = _teacher(request, teacher_named, recipe, data)
    return Run(
        source, recipe, data, request.execution, device, output, teacher=teacher, logs=logs, target=request.target,
        calibration=request.calibration, data_is_named=request.data.is_named,
    )  # fmt: skip


def _check_output(output: Path, config: OutputConfig) -> None:
    """Checks that the file can be written; one that exists says whether there is anything to resume."""
    if config.resume and not config.force and output.exists():
        if not checkpoints_in(_folder_of(output)):
            raise MissingError(
                f"nothing to resume: {output} is written and its run has ended, without --keep-checkpoints. Leave out "
                f"--resume and give another name, or train on from its weights with --checkpoint-path {output}"
            )
        raise UsageError(
            f"{output} exists, and the run that --resume goes on with replaces it at its end: add --force, or move "
            "the file away first"
        )
    check_writable(output, config.force)


def _folder_of(output: Path) -> Path:
    """Returns the folder of the checkpoints of a run."""
    return output.with_name(f"{output.name}.checkpoints")


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
        _folder_of(run.output), about, minutes=output.checkpoint_minutes,
        steps=output.checkpoint_steps, resume=output.resume, force=output.force,
    )  # fmt: skip


def _teacher(request: Request, named: NamedModel, recipe: Recipe, data: Dataset) -> Teacher:
    """Returns the teacher, with the weights of its checkpoint where it has one, for the images of the student."""
    config = request.teacher
    if not any(stage.training.epochs and stage.training.distill for stage in recipe.stages):
        raise UsageError(f"--teacher {config.teacher}: nothing is distilled, epochs or distill are 0; leave it out")
    model_config = replace(request.model, name=named.name, checkpoint_path=None, from_scratch=False)
    args = model_args(model_config, request.preprocessing, named, data)
    check_head(build_model(named.architecture, args), data, model_config)
    path = config.teacher_checkpoint
    try:
        model = None if path is None else load_teacher(path, named.architecture, args, data.mean, data.std)
    except MissingError as exc:
        raise MissingError(f"--teacher-checkpoint {exc}") from exc
    return Teacher(ModelSource(model_config, args, named), path, model)


def _check_has_price(request: Request) -> None:
    """Raises UsageError where a target meets options that its price makes pointless, or a scheme without a price."""
    if not request.has_price:
        return
    sharing, flag = request.sharing, request.target.flag
    if fixed := sharing.fixed_by_price():
        raise UsageError(
            f"{flag} finds the shared values by the price of bits: leave out {', '.join(fixed)}{_known_with_price()}"
        )
    if sharing.recipe is None and not _has_price(scheme := sharing.rule(has_price=True)["scheme"]):
        raise UsageError(
            f"{flag} and --scheme {scheme}, which has no price of bits: name another one{_known_with_price()}"
        )


def _has_price(scheme: str) -> bool:
    """Whether a scheme has a price of bits, which is its setting ``rate``."""
    return any(setting.name == "rate" for setting in fields(SCHEMES.find(scheme)))  # type: ignore[arg-type]


def _known_with_price() -> str:
    return f"; schemes with a price: {', '.join(filter(_has_price, sorted(SCHEMES)))}"


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


def _load_data(request: Request, named: NamedModel) -> Dataset:
    """Loads the data set, prepared for the model."""
    model, config, asked = request.model, request.data, request.preprocessing
    bad = BadImages(config.max_bad_images, request.output_path().with_name("bad_images.txt"))
    own = own_preprocessing(model, named)
    resolved = resolve_preprocessing({**asked.asked, "in_chans": model.in_chans}, own)
    data = load_data(
        config.name, config.data_dir, config=resolved, download=config.dataset_download, bad=bad,
        augment=_augmentation(config), class_map=asked.class_map,
    )  # fmt: skip
    if config.workers is not None and data.workers:  # data in memory needs no workers
        data = replace(data, workers=config.workers)
    check_fixed(data, asked, model.in_chans)
    return replace(data, channels_last=request.execution.channels_last)


def _augmentation(config: DataConfig) -> dict[str, Any]:
    """Returns the augmentation that was asked for, by timm's names."""
    augment = {"auto_augment": config.aa, "re_prob": config.reprob}
    return {name: value for name, value in augment.items() if value}
