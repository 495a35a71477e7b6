"""``compress MODEL --dry-run``: the fate of every tensor, the size before training, and the memory of its steps."""

from __future__ import annotations

import click
import torch

from compressor.cli.setup import Run
from compressor.cli.show import print_json, print_table
from compressor.cli.weights import named_model
from compressor.compressor import Compressor
from compressor.formats.loader import build_model
from compressor.lifecycle.step_memory import StepMemory, size_of

__all__ = ["dry_run"]


def dry_run(work: Run) -> None:
    """Show the fate of every tensor, and the size that the untrained weights would take."""
    options, model = work.options, named_model(work)
    policy = work.recipe.stages[-1].policy
    job = Compressor(model, policy, model_args=work.args, teacher=None, from_scratch=True)  # for its size alone
    rules = job.policy.given
    rows = [
        {
            "site": plan.site.name,
            "shape": list(plan.site.tensor.shape),
            "weights": plan.site.tensor.numel(),
            "fate": repr(plan.scheme) if plan.scheme else f"left alone: {plan.reason}",
            "rule": "" if plan.rule is None else rules[plan.rule].match,
        }
        for plan in job.plans
    ]
    memory = _memory(work, job.prepare())
    report = job.finish(half_untouched=options.untouched == "f16").report(options.codec)
    size, dense = report.totals.file, report.totals.dense
    if options.as_json:
        taken = None if memory is None else {**vars(memory), "total": memory.total}
        predicted = {"file": size, "dense": dense, "memory": taken}
        print_json({"sites": rows, "predicted": predicted, "output": str(work.output)})
        return
    shown = [[r["site"], "x".join(map(str, r["shape"])), f"{r['weights']:,}", r["fate"], r["rule"]] for r in rows]  # type: ignore[call-overload]
    print_table([["site", "shape", "weights", "fate", "rule"], *shown])
    if memory is not None:
        click.echo(_said(work, memory))
    click.echo(f"predicted  {dense:,} -> {size:,} bytes ({dense / size:.1f}x) before training; nothing was written")


def _memory(work: Run, job: Compressor) -> StepMemory | None:
    """Predict the memory of a step of the last stage; None where it is not trained."""
    training = work.recipe.stages[-1].training
    if work.data is None or not training.epochs:
        return None
    sketch = build_model(work.options.model, work.args)
    dense = size_of(sketch.state_dict().values())
    own = work.teacher
    taught = training.distill > 0 and not (work.options.from_scratch and own is None)
    teacher = dense if own is None else 2 * size_of(build_model(own.options.model, own.args).state_dict().values())
    average = size_of(job.model.parameters()) if training.model_ema_decay else 0
    images = torch.empty(training.batch_size, *work.data.input_size, device="meta")
    held = size_of(job.dense.values()) + dense + taught * teacher + average
    return StepMemory.of(job.model, job.groups, sketch, images, training.opt, held)


def _said(work: Run, memory: StepMemory) -> str:
    parts = {
        "models": memory.models, "optimiser": memory.optimizer, "shared weights": memory.shared,
        "activations": memory.saved, "gradients or largest layer": memory.passing,
    }  # fmt: skip
    listed = " + ".join(f"{name} {'unknown' if size is None else f'{size:,}'}" for name, size in parts.items())
    batch = work.recipe.stages[-1].training.batch_size
    return f"memory     about {memory.total:,} bytes a step of {batch} images, beside Python and the data = {listed}"
