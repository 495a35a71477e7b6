"""A job in words: what shares values, by which schemes, and how far the work has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tabulate import tabulate

from compressor.policy.policy import TensorPlan
from compressor.wording import counted

__all__ = ["describe_plan", "describe_plans", "describe_progress", "plans_table"]


def describe_plans(plans: Sequence[TensorPlan]) -> str:
    """Returns how many tensors and weights share values, and by which schemes.

    Args:
        plans: of all tensors of a model.
    """
    shared = [plan for plan in plans if plan.scheme]
    weights = sum(plan.site.tensor.numel() for plan in shared)
    schemes = Counter(describe_plan(plan) for plan in shared)
    by = ", ".join(f"{scheme} of {count}" if len(schemes) > 1 else scheme for scheme, count in schemes.items())
    left = len(plans) - len(shared)
    return f"{counted(len(shared), 'tensor')} with {weights:,} weights by {by}" + (
        f", {left} left alone" if left else ""
    )


def describe_plan(plan: TensorPlan) -> str:
    """Returns what becomes of a tensor, in the words of a command line or a recipe."""
    if plan.scheme is None:
        return f"left alone: {plan.reason}"
    return f"{plan.scheme}" if plan.pruning is None else f"{plan.scheme} sparsity={plan.pruning.sparsity:g}"


def describe_progress(steps: int, total: int, is_prepared: bool, is_finished: bool) -> str:
    """Returns how far a job has come.

    Args:
        steps, total: of training; 0: it has not begun.
        is_prepared, is_finished: whether weights share values, and whether they are packed.

    Example:
        >>> describe_progress(17, 17, False, True), describe_progress(3, 17, True, False)
        ('finished after 17 steps', '3 of 17 steps')
    """
    if is_finished:
        return f"finished after {counted(steps, 'step')}" if steps else "finished"
    return f"{steps} of {total} steps" if total else "prepared" if is_prepared else "new"


def plans_table(plans: Sequence[TensorPlan]) -> str:
    """Returns a table of the plans as HTML, in which special characters are escaped.

    Args:
        plans: of all tensors of a model.
    """
    rows = [
        (plan.site.name, "x".join(map(str, plan.site.tensor.shape)), f"{plan.site.tensor.numel():,}",
         describe_plan(plan))
        for plan in plans
    ]  # fmt: skip
    return tabulate(rows, ["tensor", "shape", "weights", "plan"], "html", disable_numparse=True)
