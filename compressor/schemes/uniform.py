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
        for site, measured in (curvature or {}).items():
            if site in group.sites:
                _compensate(group, site, measured, self)

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


def _compensate(group: GroupState, site: Site, curvature: Curvature, scheme: Uniform) -> None:
    """Compensates the weights of a site in the buckets that it has: their extremes stay what they are."""
    dense = group.master_weight(site).detach().clone()
    buckets, most = _round(group, site, dense, scheme), scheme.grid.count - 1
    size, values = buckets.steps.shape[1], _values(scheme.grid, dense)
    cut = _cut(dense.float(), scheme.bucket)
    least, largest = torch.aminmax(cut, dim=1, keepdim=True)
    ends = buckets.flat((cut == least) | (cut == largest))
    divisor = buckets.scale.masked_fill(buckets.scale == 0, 1)

    def rounded(weights: Tensor, positions: Tensor) -> Tensor:
        bucket = positions // size
        scale, offset = buckets.scale[bucket, 0], buckets.offset[bucket, 0]
        free = torch.where(ends[positions], dense.reshape(-1)[positions].float(), weights)
        steps = ((free - offset) / divisor[bucket, 0]).mul_(most).round_().clamp_(0, most)
        return values[steps.long()] * scale + offset

    compensate(group, site, curvature, rounded)
    master = group.master_weight(site).detach()
    inside = torch.minimum(torch.maximum(_cut(master.float(), scheme.bucket), least), largest)
    kept = torch.where(ends.view(dense.shape), dense, buckets.flat(inside).view(dense.shape).to(dense.dtype))
    master.copy_(kept)


def _cut(tensor: Tensor, bucket: int) -> Tensor:
    """Returns a tensor as rows of ``bucket`` entries in C order, the last row filled with the last entry."""
    flat = tensor.reshape(-1)
    length = min(bucket, flat.numel())
    missing = -flat.numel() % length
    return functional.pad(flat[None], (0, missing), mode="replicate").view(-1, length)
