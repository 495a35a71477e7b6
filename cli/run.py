"""``compress MODEL``, step by step: dense baseline, codebooks, fine-tuning, file."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

import compressor
from compressor.checkpointing.manager import Checkpoints
from compressor.cli.configs import GateConfig, OutputConfig, Request
from compressor.cli.data import look_at, say_images
from compressor.cli.dry_run import dry_run
from compressor.cli.files import EVAL_BATCH
from compressor.cli.gates import missed_gates, refuse, rejected
from compressor.cli.malloc import keep_freed_memory, return_freed_memory
from compressor.cli.requirements import check_requirements
from compressor.cli.result import Result, show_result
from compressor.cli.search import (
    calibration_input,
    check_reachable,
    check_size,
    file_options,
    price_line,
    warn_of_growth,
    with_rules,
)
from compressor.cli.setup import Run, set_up
from compressor.cli.show import Step, counts, percent, say
from compressor.cli.so_far import BestSoFar
from compressor.cli.stopping import stoppable
from compressor.cli.weights import dense_model, teacher_model
from compressor.compressor import Compressor
from compressor.distributed.collectives import broadcast_tensors, destroy, is_main_process, main_process_first
from compressor.formats.errors import CompressorError, UsageError
from compressor.formats.io.locking import holding
from compressor.lifecycle.description import describe_plan
from compressor.lifecycle.packed import Packed
from compressor.policy.recipe import Stage
from compressor.training.compilation import compiled_model
from compressor.training.evaluation import Evaluation, evaluate
from compressor.training.loop import Epoch
from compressor.training.mixup import make_mixup
from compressor.wording import counted

__all__ = ["run"]

NewStep = Callable[[str], Step]
"""Makes the next numbered step of the run, from its name."""


def run(request: Request) -> None:
    """Does what ``compress MODEL`` was asked to do.

    Raises:
        CompressorError: it cannot be done; the exit code is that of the error.
    """
    check_requirements()
    work = set_up(request)
    if request.display.dry_run:
        dry_run(work, request.output, request.display.as_json)
        return
    own_data = None if request.post_training or request.data.is_named else request.command_for_own_data()
    if own_data is not None:
        say("No data named: using the built-in digits (1,797 handwritten images). For your own: --data-dir IMAGES")
    if work.data is not None:
        look_at(work.data, request.data.data_dir)
    if work.source.preprocessing:
        say_images(work.source.preprocessing)
    if any(map(work.trains, work.recipe.stages)):
        keep_freed_memory()
    else:
        return_freed_memory()
    with ExitStack() as stack:
        main_process_first(lambda: stack.enter_context(holding(work.output)))
        stack.enter_context(stoppable(work.checkpoints))
        stack.enter_context(logging_redirect_tqdm() if sys.stderr.isatty() else nullcontext())
        result = _compress(work, request.output, request.gates)
        if is_main_process():
            show_result(result, work, request.output.codec, request.display, own_data)
        refuse(result.missed, work.output)
    destroy()


def _compress(work: Run, output: OutputConfig, gates: GateConfig) -> Result:
    """Trains, shares, fine-tunes, packs, writes and measures."""
    check_reachable(work, output)
    check_size(work, output, gates.require_size)
    step = _numbered_steps(work)
    _say_resumed(work)
    teacher = None
    if work.teacher is not None and work.data is not None:
        teacher = teacher_model(work.teacher, work.data, work.execution, work.device, step("teacher"))
    model = dense_model(work.source, work.data, work.execution, work.checkpoints, step)
    dense = _evaluate(work, model) if work.data is not None and work.has_dense_model else None
    if teacher is None and work.data is not None and work.has_dense_model:
        teacher = model
    packed, compressed = _run_stages(work, model, teacher, output, step)
    result = _write(work, packed, compressed, dense, output, gates, step("file"))
    if work.checkpoints is not None and not output.keep_checkpoints:
        work.checkpoints.clear()
    return result


def _numbered_steps(work: Run) -> NewStep:
    trained = sum(map(work.trains, work.recipe.stages))
    total = len(work.recipe.stages) + trained + 1 + work.has_dense_model + (work.teacher is not None)
    numbers = itertools.count(1)
    return lambda name: Step(f"{next(numbers)}/{total}", name)


def _say_resumed(work: Run) -> None:
    if work.checkpoints is None or work.checkpoints.found is None:
        return
    number, done = work.checkpoints.found
    training = f"stage {number} of {len(work.recipe.stages)}" if number else "the dense baseline"
    say(f"Resuming {training} after step {done}, from {work.checkpoints.folder}")


def _run_stages(
    work: Run, model: nn.Module, teacher: nn.Module | None, output: OutputConfig, step: NewStep
) -> tuple[Packed, nn.Module]:
    """Runs the stages of the recipe; returns the packed model and the module it was packed from."""
    checkpoints, stages, original = work.checkpoints, work.recipe.stages, model.state_dict()
    resumed = 0 if checkpoints is None or checkpoints.found is None else checkpoints.found[0]
    packed, pruned, policy = None, False, stages[-1].policy
    for number, stage in enumerate(stages, 1):
        if checkpoints is not None:
            checkpoints.stage = number
        if number < resumed:  # the checkpoint holds all that the earlier stages have changed
            step("codebooks").done(f"stage {number} was done before")
            if work.trains(stage):
                step("fine-tuning").done(f"stage {number} was done before")
        else:
            with _cleared_if_refused(checkpoints if number == 1 else None):
                job = _shared(
                    work, stage, model, teacher, output, step("codebooks"), original=original,
                    preserve_sparsity=pruned, from_scratch=number == 1 and not work.has_dense_model,
                )  # fmt: skip
            packed = _finetuned(work, stage, job, output, step)
            model, policy = job.model, job.policy
        pruned = pruned or any(stage.policy.prunings)
    assert packed is not None
    facts = {"amp": work.execution.amp or None, "teacher": work.teacher_name}
    packed.note(recipe=with_rules(work.recipe, policy).to_dict(), **_without_none(facts))
    return packed, model


@contextmanager
def _cleared_if_refused(checkpoints: Checkpoints | None) -> Iterator[None]:
    """Deletes the checkpoints of the dense baseline where the first stage is refused, as it would be once more."""
    try:
        yield
    except UsageError:
        if checkpoints is not None and checkpoints.found is None:
            checkpoints.clear()
        raise


def _shared(
    work: Run,
    stage: Stage,
    model: nn.Module,
    teacher: nn.Module | None,
    output: OutputConfig,
    step: Step,
    **stage_facts: Any,
) -> Compressor:
    """Makes the weights of a model share values by the policy of a stage."""
    training, target = stage.training, work.target_of(stage)
    job = Compressor(
        model, stage.policy, model_args=work.source.args, teacher=teacher, distill=training.distill if teacher else 0.0,
        temperature=training.temperature, seed=work.execution.seed, **stage_facts, **target.arguments,
    )  # fmt: skip
    images = calibration_input(work, stage, job)
    val = None if work.data is None or target.max_drop is None else work.data.eval_loader(EVAL_BATCH, "validation")
    job.prepare(
        images, val=val, options=None if target.flag is None else file_options(work, output), **work.target.measuring
    )
    shared = [plan for plan in job.plans if plan.scheme]
    weights = sum(plan.site.tensor.numel() for plan in shared)
    schemes = ", ".join(sorted({describe_plan(plan) for plan in shared}))
    size = f"{counted(len(shared), 'tensor')}, {counts(weights)} weights"
    step.done(f"{size}  {price_line(work, stage, job, images) or schemes}")
    return job


def _finetuned(work: Run, stage: Stage, job: Compressor, output: OutputConfig, new_step: NewStep) -> Packed:
    """Fine-tunes shared weights, where the stage has epochs, and packs them."""
    training, execution, data = stage.training, work.execution, work.data
    last = stage is work.recipe.stages[-1]
    half_untouched, fold_norms = output.half_untouched and last, output.fold_norms and last

    def finish(job: Compressor) -> Packed:
        return job.finish(_calibration(work, training.batch_size), half_untouched, fold_norms)

    if data is None or not work.trains(stage):
        return finish(job)
    step = new_step("fine-tuning")
    best = BestSoFar(work, stage, finish, output.codec)
    before = best.offer(job)
    _say_before(work, job, step, before)
    with compiled_model(job.model, execution.torchcompile), best.told():
        job.finetune(
            data.train_loader(training.batch_size, execution.seed), data.eval_loader(EVAL_BATCH, "validation"),
            training, on_epoch=_on_epoch(work, stage, step, lambda: best.offer(job)), on_step=step.on_step,
            device=execution.device, amp=execution.amp, checkpoints=work.checkpoints,
            mixup=make_mixup(training.mixup, training.cutmix, training.smoothing, data.num_classes),
        )  # fmt: skip
    number = work.recipe.stages.index(stage) + 1
    work.history.extend({"stage": number, **row} for row in job.history)
    packed = finish(job)
    broadcast_tensors(job.model.state_dict().values())  # GPUs may differ in the rounding of BatchNorm's statistics
    packed = best.chosen(job, packed)
    best.clear()
    top1 = _evaluate(work, job.model, "validation").top1
    step.done(f"{counted(training.epochs, 'epoch')}  validation {percent(top1)}")
    if before is not None and top1 < before and work.target.is_of_size and len(work.recipe.stages) == 1:
        say(f"training has gained nothing: before it validation {percent(before)}, in the file that --epochs 0 writes")
    return packed


def _say_before(work: Run, job: Compressor, step: Step, top1: float | None) -> None:
    """Prints the accuracy before fine-tuning, unless weights are random, or a resumed training will replace them.

    Args:
        work, job, step: of the fine-tuning.
        top1: on the validation images, where it has been measured.
    """
    is_resumed = work.checkpoints is not None and work.checkpoints.found is not None
    if top1 is None and work.has_dense_model and not is_resumed:
        top1 = _evaluate(work, job.model, "validation").top1
    if top1 is not None:
        say(f"{step.head}before it: validation {percent(top1)}", len(step.head))


def _on_epoch(work: Run, stage: Stage, step: Step, then: Callable[[], object]) -> Callable[[Epoch, float | None], None]:
    """Returns a callback that shows an epoch, logs it, numbered through all stages, and calls ``then``."""
    earlier = itertools.takewhile(lambda one: one is not stage, work.recipe.stages)
    before = sum(one.training.epochs for one in earlier)

    def on_epoch(epoch: Epoch, top1: float | None) -> None:
        step.on_epoch(epoch, top1)
        if work.logs is not None:
            work.logs.on_epoch(epoch, top1, before)
        then()

    return on_epoch


def _calibration(work: Run, batch_size: int) -> list[tuple[Tensor, Tensor]] | None:
    """Returns the first batches of training images, in the order of the seed; None where there are none."""
    if work.data is None:
        return None
    batches: Iterator[Any] = iter(work.data.train_loader(batch_size, work.execution.seed))
    return list(itertools.islice(batches, math.ceil(work.execution.calibration_images / batch_size))) or None


def _evaluate(work: Run, model: nn.Module, split: str | None = None) -> Evaluation:
    """Evaluates a model in full precision, whether or not it was trained so, as anyone does who loads the file."""
    assert work.data is not None
    return evaluate(model.to(work.device), work.data.eval_loader(EVAL_BATCH, split))


def _write(
    work: Run,
    packed: Packed,
    model: nn.Module,
    dense: Evaluation | None,
    output: OutputConfig,
    gates: GateConfig,
    step: Step,
) -> Result:
    """Writes the file, or the rejected file where it misses a gate; reopens it, and evaluates the model it holds."""
    expected = None if work.data is None else _evaluate(work, model)
    packed_top1, dense_top1 = (None if one is None else one.top1 for one in (expected, dense))
    if (data := work.data) is not None and expected is not None:
        packed.note_accuracy(expected, dense, data=data.name, split=data.evaluated, version=data.version)
    size = main_process_first(lambda: len(packed.to_bytes(output.codec)))
    warn_of_growth(work, packed.content, size)
    missed = missed_gates(gates, size, packed_top1, dense_top1)
    path, force = (rejected(work.output), True) if missed else (work.output, output.force)
    main_process_first(lambda: packed.save(path, codec=output.codec, force=force))
    loaded = compressor.load(path) if is_main_process() else model
    broadcast_tensors(loaded.state_dict().values())
    step.done(f"{path}  {size:,} bytes, reopened and verified")
    measured = None if expected is None else _evaluate(work, loaded)
    if measured is not None and expected is not None and not torch.equal(measured.correct, expected.correct):
        raise CompressorError(f"{path} answers otherwise than the model it was written from")
    return Result(packed, path, measured, dense, missed)


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
