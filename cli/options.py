"""The options of ``compress MODEL`` as one object, and what follows from them without torch."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.formats.errors import UsageError

__all__ = ["Options"]

NUMBERS = ("codewords", "delta", "sparsity")
SHARING = ("scheme", "bits", *NUMBERS, "settings")
TRAINING = (
    "epochs", "lr", "opt", "sched", "weight_decay", "batch_size", "grad_accum", "mixup", "cutmix", "smoothing",
    "layer_decay", "model_ema_decay", "distill",
)  # fmt: skip
DEFAULT_SCHEME, DEFAULT_BITS = "learnt", 4


@dataclass(frozen=True)
class Options:
    """What the user asked for; None where nothing was said."""

    model: str
    scheme: str | None = None
    bits: int | None = None
    codewords: int | None = None
    delta: float | None = None
    sparsity: float | None = None
    settings: Sequence[str] = ()
    recipe: str | None = None
    dataset: str | None = None
    data_dir: Path | None = None
    dataset_download: bool = False
    max_bad_images: int = 0
    workers: int | None = None
    aa: str | None = None
    reprob: float | None = None
    pretrained: bool = False
    checkpoint_path: Path | None = None
    from_scratch: bool = False
    num_classes: int | None = None
    in_chans: int | None = None
    img_size: int | None = None
    batch_size: int | None = None
    grad_accum: int | None = None
    epochs: int | None = None
    baseline_epochs: int | None = None
    opt: str | None = None
    lr: float | None = None
    sched: str | None = None
    weight_decay: float | None = None
    mixup: float | None = None
    cutmix: float | None = None
    smoothing: float | None = None
    layer_decay: float | None = None
    model_ema_decay: float | None = None
    distill: float | None = None
    teacher: str | None = None
    teacher_checkpoint: Path | None = None
    calibration_images: int = 1024
    device: str | None = None
    amp: bool = False
    channels_last: bool = False
    torchcompile: str | None = None
    seed: int = 0
    codec: str = "auto"
    untouched: str = "f32"
    output: Path | None = None
    force: bool = False
    resume: bool = False
    checkpoint_minutes: float = 10.0
    checkpoint_steps: int = 0
    summary: Path | None = None
    log: str | None = None
    require_top1: float | None = None
    require_drop: float | None = None
    require_size: int | None = None
    dry_run: bool = False
    everything: bool = False
    as_json: bool = False

    @property
    def names_data(self) -> bool:
        """Whether a data set was named."""
        return self.dataset is not None or self.data_dir is not None

    @property
    def has_weights(self) -> bool:
        """Whether trained weights were named."""
        return self.pretrained or self.checkpoint_path is not None

    @property
    def post_training(self) -> bool:
        """Whether there is nothing to train on: weights were named, and no data."""
        return self.has_weights and not self.names_data

    @property
    def trains_teacher(self) -> bool:
        """Whether a teacher was named, without its weights."""
        return self.teacher is not None and self.teacher_checkpoint is None

    @property
    def data_name(self) -> str:
        """The data set to open; "" for a folder of pictures."""
        return self.dataset if self.dataset is not None else "" if self.data_dir is not None else "digits"

    def check(self) -> None:
        """Raise UsageError for options that contradict each other."""
        if self.recipe is not None and (said := self._said(SHARING)):
            raise UsageError(f"--recipe says what is shared and how: leave out {said}")
        if self.pretrained and self.checkpoint_path is not None:
            raise UsageError("--pretrained and --checkpoint-path: name one")
        if self.from_scratch and self.has_weights:
            raise UsageError("--from-scratch starts from random weights: leave out --pretrained and --checkpoint-path")
        if self.from_scratch and self.distill and self.teacher is None:
            raise UsageError("--from-scratch has no dense model to distil from: leave out --distill, or name --teacher")
        if self.teacher_checkpoint is not None and self.teacher is None:
            raise UsageError(f"--teacher-checkpoint {self.teacher_checkpoint}: name its model with --teacher")
        if self.teacher is not None and self.distill == 0:
            raise UsageError(f"--teacher {self.teacher} and --distill 0: leave out one")
        if self.from_scratch and self.baseline_epochs and not self.trains_teacher:
            raise UsageError("--from-scratch trains no dense baseline: leave out --baseline-epochs")
        if self.checkpoint_path is not None and self.baseline_epochs is not None and not self.trains_teacher:
            raise UsageError("--checkpoint-path names a trained model: leave out --baseline-epochs")
        training = (
            *TRAINING, "aa", "reprob", "baseline_epochs", "teacher", "device", "amp", "channels_last", "torchcompile",
            "resume", "summary", "log",
        )  # fmt: skip
        if self.post_training and (said := self._said(training)):
            raise UsageError(f"no data to train on for {said}: name --dataset or --data-dir")
        if self.bits is not None and self.codewords is not None:
            raise UsageError("--bits and --codewords: name one")
        self._check_gates()
        if self.dataset_download and not (self.dataset or "").startswith("torch/"):
            raise UsageError("--dataset-download needs --dataset torch/...")

    def _check_gates(self) -> None:
        """Raise UsageError for a gate that nothing could be measured for."""
        if self.post_training and (self.require_top1 is not None or self.require_drop is not None):
            raise UsageError("--require-top1 and --require-drop need data to measure on: name --dataset or --data-dir")
        if self.from_scratch and self.require_drop is not None:
            raise UsageError("--from-scratch has no dense model to compare with: use --require-top1")

    def _said(self, names: Sequence[str]) -> str:
        """List those of some options that were given, as they are typed."""
        spelt = {"settings": "--set"}
        given = [name for name in names if (value := getattr(self, name)) not in (None, ()) and value is not False]
        return ", ".join(spelt.get(name, "--" + name.replace("_", "-")) for name in given)

    def rule(self) -> dict[str, Any]:
        """Give the one rule that --scheme, --bits, --codewords and --set stand for."""
        named = {name: value for name in NUMBERS if (value := getattr(self, name)) is not None}
        settings = {**dict(_setting(text) for text in self.settings), **named}
        bits = self.bits
        if self.scheme is None and bits is None and not settings.keys() - {"sparsity"}:
            bits = DEFAULT_BITS
        return {"scheme": self.scheme or DEFAULT_SCHEME, **({} if bits is None else {"bits": bits}), **settings}

    def training(self) -> dict[str, Any]:
        """Give the training settings that were named, and those that training from scratch needs otherwise."""
        named = {name: value for name in TRAINING if (value := getattr(self, name)) is not None}
        if not self.from_scratch:
            return named
        return {"epochs": 12, "lr": 3e-3, **named, **({} if self.teacher else {"distill": 0.0})}

    def output_path(self) -> Path:
        """Give the file to write: the one named, or one named after model, data and scheme."""
        if self.output is not None:
            return self.output
        data = [] if self.post_training else [self.data_name.rpartition("/")[2] or _last(self.data_dir)]
        return Path("-".join([self.model, *data, self._how()]) + ".safetensors")

    def _how(self) -> str:
        if self.recipe is not None:
            return Path(self.recipe.removeprefix("zoo:")).stem
        rule = self.rule()
        said = "".join(f"-{name}{rule[name]}" for name in NUMBERS if name in rule)
        return f"{rule['scheme']}{rule.get('bits', '')}{said}".replace("-codewords", "-")

    def own_data(self) -> str:
        """Give the command for the user's own data."""
        if self.recipe is not None:
            how = f"--recipe {self.recipe}"
        else:
            rule = self.rule()
            how = f"--scheme {rule['scheme']}" + "".join(f" --{k} {rule[k]}" for k in ("bits", *NUMBERS) if k in rule)
        taught = "" if self.teacher is None else f" --teacher {self.teacher}"
        return f"compress {self.model} --pretrained --data-dir IMAGES {how}{taught}"


def _last(folder: Path | None) -> str:
    return folder.resolve().name if folder is not None else "data"


def _setting(text: str) -> tuple[str, Any]:
    """Read KEY=VALUE; a value that is no number, truth value or list of TOML is a word.

    >>> _setting("threshold=0.5"), _setting("init=linear")
    (('threshold', 0.5), ('init', 'linear'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set {text}: expected KEY=VALUE")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value
