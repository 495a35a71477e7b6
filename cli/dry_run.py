"""``compress MODEL --dry-run``: what becomes of every tensor, the size before training, and the memory of its steps."""

from __future__ import annotations

from typing import Any

import torch

from compressor.cli.configs import OutputConfig
from compressor.cli.search import check_above, least_size, target_of, vary_vectors
from compressor.cli.setup import Run
from compressor.cli.show import echo, print_json, print_table
from compressor.cli.targets import TargetConfig
from compressor.cli.weights import named_model
from compressor.compressor import Compressor
from compressor.formats.loader import build_model
from compressor.lifecycle.description import describe_plan
from compressor.lifecycle.step_memory import StepMemory, size_of
from compressor.policy.policy import TensorPlan
from compressor.sharing.sites import find_tensors

__all__ = ["dry_run"]

HEAD = 11  # columns before the text of a line


def dry_run(run: Run, output: OutputConfig, as_json: bool) -> None:
    """Prints what becomes of every tensor, and the size that the untrained weights would take.

    Args:
        run: the work, checked.
        output: how the file would be written.
        as_json: print one JSON document.
    """
    model = named_model(run.source, run.execution.seed)
    if not run.source.config.has_weights:
        vary_vectors(model)
    policy = run.recipe.stages[-1].policy
    # from_scratch: random indices have the size of the file before training, and take no time
    job = Compressor(model, policy, model_args=run.source.args, teacher=None, from_scratch=True)
    rows = [_row(job, plan, run.target) for plan in job.plans]
    vectors = _vectors_line(job)
    memory = _memory(run, job.prepare())
    report = job.finish(half_untouched=output.half_untouched, fold_norms=output.fold_norms).report(output.codec)
    dense = report.totals.dense
    least = None if run.target.flag is None else least_size(run, output)
    size = report.totals.file if run.target.flag is None else target_of(run.target).bytes(_shared_weights(job))
    check_above(run.target, size, least)
    if as_json:
        predicted = {"file": size, "least": least, "dense": dense, "memory": memory and _memory_facts(memory)}
        print_json(_document(run, rows, predicted))
        return
    shown = [[r["site"], "x".join(map(str, r["shape"])), f"{r['weights']:,}", r["plan"], r["rule"]] for r in rows]
    print_table([["site", "shape", "weights", "plan", "rule"], *shown], spare=("rule",))
    echo(vectors, HEAD)
    if memory is not None:
        echo(_memory_line(memory, run.recipe.stages[-1].training.batch_size), HEAD)
    when = "before training" if run.target.flag is None else f"for {run.target.command_line().strip()}, not searched"
    if least is not None:
        echo(f"least      {least:,} bytes, with all weights zero", HEAD)
    after = "unknown" if size is None else f"{size:,} bytes ({dense / size:.1f}x)"
    echo(f"predicted  {dense:,} -> {after} {when}; nothing was written", HEAD)


def _document(run: Run, rows: list[dict[str, Any]], predicted: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON document of ``compress MODEL --dry-run --json``."""
    return {
        "model": {"name": run.source.named.architecture, "args": dict(run.source.args)},
        "preprocessing": run.source.preprocessing or None,
        "recipe": run.recipe.to_dict(),
        "sites": rows,
        "predicted": predicted,
        "target": run.target.arguments or None,
        "output": str(run.output),
    }


def _memory_facts(memory: StepMemory) -> dict[str, Any]:
    return {**vars(memory), "total": memory.total}


def _shared_weights(job: Compressor) -> int:
    return sum(plan.site.tensor.numel() for plan in job.plans if plan.scheme)


def _row(job: Compressor, plan: TensorPlan, target: TargetConfig) -> dict[str, Any]:
    return {
        "site": plan.site.name,
        "shape": list(plan.site.tensor.shape),
        "weights": plan.site.tensor.numel(),
        "plan": _plan(plan, target),
        "rule": "" if plan.rule is None else job.policy.given[plan.rule].match,
    }


def _plan(plan: TensorPlan, target: TargetConfig) -> str:
    """Returns what becomes of a tensor; where a target decides on the values, by which."""
    text = describe_plan(plan)
    if plan.scheme is None or not plan.scheme.has_price or target.flag is None:
        return text
    return text.replace(f"{plan.scheme}", f"{plan.scheme.id} {target.command_line().strip()}")


def _vectors_line(job: Compressor) -> str:
    """Returns how much the parameters of one dimension take, which the table leaves out unless a rule names them."""
    planned = {plan.site.name for plan in job.plans}
    vectors = [site.tensor for site in find_tensors(job.model) if site.name not in planned]
    size = f"{len(vectors)} of one dimension, {size_of(vectors):,} bytes"
    return f"vectors    {size}: dense, shared only by rules that name them"


def _memory(run: Run, job: Compressor) -> StepMemory | None:
    """Predicts the memory of a step of the last stage; returns None where it is not trained."""
    stage = run.recipe.stages[-1]
    if run.data is None or not run.trains(stage):
        return None
    training = stage.training
    sketch = build_model(run.source.named.architecture, run.source.args)
    images = torch.empty(training.batch_size, *run.data.input_size, device="meta")
    dense = size_of(sketch.state_dict().values())
    ema = size_of(job.model.parameters()) if training.model_ema_decay else 0
    teacher = _teacher_size(run, dense) if training.distill > 0 else 0
    copies = size_of(job.dense.values()) if len(run.recipe.stages) > 1 else 0  # of one stage they are the model's own
    held = copies + dense + teacher + ema
    return StepMemory.of(job.model, job.groups, sketch, images, training.opt, held)


def _teacher_size(run: Run, dense: int) -> int:
    """Returns the bytes of the teacher's weights; a model of its own is held twice, beside its frozen copy."""
    if run.teacher is not None:
        source = run.teacher.source
        return 2 * size_of(build_model(source.named.architecture, source.args).state_dict().values())
    return dense if run.has_dense_model else 0


def _memory_line(memory: StepMemory, batch_size: int) -> str:
    parts = {
        "models": memory.models, "optimiser": memory.optimizer, "shared weights": memory.shared,
        "activations": memory.saved, "gradients or largest layer": memory.passing,
    }  # fmt: skip
    listed = " + ".join(f"{name} {'unknown' if size is None else f'{size:,}'}" for name, size in parts.items())
    total = f"about {memory.total:,} bytes a step of {batch_size} images, beside Python and the data"
    return f"memory     {total} = {listed}"
