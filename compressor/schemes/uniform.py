"""Uniform quantisation: each bucket of weights is rounded to evenly spaced values between its extremes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional

from compressor.calibration.error_feedback import compensate
from compressor.formats.content import Grid, SharedTensor, index_dtype
from compressor.sharing.curvature import Curvature
from compressor.sharing.export import DTYPE_NAMES, SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

MAX_BITS = 16


@register
@dataclass(frozen=True)
class Uniform(Scheme):
    """Rounds each weight to one of 2^bits evenly spaced values between the extremes of its bucket.

    A bucket is ``bucket`` consecutive weights of a tensor in C order. With ``w`` the weights of a bucket and
    ``s = 2^bits``::

        beta = min w        alpha = max w - beta
        weight_i = alpha round((s - 1) (w_i - beta) / alpha) / (s - 1) + beta
        dL/dw_i = dL/dweight_i                          straight-through

    Both extremes are those of the master weights in this step. The file stores ``alpha`` and ``beta`` of each bucket as
    scale and offset, and one grid of s values from 0 to 1.

    Where a bucket has pruned weights, ``beta`` moves by up to half a step, so that 0.0 is one of its values; the weight
    at one end is then off by as much.

    Args:
        bits: bits of a weight, 1 to 16; default 4.
        bucket: weights that share ``alpha`` and ``beta``, 1 to 2^31; default 256. The last bucket of a
            tensor may have fewer.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[-1.0, -0.25, 0.4, 2.0]])
        >>> job = Compressor(layer, Policy([Rule("*", scheme="uniform", bits=2)]), teacher=None).prepare()
        >>> job.model.weight.tolist()  # of -1, 0, 1 and 2
        [[-1.0, 0.0, 0.0, 2.0]]

    Reference: Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018, section 3.
    """

    # Divergences from the paper and its code:
    # - Its code quantises all parameters, biases and norms among them; here the policy decides.
    # - Its code replaces an alpha below 1e-10 by 1; here only that of a constant bucket, so that small weights are
    #   quantised like any others.
    # - Distillation is the trainer's loss, with any scheme.

    id: ClassVar[str] = "uniform"
    paper: ClassVar[str] = 'Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018'
    bits_range: ClassVar[tuple[int, int]] = 1, MAX_BITS

    bits: Annotated[int, Field(ge=1, le=MAX_BITS, strict=True)] = 4
    bucket: Annotated[int, Field(ge=1, le=1 << 31, strict=True)] = 256

    def stored_values(self, weights: int) -> int:
        """Returns two values a bucket; the grid is the same for all tensors and not counted."""
        return 2 * -(-weights // self.bucket)

    @property
    def grid(self) -> Grid:
        """The values of a bucket before scale and offset, 0 to 1."""
        most = 2**self.bits - 1
        return Grid(0.0, 1 / most, most + 1)

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Lets weights make up for each other's errors, where the curvature is known; all follows from the weights."""
        buckets = {site: _Buckets.of(group, site, self) for site in group.sites} if curvature is not None else {}
        compensate(group, curvature, lambda site: buckets[site].rounded)
        for site, kept in buckets.items():
            kept.restore_ends(group.master_weight(site))

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the master weights rounded, with the gradient passed straight through to them."""
        rounded = _round(group, site, master, self).weights(self.grid).view(master.shape)
        return rounded + (master - master.detach())  # exactly zero is added, and it has the master weights' gradient

    def export(self, group: GroupState) -> SharedTensors:
        """Returns one grid, and each tensor's steps with the scale and offset of each bucket."""
        tensors: dict[str, SharedTensor] = {}
        for site in group.sites:
            master = group.master_weight(site).detach()
            buckets = _round(group, site, master, self)
            tensors[site.name] = SharedTensor(
                shape=tuple(master.shape),
                book=0,
                indices=buckets.flat(buckets.steps).cpu().numpy().astype(index_dtype(self.grid.count)),
                dtype=DTYPE_NAMES[master.dtype],
                block=buckets.steps.shape[1],
                scale=buckets.scale.cpu().numpy().reshape(-1),
                offset=buckets.offset.cpu().numpy().reshape(-1),
            )
        return SharedTensors((self.grid,), tensors)


