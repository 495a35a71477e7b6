"""No sharing: weights are trained as they are, or pruned, for a later stage to share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.formats.errors import PolicyError
from compressor.sharing.export import SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site


@register
@dataclass(frozen=True)
class Dense(Scheme):
    """Leave the weights free: a stage that prunes, or only trains, before the stages that share.

    Its tensors are stored untouched.
    """

    id: ClassVar[str] = "dense"
    shares: ClassVar[bool] = False
    paper: ClassVar[str] = "with sparsity: Han, Pool, Tran, Dally, NeurIPS 2015"

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """Refuse: nothing is shared."""
        raise PolicyError(f"scheme 'dense' shares no values and takes no bits, got {bits}")

    def stored_values(self, weights: int) -> int:
        """None."""
        del weights
        return 0

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Do nothing."""
        del group, importance

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Give the master weights."""
        del group, site
        return master

    def export(self, group: GroupState) -> SharedTensors:
        """Share nothing."""
        del group
        return SharedTensors((), {})
