"""Sites, the target parameters: the tensors of a model that can share values, under all the names they have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from compressor.formats.errors import MissingError

__all__ = ["Site", "find_tensors", "finite_weights", "padding_rows"]

LAYERS = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention, nn.Bilinear)
LAYER_WEIGHTS = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
NORM = re.compile(r"Norm(\dd)?$")  # of a class name, such as GroupNorm or LayerNorm2d
POSITION = {"pos", "position", "rel", "relative", "token", "tokens"}  # words of a tensor's own name
BIAS = {"bias", "biases"}
OF_NORM, BIASES = "of a normalisation", "a bias"
PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original\d*$")  # by ``torch.nn.utils.parametrize``


@dataclass(eq=False)
class Site:
    """One parameter of a model, identified by its object and not by its name.

    Args:
        names: its names in ``state_dict()``; several where the tensor is tied. The first is the one it is stored under.
        owners: the (module, attribute) pairs that hold it, each once.
    """

    names: list[str]
    owners: list[tuple[nn.Module, str]]

    @property
    def name(self) -> str:
        """The name it is stored under."""
        return self.names[0]

    @property
    def tensor(self) -> Tensor:
        """The tensor that its first owner holds; while the model is shared, the parametrised weight."""
        module, attribute = self.owners[0]
        tensor: Tensor = getattr(module, attribute)
        return tensor

    @property
    def exemption(self) -> str:
        """Why only a rule that spells out its name shares it; "": any rule may, as it is a weight matrix or kernel.

        The weights of PyTorch's own layers are sites, and so are all other floating tensors of two and more dimensions
        but norms, positions, tokens and biases, whatever their module is. See docs/decisions/0018.
        """
        tensor = self.tensor
        if not tensor.is_floating_point():
            return f"holds {tensor.dtype}, not floating point"
        if any(isinstance(module, torch.jit.ScriptModule) for module, _ in self.owners):
            return "compiled by TorchScript, which reads its own weights"
        matrix = tensor.ndim >= 2
        if matrix and any(isinstance(module, LAYERS) and leaf in LAYER_WEIGHTS for module, leaf in self.owners):
            return ""
        if any(NORM.search(name) for name in self.types):
            return OF_NORM
        words = {word for _, leaf in self.owners for word in re.split("[^a-z]+", leaf.lower())}
        if words & POSITION:
            return "a position or token, by its name"
        if words & BIAS:
            return BIASES
        return "" if sum(size > 1 for size in tensor.shape) > 1 else "a vector"

    @property
    def output_axis(self) -> int:
        """The axis of output channels: 1 in transposed convolutions, 0 in all other layers."""
        return int(any(getattr(module, "transposed", False) for module, _ in self.owners))

    @property
    def default(self) -> bool:
        """Whether a rule need not spell out its name: true of weight matrices and kernels, not of norms and biases."""
        return not self.exemption

    @property
    def is_minor(self) -> bool:
        """Whether it is of a normalisation or a bias, which nobody expects to be shared."""
        return self.exemption in (OF_NORM, BIASES)

    @property
    def types(self) -> set[str]:
        """The class names of its modules, base classes included."""
        return {kind.__name__ for module, _ in self.owners for kind in type(module).__mro__}

    def named_by(self, pattern: str) -> bool:
        """Returns whether a glob matches a name and spells out its last part, which makes any tensor a site."""
        return any(
            fnmatchcase(name, pattern) and pattern.rpartition(".")[2] == name.rpartition(".")[2] for name in self.names
        )

    def paths(self) -> Iterator[str]:
        """Yields every name a rule may match it by: those of the tensor and of all modules above it.

        A parametrised tensor, such as that of ``torch.nn.utils.parametrizations.weight_norm``, has also the name that
        it has in its layer.
        """
        spellings = (spelling for name in self.names for spelling in (name, PARAMETRIZED.sub(r"\1", name)))
        for name in dict.fromkeys(spellings):
            parts = name.split(".")
            yield from (".".join(parts[:end]) for end in range(len(parts), 0, -1))

    def __repr__(self) -> str:
        return f"Site({self.name!r}, {tuple(self.tensor.shape)}, {math.prod(self.tensor.shape):,} weights)"


def find_tensors(model: nn.Module) -> list[Site]:
    """Returns the parameters of a model in state-dict order, a tied one once.

    Example:
        >>> [site.name for site in find_tensors(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))]
        ['0.weight', '0.bias']
    """
    sites: dict[int, Site] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False):
            site = sites.setdefault(id(parameter), Site([], []))
            site.names.append(f"{prefix}.{attribute}" if prefix else attribute)
            if not any(owner is module and leaf == attribute for owner, leaf in site.owners):
                site.owners.append((module, attribute))
    return list(sites.values())


def padding_rows(site: Site) -> set[int]:
    """Returns the rows ``padding_idx`` of the embeddings that hold a site, which are not trained.

    Example:
        >>> [padding_rows(site) for site in find_tensors(nn.Embedding(3, 2, padding_idx=1))]
        [{1}]
    """
    embeddings = [m for m, a in site.owners if isinstance(m, nn.Embedding | nn.EmbeddingBag) and a == "weight"]
    return {embedding.padding_idx for embedding in embeddings if embedding.padding_idx is not None}


def finite_weights(site: Site) -> Tensor:
    """Returns the weights of a site without gradient, all of them finite.

    Raises:
        MissingError: the tensor is on ``meta`` and has no values, or some of them are NaN or infinite.
    """
    tensor = site.tensor.detach()
    if tensor.is_meta:
        raise MissingError(f"{site.name} is on meta and has no values: load weights, or pass from_scratch=True")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        first = tuple(torch.nonzero(~torch.isfinite(tensor))[0].tolist())
        count = f"{bad:,} of {tensor.numel():,} weights are NaN or infinite, the first at {first}"
        raise MissingError(f"{site.name}: {count}; repair the model or ignore the tensor by a rule")
    return tensor
