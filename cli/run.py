"""``compress MODEL``, step by step: dense baseline, codebooks, fine-tuning, file."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any

import click
import torch
from torch import Tensor, nn
from tqdm.contrib.logging import logging_redirect_tqdm

import compressor
from compressor.cli.dry_run import dry_run
from compressor.cli.files import EVAL_BATCH
from compressor.cli.gates import missed_gates, refuse, rejected
from compressor.cli.malloc import keep_freed_memory
from compressor.cli.options import Options
from compressor.cli.requirements import check_requirements
from compressor.cli.setup import Run, set_up
from compressor.cli.show import Step, accuracy_line, counts, flips, percent, print_json, say, width
from compressor.cli.stopping import stoppable
from compressor.cli.weights import dense_model, teacher_model
from compressor.compressor import Compressor
from compressor.distributed.collectives import broadcast_tensors, destroy, is_main_process, main_process_first
from compressor.formats.errors import CompressorError
from compressor.formats.io.locking import holding
from compressor.lifecycle.packed import Packed
from compressor.policy.recipe import Stage
from compressor.training.compilation import compiled_model
from compressor.training.evaluation import Evaluation, evaluate
from compressor.training.loop import Epoch
from compressor.training.mixup import make_mixup

__all__ = ["run"]


def run(options: Options) -> None:
    """Do what ``compress MODEL`` was asked to."""
    check_requirements()
    work = set_up(options)
    if options.dry_run:
        dry_run(work)
        return
    if work.data is not None and not options.names_data:
        say(f"No data named: using the built-in digits (1,797 handwritten images). For your own: {options.own_data()}")
    beside_the_bar = logging_redirect_tqdm() if sys.stderr.isatty() else nullcontext()
    keep_freed_memory()
    with ExitStack() as held:
        main_process_first(lambda: held.enter_context(holding(work.output)))
        held.enter_context(stoppable(work.checkpoints))
        held.enter_context(beside_the_bar)
        _run(work)
    destroy()


def _run(work: Run) -> None:
    step, checkpoints = _steps(work), work.checkpoints
    if checkpoints is not None and checkpoints.found is not None:
        stage, done = checkpoints.found
        what = f"stage {stage} of {len(work.recipe.stages)}" if stage else "the dense baseline"
        say(f"Resuming {what} after step {done}, from {checkpoints.folder}")
    teacher = teacher_model(work, step)
    model = dense_model(work, step)
    dense = None if work.data is None or work.options.from_scratch else _measure(work, model)
    packed, compressed = _compress(work, model, teacher, step)
    result, missed = _write(work, packed, compressed, dense, step("file"))
    if checkpoints is not None:
        checkpoints.clear()
    if is_main_process():
        _show(work, packed, result, dense, missed)
    refuse(missed, work.output)


def _steps(work: Run) -> Callable[[str], Step]:
    """Give a maker of numbered steps."""
    trained = sum(_trains(work, stage) for stage in work.recipe.stages)
    total = len(work.recipe.stages) + trained + 1 + (not work.options.from_scratch) + (work.teacher is not None)
    numbers = itertools.count(1)
    return lambda name: Step(f"{next(numbers)}/{total}", name)


def _trains(work: Run, stage: Stage) -> bool:
    return work.data is not None and stage.training.epochs > 0


def _compress(
    work: Run, model: nn.Module, teacher: nn.Module | None, step: Callable[[str], Step]
) -> tuple[Packed, nn.Module]:
    """Run the stages; give the packed model and the module it came from."""
    if teacher is None and work.data is not None and not work.options.from_scratch:
        teacher = model
    packed, original = None, model.state_dict()
    pruned, checkpoints = False, work.checkpoints
    resumed = 0 if checkpoints is None or checkpoints.found is None else checkpoints.found[0]
    for number, stage in enumerate(work.recipe.stages, 1):
        if checkpoints is not None:
            checkpoints.stage = number
        if number < resumed:  # all that the stages before have left is in the checkpoint
            step("codebooks").done(f"stage {number} was done before")
            if _trains(work, stage):
                step("fine-tuning").done(f"stage {number} was done before")
            pruned = pruned or any(stage.policy.prunings)
            continue
        packed, model = _stage(
            work, stage, model, teacher, step, preserve_sparsity=pruned, original=original,
            from_scratch=work.options.from_scratch and number == 1,
        )  # fmt: skip
        pruned = pruned or any(stage.policy.prunings)
    assert packed is not None
    facts = {"amp": work.options.amp or None, "teacher": work.options.teacher}
    packed.note(recipe=work.recipe.to_dict(), **{name: fact for name, fact in facts.items() if fact is not None})
    return packed, model


def _stage(
    work: Run, stage: Stage, model: nn.Module, teacher: nn.Module | None, step: Callable[[str], Step], **given: Any
) -> tuple[Packed, nn.Module]:
    training, seed = stage.training, work.options.seed
    half = work.options.untouched == "f16" and stage is work.recipe.stages[-1]
    here = step("codebooks")
    job = Compressor(
        model, stage.policy, model_args=work.args, teacher=teacher, distill=training.distill if teacher else 0.0,
        temperature=training.temperature, seed=seed, **given,
    )  # fmt: skip
    wanted = any(plan.scheme and plan.scheme.wants_gradients for plan in job.plans)
    job.prepare(_calibration(work, training.batch_size) if wanted else None)
    shared = [plan for plan in job.plans if plan.scheme]
    weights = sum(plan.site.tensor.numel() for plan in shared)
    schemes = ", ".join(sorted({repr(plan.scheme) for plan in shared}))
    here.done(f"{len(shared)} tensors, {counts(weights)} weights  {schemes}")
    if work.data is None or not _trains(work, stage):
        return job.finish(_calibration(work, training.batch_size), half), job.model
    here = step("fine-tuning")
    with compiled_model(job.model, work.options.torchcompile):
        job.finetune(
            work.data.train_loader(training.batch_size, seed), work.data.eval_loader(EVAL_BATCH, "validation"),
            training.epochs, training.lr, training.opt, training.sched, training.weight_decay,
            on_epoch=_noted(work, stage, here), on_step=here.on_step, device=work.options.device, amp=work.options.amp,
            checkpoints=work.checkpoints, grad_accum=training.grad_accum, layer_decay=training.layer_decay,
            mixup=make_mixup(training.mixup, training.cutmix, training.smoothing, work.data.num_classes),
            model_ema_decay=training.model_ema_decay,
        )  # fmt: skip
    packed = job.finish(_calibration(work, training.batch_size), half)
    broadcast_tensors(job.model.state_dict().values())  # a GPU may have summed the statistics otherwise
    top1 = _measure(work, job.model, "validation").top1
    here.done(f"{training.epochs} epochs  validation {percent(top1)}")
    return packed, job.model


def _noted(work: Run, stage: Stage, here: Step) -> Callable[[Epoch, float | None], None]:
    """Give what shows an epoch and notes it, counted through all stages."""
    earlier = itertools.takewhile(lambda other: other is not stage, work.recipe.stages)
    before = sum(other.training.epochs for other in earlier)

    def on_epoch(epoch: Epoch, top1: float | None) -> None:
        here.on_epoch(epoch, top1)
        if work.logs is not None:
            work.logs.on_epoch(epoch, top1, before)

    return on_epoch


def _calibration(work: Run, batch_size: int) -> list[tuple[Tensor, Tensor]] | None:
    """Give the first batches of training images in the seed's order; None for none."""
    if work.data is None:
        return None
    batches: Iterator[Any] = iter(work.data.train_loader(batch_size, work.options.seed))
    return list(itertools.islice(batches, math.ceil(work.options.calibration_images / batch_size))) or None


