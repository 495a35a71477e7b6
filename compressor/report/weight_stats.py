"""Figures over all shared weights of a network, as Weight Fixing Networks and Deep Compression define them."""

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
MANY_ZEROS = 0.5  # share of zeros above which the gap-coded form is worth computing
EXCLUDED = "downsample"  # timm's name of the layers that Weight Fixing Networks are published without


@dataclass(frozen=True, eq=False)
class Values:
    """The distinct values of a tensor, float32[n] ascending, and the number of occurrences of each, int64[n]."""

    name: str
    values: NDArray[np.float32]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, name: str, shared: SharedTensor, book: Codebook, histogram: NDArray[np.int64]) -> Values:
        """Counts the values of a tensor.

        Args:
            name: the tensor's name.
            shared: the tensor.
            book: its codebook.
            histogram: int64[K], of its indices; suffices if the tensor has a single group of scalar codewords.
        """
        books, _, length = book.shape
        if books == 1 and length == 1 and shared.groups == 1:
            codewords = np.arange(len(histogram), dtype=np.uint32)
            alone = replace(shared, shape=codewords.shape, indices=codewords, block=None)  # one group is no block
            decoded, counts = decode(alone, book), histogram
        else:
            decoded, counts = np.unique(decode(shared, book), return_counts=True)
        if shared.dtype == "BF16":
            decoded = (decoded.astype(np.uint32) << 16).view(np.float32)
        values, place = np.unique(decoded.astype(np.float32)[counts > 0], return_inverse=True)
        return cls(name, values, np.bincount(place, counts[counts > 0], len(values)).astype(np.int64))

    @property
    def zeros(self) -> float:
        """The share of zeros, 0 to 1; 0 of a tensor without weights."""
        return float(self.counts[self.values == 0].sum() / max(int(self.counts.sum()), 1))


@dataclass(frozen=True)
class WeightSpace:
    """All shared weights of a network as one population.

    Args:
        unique: number of distinct values.
        entropy: of the values, bits per weight.
        unique_nonzero: number of distinct values as published for Weight Fixing Networks: without zeros, and without
            the tensors of down-sampling layers.
        entropy_nonzero: entropy of the same weights, bits per weight.
        power_terms: mean number of signed powers of two that sum to a weight, each of which costs an addition when
            multiplying by the weight.

    Reference: Subia-Waud, Dasmahapatra, "Weight Fixing Networks", ECCV 2022.
    """

    unique: int
    entropy: float
    unique_nonzero: int
    entropy_nonzero: float
    power_terms: float

    @classmethod
    def of(cls, tensors: Iterable[Values]) -> WeightSpace:
        """Combines the values of all tensors."""
        tensors = list(tensors)
        values, counts = _merged(tensors)
        published, published_counts = _merged([tensor for tensor in tensors if EXCLUDED not in tensor.name])
        nonzero = published != 0
        terms = power_of_two_terms(values)
        return cls(
            unique=len(values),
            entropy=entropy(counts),
            unique_nonzero=int(nonzero.sum()),
            entropy_nonzero=entropy(published_counts[nonzero]),
            power_terms=float((terms * counts).sum() / max(int(counts.sum()), 1)),
        )


def _merged(tensors: list[Values]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    if not tensors:
        return np.empty(0, np.float32), np.empty(0, np.int64)
    values, place = np.unique(np.concatenate([tensor.values for tensor in tensors]), return_inverse=True)
    counts = np.bincount(place, np.concatenate([tensor.counts for tensor in tensors]), len(values))
    return values, counts.astype(np.int64)


def entropy(histogram: NDArray[np.int64]) -> float:
    """Returns the order-0 entropy of counts, in bits.

    >>> entropy(np.array([2, 1, 1, 0]))
    1.5
    """
    share = histogram[histogram > 0] / max(int(histogram.sum()), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0


def power_of_two_terms(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Returns the least number of signed powers of two that sum to each value: the digits of its non-adjacent form.

    Args:
        values: float32[n].

    Returns:
        int64[n].

    Example:
        >>> power_of_two_terms(np.array([0, 4, -0.75, 7, 11], np.float32)).tolist()
        [0, 1, 2, 2, 3]
    """
    mantissa = np.abs(np.frexp(values.astype(np.float64))[0] * 2.0**24).astype(np.int64)
    terms: NDArray[np.int64] = np.bitwise_count(mantissa ^ 3 * mantissa).astype(np.int64)
    return terms


def gap_coded_bytes(shared: SharedTensor, zero: int, histogram: NDArray[np.int64]) -> int:
    """Computes a sparse tensor's size in Deep Compression's form: Huffman codes of values and of the gaps between them.

    A gap beyond the field's largest takes filler zeros, each of which costs a value. The two tables of code lengths are
    counted at 4 bits an entry. Packed files do not use this form: they code zeros like any other value.

    Args:
        shared: the tensor.
        zero: the index of the codeword 0.
        histogram: int64[K], of the indices.

    Returns:
        The size in bytes.

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
