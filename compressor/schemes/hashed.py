"""HashedNets: a hash, not an index, says which value a weight is, and with which sign."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.codecs.registry import codec_class
from compressor.formats.content import SharedTensor, Table, index_dtype
from compressor.formats.dtypes import round_to
from compressor.formats.errors import PolicyError
from compressor.formats.inference.virtual_weight import mirrored
from compressor.ops.gather_scatter import lookup
from compressor.sharing.export import DTYPE_NAMES, SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

CODEC = "hashed"
TINY = 1e-300
MOST_VALUES = codec_class(CODEC).max_codewords // 2 - 1  # each with either sign, and a zero where weights are pruned


@register
@dataclass(frozen=True)
class HashedNets(Scheme):
    """Share values at random: weight ``i`` is ``xi(i) v[h(i)]``, with index ``h`` and sign ``xi`` from a hash.

    Of a tensor of N weights, ``K = ceil(N / compression)`` real values are stored, and the seed: no indices, for the
    hash of the tensor's name, the position and the seed gives them back. ``dL/dv_k`` is the sum of ``xi(i) dL/dw_i``
    over ``h(i) = k``. Nothing else is learnt: of weights that are trained already, random sharing keeps only about
    the K-th part of N of their energy, so begin from scratch, or train long, with distillation.

    Values start at the signed sum of the weights they stand for: divided by their number, which is the least-squares
    projection; or from scratch by its square root, and all of them then scaled, so that the tensor's mean square is
    that of the dense initialisation, however many weights a value has.

    Args:
        compression: weights for each stored value; ``bits`` stands for 32 / bits.
        codewords: K itself, which then decides; "auto": by ``compression``.
        seed: of the hash.

    Reference: Chen, Wilson, Tyree, Weinberger, Chen, "Compressing Neural Networks with the Hashing Trick", ICML 2015.
    """

    # Where we differ from the paper and its code:
    # - One hash gives index and sign, not two: it is a number below 2K, and those from K on are the negatives.
    # - The key holds the tensor's name: in the paper's, layers of one shape share one pattern.
    # - Values start as above. The paper draws them as the weights of a dense layer, whose distribution they then have.
    # - The gradient of a value is divided by N / K (see Group.codebook): plain gradient descent then moves a value as
    #   far as it would move a weight. Biases and norms are not hashed.

    id: ClassVar[str] = "hashed"
    paper: ClassVar[str] = 'Chen et al., "Compressing Neural Networks with the Hashing Trick", ICML 2015'
    caution: ClassVar[str] = (
        "random sharing undoes what weights have learnt: it is meant for training from scratch (--from-scratch), or "
        "long with distillation"
    )

    compression: Annotated[float, Field(ge=1, le=1e9)] = 8.0
    codewords: Annotated[int, Field(ge=1, le=MOST_VALUES, strict=True)] | Literal["auto"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 63, strict=True)] = 0

    @classmethod
    def settings_for_bits(cls, bits: int) -> dict[str, Any]:
        """As many real values as make so many bits a weight."""
        super().settings_for_bits(bits)
        return {"compression": 32 / bits}

    def stored_values(self, weights: int) -> int:
        """One in ``compression`` weights, rounded up."""
        if self.codewords != "auto":
            return self.codewords
        values = max(1, math.ceil(weights / self.compression))
        if values > MOST_VALUES:
            least = math.ceil(10 * weights / MOST_VALUES) / 10
            more = f"take a compression of {least} or more, or leave the tensor to another scheme"
            raise PolicyError(f"{weights:,} weights would share {values:,} values, at most {MOST_VALUES:,}: {more}")
        return values

    def generator(self) -> Codec:
        """Give the codec that hashes."""
        return codec_class(CODEC).of(memoryview(self.seed.to_bytes(8, "little")), Stream("", 0, 1))

    def fit(self, group: GroupState, importance: Mapping[Site, Tensor] | None) -> None:
        """Start the values at the signed means, or from scratch the scaled signed sums, of their weights."""
        group.unit.fill_(1.0)  # they are weights, not the codewords of some: the learning rate is that of weights
        group.set_codebook(group.unit.new_zeros(self.stored_values(group.weights)), learnt=True)
        sums, counts, energy = _signed_sums(group, self.generator(), None if group.from_scratch else importance)
        if group.from_scratch:
            start = sums / counts.sqrt().clamp(min=TINY)
            start *= (energy / (start.square() * counts).sum().clamp(min=TINY)).sqrt()
        else:
            start = sums / counts.clamp(min=TINY)
        group.set_codebook(start, learnt=True)

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Look the values up; the master weights no longer matter."""
        del master
        return lookup(mirrored(group.codebook()), group.indices(site))

    def export(self, group: GroupState) -> SharedTensors:
        """Give values and seed; where weights are pruned, which no hash can say, indices are stored like any others."""
        values = group.codebook().detach()
        if group.has_zeros:
            return export_scalars(group, mirrored(values), {site: group.indices(site) for site in group.sites})
        dtype = DTYPE_NAMES[group.master_weight(group.sites[0]).dtype]
        book = Table(round_to(values.cpu().numpy(), dtype).reshape(1, -1, 1), dtype, mirrored=True)
        return SharedTensors((book,), {site.name: self._shared(group, site, book) for site in group.sites})

    def _shared(self, group: GroupState, site: Site, book: Table) -> SharedTensor:
        source, codewords = group.generated(site, self.generator()), book.shape[1]
        indices = source.indices(0, source.stream.count, torch.device("cpu")).numpy()
        return SharedTensor(source.shape, 0, indices.astype(index_dtype(codewords)), book.dtype, codec=self.generator())


def _signed_sums(
    group: GroupState, codec: Codec, importance: Mapping[Site, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Go through the weights once, and keep their indices where they are looked up in training.

    Returns:
        Float64[K]: the sums of each value's weights with their signs; how many these are, or their importance.
        Float64[]: the sum of all squares. Pruned weights do not count.
    """
    values, device = len(group.values), group.unit.device
    totals = torch.zeros(2, 2 * values, dtype=torch.float64, device=device)
    energy = torch.zeros((), dtype=torch.float64, device=device)
    for site in group.sites:
        source, weights = group.generated(site, codec), group.master_weight(site).detach().reshape(-1)
        if not group.virtual:
            group.set_indices(
                site, torch.empty(source.shape, dtype=torch.int32, device=device), 2 * values, saved=False
            )
        for start, stop in source.chunks():
            indices, run = source.indices(start, stop, device), weights[start:stop].double()
            weighing = torch.ones_like(run)
            if group.has_zeros:
                weighing *= ~group.pruned(site).view(-1)[start:stop]
            if importance is not None:
                weighing *= importance[site].view(-1)[start:stop].double().clamp(min=TINY)
            totals.index_add_(1, indices, torch.stack([run * weighing, weighing]))
            energy += (run.square() * weighing).sum()
            if not group.virtual:
                group.indices(site).view(-1)[start:stop] = indices
    sums, counts = totals[0, :values] - totals[0, values:], totals[1, :values] + totals[1, values:]
    return sums, counts, energy
