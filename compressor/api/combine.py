"""``tfmot.experimental.combine`` for torch: quantisation that keeps the zeros and clusters of earlier stages."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.api.quantization import EIGHT_BITS, VERB, QuantizeScheme
from compressor.api.wrapping import strip
from compressor.policy.policy import Rule
from compressor.sharing.sites import find_tensors

__all__ = [
    "Default8BitClusterPreserveQuantizeScheme",
    "Default8BitPrunePreserveQuantizeScheme",
    "strip_clustering_cqat",
]

MAX_CLUSTERS = 256  # the values that 8 bits tell apart
MOST_DISTINCT = 0.8  # of weights that are not zero, in a clustered tensor; of dense ones nearly all are distinct


@dataclass(frozen=True)
class Default8BitPrunePreserveQuantizeScheme(QuantizeScheme):
    """Rounds weights to 8 bits, as ``DefaultNBitQuantizeScheme(8)`` does, and keeps zeros (TFMOT's PQAT)."""

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights that are zero before the training stay zero: always."""
        return True

    def rules(self, name: str, layer: nn.Module) -> list[Rule]:
        """Returns one rule for all weights of the layer."""
        return EIGHT_BITS.rules(name, layer)


@dataclass(frozen=True)
class Default8BitClusterPreserveQuantizeScheme(QuantizeScheme):
    """Trains the clusters of each tensor on, and never makes more of them (TFMOT's CQAT; PCQAT with its zeros).

    A tensor is clustered if it has at most 256 values and, 0.0 apart, at most four fifths as many as weights. Where
    the slices of its axis 0 have values of their own, they keep them. Other tensors are rounded to 8 bits.

    The values of a clustered tensor are not rounded to multiples of a step: a packed file stores each of them once,
    whatever it is.

    Args:
        preserve_sparsity: whether weights that are zero now stay zero, in all marked layers.

    Example:
        >>> from compressor.api.clustering import cluster_weights, strip_clustering
        >>> from compressor.api.quantization import quantize_annotate_model, quantize_apply
        >>> clustered = strip_clustering(cluster_weights(nn.Sequential(nn.Linear(16, 16)), number_of_clusters=8))
        >>> marked = quantize_annotate_model(clustered)
        >>> cqat = quantize_apply(marked, Default8BitClusterPreserveQuantizeScheme(preserve_sparsity=False))
        >>> len(cqat[0].weight.unique())
        8
    """

    preserve_sparsity: bool = True

    @property
    def keeps_zeros(self) -> bool:
        """Whether weights that are zero before the training stay zero."""
        return self.preserve_sparsity

    def rules(self, name: str, layer: nn.Module) -> list[Rule]:
        """Returns a rule for each clustered tensor of the layer, and one for the others."""
        prefix = f"{name}." if name else ""
        clustered = [
            Rule(f"re:{re.escape(prefix + site.name)}", scheme="learnt", codewords=clusters, group=group)
            for site in find_tensors(layer)
            if site.default
            for clusters, group in _clusters(site.tensor.detach())
        ]
        return clustered + EIGHT_BITS.rules(name, layer)


def _clusters(weight: Tensor) -> list[tuple[int, str]]:
    """Returns the clusters of a tensor, and whether each "site" or each "channel" has so many; [] if it has none."""
    if weight.is_meta or not weight.numel():
        return []
    slices = weight.reshape(len(weight), -1)
    whole, by_slice = _distinct(weight.reshape(1, -1)), _distinct(slices)
    # Slices with clusters of their own have hardly a value in common.
    counts, group = (by_slice, "channel") if 2 * int(whole.sum()) > int(by_slice.sum()) else (whole, "site")
    most = int(counts.max()) + bool((weight == 0).any())
    length = slices.shape[1] if group == "channel" else weight.numel()
    repeated = int(counts.sum()) <= MOST_DISTINCT * int(torch.count_nonzero(weight))
    return [(max(most, 1), group)] if repeated and most <= min(MAX_CLUSTERS, length - 1) else []


def _distinct(rows: Tensor) -> Tensor:
    """Returns the number of distinct values other than 0.0 in each row, int64[rows]."""
    ordered = rows.sort(dim=1).values
    first = torch.ones_like(ordered[:, :1], dtype=torch.bool)
    return (torch.cat([first, ordered.diff(dim=1) != 0], dim=1) & (ordered != 0)).sum(dim=1)


def strip_clustering_cqat(to_strip: nn.Module) -> nn.Module:
    """Returns a copy of a quantised model that is an ordinary module again, with the quantised values as weights.

    Args:
        to_strip: a model of ``quantize_apply``, with any scheme.

    Raises:
        UsageError: the model was not wrapped by ``quantize_apply``.
    """
    return strip(VERB, to_strip)
