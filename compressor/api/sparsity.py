"""``tfmot.sparsity.keras`` for torch: prunes the smallest weights of a model while it trains, then strips it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer

from compressor.api.wrapping import Wrapping, jobs, strip, wrap
from compressor.formats.errors import UsageError
from compressor.policy.policy import Policy, Rule

__all__ = ["ConstantSparsity", "PolynomialDecay", "UpdatePruningStep", "prune_low_magnitude", "strip_pruning"]

VERB = "prune_low_magnitude"


def _check_share(name: str, value: float) -> None:
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise UsageError(f"{name} must be a number from 0 to below 1, got {value!r}")


def _check_whole(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(f"{name} must be a whole number, at least {least}, got {value!r}")


@dataclass(frozen=True)
class ConstantSparsity:
    """A constant share of zeros from a given step on.

    All of it is pruned at ``begin_step``, and pruned weights stay pruned, so that the later prunings that ``end_step``
    and ``frequency`` ask for find nothing left to prune.

    Args:
        target_sparsity: share of zeros, 0 to below 1.
        begin_step: number of optimiser steps before weights are pruned; 0: at once.
        end_step: number of optimiser steps after which nothing more is pruned, no less than ``begin_step``; -1: never.
        frequency: number of steps between prunings.

    Raises:
        UsageError: an argument is not valid.
    """

    target_sparsity: float
    begin_step: int
    end_step: int = -1
    frequency: int = 100

    def __post_init__(self) -> None:
        _check_share("target_sparsity", self.target_sparsity)
        _check_whole("begin_step", self.begin_step, 0)
        if self.end_step != -1:
            _check_whole("end_step", self.end_step, self.begin_step)
        _check_whole("frequency", self.frequency, 1)

    @property
    def last_step(self) -> int:
        """The step after which nothing more is pruned."""
        return self.begin_step

    def settings(self) -> dict[str, Any]:
        """Returns the settings of a rule; steps become shares of the last step."""
        begin = 1.0 if self.begin_step else 0.0
        return {"sparsity": self.target_sparsity, "sparsity_from": begin, "sparsity_by": begin}


@dataclass(frozen=True)
class PolynomialDecay:
    """A share of zeros that rises along a polynomial, fast at first.

    After ``t`` steps it is ``final + (initial - final) (1 - (t - begin_step) / (end_step - begin_step))^power``.

    Args:
        initial_sparsity: share of zeros at ``begin_step``, 0 to below 1.
        final_sparsity: share of zeros at ``end_step``, 0 to below 1, no less than ``initial_sparsity``.
        begin_step: number of optimiser steps before weights are pruned.
        end_step: number of optimiser steps after which the share is final.
        power: of the polynomial, above 0, at most 100.
        frequency: number of steps between prunings; a last one comes at ``end_step``.

    Raises:
        UsageError: an argument is not valid.

    Reference: Zhu, Gupta, "To Prune, or Not to Prune", 2017, equation 1.
    """

    initial_sparsity: float
    final_sparsity: float
    begin_step: int
    end_step: int
    power: float = 3
    frequency: int = 100

    def __post_init__(self) -> None:
        _check_share("initial_sparsity", self.initial_sparsity)
        _check_share("final_sparsity", self.final_sparsity)
        if self.initial_sparsity > self.final_sparsity:
            falls = f"initial_sparsity {self.initial_sparsity:g} is above final_sparsity {self.final_sparsity:g}"
            raise UsageError(f"{falls}, but what is pruned stays pruned")
        _check_whole("begin_step", self.begin_step, 0)
        _check_whole("end_step", self.end_step, max(1, self.begin_step))
        _check_whole("frequency", self.frequency, 1)
        if not isinstance(self.power, int | float) or not 0 < self.power <= 100:
            raise UsageError(f"power must be a number above 0, at most 100, got {self.power!r}")

    @property
    def last_step(self) -> int:
        """The step after which nothing more is pruned."""
        return self.end_step

    def settings(self) -> dict[str, Any]:
        """Returns the settings of a rule; steps become shares of the last step."""
        return {
            "sparsity": self.final_sparsity,
            "sparsity_start": self.initial_sparsity,
            "sparsity_from": self.begin_step / self.end_step,
            "sparsity_by": 1.0,
            "sparsity_power": self.power,
            "sparsity_every": min(1.0, self.frequency / self.end_step),
        }


HALF_AT_ONCE = ConstantSparsity(0.5, 0)


def prune_low_magnitude(
    to_prune: nn.Module, pruning_schedule: ConstantSparsity | PolynomialDecay = HALF_AT_ONCE
) -> nn.Module:
    """Returns a copy of a model or layer in which more and more of the smallest weights are zero as it trains.

    ``UpdatePruningStep(pruned, optimizer)`` connects the schedule to the training.

    Args:
        to_prune: a model or layer; each of its Linear, convolution, embedding and attention weights is pruned
            separately.
        pruning_schedule: how many weights are zero, and when.

    Raises:
        UsageError: an argument is no module or no schedule.
        PolicyError: nothing in the model can be pruned.

    Example:
        >>> pruned = prune_low_magnitude(nn.Linear(16, 8), ConstantSparsity(0.75, begin_step=0))
        >>> int((strip_pruning(pruned).weight == 0).sum())
        96
    """
    if not isinstance(pruning_schedule, ConstantSparsity | PolynomialDecay):
        raise UsageError(f"pruning_schedule must be ConstantSparsity or PolynomialDecay, got {pruning_schedule!r}")
    policy = Policy([Rule("*", scheme="dense", **pruning_schedule.settings())])
    return wrap(VERB, to_prune, policy, last_step=pruning_schedule.last_step)


class UpdatePruningStep:
    """Connects the schedule of a pruned model to the steps of an optimiser; to be created once, before training.

    Args:
        pruned: a model of ``prune_low_magnitude``, or one with such layers.
        optimizer: its steps are counted.

    Raises:
        UsageError: the model has no pruned weights.

    Example:
        >>> import torch
        >>> pruned = prune_low_magnitude(nn.Linear(16, 8), PolynomialDecay(0.25, 0.75, begin_step=0, end_step=10))
        >>> optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
        >>> callback = UpdatePruningStep(pruned, optimizer)
        >>> for _ in range(10):
        ...     optimizer.step()
        >>> callback.step, int((pruned.weight == 0).sum())
        (10, 96)
    """

    def __init__(self, pruned: nn.Module, optimizer: Optimizer) -> None:
        self._jobs = [wrapping.job for wrapping in jobs(VERB, pruned)]
        for wrapping in jobs(VERB, pruned):
            wrapping.job.attach(optimizer, max(1, wrapping.last_step))

    @property
    def step(self) -> int:
        """The number of steps so far."""
        return self._jobs[0].steps


def strip_pruning(to_strip: nn.Module) -> nn.Module:
    """Returns a copy of a pruned model that is an ordinary module again, with zeros where weights are pruned.

    Args:
        to_strip: the model, or one with pruned layers.

    Raises:
        UsageError: the model has no pruned weights, or its schedule has not ended.
    """
    for wrapping in jobs(VERB, to_strip):
        _check_finished(wrapping)
    return strip(VERB, to_strip)


def _check_finished(wrapping: Wrapping) -> None:
    """Raises UsageError if the schedule has not ended: the rest would be pruned at once, with no training after it."""
    for group in wrapping.job.groups:
        assert group.pruning is not None
        wanted = group.pruning.sparsity
        for site in group.sites:
            pruned = group.pruned(site)
            if int(pruned.sum()) < round(wanted * pruned.numel()):
                now = f"{site.name}: {float(pruned.float().mean()):.1%} of the weights are pruned, not yet {wanted:.1%}"
                raise UsageError(
                    f"{now}: train up to step {wrapping.last_step} with UpdatePruningStep(model, optimizer)"
                )
