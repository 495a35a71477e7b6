"""The hash that generates indices: golden vectors, an obvious twin, and its statistics."""

from __future__ import annotations

import numpy as np
import pytest

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.hashed import Hashed, hashed_indices
from compressor.formats.errors import FormatError, UsageError

MASK = (1 << 64) - 1
GOLDEN = {
    ("fc.weight", 0): [2300, 38793, 43504, 16898, 37410, 17702, 36760, 25015],
    ("layer1.0.conv1.weight", 42): [15590, 12650, 64271, 13996, 17247, 4327, 1614, 29131],
}


def slow_mix(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & MASK
    word = (word ^ word >> 27) * 0x94D049BB133111EB & MASK
    return word ^ word >> 31


def slow_indices(name: str, count: int, codewords: int, seed: int) -> list[int]:
    key = 0xCBF29CE484222325
    for byte in name.encode():
        key = (key ^ byte) * 0x100000001B3 & MASK
    key = slow_mix(key ^ seed)
    words = (slow_mix(key + (position + 1) * 0x9E3779B97F4A7C15 & MASK) for position in range(count))
    return [(word >> 32) * codewords >> 32 for word in words]


@pytest.mark.parametrize(("name", "seed"), [("fc.weight", 0), ("層.weight", 1), ("a", MASK)])
@pytest.mark.parametrize("codewords", [1, 2, 100, 1 << 18, (1 << 20) - 1])
def test_indices_are_the_specified_ones(name: str, seed: int, codewords: int) -> None:
    assert hashed_indices(name, 300, codewords, seed).tolist() == slow_indices(name, 300, codewords, seed)


def test_golden_vectors() -> None:
    """Read for ever: files hold only the seed."""
    assert hashed_indices("fc.weight", 8, 1 << 16, 0).tolist() == GOLDEN["fc.weight", 0]
    assert hashed_indices("layer1.0.conv1.weight", 8, 1 << 16, 42).tolist() == GOLDEN["layer1.0.conv1.weight", 42]


def test_long_tensors_are_hashed_in_blocks_without_seams() -> None:
    long = hashed_indices("fc.weight", 200_000, 1000)
    assert long[65_530:65_545].tolist() == slow_indices("fc.weight", 65_545, 1000, 0)[65_530:]


def test_indices_are_even_and_unlike_between_names_and_seeds() -> None:
    indices = hashed_indices("fc.weight", 1_000_000, 1000)
    counts = np.bincount(indices, minlength=1000)
    chi_square = float(((counts - 1000.0) ** 2 / 1000).sum())
    assert 800 < chi_square < 1200  # 999 degrees of freedom: mean 999, standard deviation 45
    for other in (hashed_indices("fc.bias", 1_000_000, 1000), hashed_indices("fc.weight", 1_000_000, 1000, 1)):
        assert abs(int((indices == other).sum()) - 1000) < 200


def test_other_indices_cannot_be_coded() -> None:
    with pytest.raises(UsageError, match=r"'fc\.weight' are not those the hash gives for seed 3"):
        Hashed(3).encode(np.zeros(10, np.uint8), Stream("fc.weight", 10, 5))


def test_seed_must_fit_eight_bytes() -> None:
    with pytest.raises(UsageError, match="seed"):
        hashed_indices("fc.weight", 1, 2, 1 << 64)


def test_stream_is_eight_bytes() -> None:
    with pytest.raises(FormatError, match="9 bytes, expected the 8"):
        Hashed().decode(memoryview(bytes(9)), Stream("fc.weight", 10, 5))