@plain_dataclass(frozen=True)
class RoundedBuckets:
    """A tensor cut into buckets and rounded.

    Args:
        steps: float32[buckets, bucket], whole numbers 0..2^bits - 1; what fills the last bucket is no weight.
        scale: float32[buckets, 1], alpha.
        offset: float32[buckets, 1], beta.
        count: N, the number of weights.
    """

    steps: Tensor
    scale: Tensor
    offset: Tensor
    count: int

    def weights(self, grid: Grid) -> Tensor:
        """Returns the weights in C order, float32[N], by the very operations of the file's decoder."""
        values = _values(grid, self.steps).index_select(0, self.steps.reshape(-1).int())
        return self.flat(values.view_as(self.steps) * self.scale + self.offset)

    def flat(self, buckets: Tensor) -> Tensor:
        """Returns the N entries of a tensor in buckets, [N], without what fills the last."""
        return buckets.reshape(-1)[: self.count]


def _values(grid: Grid, like: Tensor) -> Tensor:
    return torch.from_numpy(grid.expand().reshape(-1)).to(like.device)


def _round(group: GroupState, site: Site, master: Tensor, scheme: Uniform) -> RoundedBuckets:
    """Returns the master weights of a tensor rounded bucket by bucket."""
    most = scheme.grid.count - 1
    pruned = _cut(group.pruned(site).float(), scheme.bucket).bool() if group.has_zeros else None
    buckets = _cut(master.detach().float(), scheme.bucket)
    if pruned is not None:
        buckets = buckets.masked_fill(pruned, 0)  # so that zero lies between the extremes
    offset, largest = torch.aminmax(buckets, dim=1, keepdim=True)
    # Without the clamp, weights at both ends of float32's range would be infinitely far from each other.
    scale = (largest - offset).clamp_(max=torch.finfo(torch.float32).max)
    divisor = scale.masked_fill(scale == 0, 1)
    if pruned is not None:
        # The offset becomes minus a whole number of steps, computed as the decoder does, so that the sum is exactly 0.
        zero = _values(scheme.grid, scale)[(-offset / divisor * most).round_().clamp_(0, most).long()] * scale
        offset = torch.where(pruned.any(dim=1, keepdim=True), -zero, offset)
    steps = ((buckets - offset) / divisor).mul_(most).round_().clamp_(0, most)
    return RoundedBuckets(steps, scale, offset, master.numel())


@plain_dataclass(frozen=True)
class _Buckets:
    """The buckets of a tensor before error feedback, whose extremes have to stay what they are.

    Args:
        dense: the master weights, [shape].
        least: float32[buckets, 1], the smallest weight of each bucket.
        largest: float32[buckets, 1], the largest.
        rounding: scale and offset of each bucket.
        values: float32[2^bits], the codewords before scale and offset.
    """

    dense: Tensor
    least: Tensor
    largest: Tensor
    rounding: RoundedBuckets
    values: Tensor

    @classmethod
    def of(cls, group: GroupState, site: Site, scheme: Uniform) -> _Buckets:
        dense = group.master_weight(site).detach().clone()
        least, largest = torch.aminmax(_cut(dense.float(), scheme.bucket), dim=1, keepdim=True)
        return cls(dense, least, largest, _round(group, site, dense, scheme), _values(scheme.grid, dense))

    @property
    def size(self) -> int:
        return self.rounding.steps.shape[1]

    @property
    def ends(self) -> Tensor:
        """Which weights are an extreme of their bucket, bool[N]."""
        cut = _cut(self.dense.float(), self.size)
        return self.rounding.flat((cut == self.least) | (cut == self.largest))

    def rounded(self, weights: Tensor, positions: Tensor) -> Tensor:
        """Returns weights rounded in the buckets of their positions; extremes as if they were what they were."""
        bucket, dense = positions // self.size, self.dense.reshape(-1)[positions].float()
        scale, offset = self.rounding.scale[bucket, 0], self.rounding.offset[bucket, 0]
        is_end = (dense == self.least[bucket, 0]) | (dense == self.largest[bucket, 0])
        most = len(self.values) - 1
        steps = (torch.where(is_end, dense, weights) - offset) / scale.masked_fill(scale == 0, 1) * most
        return self.values[steps.round_().clamp_(0, most).long()] * scale + offset

    def restore_ends(self, master: Tensor) -> None:
        """Gives extremes their value back, and draws weights that have gone beyond them to them, in place."""
        cut = _cut(master.detach().float(), self.size)
        inside = self.rounding.flat(torch.minimum(torch.maximum(cut, self.least), self.largest))
        kept = torch.where(self.ends, self.dense.reshape(-1), inside.to(self.dense.dtype))
        with torch.no_grad():
            master.copy_(kept.view(master.shape))


def _cut(tensor: Tensor, bucket: int) -> Tensor:
    """Returns a tensor as rows of ``bucket`` entries in C order, the last row filled with the last entry."""
    flat = tensor.reshape(-1)
    length = min(bucket, flat.numel())
    missing = -flat.numel() % length
    return functional.pad(flat[None], (0, missing), mode="replicate").view(-1, length)
