"""No sharing: weights are trained dense, or pruned, for a later stage to share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.formats.errors import PolicyError
from compressor.sharing.curvature import Curvature
from compressor.sharing.export import SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site


@register
@dataclass(frozen=True)
class Dense(Scheme):
    """Shares nothing: a stage that only trains or prunes its weights, before the stages that share them.

    The network computes with the master weights, those that are pruned being 0.0, and the file stores the tensors
    untouched. With ``sparsity`` it is the first stage of Deep Compression.

    Example:
        >>> import torch
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[-0.1, 0.2, 0.9, -1.0]])
        >>> job = Compressor(layer, Policy([Rule("*", scheme="dense", sparsity=0.5)]), teacher=None).prepare()
        >>> [round(weight, 2) for weight in job.model.weight[0].tolist()]
        [0.0, 0.0, 0.9, -1.0]

    Reference: Han, Pool, Tran, Dally, "Learning both Weights and Connections for Efficient Neural Networks",
    NeurIPS 2015, for training with pruning.
    """

    id: ClassVar[str] = "dense"
    shares: ClassVar[bool] = False
    paper: ClassVar[str] = "with sparsity: Han, Pool, Tran, Dally, NeurIPS 2015"

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Raises PolicyError: a scheme that shares no values takes no bits."""
        raise PolicyError(f"scheme 'dense' shares no values and takes no bits, got {bits}")

    def stored_values(self, weights: int) -> int:
        """Returns 0: there is no codebook."""
        del weights
        return 0

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets nothing: there are neither codebook nor indices."""
        del group, curvature

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the master weight itself."""
        del group, site
        return master

    def export(self, group: GroupState) -> SharedTensors:
        """Returns no shared tensors, so that all are stored untouched."""
        del group
        return SharedTensors((), {})
