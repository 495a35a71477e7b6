"""``compress MODEL --dry-run``: the fate of every tensor, and the size before training."""

from __future__ import annotations

import click

from compressor.baseline import create_model
from compressor.cli.setup import Run
from compressor.cli.show import print_json, print_table
from compressor.core import Compressor

__all__ = ["dry_run"]


def dry_run(work: Run) -> None:
    """Show the fate of every tensor, and the size that the untrained weights would take."""
    options = work.options
    given = {"checkpoint_path": str(options.checkpoint_path)} if options.checkpoint_path is not None else {}
    model = create_model(options.model, {**work.args, **given}, pretrained=options.pretrained, seed=options.seed)
    policy = work.recipe.stages[-1].policy
    job = Compressor(model, policy, model_args=work.args, teacher=None, from_scratch=True)  # for its size alone
    rules = job.policy.given
    rows = [
        {
            "site": fate.site.name,
            "shape": list(fate.site.tensor.shape),
            "weights": fate.site.tensor.numel(),
            "fate": repr(fate.scheme) if fate.scheme else f"left alone: {fate.reason}",
            "rule": "" if fate.rule is None else rules[fate.rule].match,
        }
        for fate in job.fates
    ]
    report = job.prepare().finish(half_untouched=options.untouched == "f16").report(options.codec)
    size, dense = report.totals.file, report.totals.dense
    if options.as_json:
        print_json({"sites": rows, "predicted": {"file": size, "dense": dense}, "output": str(work.output)})
        return
    shown = [[r["site"], "x".join(map(str, r["shape"])), f"{r['weights']:,}", r["fate"], r["rule"]] for r in rows]  # type: ignore[call-overload]
    print_table([["site", "shape", "weights", "fate", "rule"], *shown])
    click.echo(f"predicted  {dense:,} -> {size:,} bytes ({dense / size:.1f}x) before training; nothing was written")
