"""k-means, then trained centroids: the indices never change, the codewords are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.calibration.error_feedback import compensate, nearest_codeword
from compressor.clustering.kmeans1d import Init, fit_codebook
from compressor.ops.gather_scatter import lookup
from compressor.ops.nearest import nearest
from compressor.sharing.curvature import Curvature, diagonals
from compressor.sharing.export import SharedTensors, export_scalars
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
    # The paper starts Lloyd's iterations from "linear" centroids: on heavy-tailed weights those stop at 1.6 to 6 times
    # the squared error of the optimum.
    init: Init = "optimal"

    @property
    def gains_from_curvature(self) -> bool:
        """Returns True: files of 3 and 4 bits were a quarter smaller, see docs/decisions/0020."""
        return True

    def stored_values(self, weights: int) -> int:
        """Returns K, one value a codeword."""
        del weights
        return self.codewords

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Clusters the weights and sets centroids and indices, with error feedback where the curvature is known."""
        codebook = fit_codebook(group, self.codewords, diagonals(curvature), self.init)
        group.set_codebook(codebook, learnt=True)
        compensate(group, curvature, lambda _: nearest_codeword(codebook))
        for site in group.sites:
            group.set_indices(site, nearest(group.master_weight(site).detach().float(), codebook), len(codebook))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the centroid of each weight's fixed index; the gradient is the centroids' alone."""
        del master
        return lookup(group.codebook(), group.indices(site))

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the trained centroids and the fixed indices."""
        return export_scalars(group, group.codebook(), {site: group.indices(site) for site in group.sites})
