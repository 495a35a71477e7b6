"""HashedNets: a hash of the position, not a stored index, gives the value and the sign of each weight."""

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
from compressor.sharing.curvature import Curvature, diagonals
from compressor.sharing.export import DTYPE_NAMES, SharedTensors, export_scalars
from compressor.sharing.group_state import GroupState
from compressor.sharing.registry import register
from compressor.sharing.scheme import Scheme
from compressor.sharing.sites import Site

CODEC = "hashed"
TINY = 1e-300  # keeps a division by a sum of zero terms finite
MOST_VALUES = codec_class(CODEC).max_codewords // 2 - 1  # both signs of each value, and a zero where weights are pruned


@register
@dataclass(frozen=True)
class HashedNets(Scheme):
    """Shares K values per tensor at random: a hash gives each weight's value and sign, so no index is stored.

    With ``v`` the K trained values of a tensor of N weights, ``h`` a hash of the tensor's name, the position and the
    seed, and ``xi`` a sign from the same hash::

        K = ceil(N / compression)
        weight_i = xi(i) v[h(i)]                                  h(i) in 0..K-1, xi(i) in {-1, 1}
        dL/dv_k = sum of xi(i) dL/dweight_i over h(i) = k         L: the loss

    The file stores the values and the seed. Of weights that have been trained, random sharing keeps only about K / N of
    their energy, so train from scratch, or for long and with distillation. With ``w`` the weights before sharing and
    ``n_k`` the number of weights of value k, the values start from their signed sums::

        v_k = sum of xi(i) w_i over h(i) = k, divided by n_k      the least-squares projection
        v_k = ... divided by sqrt(n_k), then all scaled           from scratch: so that the mean square of the tensor is
                                                                  that of ``w``, however many weights share a value

    Args:
        compression: N / K, 1 to 1e9; default 8. ``bits`` stands for 32 / bits.
        codewords: K itself, which overrides ``compression``, 1 to 524,287; "auto", the default: by ``compression``.
        seed: of the hash, 0 to 2^63 - 1; default 0.

    Example:
        >>> from compressor import Compressor, Policy, Rule
        >>> layer = torch.nn.Linear(6, 1, bias=False)
        >>> rule = Rule("*", scheme="hashed", compression=3)
        >>> job = Compressor(layer, Policy([rule]), teacher=None, from_scratch=True).prepare()
        >>> job.groups[0].values.data = torch.tensor([0.5, 2.0])
        >>> job.model.weight.tolist()
        [[0.5, 0.5, 0.5, -2.0, 2.0, 0.5]]

    Reference: Chen, Wilson, Tyree, Weinberger, Chen, "Compressing Neural Networks with the Hashing Trick", ICML 2015.
    """

    # Divergences from the paper and its code:
    # - One hash gives index and sign, not two: it is a number below 2K, and those from K on stand for the negatives.
    # - The key of the hash has the tensor's name in it: in the paper's, layers of one shape share one pattern.
    # - The paper draws the values as the weights of a dense layer; here they start from the sums above.
    # - The gradient of a value is divided by N / K (see GroupState.codebook_scale): plain gradient descent then moves a
    #   value as far as it would move a weight. Biases and norms are not hashed.

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
        """Returns the compression with which float32 values take so many bits a weight."""
        super().settings_for_bits(bits)
        return {"compression": 32 / bits}

    def stored_values(self, weights: int) -> int:
        """Returns K, the number of values.

        Raises:
            PolicyError: K by ``compression`` is more than the codec can address.
        """
        if self.codewords != "auto":
            return self.codewords
        values = max(1, math.ceil(weights / self.compression))
        if values > MOST_VALUES:
            least = math.ceil(10 * weights / MOST_VALUES) / 10
            more = f"take a compression of {least} or more, or leave the tensor to another scheme"
            raise PolicyError(f"{weights:,} weights would share {values:,} values, at most {MOST_VALUES:,}: {more}")
        return values

    def generator(self) -> Codec:
        """Returns the codec that hashes name, position and seed to an index in 0..2K-1."""
        return codec_class(CODEC).of(memoryview(self.seed.to_bytes(8, "little")), Stream("", 0, 1))

    def fit(self, group: GroupState, curvature: Mapping[Site, Curvature] | None) -> None:
        """Sets the values from the signed sums of their weights, and the indices unless they are virtual."""
        group.unit.fill_(1.0)  # values are weights here, and learn at the rate of weights
        group.set_codebook(group.unit.new_zeros(self.stored_values(group.weights)), learnt=True)
        sums, counts, energy = _signed_sums(
            group, self.generator(), None if group.from_scratch else diagonals(curvature)
        )
        if group.from_scratch:
            start = sums / counts.sqrt().clamp(min=TINY)
            start *= (energy / (start.square() * counts).sum().clamp(min=TINY)).sqrt()
        else:
            start = sums / counts.clamp(min=TINY)
        group.set_codebook(start, learnt=True)

    def weight(self, group: GroupState, site: Site, master: Tensor) -> Tensor:
        """Returns the signed value of each weight; the gradient is the values' alone."""
        del master
        return lookup(mirrored(group.codebook()), group.indices(site))

    def export(self, group: GroupState) -> SharedTensors:
        """Returns the values and the seed; where weights are pruned, which no hash can tell, stored indices instead."""
        values = group.codebook().detach()
        if group.has_zeros:
            return export_scalars(group, mirrored(values), {site: group.indices(site) for site in group.sites})
        dtype = DTYPE_NAMES[group.master_weight(group.sites[0]).dtype]
        book = Table(round_to(values.cpu().numpy(), dtype).reshape(1, -1, 1), dtype, mirrored=True)
        return SharedTensors((book,), {site.name: self._shared_tensor(group, site, book) for site in group.sites})

    def _shared_tensor(self, group: GroupState, site: Site, book: Table) -> SharedTensor:
        source, codewords = group.generated(site, self.generator()), book.shape[1]
        indices = source.indices(0, source.stream.count, torch.device("cpu")).numpy()
        return SharedTensor(source.shape, 0, indices.astype(index_dtype(codewords)), book.dtype, codec=self.generator())


def _signed_sums(
    group: GroupState, codec: Codec, importance: Mapping[Site, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the signed sums of the weights of each value, and sets the indices of a group that is not virtual.

    Pruned weights do not count. With importance each weight counts as often as that says.

    Returns:
        float64[K], the sums; float64[K], how many weights each value has; float64 scalar, the sum of all squares.
    """
    values, device = len(group.values), group.unit.device
    totals = torch.zeros(2, 2 * values, dtype=torch.float64, device=device)
    energy = torch.zeros((), dtype=torch.float64, device=device)
    for site in group.sites:
        source, weights = group.generated(site, codec), group.master_weight(site).detach().reshape(-1)
        if not group.virtual:
            empty = torch.empty(source.shape, dtype=torch.int32, device=device)
            group.set_indices(site, empty, 2 * values, saved=False)
        for start, stop in source.chunks():
            indices, chunk = source.indices(start, stop, device), weights[start:stop].double()
            mass = torch.ones_like(chunk)
            if group.has_zeros:
                mass *= ~group.pruned(site).view(-1)[start:stop]
            if importance is not None:
                mass *= importance[site].view(-1)[start:stop].double().clamp(min=TINY)
            totals.index_add_(1, indices, torch.stack([chunk * mass, mass]))
            energy += (chunk.square() * mass).sum()
            if not group.virtual:
                group.indices(site).view(-1)[start:stop] = indices
    sums, counts = totals[0, :values] - totals[0, values:], totals[1, :values] + totals[1, values:]
    return sums, counts, energy
