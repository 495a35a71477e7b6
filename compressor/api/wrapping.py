"""Wrapping and stripping of models: a wrapped model carries the Compressor that controls it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from compressor.compressor import Compressor
from compressor.formats.errors import UsageError
from compressor.policy.policy import Policy
from compressor.sharing.parametrization import CONTAINER
from compressor.training.model_copy import checked_module, copy_module

__all__ = ["job_of", "jobs", "strip", "wrap"]


@dataclass(frozen=True)
class Wrapping:
    """The function that wrapped a module, the Compressor that controls it, and the last step of its schedule, or 0."""

    verb: str
    job: Compressor
    last_step: int = 0


def wrap(
    verb: str,
    model: nn.Module,
    policy: Policy,
    *,
    inplace: bool = False,
    preserve_sparsity: bool = False,
    last_step: int = 0,
) -> nn.Module:
    """Makes a model, or a copy of it, compute with shared weights while it trains; see ``Compressor``.

    Args:
        verb: name of the calling function, for messages and for ``strip``.
        model: the model or layer to wrap.
        policy: the rules by which its weights are shared.
        inplace: whether the model itself is wrapped rather than a copy.
        preserve_sparsity: whether weights that are zero now stay zero.
        last_step: the step at which the pruning schedule ends; 0: there is none.

    Raises:
        UsageError: the argument is no module, or is wrapped already.
        PolicyError: nothing in the model can be shared.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"{verb} takes a torch.nn.Module, got {type(model).__name__}; wrap layers one by one")
    for name, wrapping in _wrappings(model):
        raise UsageError(f"{verb}: {name or 'the model'} is wrapped by {wrapping.verb} already: strip that first")
    job = Compressor(model, policy, copy=not inplace, teacher=None, preserve_sparsity=preserve_sparsity).prepare()
    # Stored in the container, the job is part of deep copies of the model and disappears when it is finished.
    getattr(job.model, CONTAINER).wrapping = Wrapping(verb, job, last_step)
    return job.model


def strip(verb: str, to_strip: nn.Module) -> nn.Module:
    """Returns a copy in which all that a function has wrapped are ordinary modules, with the shared values as weights.

    Args:
        verb: name of the function that wrapped the model or its layers.
        to_strip: the model.

    Raises:
        UsageError: that function has wrapped nothing in the model.
    """
    stripped = copy_module(checked_module(to_strip))
    for wrapping in jobs(verb, stripped):
        wrapping.job.finish()
    return stripped


def jobs(verb: str, model: nn.Module) -> list[Wrapping]:
    """Returns the wrappings of a model and its layers by one function.

    Args:
        verb: name of the function.
        model: the model.

    Raises:
        UsageError: that function has wrapped nothing in the model.
    """
    matching = [wrapping for _, wrapping in _wrappings(model) if wrapping.verb == verb]
    if not matching:
        others = {wrapping.verb for _, wrapping in _wrappings(model)}
        instead = f"it is wrapped by {' and '.join(sorted(others))}" if others else "it is an ordinary module"
        raise UsageError(f"the model is not wrapped by {verb}: {instead}")
    return matching


def job_of(wrapped: nn.Module) -> Compressor:
    """Returns the Compressor that controls a wrapped model.

    Its ``finish()`` strips the model in place and returns the content of the packed file; its ``attach(optimizer,
    total_steps)`` tells the scheme how far training is.

    Args:
        wrapped: the model.

    Raises:
        UsageError: the model is not wrapped, or only layers of it are.

    Example:
        >>> from compressor.api.clustering import cluster_weights
        >>> clustered = cluster_weights(nn.Sequential(nn.Linear(16, 16)), number_of_clusters=4)
        >>> packed = job_of(clustered).finish()
        >>> len(clustered[0].weight.unique()), len(packed.to_bytes()) < 4 * 16 * 16
        (4, True)
    """
    wrappings = dict(_wrappings(checked_module(wrapped)))
    if "" not in wrappings:
        layers = f", but {', '.join(wrappings)} in it" if wrappings else ", or has been stripped"
        raise UsageError(f"this model is not wrapped itself{layers}: wrap the whole model to pack it")
    return wrappings[""].job


def _wrappings(model: nn.Module) -> Iterator[tuple[str, Wrapping]]:
    """Yields name and wrapping of all wrapped modules of a model, the model itself included."""
    for name, module in model.named_modules():
        wrapping = getattr(getattr(module, CONTAINER, None), "wrapping", None)
        if wrapping is not None:
            yield name, wrapping
