"""k-means, then trained centroids: the indices never change, the codewords are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.calibration.error_feedback import compensate
from compressor.clustering.granularity import Granularity, GroupSize, VectorLength
from compressor.clustering.kmeans1d import Init
from compressor.ops.gather_scatter import lookup
from compressor.sharing.curvature import Curvature, diagonals
from compressor.sharing.export import SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site


@register
@dataclass(frozen=True)
class KMeans(Scheme):
    """Clusters the weights of each tensor once, then trains the centroids with the assignment fixed.

    With ``w`` the N weights of a tensor before training, ``c`` its K centroids, ``a`` the N indices and L the loss::

        a_i = argmin_k |w_i - c_k|                      once, before training
        weight_i = c[a_i]
        dL/dc_k = sum of dL/dweight_i over a_i = k      section 3.3

    The master weights take no further part. Where weights are pruned, one of the K codewords is 0.0.

    Args:
        codewords: K, the number of values a tensor may take, 1 to 65,536; default 16.
        group_size: G, slices of axis 0 that have a codebook of their own, which are the output channels of all but
            transposed convolutions; 0, the default: all. Slices of no more weights than codewords share one.
        channel_scale: whether the codebook is in units of the root mean square of each output channel; default False.
        vector: d, output channels that share an index, 1 to 64; codewords are then vectors, and ``bits`` bits are those
            of d weights. Default 1.
        init: the centroids before training: "optimal", the default, the near-optimal codebook of a dynamic program; or
            where Lloyd's iterations start: "linear", "density" or "quantile", see ``kmeans1d.optimal_codebook``.

    Example:
        >>> import torch
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.0, 0.25, 1.0, 1.25]])
        >>> job = Compressor(layer, Policy([Rule("*", scheme="kmeans", codewords=2)]), teacher=None).prepare()
        >>> job.model.weight.tolist()
        [[0.125, 0.125, 1.125, 1.125]]

    Reference: Han, Mao, Dally, "Deep Compression", ICLR 2016, section 3.
    """

    id: ClassVar[str] = "kmeans"
    paper: ClassVar[str] = 'Han, Mao, Dally, "Deep Compression", ICLR 2016'

    codewords: Annotated[int, Field(ge=1, le=65536, strict=True)] = 16
    group_size: GroupSize = 0
    channel_scale: bool = False
    vector: VectorLength = 1
    # The paper starts Lloyd's iterations from "linear" centroids: on heavy-tailed weights those stop at 1.6 to 6 times
    # the squared error of the optimum.
    init: Init = "optimal"

    @property
    def gains_from_curvature(self) -> bool:
        """Returns True: files of 3 and 4 bits were a quarter smaller, see docs/decisions/0020."""
        return True

    @property
    def granularity(self) -> Granularity:
        """Which weights have a codebook, a factor and an index in common."""
        return Granularity(self.codewords, self.group_size, self.channel_scale, self.vector)

    def conflict(self) -> str:
        """Returns what the granularity finds."""
        return self.granularity.conflict(self.init)

    @property
    def can_prune(self) -> bool:
        """Whether codewords are single weights: of a vector, one weight cannot be zero by itself."""
        return self.vector == 1

    def stored_values(self, weights: int) -> int:
        """Returns K d, one value an entry of a codeword."""
        del weights
        return self.codewords * self.vector

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Clusters the weights and sets centroids and indices, with error feedback where the curvature is known."""
        shared = self.granularity
        codebook = shared.fit(group, diagonals(curvature), self.init)
        group.set_codebook(codebook, learnt=True)
        compensate(group, curvature, lambda site: shared.rounding(group, site, codebook))
        for site in group.sites:
            group.set_indices(site, shared.nearest(group, site, codebook), len(codebook))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the centroid of each weight's fixed index; the gradient is the centroids' alone."""
        del master
        weights, factor = lookup(group.codebook(), group.indices(site)), self.granularity.factor(group, site)
        return weights if factor is None else weights * factor

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the trained centroids and the fixed indices."""
        return self.granularity.export(group, group.codebook(), {site: group.indices(site) for site in group.sites})
