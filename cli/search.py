"""A run with a target: the images that its price is searched on, and what is said of what was found."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.cli.setup import Run
from compressor.cli.targets import CALIBRATION_IMAGES, TargetConfig, number
from compressor.compressor import Compressor
from compressor.formats.file.container import canonical_json
from compressor.lifecycle.packed import Packed
from compressor.policy.recipe import Stage

__all__ = [
    "calibration_input",
    "note_target",
    "noted_size",
    "price_line",
    "target_arguments",
    "target_facts",
    "target_line",
    "warn_of_growth",
]

_log = logging.getLogger(__name__)
ALIGNMENT = 8  # of the header of a file
LONGEST = 0.9305555555555556  # an accuracy that takes as many digits as any


def calibration_input(work: Run, stage: Stage, job: Compressor) -> Tensor | Literal["synthetic"] | None:
    """Returns what weights are judged by: training images in the order of the seed, a word, or None for nothing.

    Args:
        work: names the source of the images, and how many at most.
        stage: of which batches are read.
        job: a stage without a target has images where a scheme of its own wants them, or they were asked for.

    Returns:
        float[n, C, H, W], at most ``CALIBRATION_IMAGES``; "synthetic": images made from the model; None: none.
    """
    is_wanted = any(plan.scheme and plan.scheme.wants_curvature for plan in job.plans) and work.data is not None
    if not is_wanted and work.target.calibration is None and work.target_of(stage).flag is None:
        return None
    if work.calibration != "data" or work.data is None:
        return "synthetic" if work.calibration == "synthetic" else None
    count, images, held = min(CALIBRATION_IMAGES, work.execution.calibration_images), [], 0
    for batch, _ in work.data.train_loader(stage.training.batch_size, work.execution.seed):
        images.append(batch)
        held += len(batch)
        if held >= count:
            break
    return torch.cat(images)[:count]


def noted_size(work: Run) -> int:
    """Returns about how many bytes the recipe, the data and the accuracy of a run take that it notes in its file."""

    def escaped(value: Any) -> int:  # the metadata is JSON in a string of JSON
        return len(canonical_json({"": canonical_json(value)}))

    facts: dict[str, Any] = {"recipe": work.recipe.to_dict()}
    if work.data is not None:
        count = len(work.data.eval_loader(1).dataset)  # type: ignore[arg-type]
        facts["data"] = {"name": work.data.name, "version": work.data.version, "split": work.data.evaluated, "n": count}
        facts["top1"] = {"dense": LONGEST, "packed": LONGEST}
    facts |= {"amp": True} if work.execution.amp else {}
    facts |= {"teacher": work.teacher_name} if work.teacher_name else {}
    rules = [rule.to_dict() for rule in work.recipe.stages[-1].policy.rules]  # all that a packed model has for a recipe
    return escaped(facts) - escaped({"recipe": {"stage": [{"rule": rules}]}}) + ALIGNMENT


def target_arguments(work: Run, stage: Stage, model: nn.Module) -> dict[str, Any]:
    """Returns the target of a stage as an argument of ``Compressor``, less the bytes that are noted in the file later.

    Args:
        work, stage: have the target.
        model: to count the weights that share values.
    """
    arguments = work.target_of(stage).arguments
    if "target_size" in arguments:
        arguments["target_size"] = max(1, arguments["target_size"] - noted_size(work))
    if "target_bits" in arguments:
        shared = sum(plan.site.tensor.numel() for plan in stage.policy.plan(model) if plan.scheme)
        arguments["target_bits"] = max(1 / shared, arguments["target_bits"] - 8 * noted_size(work) / shared)
    return arguments


def price_line(work: Run, stage: Stage, job: Compressor, images: Tensor | str | None) -> str:
    """Returns the price of a bit that a job has found, for the line of its step; "" for a stage without a target.

    Args:
        work, stage: have the target.
        job: prepared.
        images: what the weights were judged by.
    """
    target = work.target_of(stage)
    if target.flag is None:
        return ""
    judged = "no images" if images is None else f"{images if isinstance(images, str) else len(images)} images"
    if job.search is None:
        return f"rate {number(job.rate)}  {judged}"
    aim = "" if target.target_size is None else f" of {target.target_size:,}"
    predicted = f"{job.search.predicted + noted_size(work):,}{aim} bytes predicted"
    return f"rate {job.rate:.2g} in {job.search.passes} passes, {predicted}  {judged}"


def note_target(packed: Packed, work: Run) -> None:
    """Notes the predicted size of the file in a packed model as that with all that is noted in it."""
    found = packed.content.provenance.get("target")
    if work.target.flag is not None and found and found.get("predicted") is not None:
        packed.note(target={**found, "predicted": found["predicted"] + noted_size(work)})


def target_facts(work: Run, packed: Packed, size: int) -> dict[str, Any] | None:
    """Returns target, price, predicted and real bytes for a JSON document; None without a target.

    Args:
        work: has the target.
        packed: has the price.
        size: of the file, in bytes.
    """
    if work.target.flag is None:
        return None
    provenance = packed.content.provenance
    found = provenance.get("target") or {}
    facts = {"rate": found.get("rate"), "predicted": found.get("predicted"), "size": size}
    return {**work.target.arguments, **facts, "calibration": provenance.get("calibration")}


def target_line(facts: Mapping[str, Any], target: TargetConfig) -> str:
    """Returns the same as a line for the terminal."""
    predicted = "" if facts["predicted"] is None else f"{facts['predicted']:,} bytes predicted, "
    return f"target {target.command_line().strip()}  rate {number(facts['rate'])}  {predicted}{facts['size']:,} written"


def warn_of_growth(work: Run, size: int) -> None:
    """Warns of a file that fine-tuning has let grow beyond its target.

    Args:
        work: has the target.
        size: of the file, in bytes.
    """
    wanted = work.target.target_size
    if wanted is not None and size > wanted:
        trained = "; fine-tuning changes what indices take" if work.trains(work.recipe.stages[-1]) else ""
        _log.warning("the file has %s bytes, more than --target-size %s%s", f"{size:,}", f"{wanted:,}", trained)
