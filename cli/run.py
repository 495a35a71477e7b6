"""``compress MODEL``, step by step: dense baseline, codebooks, fine-tuning, file."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

import compressor
from compressor.baseline import create_model, train_baseline
from compressor.cli.dry_run import dry_run
from compressor.cli.files import EVAL_BATCH
from compressor.cli.options import Options
from compressor.cli.requirements import check_requirements
from compressor.cli.setup import Run, set_up
from compressor.cli.show import Step, accuracy_line, counts, flips, percent, print_json, say, width
from compressor.core import Compressor
from compressor.formats.errors import CompressorError, MissingError
from compressor.packing import Packed
from compressor.recipe import Stage
from compressor.teacher import seeing
from compressor.training import Evaluation, evaluate

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
    step = _steps(work)
    teacher = _teacher(work, step)
    model = _dense(work, step)
    dense = None if work.data is None or options.from_scratch else _measure(work, model)
    packed, compressed = _compress(work, model, teacher, step)
    result = _write(work, packed, compressed, dense, step("file"))
    _show(work, packed, result, dense)


def _steps(work: Run) -> Callable[[str], Step]:
    """Give a maker of numbered steps."""
    trained = sum(_trains(work, stage) for stage in work.recipe.stages)
    total = len(work.recipe.stages) + trained + 1 + (not work.options.from_scratch) + (work.teacher is not None)
    numbers = itertools.count(1)
    return lambda name: Step(f"{next(numbers)}/{total}", name)


def _trains(work: Run, stage: Stage) -> bool:
    return work.data is not None and stage.training.epochs > 0


def _dense(work: Run, step: Callable[[str], Step]) -> nn.Module:
    """Give the model to compress, with its preprocessing written on it."""
    model = _start(work, step)
    if work.data is not None:
        own = {"input_size": work.data.input_size, "mean": work.data.mean, "std": work.data.std}
        model.pretrained_cfg = {**getattr(model, "pretrained_cfg", {}), **own}  # type: ignore[assignment]
    return model


def _teacher(work: Run, step: Callable[[str], Step]) -> nn.Module | None:
    """Give the model to distil from, where one was named, for images as the student sees them."""
    teacher, data = work.teacher, work.data
    if teacher is None or data is None:
        return None
    if teacher.model is not None:
        here, top1 = step("teacher"), _measure(work, teacher.model, "validation").top1
        here.done(f"{work.options.teacher}  {work.options.teacher_checkpoint}  validation {percent(top1)}")
        return teacher.model
    own = replace(work, options=teacher.options, args=teacher.args)
    model = _start(own, step, "teacher")
    known: Any = model.pretrained_cfg if _fits_as_it_is(own) else {}  # else it was trained on what the student sees
    return seeing(model, data.mean, data.std, known)


def _start(work: Run, step: Callable[[str], Step], name: str | None = None) -> nn.Module:
    options, args = work.options, dict(work.args)
    if options.from_scratch:
        return create_model(options.model, args, seed=options.seed)
    if work.data is None or _fits_as_it_is(work):
        here = step(name or "weights")
        path = options.checkpoint_path
        given = {"checkpoint_path": str(path)} if path is not None else {}
        with _explained(path):
            model = create_model(options.model, {**args, **given}, pretrained=options.pretrained, seed=options.seed)
        here.done(f"{path or 'pretrained'}  {counts(sum(p.numel() for p in model.parameters()))} parameters")
        return model
    here = step(name or "dense baseline")
    baseline = train_baseline(
        options.model, args, work.data, seed=options.seed, epochs=options.baseline_epochs,
        pretrained=options.pretrained, on_epoch=here.on_epoch, on_step=here.on_step, device=options.device,
        amp=options.amp,
    )  # fmt: skip
    kept = "not kept" if baseline.path is None else f"{'reused from' if baseline.reused else 'kept in'} {baseline.path}"
    here.done(f"{baseline.figures['epochs']} epochs  validation {percent(baseline.figures['validation_top1'])}  {kept}")
    model = create_model(options.model, args, seed=options.seed)
    model.load_state_dict(dict(baseline.state))
    return model


@contextmanager
def _explained(checkpoint: Path | None) -> Iterator[None]:
    """Say what is wrong with a damaged checkpoint: torch's EOFError, click would take for Ctrl-D."""
    try:
        yield
    except (EOFError, SafetensorError) as exc:
        raise MissingError(f"--checkpoint-path {checkpoint}: damaged, or no checkpoint ({exc})") from exc


