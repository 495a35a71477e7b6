"""A run with a target: the images that its price is searched on, and what is said of what was found."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compressor.calibration.image_counts import DEFAULT_IMAGES, FEWEST_IMAGES
from compressor.cli.configs import OutputConfig
from compressor.cli.setup import Run
from compressor.cli.targets import TargetConfig, number
from compressor.compressor import Compressor
from compressor.formats.content import Content
from compressor.formats.errors import UsageError
from compressor.lifecycle.packed import Packed
from compressor.lifecycle.target import MOST_RATE, FileOptions, Target
from compressor.models.baseline import create_model
from compressor.policy.policy import Policy
from compressor.policy.recipe import Recipe, Stage
from compressor.rng import seeded

__all__ = [
    "calibration_input",
    "check_above",
    "check_reachable",
    "check_size",
    "file_options",
    "least_size",
    "price_line",
    "target_facts",
    "target_line",
    "target_of",
    "training_images",
    "vary_vectors",
    "warn_of_growth",
    "with_rules",
]

_log = logging.getLogger(__name__)
# As long as what is noted in files: prices that are found have four digits.
LONG_RATE, LONG_TOP1, LONG_EPOCHS = 1.234e-07, 0.9305555555555556, 999


def calibration_input(work: Run, stage: Stage, job: Compressor) -> Tensor | Literal["synthetic"] | None:
    """Returns what weights are judged by: training images in the order of the seed, a word, or None for nothing.

    Args:
        work: names the source of the images, and how many at most.
        stage: of which batches are read.
        job: a stage without a target has images where they were asked for, or where a scheme of its own wants them,
            or gains from them and trained weights meet data that were named.

    Returns:
        float[n, C, H, W], at most ``DEFAULT_IMAGES``; "synthetic": images made from the model; None: none.
    """
    is_asked_for = work.target.calibration is not None or work.target_of(stage).flag is not None
    if not is_asked_for:
        gains = work.data_is_named and work.has_dense_model
        schemes = [plan.scheme for plan in job.plans if plan.scheme]
        is_wanted = any(scheme.wants_curvature or (gains and scheme.gains_from_curvature) for scheme in schemes)
        if work.data is None or not is_wanted:
            return None
    if work.calibration != "data" or work.data is None:
        return "synthetic" if work.calibration == "synthetic" else None
    images = training_images(work, stage)
    return images if is_asked_for or len(images) >= FEWEST_IMAGES else None


def training_images(work: Run, stage: Stage) -> Tensor:
    """Returns the first training images in the order of the seed, float[n, C, H, W], n at most ``DEFAULT_IMAGES``.

    Args:
        work: has the data, and how many images are asked for.
        stage: of which batches are read.
    """
    assert work.data is not None
    count, images, held = min(DEFAULT_IMAGES, work.execution.calibration_images), [], 0
    with seeded(work.execution.seed):  # augmentation draws, after more draws where a baseline was trained
        for batch, _ in work.data.train_loader(stage.training.batch_size, work.execution.seed):
            images.append(batch)
            held += len(batch)
            if held >= count:
                break
    return torch.cat(images)[:count]


def file_options(work: Run, output: OutputConfig) -> FileOptions:
    """Returns how the file of a run will be written, for a search of its size.

    Args:
        work: has the recipe, the data and the accuracy that are noted in the file, here by values as long.
        output: has the codec.
    """
    policy = work.recipe.stages[-1].policy
    recipe = with_rules(work.recipe, policy.priced(LONG_RATE))
    notes: dict[str, Any] = {"recipe": Recipe(tuple(map(_with_long_epochs, recipe.stages))).to_dict()}
    if work.data is not None:
        count = len(work.data.eval_loader(1).dataset)  # type: ignore[arg-type]
        notes["data"] = {"name": work.data.name, "version": work.data.version, "split": work.data.evaluated, "n": count}
        notes["top1"] = {"dense": LONG_TOP1, "packed": LONG_TOP1}
    notes |= {"amp": True} if work.execution.amp else {}
    notes |= {"teacher": work.teacher_name} if work.teacher_name else {}
    return FileOptions(output.codec, output.half_untouched, output.fold_norms, notes)


def _with_long_epochs(stage: Stage) -> Stage:
    """Returns a stage whose epochs, if it has any, are a number of its own: a resumed run may be given more."""
    training = replace(stage.training, epochs=LONG_EPOCHS) if stage.training.epochs else stage.training
    return replace(stage, training=training)


def with_rules(recipe: Recipe, policy: Policy) -> Recipe:
    """Returns a recipe with the rules of another policy in its last stage."""
    *earlier, last = recipe.stages
    return Recipe((*earlier, replace(last, policy=policy)))


def target_of(config: TargetConfig) -> Target:
    """Returns the target that a command names, as the search takes it."""
    return Target(config.rate, config.target_size, config.target_bits, config.max_drop)


def least_size(work: Run, output: OutputConfig) -> int | None:
    """Returns the bytes of the file when all weights are zero; None where something shared has no price of bits.

    Args:
        work: has the model, whose weights are not needed, and the recipe.
        output: how the file would be written.
    """
    policy = work.recipe.stages[-1].policy.priced(MOST_RATE)
    if not all(scheme is None or scheme.has_price for scheme in policy.schemes):
        return None
    model = create_model(work.source.config.name, work.source.args, seed=work.execution.seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # norms and biases, which tensors of one value make free, too: no file is smaller
    job = Compressor(model, policy, model_args=work.source.args, copy=False, teacher=None).prepare()
    options = file_options(work, output)
    half, fold = options.chosen(target_of(work.target))
    packed = job.finish(half_untouched=half, fold_norms=fold)
    packed.note(**options.notes)
    return len(packed.to_bytes(options.codec))


def check_reachable(work: Run, output: OutputConfig) -> None:
    """Raises UsageError for a size that no price reaches, where a dense baseline would be trained before that shows.

    Args:
        work: has the target.
        output: how the file is written.
    """
    wanted = work.target.target_size
    if wanted is None or work.source.config.has_weights:  # with weights given, the search itself begins at once
        return
    check_above(work.target, wanted, least_size(work, output))


def check_above(config: TargetConfig, wanted: int | None, least: int | None) -> None:
    """Raises UsageError for a target in bytes that is below the size with all weights zero, where both are known."""
    if wanted is not None and least is not None and wanted < least:
        asked = f"{config.flag} {wanted:,}" if config.target_size is not None else config.command_line().strip()
        raise UsageError(f"{asked}: with all weights zero the file takes {least:,} bytes; ask for more")


def check_size(work: Run, output: OutputConfig, wanted: int | None) -> None:
    """Compares a size that is required with what is known before training.

    Args:
        work: has the model, whose weights are not needed, and the recipe.
        output: how the file is written.
        wanted: the most bytes that the file may have; None: any.

    Raises:
        UsageError: what is not shared takes more alone. A prediction above it is a warning: training changes it.
    """
    if wanted is None or work.target.flag is not None or work.data is None:  # without data nothing takes long
        return
    policy, args = work.recipe.stages[-1].policy, work.source.args
    with seeded(work.execution.seed):  # what comes afterwards draws the same numbers as without
        model = create_model(work.source.config.name, args, seed=work.execution.seed)
        vary_vectors(model)
        job = Compressor(model, policy, model_args=args, copy=False, teacher=None, from_scratch=True).prepare()
        packed = job.finish(half_untouched=output.half_untouched, fold_norms=output.fold_norms)
    sizes = packed.report(output.codec).totals
    if sizes.untouched > wanted:
        alone = f"what is not shared takes {sizes.untouched:,} bytes alone"
        raise UsageError(f"--require-size {wanted:,}: {alone}; ask for more, or try --fold-norms")
    if sizes.file > wanted:
        _log.warning(
            "--require-size %s: the file is predicted to take %s bytes, before training; --target-size finds one that "
            "fits, fewer --bits make it smaller", f"{wanted:,}", f"{sizes.file:,}"
        )  # fmt: skip


@torch.no_grad()
def vary_vectors(model: nn.Module) -> None:
    """Gives untrained norms and biases the size that they have after training: a tensor of one value takes no bytes.

    Args:
        model: is changed.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 1 and tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)


