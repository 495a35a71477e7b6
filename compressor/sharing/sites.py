"""Sites: the tensors of a model that can share values, under all the names they have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compressor.formats.errors import MissingError

__all__ = ["Site", "find_tensors", "finite_weights"]

SHARED_BY_DEFAULT = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.Bilinear)
LEAVES_BY_DEFAULT = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@dataclass(eq=False)
class Site:
    """One parameter of a model.

    Args:
        names: its names in ``state_dict()``, first the one it is stored under; several where it is tied.
        owners: the (module, attribute) pairs that hold it, without repetition.
    """

    names: list[str]
    owners: list[tuple[nn.Module, str]]

    @property
    def name(self) -> str:
        """The name it is stored under."""
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        """The tensor as its first owner shows it."""
        module, attribute = self.owners[0]
        found: Tensor = getattr(module, attribute)
        return found

    @property
    def default(self) -> bool:
        """Whether it is shared without being named: a weight matrix or kernel, not a norm, bias or table of places."""
        tensor = self.tensor
        usual = any(isinstance(m, SHARED_BY_DEFAULT) and a in LEAVES_BY_DEFAULT for m, a in self.owners)
        return usual and tensor.is_floating_point() and tensor.ndim >= 2

    @property
    def types(self) -> set[str]:
        """Class names of its modules, base classes included."""
        return {kind.__name__ for module, _ in self.owners for kind in type(module).__mro__}

    def named_by(self, pattern: str) -> bool:
        """Whether a glob spells out the tensor's own last name, which makes any tensor a site."""
        return any(
            fnmatchcase(name, pattern) and pattern.rpartition(".")[2] == name.rpartition(".")[2] for name in self.names
        )

    def paths(self) -> Iterator[str]:
        """Every name a rule may match it by: the tensor's, and those of all modules above it."""
        for name in self.names:
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(len(parts), 0, -1))

    def __repr__(self) -> str:
        return f"Site({self.name!r}, {tuple(self.tensor.shape)}, {math.prod(self.tensor.shape):,} weights)"


def find_tensors(model: nn.Module) -> list[Site]:
    """List the parameters of a model in state-dict order, tied ones once.

    Example:
        >>> [site.name for site in find_tensors(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))]
        ['0.weight', '0.bias']
    """
    found: dict[int, Site] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            site = found.setdefault(id(parameter), Site([], []))
            site.names.append(f"{prefix}.{attribute}" if prefix else attribute)
            if not any(owner is module and held == attribute for owner, held in site.owners):
                site.owners.append((module, attribute))
    return list(found.values())


def finite_weights(site: Site) -> Tensor:
    """Give a site's weights; raises MissingError, naming it, where any is NaN or infinite, or there are none."""
    tensor = site.tensor.detach()
    if tensor.is_meta:
        raise MissingError(f"{site.name} is on meta and has no values: load weights, or say from_scratch=True")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        first = tuple(torch.nonzero(~torch.isfinite(tensor))[0].tolist())
        count = f"{bad:,} of {tensor.numel():,} weights are NaN or infinite, the first at {first}"
        raise MissingError(f"{site.name}: {count}; repair the model or ignore the tensor by a rule")
    return tensor
