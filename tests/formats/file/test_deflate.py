"""Deflated metadata: what zlib inflates, in fewer bytes than zlib's, the same on every machine."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressor.formats.errors import FormatError
from compressor.formats.file.deflate import DICTIONARY, deflate, inflate
from compressor.model_zoo import list_checkpoints
from tests.helpers.forging import deflated, text_of

CHECKPOINTS = Path(__file__).resolve().parents[3] / "model_zoo" / "checkpoints"


def zlib_inflated(data: bytes) -> bytes:
    stream = zlib.decompressobj(-15, zdict=DICTIONARY)
    text = stream.decompress(data) + stream.flush()
    assert stream.eof
    assert not stream.unused_data
    return text


@given(st.binary(max_size=300))
def test_any_bytes(text: bytes) -> None:
    data = deflate(text)
    assert zlib_inflated(data) == text
    assert inflate(data, len(text)) == text


@given(st.text(alphabet='abc",[]{}0', max_size=200), st.integers(1, 40))
def test_repeated_text(text: str, times: int) -> None:
    whole = text.encode() * times
    assert zlib_inflated(deflate(whole)) == whole


LENGTHS = [3, 4, 10, 11, 18, 19, 34, 66, 130, 257, 258, 259, 260, 516, 600]
DISTANCES = [1, 2, 3, 4, 5, 8, 9, 4096, 4097, 24576, 32768, 32769]


@pytest.mark.parametrize(
    ("length", "distance"), [(length, 3) for length in LENGTHS] + [(9, distance) for distance in DISTANCES]
)
def test_matches_of_every_length_and_distance(length: int, distance: int) -> None:
    noise = random.Random(distance).randbytes(distance)
    text = noise + (noise * (length // distance + 1))[:length]
    assert zlib_inflated(deflate(text)) == text


def test_all_256_bytes_often_and_once() -> None:
    """A code of which some lengths come near the limit: frequencies like Fibonacci numbers."""
    counts = [1, 1]
    while len(counts) < 18:
        counts.append(counts[-1] + counts[-2])
    drawn = [byte for byte, count in enumerate(counts) for _ in range(count)]
    random.Random(0).shuffle(drawn)
    for text in (bytes(range(256)), bytes(drawn)):
        assert zlib_inflated(deflate(text)) == text


@pytest.mark.parametrize("name", list_checkpoints())
def test_metadata_take_fewer_bytes_than_by_zlib(name: str) -> None:
    text = text_of((CHECKPOINTS / f"{name}.safetensors").read_bytes())
    assert len(deflate(text)) < len(deflated(text)) < len(text) / 4


@pytest.mark.parametrize("name", list_checkpoints())
def test_same_bytes_as_on_the_machine_that_wrote_the_file(name: str) -> None:
    data = (CHECKPOINTS / f"{name}.safetensors").read_bytes()
    assert deflate(text_of(data)) in data


def test_the_dictionary_is_that_of_the_format() -> None:
    assert len(DICTIONARY) == 6_014
    assert hashlib.sha256(DICTIONARY).hexdigest() == "a46887037ae6d2cf85766459ad83b6ca572c7b244c637d1a85fa4b7eef1d652d"
    assert DICTIONARY.isascii()


@pytest.mark.parametrize("size", [0, 12, 14, 1 << 20])
def test_inflating_to_another_size(size: int) -> None:
    with pytest.raises(FormatError, match="does not hold exactly"):
        inflate(deflate(b'{"version":2}'), size)


def test_the_end_of_a_stream_is_read_even_if_its_text_has_the_size_declared() -> None:
    """Blocks after the last byte, and a block that is not the last."""
    text = json.dumps({"version": 2}).encode()
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=DICTIONARY)
    unfinished = stream.compress(text) + stream.flush(zlib.Z_SYNC_FLUSH)
    with pytest.raises(FormatError, match="does not hold exactly"):
        inflate(unfinished, len(text))
