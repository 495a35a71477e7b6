"""A job in words: what shares values, by which schemes, and how far the work has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tabulate import tabulate

from compressor.policy.policy import TensorPlan

__all__ = ["describe_plans", "plans_table"]


def describe_plans(plans: Sequence[TensorPlan]) -> str:
    """Returns how many tensors and weights share values, and by which schemes.

    Args:
        plans: of all tensors of a model.
    """
    shared = [plan for plan in plans if plan.scheme]
    weights = sum(plan.site.tensor.numel() for plan in shared)
    schemes = Counter(repr(plan.scheme) for plan in shared)
    by = ", ".join(f"{scheme} of {count}" if len(schemes) > 1 else scheme for scheme, count in schemes.items())
    left = len(plans) - len(shared)
    return f"{len(shared)} tensors with {weights:,} weights by {by}" + (f", {left} left alone" if left else "")


def plans_table(plans: Sequence[TensorPlan]) -> str:
    """Returns a table of the plans as HTML, in which special characters are escaped.

    Args:
        plans: of all tensors of a model.
    """
    rows = [
        (plan.site.name, "x".join(map(str, plan.site.tensor.shape)), f"{plan.site.tensor.numel():,}",
         repr(plan.scheme) if plan.scheme else f"left alone: {plan.reason}")
        for plan in plans
    ]  # fmt: skip
    return tabulate(rows, ["tensor", "shape", "weights", "plan"], "html", disable_numparse=True)
