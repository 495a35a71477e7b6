"""What a packed file is and how it was made, in words: model, sharing, training, images, classes, accuracy.

This module does not import torch, so that ``compress inspect`` starts at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from compressor.data.preprocessing import describe_preprocessing
from compressor.formats.file.reader import PackedFile
from compressor.formats.io.hub import PREFIX
from compressor.report.interval import interval_text, wilson_interval
from compressor.report.provenance import Provenance

__all__ = ["Origin"]

NUMBERS = ("bits", "codewords", "delta", "sparsity", "rate")  # of a rule's settings those that decide about the size
MAX_RULES, MAX_CLASSES, MAX_TEXT = 4, 10, 200
HEAD = 10  # columns of the labels


@dataclass(frozen=True)
class Origin:
    """What a packed file says about itself.

    Args:
        model: name and arguments of the timm model; None: it is to be loaded into any module.
        preprocessing: of its images, by the names of timm's ``pretrained_cfg``.
        recipe: the stages by which it was made, as a recipe's TOML has them.
        made: its provenance.
        hub: ``hf-hub:OWNER/NAME@COMMIT`` of a file that was fetched from there; None for any other.
    """

    model: Mapping[str, Any] | None
    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any]
    made: Provenance
    hub: str | None = None

    @classmethod
    def of(cls, file: PackedFile, made: Provenance) -> Origin:
        """Returns what an open packed file says.

        Args:
            file: the packed file.
            made: its provenance.
        """
        hub = file.label if file.label.startswith(PREFIX) else None
        return cls(file.model, dict(file.preprocessing or {}), dict(file.recipe or {}), made, hub)

    def lines(self, width: int = 120) -> str:
        """Returns a line for each thing that the file says, none of them wider than ``width``."""
        return "\n".join(
            line
            for name, text in self.facts().items()
            for line in wrap(f"{name:{HEAD}}{text}", width, subsequent_indent=" " * HEAD)
        )

    def accuracy(self) -> str:
        """Returns the accuracy that the file says it has, with its 95 % interval; "" where it says none."""
        top1, data = self.made.top1, self.made.data
        if top1 is None or data is None:
            return ""
        interval = interval_text(*wilson_interval(top1.packed, data.n))
        before = f"dense {100 * top1.dense:.1f} % -> " if top1.dense is not None else ""
        return (
            f"top-1 on {data.n:,} {data.split} images of {data.name}  {before}packed file {100 * top1.packed:.1f} %  "
            f"95 % interval {interval}, as recorded when it was written"
        )

    def facts(self) -> dict[str, str]:
        """Returns a text for each thing that the file says, by a word for it."""
        return {name: text for name, text in self._facts() if text}

    def _facts(self) -> Iterator[tuple[str, str]]:
        """Yields label and text; what the file does not say is ""."""
        prepared = self.preprocessing
        yield "model", _model(self.model)
        yield "fetched", self.hub or ""
        stages = self.recipe.get("stage", [])
        yield "shared", "; ".join(_shared(stage) for stage in stages[-1:])
        yield "trained", "; then ".join(filter(None, map(_trained, stages)))
        yield "images", describe_preprocessing(prepared) if prepared else ""
        yield "classes", _classes(prepared.get("label_names") or ())
        versions = ", ".join(f"{name} {version}" for name, version in self.made.versions.items())
        yield "made by", f"{versions}; seed {self.made.seed}" if versions else ""
        yield "accuracy", self.accuracy()


def _model(model: Mapping[str, Any] | None) -> str:
    if model is None:
        return "not one of timm's: it is loaded into a module of yours"
    args = ", ".join(f"{name}={value!r}" for name, value in model["args"].items())
    return f"{model['name']}({args})"


def _shared(stage: Mapping[str, Any]) -> str:
    """Returns which scheme shares what, with the settings that decide about the size."""
    rules = stage.get("rule", [])
    more = [f"and {len(rules) - MAX_RULES} more rules"] if len(rules) > MAX_RULES else []
    return "; ".join([*(_rule(rule, len(rules) == 1) for rule in rules[:MAX_RULES]), *more])


def _rule(rule: Mapping[str, Any], is_only: bool) -> str:
    match = rule.get("match", "*")
    what = f"{match}: " if match != "*" else "" if is_only else "all others: "
    if rule.get("ignore"):
        return f"{what}left alone"[:MAX_TEXT]
    decided = ("rate", "sparsity") if rule.get("rate") else NUMBERS  # a price decides how many values there are
    numbers = [f"{name} {rule[name]}" for name in decided if rule.get(name)]
    return f"{what}{', '.join([str(rule.get('scheme', '')), *numbers])}"[:MAX_TEXT]


def _trained(stage: Mapping[str, Any]) -> str:
    """Returns how a stage was trained; "" where the file does not say, as after a training loop of one's own."""
    epochs = stage.get("epochs")
    if not isinstance(epochs, int):
        return ""
    if not epochs:
        return "not, values were shared only"
    words = [f"{epochs} {'epoch' if epochs == 1 else 'epochs'}", str(stage.get("opt", ""))]
    words += [f"lr {stage['lr']}"] if "lr" in stage else []
    words += [str(stage.get("sched", ""))]
    words += [f"batches of {stage['batch_size']}"] if "batch_size" in stage else []
    words += [f"distilled {stage['distill']}"] if stage.get("distill") else []
    return ", ".join(filter(None, words))[:MAX_TEXT]


def _classes(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_CLASSES:,} more" if len(names) > MAX_CLASSES else ""
    return f"{len(names):,}: {', '.join(names[:MAX_CLASSES])}{more}" if names else ""
