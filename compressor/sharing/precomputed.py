"""Shared weights that are computed before the layers of a model, one after the other, which is faster.

Between the layers of a network, whose data push it out of the processor's caches, the code that computes a weight takes
several times as long. A weight that was computed beforehand is only right where the layer itself would compute the same
one, with the same graph behind it: ``_state`` is what that depends on.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["PrecomputedWeight", "can_precompute"]


class PrecomputedWeight:
    """The weight of one parametrisation, where it was computed before its layer's turn; a copy is empty."""

    def __init__(self) -> None:
        self._entry: tuple[Tensor, Tensor, Any] | None = None

    def __reduce__(self) -> tuple[type[PrecomputedWeight], tuple[()]]:
        return PrecomputedWeight, ()

    @property
    def is_empty(self) -> bool:
        """Whether no weight is kept."""
        return self._entry is None

    def compute(self, weight: Callable[[Tensor], Tensor], group: nn.Module, master: Tensor) -> None:
        """Computes the weight from its master weight and keeps it.

        Args:
            weight: computes it; it may write to the master weight, as schemes do that assign weights.
            group: whose parameters the weight depends on.
            master: the master weight.
        """
        computed = weight(master)
        self._entry = computed, master, _state(group, master)

    def take(self, group: nn.Module, master: Tensor) -> Tensor | None:
        """Returns the weight where it is the one that would be computed now, else None."""
        entry = self._entry  # read once: another thread may clear it
        if entry is None:
            return None
        weight, source, state = entry
        return weight if source is master and state == _state(group, master) else None

    def clear(self) -> None:
        """Forgets the weight."""
        self._entry = None


def can_precompute() -> bool:
    """Whether computing all weights at once helps: not in evaluation, where it would only take memory."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and _saved_tensor_hooks is not None


def _state(group: nn.Module, master: Tensor) -> Any:
    """Returns what must not have changed for a weight to be the one its layer would compute, graph included.

    The thread, for a graph can go backwards once only. Whether there is a graph, and the hooks by which autograd saves
    tensors: ``torch.utils.checkpoint`` installs some, counts what is saved, and fails where a weight from outside saves
    less. How often the parameters were written to, for some models average or clamp them in their forward pass.
    """
    assert _saved_tensor_hooks is not None
    versions = [parameter._version for parameter in group.parameters(recurse=False)]
    return get_ident(), torch.is_grad_enabled(), _saved_tensor_hooks(False), master._version, versions


# PyTorch has no public way to ask for the hooks that ``torch.autograd.graph.saved_tensors_hooks`` has installed. In a
# version without this private one nothing is precomputed: each layer computes its weight in its turn. See
# docs/decisions/0016.
_saved_tensor_hooks: Callable[[bool], Any] | None = getattr(
    torch._C._autograd, "_top_saved_tensors_default_hooks", None
)