def price_line(work: Run, stage: Stage, job: Compressor, images: Tensor | str | None) -> str:
    """Returns the price of a bit that a job has found, for the line of its step; "" for a stage without a target.

    Args:
        work, stage: have the target.
        job: prepared.
        images: what the weights were judged by.
    """
    target, search = work.target_of(stage), job.search
    if target.flag is None or search is None:
        return ""
    judged = "no images" if images is None else f"{images if isinstance(images, str) else len(images)} images"
    passes = "" if target.rate is not None else f" in {search.passes} {'pass' if search.passes == 1 else 'passes'}"
    aim = "" if target.target_size is None else f" of {target.target_size:,}"
    size = f"{search.size:,}{aim} bytes" if search.predicted is None else f"{search.predicted:,}{aim} bytes predicted"
    return f"rate {number(float(f'{search.rate:.2g}'))}{passes}, {size}  {judged}"


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
    facts |= {"drop": found["drop"]} if "drop" in found else {}
    return {**work.target.arguments, **facts, "calibration": provenance.get("calibration")}


def target_line(facts: Mapping[str, Any], target: TargetConfig) -> str:
    """Returns the same as a line for the terminal."""
    predicted = "" if facts["predicted"] is None else f"{facts['predicted']:,} predicted, "
    rate = "unknown" if facts["rate"] is None else number(float(f"{facts['rate']:.3g}"))
    lost = f", {facts['drop']:.2f} points lost on validation images" if "drop" in facts else ""
    return f"target {target.command_line().strip()}  rate {rate}  {predicted}{facts['size']:,} bytes written{lost}"


def warn_of_growth(work: Run, content: Content, size: int) -> None:
    """Warns of a file that is larger than its target.

    Args:
        work: has the target.
        content: of the file.
        size: of the file, in bytes.
    """
    ruled = list(content.sites.values())[: len(content.provenance["rules"])]  # norms on grids come after them
    wanted = target_of(work.target).bytes(sum(math.prod(site.shape) for site in ruled))
    if wanted is not None and size > wanted:
        trained = "; fine-tuning changes what indices take" if work.trains(work.recipe.stages[-1]) else ""
        asked = work.target.flag
        _log.warning("the file has %s bytes, more than the %s of %s%s", f"{size:,}", f"{wanted:,}", asked, trained)
