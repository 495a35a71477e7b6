"""What the verbs have in common: a wrapped model carries the Compressor that governs it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from compressor.compressor import Compressor
from compressor.formats.errors import UsageError
from compressor.policy.policy import Policy
from compressor.sharing.parametrization import CONTAINER

__all__ = ["job_of", "jobs", "strip", "wrap"]


@dataclass(frozen=True)
class Wrapping:
    """Which verb wrapped a module, the job that governs it, and at which step its schedule ends, 0 without one."""

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
    """Let a model, or a copy of it, compute with shared weights while it trains; see ``Compressor``.

    Raises UsageError for what is no module, or is wrapped already, PolicyError where nothing in it can be shared.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"{verb} takes a torch.nn.Module, got {type(model).__name__}; wrap layers one by one")
    for name, wrapping in _wrappings(model):
        raise UsageError(f"{verb}: {name or 'the model'} is wrapped by {wrapping.verb} already: strip that first")
    job = Compressor(model, policy, copy=not inplace, teacher=None, preserve_sparsity=preserve_sparsity).prepare()
    # The job goes where the model goes, deep copies included, and leaves no trace when it is finished.
    getattr(job.model, CONTAINER).wrapping = Wrapping(verb, job, last_step)
    return job.model


def strip(verb: str, to_strip: nn.Module) -> nn.Module:
    """Give a copy without what a verb has wrapped: ordinary modules, every weight snapped to its value.

    Raises UsageError where that verb has wrapped nothing.
    """
    stripped = copy.deepcopy(to_strip)
    for wrapping in jobs(verb, stripped):
        wrapping.job.finish()
    return stripped


def jobs(verb: str, model: nn.Module) -> list[Wrapping]:
    """List what a verb has wrapped, the model or layers of it; raises UsageError where it is nothing."""
    found = [wrapping for _, wrapping in _wrappings(model) if wrapping.verb == verb]
    if not found:
        others = {wrapping.verb for _, wrapping in _wrappings(model)}
        instead = f"it is wrapped by {' and '.join(sorted(others))}" if others else "it is an ordinary module"
        raise UsageError(f"the model is not wrapped by {verb}: {instead}")
    return found


def job_of(wrapped: nn.Module) -> Compressor:
    """Give the Compressor that governs a wrapped model.

    Its ``finish()`` strips the model in place and gives what the packed file will hold; its ``attach(optimizer,
    total_steps)`` tells the scheme how far training is. For a timm model built with arguments, put them into
    ``model_args`` before the file is saved.

    Raises UsageError for a model that no verb has wrapped, or of which only layers are.

    Example:
        >>> from compressor.api.clustering import cluster_weights
        >>> clustered = cluster_weights(nn.Sequential(nn.Linear(16, 16)), number_of_clusters=4)
        >>> packed = job_of(clustered).finish()
        >>> len(clustered[0].weight.unique()), len(packed.to_bytes()) < 4 * 16 * 16
        (4, True)
    """
    found = dict(_wrappings(wrapped))
    if "" not in found:
        layers = f", but {', '.join(found)} in it" if found else ", or has been stripped"
        raise UsageError(f"this model is not wrapped itself{layers}: wrap the whole model to pack it")
    return found[""].job


def _wrappings(model: nn.Module) -> Iterator[tuple[str, Wrapping]]:
    """Give the names of all wrapped modules in a model, itself included, with what wraps them."""
    for name, module in model.named_modules():
        wrapping = getattr(getattr(module, CONTAINER, None), "wrapping", None)
        if wrapping is not None:
            yield name, wrapping
