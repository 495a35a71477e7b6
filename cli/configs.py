"""What ``compress MODEL`` was asked to do: a few configs, built once from the command line, and how they fit together.

Nothing here imports torch, timm or pydantic, so that ``--help`` is quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compressor.calibration.image_counts import DEFAULT_IMAGES, FEWEST_IMAGES
from compressor.cli.click_options import byte_size, from_values, given_flags
from compressor.cli.completion import codecs, completing, models
from compressor.cli.files import PackedPath
from compressor.cli.preprocessing import PreprocessingConfig
from compressor.cli.sharing import SharingConfig
from compressor.cli.spelling import check_codec, check_models
from compressor.cli.targets import TARGETS, TargetConfig
from compressor.config_fields import config_field, config_fields
from compressor.data.built_in import check_name
from compressor.formats.errors import MissingError, UsageError
from compressor.training.config import TrainingConfig

__all__ = [
    "DataConfig",
    "DisplayConfig",
    "ExecutionConfig",
    "GateConfig",
    "ModelConfig",
    "OutputConfig",
    "Request",
    "TeacherConfig",
]

ENDING = ".safetensors"


@dataclass(frozen=True)
class DataConfig:
    """The images to train and evaluate on."""

    dataset: str | None = config_field(None, "digits, fashion-mnist, or a timm name: torch/cifar10, hfds/..., wds/...")
    data_dir: Path | None = config_field(None, "Folder of the data; alone: images in train/CLASS and val/CLASS.")
    dataset_download: bool = config_field(False, "Let torchvision fetch torch/... into --data-dir.")
    max_bad_images: int = config_field(
        0,
        "Images that may be unreadable; all are listed in bad_images.txt beside the output.",
        ge=0,
        metavar="N",
    )
    workers: int | None = config_field(
        None,
        "Processes that open images; 0: this one alone. [default: as many as processors, up to 4]",
        ge=0,
        flags=("-j", "--workers"),
    )
    aa: str | None = config_field(None, "timm's augmentation of images, such as rand-m9-mstd0.5.", metavar="POLICY")
    reprob: float | None = config_field(None, "Share of images a part of which is erased.", ge=0, le=1)

    @property
    def is_named(self) -> bool:
        """Whether a data set was named."""
        return self.dataset is not None or self.data_dir is not None

    @property
    def name(self) -> str:
        """The data set to load; "" for a folder of images."""
        return self.dataset if self.dataset is not None else "" if self.data_dir is not None else "digits"

    @property
    def label(self) -> str:
        """A short name for files."""
        folder = "data" if self.data_dir is None else self.data_dir.resolve().name
        return self.name.rpartition("/")[2] or folder

    def check(self) -> None:
        """Raises UsageError for options that contradict each other, MissingError for data that are not there."""
        if self.dataset_download and not (self.dataset or "").startswith("torch/"):
            raise UsageError("--dataset-download needs --dataset torch/...")
        if self.data_dir is not None and not self.data_dir.is_dir() and not self.dataset_download:
            raise MissingError(f"--data-dir {self.data_dir}: no such folder")
        if self.dataset is not None:
            check_name(self.dataset, has_folder=self.data_dir is not None)


@dataclass(frozen=True)
class ModelConfig:
    """The model to compress, and where its weights come from."""

    name: str
    pretrained: bool = config_field(False, "Start from timm's weights; without data no training follows.")
    checkpoint_path: Path | None = config_field(
        None, "Start from these weights; without data no training follows.", click={"type": PackedPath(path_type=Path)}
    )
    from_scratch: bool = config_field(False, "Train weights and shared values together from random ones.")
    num_classes: int | None = config_field(None, "Classes of the head. [default: the data's]", ge=1)
    in_chans: int | None = config_field(None, "Channels of the images. [default: the data's]", ge=1)
    baseline_epochs: int | None = config_field(
        None, "Epochs of the training of dense models. [default: 12, or 40]", ge=0
    )

    @property
    def label(self) -> str:
        """The name for files: of a repository or folder, the last part.

        >>> [ModelConfig(name).label for name in ("vit_tiny", "hf-hub:timm/resnet18.a1_in1k@main", "local-dir:a/b/")]
        ['vit_tiny', 'resnet18.a1_in1k', 'b']
        """
        source, colon, place = self.name.partition(":")
        if not colon:
            return self.name
        return Path(place).resolve().name if source == "local-dir" else place.partition("@")[0].rpartition("/")[2]

    @property
    def has_weights(self) -> bool:
        """Whether trained weights were named."""
        return self.pretrained or self.checkpoint_path is not None

    def check(self) -> None:
        """Raises UsageError for options that contradict each other."""
        if self.pretrained and self.checkpoint_path is not None:
            raise UsageError("--pretrained and --checkpoint-path: name one")
        if self.from_scratch and self.has_weights:
            raise UsageError("--from-scratch starts from random weights: leave out --pretrained and --checkpoint-path")


@dataclass(frozen=True)
class TeacherConfig:
    """A model to distil from, other than the dense one."""

    teacher: str | None = config_field(
        None,
        "Distil from this bigger timm model instead.",
        metavar="MODEL",
        click={"shell_complete": completing(models)},
    )
    teacher_checkpoint: Path | None = config_field(
        None, "Its weights, packed or not. [default: trained and kept]", click={"type": PackedPath(path_type=Path)}
    )

    @property
    def is_trained_here(self) -> bool:
        """Whether a teacher was named, without its weights."""
        return self.teacher is not None and self.teacher_checkpoint is None

    def check(self, distill: float | None) -> None:
        """Raises UsageError for options that contradict each other, or the weight of distillation."""
        if self.teacher_checkpoint is not None and self.teacher is None:
            raise UsageError(f"--teacher-checkpoint {self.teacher_checkpoint}: name its model with --teacher")
        if self.teacher is not None and distill == 0:
            raise UsageError(f"--teacher {self.teacher} and --distill 0: leave out one")


@dataclass(frozen=True)
class ExecutionConfig:
    """How the work is carried out."""

    device: str | None = config_field(None, "cpu, cuda, cuda:1, mps, ... [default: the fastest there is]")
    amp: bool = config_field(False, "Mixed precision: bfloat16, or float16 where a GPU lacks it.")
    channels_last: bool = config_field(False, "Images with their channels together in memory.")
    torchcompile: str | None = config_field(
        None,
        "Compile fine-tuning, as torch.compile does. [default backend: inductor]",
        metavar="BACKEND",
        click={"is_flag": False, "flag_value": "inductor"},
    )
    calibration_images: int = config_field(
        1024, f"Training images to re-estimate BatchNorm on; at most {DEFAULT_IMAGES} serve a target.", ge=0
    )
    seed: int = config_field(0, "Seed of everything random.", ge=0, le=2**32 - 1)  # the most that numpy takes


@dataclass(frozen=True)
class OutputConfig:
    """What is written: the file, checkpoints on the way to it, and figures of its training."""

    codec: str = config_field("auto", "How indices become bytes.", click={"shell_complete": completing(codecs)})
    untouched: str | None = config_field(
        None,
        "What is not shared, such as norms and biases, as float32 or rounded. [default: f32; f16 for a target]",
        choices=("f32", "f16"),
    )
    fold_norms: bool | None = config_field(
        None,
        "Fold BatchNorm statistics into scale and shift, and round norms and biases. [default: for a target]",
        flags=("--fold-norms/--no-fold-norms",),
        click={"default": None},
    )
    output: Path | None = config_field(
        None, "File to write. [default: MODEL-DATA-SCHEME.safetensors]", flags=("-o", "--output")
    )
    force: bool = config_field(False, "Replace the file if it exists.")
    resume: bool = config_field(
        False, "Go on where the same command was stopped or killed; with more --epochs, to their end."
    )
    checkpoint_minutes: float = config_field(
        10.0, "Minutes between checkpoints in the middle of an epoch; 0: only at its end.", ge=0
    )
    checkpoint_steps: int = config_field(0, "Steps between checkpoints, as well; 0: none.", ge=0)
    keep_checkpoints: bool = config_field(
        False, "Keep the last ones when the file is written, for --resume with more --epochs."
    )
    summary: Path | None = config_field(
        None, "A row of figures per epoch, as timm's. [default: OUTPUT.summary.csv]", metavar="FILE"
    )
    log: str | None = config_field(None, "Note them in OUTPUT.tensorboard, too.", choices=("tensorboard",))

    def check(self) -> None:
        """Raises UsageError for a file with the ending of another format, or a codec that there is not."""
        if self.output is not None and self.output.suffix not in ("", ENDING):
            raise UsageError(f"-o {self.output}: a packed file ends in {ENDING}, name it {self.output.stem}{ENDING}")
        check_codec(self.codec)

    @property
    def half_untouched(self) -> bool | None:
        """Whether the tensors that are not shared are stored as float16; None: where a target is searched for."""
        return None if self.untouched is None else self.untouched == "f16"


@dataclass(frozen=True)
class GateConfig:
    """What the packed file must reach to be written under its own name."""

    require_top1: float | None = config_field(
        None, "Exit 5 below; the file is kept as OUTPUT.rejected.", ge=0, le=100, metavar="PERCENT"
    )
    require_drop: float | None = config_field(
        None, "Likewise where top-1 falls by more.", ge=-100, le=100, metavar="POINTS"
    )
    require_size: int | None = config_field(
        None, "Likewise for a larger file, as 1.5MB.", metavar="BYTES", click={"type": byte_size}
    )


@dataclass(frozen=True)
class DisplayConfig:
    """What is printed."""

    dry_run: bool = config_field(False, "Show what becomes of every tensor, and the size; write nothing.")
    everything: bool = config_field(False, "Show every tensor in the table.", flags=("--all",))
    as_json: bool = config_field(False, "Print one JSON document on stdout instead of the table.", flags=("--json",))


@dataclass(frozen=True)
class Request:
    """Everything that ``compress MODEL`` was asked to do.

    Args:
        model, sharing, target, data, preprocessing, teacher, execution, output, gates, display: the configs.
        training: fields of ``TrainingConfig`` that were named; they win over those of a recipe.
    """

    model: ModelConfig
    sharing: SharingConfig = field(default_factory=SharingConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    data: DataConfig = field(default_factory=DataConfig)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    training: Mapping[str, Any] = field(default_factory=dict)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    output: OutputConfig = field(default_factory=OutputConfig)
    gates: GateConfig = field(default_factory=GateConfig)
    display: DisplayConfig = field(default_factory=DisplayConfig)

    @classmethod
    def from_command_line(cls, model: str, values: Mapping[str, Any]) -> Request:
        """Builds the configs from the values of the options; those that a command does not have keep their defaults."""
        training = {name: value for name in TrainingConfig.names() if (value := values.get(name)) is not None}
        return cls(
            model=from_values(ModelConfig, values, name=model),
            sharing=from_values(SharingConfig, values),
            target=from_values(TargetConfig, values),
            data=from_values(DataConfig, values),
            preprocessing=from_values(PreprocessingConfig, values),
            training=training,
            teacher=from_values(TeacherConfig, values),
            execution=from_values(ExecutionConfig, values),
            output=from_values(OutputConfig, values),
            gates=from_values(GateConfig, values),
            display=from_values(DisplayConfig, values),
        )

    @property
    def post_training(self) -> bool:
        """Whether there is nothing to train on: weights were named, and no data."""
        return self.model.has_weights and not self.data.is_named

    @property
    def has_price(self) -> bool:
        """Whether bits have a price: one is named, or searched for a target."""
        return self.target.flag is not None

    @property
    def calibration(self) -> str:
        """The images that weights are judged by: data, synthetic or none."""
        return self.target.calibration or ("synthetic" if self.post_training else "data")

    def check(self) -> None:
        """Raises UsageError for options that contradict each other."""
        check_models((self.model.name, self.teacher.teacher))
        self.sharing.check()
        self.target.check()
        self.model.check()
        self._check_teaching()
        self.data.check()
        self.preprocessing.check(self.model.in_chans)
        self.output.check()
        if self.post_training:
            self._check_post_training()
        if self.model.from_scratch and self.gates.require_drop is not None:
            raise UsageError("--from-scratch has no dense model to compare with: use --require-top1")
        self._check_calibration()

    def _check_calibration(self) -> None:
        """Raises UsageError for a target, or images to judge weights by, where there is nothing to judge."""
        if self.model.from_scratch and (
            flags := given_flags(self.target, *TARGETS, "calibration", "calibration_memory")
        ):
            raise UsageError(f"--from-scratch starts from random weights: leave out {', '.join(flags)}")
        if self.target.is_searched and self.output.codec != "auto":
            raise UsageError(f"{self.target.flag} takes the smallest codec: leave out --codec {self.output.codec}")
        uses_data = self.calibration == "data" and (self.has_price or self.target.calibration is not None)
        if uses_data and (count := self.execution.calibration_images) < FEWEST_IMAGES:
            few = f"--calibration-images {count}: expected at least {FEWEST_IMAGES} to calibrate on"
            raise UsageError(f"{few}, or --calibration synthetic or none")

    def _check_teaching(self) -> None:
        """Raises UsageError for options about a dense model or a teacher that there is not."""
        distill = self.training.get("distill")
        if self.model.from_scratch and distill and self.teacher.teacher is None:
            raise UsageError("--from-scratch has no dense model to distil from: leave out --distill, or name --teacher")
        self.teacher.check(distill)
        if self.teacher.is_trained_here:
            return
        if self.model.from_scratch and self.model.baseline_epochs:
            raise UsageError("--from-scratch trains no dense baseline: leave out --baseline-epochs")
        if self.model.checkpoint_path is not None and self.model.baseline_epochs is not None:
            raise UsageError("--checkpoint-path names a trained model: leave out --baseline-epochs")

    def _check_post_training(self) -> None:
        """Raises UsageError for options that need data."""
        flags = [
            *(
                one.flag
                for one in config_fields(TrainingConfig)
                if one.name in self.training and (one.name, self.training[one.name]) != ("epochs", 0)
            ),
            *given_flags(self.data, "aa", "reprob"),
            *given_flags(self.model, "baseline_epochs"),
            *given_flags(self.teacher, "teacher"),
            *given_flags(self.execution, "device", "amp", "channels_last", "torchcompile"),
            *given_flags(self.output, "resume", "keep_checkpoints", "summary", "log"),
        ]
        if flags:
            raise UsageError(f"no data to train on for {', '.join(flags)}: name --dataset or --data-dir")
        if self.gates.require_top1 is not None or self.gates.require_drop is not None:
            raise UsageError("--require-top1 and --require-drop need data to measure on: name --dataset or --data-dir")
        if self.target.max_drop is not None:
            raise UsageError("--max-drop needs data to measure on: name --dataset or --data-dir")
        if self.target.calibration == "data":
            raise UsageError("--calibration data: there is none; name --dataset or --data-dir")

    def training_overrides(self) -> dict[str, Any]:
        """Returns the training options that win over those of a recipe, or over the defaults."""
        if not self.model.from_scratch:
            return dict(self.training)
        defaults = {one.name: one.from_scratch for one in config_fields(TrainingConfig) if one.from_scratch is not None}
        without_teacher = {} if self.teacher.teacher else {"distill": 0.0}
        return {**defaults, **self.training, **without_teacher}

    def output_path(self) -> Path:
        """Returns the file to write: the one named, or one named after model, data and scheme."""
        if self.output.output is not None:
            return self.output.output
        data = [] if self.post_training else [self.data.label]
        target = [self.target.label()] if self.has_price else []
        return Path("-".join([self.model.label, *data, self.sharing.label(self.has_price), *target]) + ENDING)

    def command_for_own_data(self) -> str:
        """Returns the command that does the same with images of the user's own."""
        teacher = "" if self.teacher.teacher is None else f" --teacher {self.teacher.teacher}"
        sharing = self.sharing.command_line(self.has_price) + self.target.command_line()
        start = "--from-scratch" if self.model.from_scratch else "--pretrained"
        return f"compress {self.model.name} {start} --data-dir IMAGES {sharing}{teacher}"
