"""k-means, then trained centroids: indices never change, the codewords are fine-tuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.clustering.kmeans1d import Init, fit_codebook
from compressor.ops.gather_scatter import lookup
from compressor.ops.nearest import nearest
from compressor.sharing.export import SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site


@register
@dataclass(frozen=True)
class KMeans(Scheme):
    """Cluster the weights once; fine-tune the cluster centres with the assignment fixed.

    With ``c`` the codebook and ``a`` the indices, the weight is ``c[a]`` and ``dL/dc_k`` the sum of ``dL/dw_i``
    over ``a_i = k``. The start is the near-optimal codebook, where the paper starts Lloyd from evenly spaced
    centres (``init="linear"``): those stop at 1.6 to 6 times the error on heavy tails.

    Args:
        codewords: K, the number of values a tensor may take.
        init: where k-means starts: "optimal", "linear", "density" or "quantile".

    Reference: Han, Mao, Dally, "Deep Compression", ICLR 2016, section 3.
    """

    id: ClassVar[str] = "kmeans"
    paper: ClassVar[str] = 'Han, Mao, Dally, "Deep Compression", ICLR 2016'

    codewords: Annotated[int, Field(ge=1, le=65536, strict=True)] = 16
    init: Init = "optimal"

    def stored_values(self, weights: int) -> int:
        """One per codeword."""
        del weights
        return self.codewords

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Cluster the group's weights."""
        codebook = fit_codebook(group, self.codewords, importance, self.init)
        group.set_codebook(codebook, learnt=True)
        for site in group.sites:
            group.set_indices(site, nearest(group.master_weight(site).detach().float(), codebook), len(codebook))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Look the fixed indices up; the master weights no longer matter."""
        del master
        return lookup(group.codebook(), group.indices(site))

    def export(self, group: GroupState) -> SharedTensors:
        """Give the trained codebook and the indices."""
        return export_scalars(group, group.codebook(), {site: group.indices(site) for site in group.sites})