def _measure(work: Run, model: nn.Module, split: str | None = None) -> Evaluation:
    """Evaluate in full precision, with or without --amp, so that anyone can measure the same of the file."""
    assert work.data is not None
    return evaluate(model.to(work.device), work.data.eval_loader(EVAL_BATCH, split))


def _write(
    work: Run, packed: Packed, model: nn.Module, dense: Evaluation | None, here: Step
) -> tuple[Evaluation | None, list[str]]:
    """Write the file, reopen it, and measure the model it gives, None without data; and say what gates it misses."""
    expected, options, before = None, work.options, None if dense is None else dense.top1
    if work.data is not None:
        expected = _measure(work, model)
        known = {} if before is None else {"dense": before}
        data = {"name": work.data.name, "version": work.data.version, "split": work.data.evaluated, "n": expected.n}
        packed.note(data=data, top1={**known, "packed": expected.top1})
    top1, size = (
        None if expected is None else expected.top1,
        main_process_first(lambda: len(packed.to_bytes(options.codec))),
    )
    missed = missed_gates(options, size, top1, before)
    output = rejected(work.output) if missed else work.output
    force = options.force or bool(missed)
    main_process_first(lambda: packed.save(output, codec=options.codec, force=force))
    loaded = compressor.load(output) if is_main_process() else model
    broadcast_tensors(loaded.state_dict().values())
    here.done(f"{output}  {size:,} bytes, reopened and verified")
    if expected is None:
        return None, missed
    result = _measure(work, loaded)
    if not torch.equal(result.correct, expected.correct):
        raise CompressorError(f"{output} answers otherwise than the model it was written from")
    return result, missed


def _show(work: Run, packed: Packed, result: Evaluation | None, dense: Evaluation | None, missed: list[str]) -> None:
    options = work.options
    report = packed.report(options.codec)
    if options.as_json:
        accuracy = None if result is None else _accuracy(result, dense)
        file = rejected(work.output) if missed else work.output
        facts = {"file": str(file), "model": options.model, "top1": accuracy, "missed": missed, **_how(work)}
        print_json(facts | report.to_dict())
        return
    click.echo("\n" + report.table(width(), options.everything))
    if result is not None and work.data is not None:
        click.echo(accuracy_line(result, dense, work.data.evaluated, options.seed))
    if not options.names_data and not options.post_training:
        click.echo(f"For your own images (in IMAGES/train/CLASS and IMAGES/val/CLASS): {options.own_data()}")


def _how(work: Run) -> dict[str, Any]:
    """Say how it was trained: by whom it was taught, by what recipe, and where its epochs are noted."""
    trained = any(_trains(work, stage) for stage in work.recipe.stages)
    taught = any(_trains(work, stage) and stage.training.distill for stage in work.recipe.stages)
    dense = None if work.options.from_scratch else "dense"
    return {
        "teacher": (work.options.teacher or dense) if taught else None,
        "recipe": work.recipe.to_dict(),
        "seed": work.options.seed,
        "summary": str(work.logs.summary) if work.logs is not None and trained else None,
    }


def _accuracy(result: Evaluation, dense: Evaluation | None) -> dict[str, Any]:
    low, high = result.interval
    facts: dict[str, Any] = {"packed": result.top1, "n": result.n, "low": low, "high": high}
    if dense is not None:
        lost, gained = flips(result, dense)
        facts |= {"dense": dense.top1, "lost": lost, "gained": gained}
    return facts
