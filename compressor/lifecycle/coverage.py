"""The share of a model that no rule shares: a warning, so that it is not found in the size of the file alone."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from compressor.policy.policy import Policy, TensorPlan
from compressor.sharing.sites import find_tensors

__all__ = ["warn_of_dense"]

_log = logging.getLogger(__name__)
EXPECTED = 0.05  # share of the parameters' bytes that may stay dense without a warning
NAMED = 3  # tensors that the warning names


def warn_of_dense(model: nn.Module, policy: Policy, plans: Sequence[TensorPlan]) -> None:
    """Logs one warning where more than 5 % of the parameters' bytes stay dense unasked.

    Norms and biases do not count, and neither do tensors that a rule ignores.

    Args:
        model: not yet shared.
        policy: the rules.
        plans: what the policy plans for the tensors of the model.
    """
    plan_of = {plan.site.name: plan for plan in plans}
    reasons, sizes = {}, {}
    for site in find_tensors(model):
        plan = plan_of.get(site.name)
        asked = plan is not None and plan.rule is not None and policy.given[plan.rule].ignored
        if site.is_minor or asked or (plan is not None and plan.scheme):
            continue
        reasons[site.name] = site.exemption if plan is None else plan.reason
        sizes[site.name] = site.tensor.nbytes
    total = sum(parameter.nbytes for parameter in model.parameters())
    if (dense := sum(sizes.values())) > EXPECTED * total:
        largest = sorted(sizes, key=lambda name: -sizes[name])
        named = ", ".join(f"{name} ({reasons[name]})" for name in largest[:NAMED])
        more = f" and {len(largest) - NAMED} more" if len(largest) > NAMED else ""
        _log.warning("%.0f %% of the parameters' bytes stay dense: %s%s", 100 * dense / total, named, more)
