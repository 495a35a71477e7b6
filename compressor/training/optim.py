"""Optimisers and learning-rate schedules: timm's, by their timm names, moved on by the step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from compressor.formats.errors import UsageError

__all__ = ["RoundSchedule", "Schedule", "halve_rates", "make_optimizer", "use_fused_kernels"]

RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # where optimisers, timm's schedules and torch's keep them


class Schedule(Protocol):
    """A learning-rate schedule that moves on with every optimiser step, as torch's do."""

    def step(self) -> None:
        """Set the learning rate of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Give all that changes in training."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Put it back."""


class RoundSchedule:
    """A timm schedule for each parameter group, which may begin anew for some in the middle of training.

    Args:
        optimizer: whose learning rates are set.
        name: of timm's schedule.
        epochs, updates_per_epoch: of the whole training.
    """

    def __init__(self, optimizer: Optimizer, name: str, epochs: int, updates_per_epoch: int) -> None:
        self._optimizer, self._name = optimizer, name
        count = len(optimizer.param_groups)
        self._lengths = [(epochs, updates_per_epoch)] * count
        self._timms = [self._make(number, *length) for number, length in enumerate(self._lengths)]
        self._steps = [0] * count

    def _make(self, number: int, epochs: int, updates_per_epoch: int) -> Any:
        group: Any = _OneGroup(self._optimizer, number)
        return create_scheduler_v2(
            group, sched=self._name, num_epochs=epochs, step_on_epochs=False, updates_per_epoch=updates_per_epoch
        )[0]

    def step(self) -> None:
        """Set the learning rate of the next step."""
        for number, timms in enumerate(self._timms):
            self._steps[number] += 1
            if timms is not None:
                timms.step_update(self._steps[number])

    def restart(self, parameters: Sequence[Tensor], steps: int) -> None:
        """Begin the schedule anew, for so many steps, in the groups that hold any of the parameters."""
        wanted = {id(parameter) for parameter in parameters}
        for number, group in enumerate(self._optimizer.param_groups):
            if wanted & {id(parameter) for parameter in group["params"]}:
                group["lr"] = group.get("initial_lr", group["lr"])
                self._lengths[number], self._steps[number] = (1, steps), 0
                self._timms[number] = self._make(number, 1, steps)

    def state_dict(self) -> dict[str, Any]:
        """Give all that changes in training: of each group, how long its schedule is, and where it stands."""
        return {"lengths": list(self._lengths), "steps": list(self._steps)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back; the learning rates themselves are the optimiser's state."""
        self._lengths, self._steps = list(state["lengths"]), list(state["steps"])
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._timms = [self._make(number, *length) for number, length in enumerate(self._lengths)]
        for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
            group["lr"] = rate  # timm's schedules set it to their first


class _OneGroup:
    """A parameter group as the whole optimiser, all that timm's schedules look at."""

    def __init__(self, optimizer: Optimizer, number: int) -> None:
        self._optimizer, self._number = optimizer, number

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one group."""
        return [self._optimizer.param_groups[self._number]]


def make_optimizer(
    parameters: list[dict[str, Any]], opt: str, lr: float, sched: str, epochs: int, updates_per_epoch: int
) -> tuple[Optimizer, RoundSchedule]:
    """Build timm's optimiser and schedule; raises UsageError for names and settings they do not take."""
    try:
        optimizer = create_optimizer_v2(parameters, opt=opt, lr=lr)
        return optimizer, RoundSchedule(optimizer, sched, epochs, updates_per_epoch)
    except (ValueError, AssertionError, NotImplementedError) as error:  # timm asserts what it is given
        raise UsageError(f"optimiser {opt!r} with schedule {sched!r}: {error}") from None


def use_fused_kernels(optimizer: Optimizer) -> None:
    """Let Adam and AdamW pass over the weights once a step, in a fifth of the time, where PyTorch does so safely.

    Its ``fused`` kernels go by memory, whatever the strides say; those of SGD ask for all gradients from the first
    step on, and on GPUs they meet gradients that overflowed. Set on the groups, not asked of the optimiser, which
    would then take the scaling of a loss in half precision in its own hands.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.AdamW([torch.zeros(2)])
        >>> use_fused_kernels(optimizer)
        >>> optimizer.param_groups[0]["fused"]
        True
    """
    if type(optimizer) not in (Adam, AdamW):
        return
    for group in optimizer.param_groups:
        plain = not any(group.get(name) for name in ("foreach", "capturable", "differentiable"))
        group["fused"] = (plain and all(map(_is_plain, group["params"]))) or None


def _is_plain(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu" and parameter.is_floating_point() and parameter.is_contiguous()


def halve_rates(optimizer: Optimizer, schedule: Schedule) -> None:
    """Halve the learning rate of all steps to come; as part of the optimiser's state it stays so when it is resumed.

    Example:
        >>> import torch
        >>> optimizer, schedule = make_optimizer([{"params": [torch.zeros(1)]}], "sgd", 0.4, "cosine", 1, 2)
        >>> halve_rates(optimizer, schedule)
        >>> schedule.step()
        >>> round(optimizer.param_groups[0]["lr"], 4)
        0.1
    """
    for group in optimizer.param_groups:
        group.update({name: group[name] * 0.5 for name in RATES if name in group})
    schedule.load_state_dict(schedule.state_dict())  # those of timm have noted the first rate