def _fits_as_it_is(work: Run) -> bool:
    """Tell whether the weights named need no training of their own before they are shared."""
    options = work.options
    if options.checkpoint_path is not None:
        return True
    cfg = timm.models.get_pretrained_cfg(options.model)
    assert work.data is not None
    fits = cfg is not None and cfg.num_classes == work.data.num_classes and "in_chans" not in work.args
    return options.pretrained and (options.baseline_epochs == 0 or (fits and options.baseline_epochs is None))


def _compress(
    work: Run, model: nn.Module, teacher: nn.Module | None, step: Callable[[str], Step]
) -> tuple[Packed, nn.Module]:
    """Run the stages; give the packed model and the module it came from."""
    if teacher is None and work.data is not None and not work.options.from_scratch:
        teacher = model
    packed, original = None, model.state_dict()
    pruned = False
    for stage in work.recipe.stages:
        packed, model = _stage(
            work, stage, model, teacher, step, preserve_sparsity=pruned, original=original,
            from_scratch=work.options.from_scratch and packed is None,
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
    job.prepare()
    shared = [fate for fate in job.fates if fate.scheme]
    weights = sum(fate.site.tensor.numel() for fate in shared)
    schemes = ", ".join(sorted({repr(fate.scheme) for fate in shared}))
    here.done(f"{len(shared)} tensors, {counts(weights)} weights  {schemes}")
    if work.data is None or not _trains(work, stage):
        return job.finish(_calibration(work, training.batch_size), half), job.model
    here = step("fine-tuning")
    job.finetune(
        work.data.train_loader(training.batch_size, seed), val=work.data.eval_loader(EVAL_BATCH, "validation"),
        epochs=training.epochs, lr=training.lr, opt=training.opt, sched=training.sched,
        weight_decay=training.weight_decay, on_epoch=here.on_epoch, on_step=here.on_step,
        device=work.options.device, amp=work.options.amp,
    )  # fmt: skip
    packed = job.finish(_calibration(work, training.batch_size), half)
    top1 = _measure(work, job.model, "validation").top1
    here.done(f"{training.epochs} epochs  validation {percent(top1)}")
    return packed, job.model


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


def _write(work: Run, packed: Packed, model: nn.Module, dense: Evaluation | None, here: Step) -> Evaluation | None:
    """Write the file, reopen it, and measure the model it gives; None where there is no data."""
    expected = None
    if work.data is not None:
        expected = _measure(work, model)
        before = {} if dense is None else {"dense": dense.top1}
        data = {"name": work.data.name, "version": work.data.version, "split": work.data.evaluated, "n": expected.n}
        packed.note(data=data, top1={**before, "packed": expected.top1})
    size = packed.save(work.output, codec=work.options.codec, force=work.options.force)
    loaded = compressor.load(work.output)
    here.done(f"{work.output}  {size:,} bytes, reopened and verified")
    if work.data is None or expected is None:
        return None
    result = _measure(work, loaded)
    if not torch.equal(result.correct, expected.correct):
        raise CompressorError(f"{work.output} answers otherwise than the model it was written from")
    return result


def _show(work: Run, packed: Packed, result: Evaluation | None, dense: Evaluation | None) -> None:
    options = work.options
    report = packed.report(options.codec)
    if options.as_json:
        accuracy = None if result is None else _accuracy(result, dense)
        print_json({"file": str(work.output), "model": options.model, "top1": accuracy, **report.to_dict()})
        return
    click.echo("\n" + report.table(width(), options.everything))
    if result is not None and work.data is not None:
        click.echo(accuracy_line(result, dense, work.data.evaluated, options.seed))
    if not options.names_data and not options.post_training:
        click.echo(f"For your own images (in IMAGES/train/CLASS and IMAGES/val/CLASS): {options.own_data()}")


def _accuracy(result: Evaluation, dense: Evaluation | None) -> dict[str, Any]:
    low, high = result.interval
    facts: dict[str, Any] = {"packed": result.top1, "n": result.n, "low": low, "high": high}
    if dense is not None:
        lost, gained = flips(result, dense)
        facts |= {"dense": dense.top1, "lost": lost, "gained": gained}
    return facts
