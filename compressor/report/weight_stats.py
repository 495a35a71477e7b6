"""Figures over all shared weights of a network together, as Weight Fixing Networks and Deep Compression count them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.registry import codec_class
from compressor.formats.content import Codebook, SharedTensor, decode

__all__ = ["Values", "WeightSpace", "gap_coded_bytes", "power_of_two_terms"]

GAP_BITS_CONVOLUTION, GAP_BITS_LINEAR = 8, 5  # Deep Compression, section 2
MANY_ZEROS = 0.5  # from which share on the gap-coded form is worth computing


@dataclass(frozen=True, eq=False)
class Values:
    """The distinct values of a tensor, float32[n] ascending, and how often each occurs, int64[n]."""

    name: str
    values: NDArray[np.float32]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, name: str, shared: SharedTensor, book: Codebook, histogram: NDArray[np.int64]) -> Values:
        """Count the values; the histogram of the indices tells them unless each group has its own."""
        books, _, length = book.shape
        if books == 1 and length == 1 and shared.groups == 1:
            codewords = np.arange(len(histogram), dtype=np.uint32)
            given, counted = decode(replace(shared, shape=codewords.shape, indices=codewords), book), histogram
        else:
            given, counted = np.unique(decode(shared, book), return_counts=True)
        if shared.dtype == "BF16":
            given = (given.astype(np.uint32) << 16).view(np.float32)
        values, place = np.unique(given.astype(np.float32)[counted > 0], return_inverse=True)
        return cls(name, values, np.bincount(place, counted[counted > 0], len(values)).astype(np.int64))

    @property
    def zeros(self) -> float:
        """Share of zeros."""
        return float(self.counts[self.values == 0].sum() / self.counts.sum())


@dataclass(frozen=True)
class WeightSpace:
    """All shared weights as one population.

    Args:
        unique: distinct values.
        entropy: of the values, bits per weight.
        unique_nonzero, entropy_nonzero: the same as Weight Fixing Networks are published: without zeros, and
            without the tensors of down-sampling layers.
        power_terms: signed powers of two that a weight is the sum of, mean over the weights: additions that a
            multiplication by it costs.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022.
    """

    unique: int
    entropy: float
    unique_nonzero: int
    entropy_nonzero: float
    power_terms: float

    @classmethod
    def of(cls, tensors: Iterable[Values]) -> WeightSpace:
        """Gather the values of all tensors."""
        tensors = list(tensors)
        values, counts = _gathered(tensors)
        published, published_counts = _gathered([tensor for tensor in tensors if "downsample" not in tensor.name])
        kept = published != 0
        terms = power_of_two_terms(values)
        return cls(
            unique=len(values),
            entropy=entropy(counts),
            unique_nonzero=int(kept.sum()),
            entropy_nonzero=entropy(published_counts[kept]),
            power_terms=float((terms * counts).sum() / max(int(counts.sum()), 1)),
        )


def _gathered(tensors: list[Values]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if not tensors:
        return np.empty(0, np.float32), np.empty(0, np.int64)
    values, place = np.unique(np.concatenate([tensor.values for tensor in tensors]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([tensor.counts for tensor in tensors]), len(values))
    return values, counts.astype(np.int64)


def entropy(histogram: NDArray[np.int64]) -> float:
    """Give the order-0 entropy of counts, in bits.

    >>> entropy(np.array([2, 1, 1, 0]))
    1.5
    """
    share = histogram[histogram > 0] / max(int(histogram.sum()), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0


def power_of_two_terms(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Count the fewest signed powers of two that sum to each value: the digits of its non-adjacent form.

    >>> power_of_two_terms(np.array([0, 4, -0.75, 7, 11], np.float32)).tolist()
    [0, 1, 2, 2, 3]
    """
    mantissa = np.abs(np.frexp(values.astype(np.float64))[0] * 2.0**24).astype(np.int64)
    terms: NDArray[np.int64] = np.bitwise_count(mantissa ^ 3 * mantissa).astype(np.int64)
    return terms


def gap_coded_bytes(shared: SharedTensor, zero: int, histogram: NDArray[np.int64]) -> int:
    """Compute a sparse tensor's bytes in Deep Compression's form: Huffman codes of values and of the gaps between them.

    A gap beyond the field's largest takes filler zeros, which cost a value each. Both tables of code lengths are
    counted at 4 bits an entry. Nothing in a packed file is stored so: it codes zeros as a value.

    Args:
        zero: the index of the codeword 0.
        histogram: int64[K], of the indices.

    Reference: Han, Mao, Dally, "Deep Compression", ICLR 2016, sections 2 and 4.
    """
    field = 1 << (GAP_BITS_CONVOLUTION if len(shared.shape) > 2 else GAP_BITS_LINEAR)
    steps = np.diff(np.flatnonzero(shared.indices != zero), prepend=-1)
    fillers = (steps - 1) // field
    gaps = np.bincount((steps - 1) % field, minlength=field)
    gaps[field - 1] += int(fillers.sum())
    codes = histogram.copy()
    codes[zero] = int(fillers.sum())
    huffman = codec_class("huffman")()
    bits = sum(int((counts * huffman.code_lengths(counts)).sum()) + 4 * len(counts) for counts in (gaps, codes))
    return math.ceil(bits / 8)
