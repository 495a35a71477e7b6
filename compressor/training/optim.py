"""timm's optimisers and learning-rate schedules, by their timm names; schedules are stepped by the optimiser's step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from compressor.formats.errors import UsageError, did_you_mean

__all__ = ["RoundSchedule", "Schedule", "halve_rates", "make_optimizer", "use_fused_kernels"]

SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly")  # for hints: timm has no list of its own
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # keys of the learning rates of optimisers and schedules


class Schedule(Protocol):
    """A learning-rate schedule that is stepped after every step of the optimiser, as torch's are."""

    def step(self) -> None:
        """Sets the learning rate of the next step."""

    def state_dict(self) -> dict[str, Any]:
        """Returns all that changes in training."""

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Restores what ``state_dict()`` returned."""


class RoundSchedule:
    """A timm schedule for each parameter group, which can be restarted for single groups in the middle of training.

    Args:
        optimizer: the optimiser whose learning rates are set.
        name: timm's name of the schedule.
        epochs: number of epochs of the training.
        updates_per_epoch: number of steps of an epoch.
    """

    def __init__(self, optimizer: Optimizer, name: str, epochs: int, updates_per_epoch: int) -> None:
        self._optimizer, self._name = optimizer, name
        self._epochs, self._done = epochs, 0  # of the whole training, and steps of it
        count = len(optimizer.param_groups)
        self._lengths = [(epochs, updates_per_epoch)] * count
        self._schedulers = [self._make(number, *length) for number, length in enumerate(self._lengths)]
        self._steps = [0] * count

    def _make(self, number: int, epochs: int, updates_per_epoch: int) -> Any:
        group: Any = _OneGroup(self._optimizer, number)
        return create_scheduler_v2(
            group, sched=self._name, num_epochs=epochs, step_on_epochs=False, updates_per_epoch=updates_per_epoch
        )[0]

    def step(self) -> None:
        """Sets the learning rate of the next step."""
        self._done += 1
        for number, scheduler in enumerate(self._schedulers):
            self._steps[number] += 1
            if scheduler is not None:
                scheduler.step_update(self._steps[number])

    def restart(self, parameters: Sequence[Tensor], steps: int) -> None:
        """Restarts the schedule, with a length of ``steps``, in the groups that hold any of the parameters."""
        restarted = {id(parameter) for parameter in parameters}
        for number, group in enumerate(self._optimizer.param_groups):
            if restarted & {id(parameter) for parameter in group["params"]}:
                group["lr"] = group.get("initial_lr", group["lr"])
                self._lengths[number], self._steps[number] = (1, steps), 0
                self._schedulers[number] = self._make(number, 1, steps)

    def state_dict(self) -> dict[str, Any]:
        """Returns the length of the training and its steps so far, and both for the schedule of each group."""
        return {
            "epochs": self._epochs, "done": self._done, "lengths": list(self._lengths), "steps": list(self._steps),
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what ``state_dict()`` returned; the learning rates themselves are part of the optimiser's state.

        Where that training had other epochs, each schedule is stretched, and goes on as if it had been as long from the
        beginning: this is what timm does.
        """
        self._done, self._lengths, self._steps = state["done"], list(state["lengths"]), list(state["steps"])
        is_longer = self._epochs != state["epochs"]
        if is_longer:
            stretch = self._epochs / state["epochs"]
            self._lengths = [self._stretched(number, stretch) for number in range(len(self._lengths))]
        rates = [group["lr"] for group in self._optimizer.param_groups]
        self._schedulers = [self._make(number, *length) for number, length in enumerate(self._lengths)]
        groups = zip(self._optimizer.param_groups, rates, self._schedulers, self._steps, strict=True)
        for group, rate, scheduler, steps in groups:
            group["lr"] = rate  # making timm's schedules has set it to their first
            if is_longer and scheduler is not None and steps:
                scheduler.step_update(steps)

    def _stretched(self, number: int, stretch: float) -> tuple[int, int]:
        """Returns epochs and steps of an epoch of a schedule that ends at the same share of a longer training."""
        epochs, updates = self._lengths[number]
        start = self._done - self._steps[number]
        if not start:
            return self._epochs, updates
        return 1, max(1, round((epochs * updates + start) * stretch) - start)


class _OneGroup:
    """Shows timm's schedules one parameter group as if it were the whole optimiser."""

    def __init__(self, optimizer: Optimizer, number: int) -> None:
        self._optimizer, self._number = optimizer, number

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one group, in a list."""
        return [self._optimizer.param_groups[self._number]]


def make_optimizer(
    parameters: list[dict[str, Any]], opt: str, lr: float, sched: str, epochs: int, updates_per_epoch: int
) -> tuple[Optimizer, RoundSchedule]:
    """Builds timm's optimiser and schedule.

    Args:
        parameters: parameter groups.
        opt, sched: timm's names.
        lr: highest learning rate.
        epochs: number of epochs of the training.
        updates_per_epoch: number of steps of an epoch.

    Raises:
        UsageError: timm does not know a name, or refuses a setting; or the optimiser needs second derivatives.
    """
    try:
        optimizer = create_optimizer_v2(parameters, opt=opt, lr=lr)
        if getattr(optimizer, "is_second_order", False):  # timm's mark of those that need backward(create_graph=True)
            raise ValueError("it needs second derivatives, which training does not compute; take another, as adamw")
        return optimizer, RoundSchedule(optimizer, sched, epochs, updates_per_epoch)
    except (ValueError, AssertionError, NotImplementedError) as error:  # timm checks arguments by assert
        names = (opt, [str(one) for one in list_optimizers()]), (sched, SCHEDULES)
        hint = "".join(did_you_mean(name, known) for name, known in names if name not in known)
        raise UsageError(f"opt {opt!r} with sched {sched!r}: {str(error).rstrip('.')}.{hint}") from None


def use_fused_kernels(optimizer: Optimizer) -> None:
    """Makes Adam and AdamW use PyTorch's ``fused`` kernels, which take a fifth of the time, where they are safe.

    The kernels are safe for contiguous parameters on the CPU: they ignore strides, and on GPUs they would be given
    gradients that have overflowed. SGD's need the gradients of all parameters from the first step on. The option is
    set on the parameter groups: an optimiser built with it would unscale the loss of mixed precision by itself.

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
        compatible = not any(group.get(name) for name in ("foreach", "capturable", "differentiable"))
        group["fused"] = (compatible and all(map(_can_be_fused, group["params"]))) or None


def _can_be_fused(parameter: Tensor) -> bool:
    return parameter.device.type == "cpu" and parameter.is_floating_point() and parameter.is_contiguous()


def halve_rates(optimizer: Optimizer, schedule: Schedule) -> None:
    """Halves the learning rates of all steps to come.

    They are part of the optimiser's state, so that a resumed training keeps them.

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
    schedule.load_state_dict(schedule.state_dict())  # rebuilds timm's schedulers, which hold the first rate
