"""Training and evaluation mode, of the modules that the caller has put in eval mode for good in particular."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["eval_flags", "eval_mode", "modules_in_eval", "restored_modes", "train_mode"]


def modules_in_eval(model: nn.Module) -> list[nn.Module]:
    """Returns the modules in eval mode of a model that is itself in training mode, such as a BatchNorm to be kept.

    Where the whole model is in eval mode there are none: that is how evaluations leave it.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval())
        >>> len(modules_in_eval(net)), len(modules_in_eval(net.eval()))
        (1, 0)
    """
    return [module for module in model.modules() if not module.training] if model.training else []


def train_mode(model: nn.Module, in_eval: Iterable[nn.Module] = ()) -> None:
    """Puts a model in training mode, but for ``modules_in_eval`` and other modules that stay in eval mode.

    Args:
        model: the model.
        in_eval: modules that stay in eval mode, too.
    """
    kept = [*in_eval, *modules_in_eval(model)]
    model.train()
    for module in kept:
        module.training = False


@contextmanager
def restored_modes(model: nn.Module) -> Iterator[None]:
    """Restores the mode of every module at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def eval_flags(model: nn.Module) -> Iterator[None]:
    """Does what ``eval_mode`` does without calling ``eval()``, which some modules act upon."""
    with restored_modes(model):
        for module in model.modules():
            module.training = False
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode inside, and restores the mode of every module afterwards."""
    with restored_modes(model):
        model.eval()
        yield
