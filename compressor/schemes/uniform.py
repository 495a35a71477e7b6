"""Uniform quantisation: runs of weights are rounded to evenly spaced values between their least and their largest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional

from compressor.formats.content import Grid, SharedTensor, index_dtype
from compressor.sharing.export import DTYPE_NAMES, SharedTensors
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

MOST_BITS = 16


@register
@dataclass(frozen=True)
class Uniform(Scheme):
    """Round each weight to one of evenly spaced values between the least and the largest of its bucket.

    A bucket is a run of weights in C order. With ``beta`` its least, ``alpha`` its largest minus its least and
    ``s = 2^bits``, the weight is ``alpha round((s - 1) (w - beta) / alpha) / (s - 1) + beta``. Both are found anew in
    every step; the gradient passes to the master weights unchanged.

    Where a bucket has pruned weights, ``beta`` is moved by up to half a step, so that 0.0 is one of its values; the
    weight at one end is then off by as much.

    Args:
        bits: of a weight.
        bucket: how many weights share ``alpha`` and ``beta``, two more numbers in the file.

    Reference: Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018, section 3.
    """

    # Where we differ from the paper and its code:
    # - Its code quantises all parameters, biases and norms among them; here the policy says what is shared.
    # - Its code takes 1 for an alpha below 1e-10; here only a bucket that is constant is left as it is, so that small
    #   weights count too. A last bucket that is short has the extremes of what is in it, as there.
    # - Distillation is the trainer's loss, under any scheme.

    id: ClassVar[str] = "uniform"
    paper: ClassVar[str] = 'Polino, Pascanu, Alistarh, "Model Compression via Distillation and Quantization", ICLR 2018'
    bits_taken: ClassVar[tuple[int, int]] = 1, MOST_BITS

    bits: Annotated[int, Field(ge=1, le=MOST_BITS, strict=True)] = 4
    bucket: Annotated[int, Field(ge=1, le=1 << 31, strict=True)] = 256

    def stored_values(self, weights: int) -> int:
        """Two for each bucket; the grid is the same whatever the tensor."""
        return 2 * -(-weights // self.bucket)

    @property
    def grid(self) -> Grid:
        """The values of a bucket before they are scaled: 0 to 1."""
        most = 2**self.bits - 1
        return Grid(0.0, 1 / most, most + 1)

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Do nothing: all follows from the master weights."""
        del group, importance

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Round the master weights as they are now."""
        rounded = _rounded(group, site, master, self).weights(self.grid).view(master.shape)
        return rounded + (master - master.detach())  # plus zero, exactly: the gradient is the master weights'

    def export(self, group: GroupState) -> SharedTensors:
        """Give one grid, and for each tensor the scales and offsets of its buckets."""
        tensors: dict[str, SharedTensor] = {}
        for site in group.sites:
            master = group.master_weight(site).detach()
            found = _rounded(group, site, master, self)
            tensors[site.name] = SharedTensor(
                shape=tuple(master.shape),
                book=0,
                indices=found.flat(found.steps).cpu().numpy().astype(index_dtype(self.grid.count)),
                dtype=DTYPE_NAMES[master.dtype],
                block=found.steps.shape[1],
                scale=found.scale.cpu().numpy().reshape(-1),
                offset=found.offset.cpu().numpy().reshape(-1),
            )
        return SharedTensors((self.grid,), tensors)


@plain_dataclass(frozen=True)
class Rounded:
    """A tensor in buckets: whole ``steps``, float32[buckets, bucket], of which the first ``count`` are weights.

    ``scale`` and ``offset`` are float32[buckets, 1].
    """

    steps: Tensor
    scale: Tensor
    offset: Tensor
    count: int

    def weights(self, grid: Grid) -> Tensor:
        """Give the weights as the record's decoder does: look up, multiply, add, each rounded once; float32[count]."""
        values = _values(grid, self.steps).index_select(0, self.steps.reshape(-1).int())
        return self.flat(values.view_as(self.steps) * self.scale + self.offset)

    def flat(self, buckets: Tensor) -> Tensor:
        """Lay the buckets side by side, without what fills the last."""
        return buckets.reshape(-1)[: self.count]


def _values(grid: Grid, like: Tensor) -> Tensor:
    return torch.from_numpy(grid.expand().reshape(-1)).to(like.device)


def _rounded(group: GroupState, site: Site, master: Tensor, scheme: Uniform) -> Rounded:
    """Round a tensor's master weights, bucket by bucket."""
    most = scheme.grid.count - 1
    pruned = _buckets(group.pruned(site).float(), scheme.bucket).bool() if group.has_zeros else None
    buckets = _buckets(master.detach().float(), scheme.bucket)
    if pruned is not None:
        buckets = buckets.masked_fill(pruned, 0)  # zero is then between the ends
    offset, largest = torch.aminmax(buckets, dim=1, keepdim=True)
    scale = (largest - offset).clamp_(max=torch.finfo(torch.float32).max)  # else the ends of float32 are infinitely far
    divisor = scale.masked_fill(scale == 0, 1)
    if pruned is not None:
        # Some whole number of steps, computed as the decoder will and then taken away, is 0.0 exactly.
        zero = _values(scheme.grid, scale)[(-offset / divisor * most).round_().clamp_(0, most).long()] * scale
        offset = torch.where(pruned.any(dim=1, keepdim=True), -zero, offset)
    steps = ((buckets - offset) / divisor).mul_(most).round_().clamp_(0, most)
    return Rounded(steps, scale, offset, master.numel())


def _buckets(tensor: Tensor, bucket: int) -> Tensor:
    """Cut a tensor into rows of ``bucket`` entries in C order, the last filled with its last entry."""
    flat = tensor.reshape(-1)
    length = min(bucket, flat.numel())
    missing = -flat.numel() % length
    return functional.pad(flat[None], (0, missing), mode="replicate").view(-1, length)
