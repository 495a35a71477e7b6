"""What every codec keeps to, whichever there are: none is named here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.registry import CODECS, codec_class
from compressor.formats.content import index_dtype
from compressor.formats.errors import FormatError, UnsupportedError

every_codec = pytest.mark.parametrize("codec_id", sorted(CODECS))
general = pytest.mark.parametrize("codec_id", sorted(name for name, codec in CODECS.items() if codec.general))
generating = pytest.mark.parametrize("codec_id", sorted(name for name, codec in CODECS.items() if not codec.general))


def sample(codec_id: str, count: int, codewords: int, seed: int, spread: float = 4.0) -> NDArray[Any]:
    """Make indices that the codec can code: geometric ones, or those it generates itself."""
    codec = CODECS[codec_id]()
    if not codec.general:
        empty = codec.encode(np.empty(0, np.uint8), Stream("fc.weight", 0, codewords))
        return codec.decode(memoryview(empty), Stream("fc.weight", count, codewords))
    drawn = np.random.default_rng(seed).geometric(min(1.0, spread / codewords), count) - 1
    return np.minimum(drawn, codewords - 1).astype(index_dtype(codewords))


def round_trip(codec_id: str, indices: NDArray[Any], codewords: int, shape: tuple[int, ...] = ()) -> bytes:
    codec, stream = CODECS[codec_id](), Stream("fc.weight", len(indices), codewords, shape)
    data = codec.encode(indices, stream)
    decoded = codec.decode(memoryview(data), stream)
    assert decoded.dtype == index_dtype(codewords)
    np.testing.assert_array_equal(decoded, indices)
    values = np.random.default_rng(0).normal(size=codewords).astype(np.float32)
    looked_up = codec.lookup(memoryview(data), stream, values)
    assert looked_up.dtype == np.float32
    np.testing.assert_array_equal(looked_up, values[indices])
    return data


@every_codec
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(0, 700), st.integers(1, 1 << 12), st.integers(0, 2**32 - 1), st.sampled_from([0.02, 1.0, 4.0, 4096.0])
)
def test_round_trip(codec_id: str, count: int, codewords: int, seed: int, spread: float) -> None:
    codewords = min(codewords, CODECS[codec_id].max_codewords)
    round_trip(codec_id, sample(codec_id, count, codewords, seed, spread), codewords)


@every_codec
@pytest.mark.parametrize("width", range(1, 17))
def test_every_width(codec_id: str, width: int) -> None:
    codewords = min(1 << width, CODECS[codec_id].max_codewords)
    round_trip(codec_id, sample(codec_id, 1001, codewords, width), codewords)


@every_codec
@pytest.mark.parametrize("count", [0, 1, 7, 65_535, 65_536, 65_537, 200_003])
@pytest.mark.parametrize("codewords", [1, 2, 3, 16, 37])
def test_sizes_around_chunks(codec_id: str, count: int, codewords: int) -> None:
    round_trip(codec_id, sample(codec_id, count, codewords, count), codewords)


@general
@pytest.mark.parametrize("count", [1, 100, 70_000])
def test_one_used_codeword_of_many(codec_id: str, count: int) -> None:
    round_trip(codec_id, np.full(count, 5, np.uint8), 9)


@general
def test_extreme_histograms(codec_id: str) -> None:
    """Fibonacci counts make the longest codes; one rare codeword among a million makes the smallest share."""
    counts = [1, 1]
    while len(counts) < 27:
        counts.append(counts[-1] + counts[-2])
    indices = np.repeat(np.arange(27), counts).astype(np.uint8)
    np.random.default_rng(0).shuffle(indices)
    round_trip(codec_id, indices, 27)
    rare = np.zeros(1_000_000, np.uint8)
    rare[777_777] = 1
    round_trip(codec_id, rare, 2)


@general
def test_all_codewords_used_once(codec_id: str) -> None:
    codewords = min(CODECS[codec_id].max_codewords, 1 << 16)
    round_trip(codec_id, np.random.default_rng(1).permutation(codewords).astype(index_dtype(codewords)), codewords)


@general
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([(1, 90), (30, 1), (12, 5), (9, 4, 3), (6, 1, 5, 5), (16, 8, 3, 3), (2, 3, 2, 3, 2), (64, 64)]),
    st.sampled_from([1, 2, 3, 16, 37, 300]),
    st.integers(0, 2**32 - 1),
)
def test_rows_columns_and_positions_of_any_spread(
    codec_id: str, shape: tuple[int, ...], codewords: int, seed: int
) -> None:
    """Also rows in which one codeword alone occurs; the shape changes nothing but the bytes."""
    rng = np.random.default_rng(seed)
    spread = np.full(shape, codewords / 8)
    for axis, size in enumerate(shape):
        factors = np.exp(rng.normal(size=size)) * (rng.random(size) < 0.8)
        spread = spread * factors.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    indices = np.clip(np.rint(rng.normal(size=shape) * spread + codewords // 2), 0, codewords - 1)
    indices = indices.astype(index_dtype(codewords)).reshape(-1)
    round_trip(codec_id, indices, codewords, shape)


@every_codec
def test_same_bytes_every_time(codec_id: str) -> None:
    indices = sample(codec_id, 5000, 50, 3)
    assert round_trip(codec_id, indices, 50) == round_trip(codec_id, indices.astype(np.uint32).astype(np.uint8), 50)


@every_codec
def test_codec_is_found_again_from_its_stream(codec_id: str) -> None:
    stream = Stream("fc.weight", 100, 10)
    indices = sample(codec_id, 100, 10, 0)
    data = CODECS[codec_id]().encode(indices, stream)
    assert CODECS[codec_id].of(memoryview(data), stream).encode(indices, stream) == data


@every_codec
@pytest.mark.parametrize(("count", "codewords"), [(0, 5), (1, 1), (300, 1), (300, 2), (300, 11), (70_000, 6)])
def test_truncated_or_longer_is_refused(codec_id: str, count: int, codewords: int) -> None:
    codec, stream = CODECS[codec_id](), Stream("fc.weight", count, codewords)
    data = codec.encode(sample(codec_id, count, codewords, 0), stream)
    lies = [data[:cut] for cut in {0, len(data) // 2, len(data) - 1} if 0 <= cut < len(data)]
    for lie in [*lies, data + b"\0", data + b"\xff"]:
        with pytest.raises(FormatError, match=r"fc\.weight"):
            codec.decode(memoryview(lie), stream)
        with pytest.raises(FormatError, match=r"fc\.weight"):
            codec.lookup(memoryview(lie), stream, np.zeros(codewords, np.float32))


@every_codec
@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(1, 40))
def test_any_bytes_decode_or_are_refused(codec_id: str, data: bytes, count: int, codewords: int) -> None:
    stream = Stream("fc.weight", count, codewords)
    try:
        indices = CODECS[codec_id]().decode(memoryview(data), stream)
    except FormatError:
        return
    assert indices.shape == (count,)
    assert not count or indices.max() < codewords
    most = CODECS[codec_id]().max_count(len(data), codewords)
    assert most is None or count <= most


@every_codec
@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_changed_streams_decode_or_are_refused(codec_id: str, data: st.DataObject) -> None:
    codewords, shape = data.draw(st.integers(1, 20)), data.draw(st.sampled_from([(), (4, 24), (5, 1, 9)]))
    stream = Stream("fc.weight", math.prod(shape) if shape else data.draw(st.integers(0, 60)), codewords, shape)
    codec = CODECS[codec_id]()
    changed = bytearray(codec.encode(sample(codec_id, stream.count, codewords, 5), stream))
    for _ in range(data.draw(st.integers(1, 3)) if changed else 0):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    try:
        indices = codec.decode(memoryview(bytes(changed)), stream)
    except FormatError:
        return
    assert len(indices) == stream.count
    assert not stream.count or indices.max() < codewords


@general
def test_code_lengths_foretell_the_size(codec_id: str) -> None:
    """Of indices in one row: a codec that makes use of places may take fewer bytes for others."""
    indices = sample(codec_id, 60_000, 12, 4)
    histogram = np.bincount(indices, minlength=12)
    bits = float((CODECS[codec_id]().code_lengths(histogram) * histogram).sum())
    size = len(round_trip(codec_id, indices, 12))
    assert bits / 8 <= size + 1
    assert size <= bits / 8 * 1.001 + 64


@every_codec
def test_code_lengths_of_nothing_are_finite(codec_id: str) -> None:
    lengths = CODECS[codec_id]().code_lengths(np.zeros(5, np.int64))
    assert lengths.shape == (5,)
    assert np.isfinite(lengths).all()


@generating
def test_code_lengths_of_generated_indices_are_nothing(codec_id: str) -> None:
    assert not CODECS[codec_id]().code_lengths(np.array([3, 4])).any()


def test_unknown_codec_names_the_nearest() -> None:
    known = sorted(CODECS)[0]
    with pytest.raises(UnsupportedError, match=f"Did you mean '{known}'"):
        codec_class(known + "z")
