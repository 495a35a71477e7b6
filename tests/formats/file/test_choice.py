"""codec="auto" gives the shortest streams, but names no second codec for a byte or two."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.file.choice import Option, choose
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack

GENERAL = sorted(name for name, codec in CODECS.items() if codec.general)


def content(seed: int, sites: int) -> Content:
    """Sites of a few to some hundred indices, of which one codeword is rather frequent."""
    random = np.random.default_rng(seed)
    shared, books = {}, []
    for number in range(sites):
        codewords, count = int(random.integers(2, 18)), int(2 ** random.uniform(1, 9))
        indices = np.where(random.random(count) < random.random(), 0, random.integers(0, codewords, count))
        shared[f"layer{number}.weight"] = SharedTensor((count,), number, indices.astype(np.uint8))
        books.append(Table.of(np.arange(codewords)))
    return Content(shared, tuple(books))


@pytest.mark.parametrize("seed", range(20))
def test_auto_is_within_two_bytes_of_the_shortest_stream_of_each_site(seed: int) -> None:
    whole = content(seed, 1 + seed % 4)
    shortest = dict.fromkeys(whole.sites, 1 << 30)
    for codec in GENERAL:
        with PackedFile.from_bytes(pack(whole, codec)) as file:
            shortest = {name: min(size, file.sites[name].size) for name, size in shortest.items()}
    with PackedFile.from_bytes(pack(whole)) as file:
        assert all(shortest[name] <= site.size <= shortest[name] + 2 for name, site in file.sites.items())


def test_auto_is_no_larger_than_one_codec_for_all() -> None:
    for seed in range(10):
        whole = content(seed, 6)
        assert len(pack(whole)) <= min(len(pack(whole, codec)) for codec in GENERAL)


def options(**sizes: int) -> list[Option]:
    return [Option(codec, bytes(size)) for codec, size in sorted(sizes.items(), key=lambda item: item[1])]


def test_two_bytes_are_not_worth_another_codec_and_three_are() -> None:
    chosen = choose({"a": options(ans=9, bits=20), "b": options(ans=9), "c": options(ans=12, bits=10)})
    assert {name: option.codec for name, option in chosen.items()} == {"a": "ans", "b": "ans", "c": "ans"}
    chosen = choose({"a": options(ans=9, bits=20), "b": options(ans=9), "c": options(ans=13, bits=10)})
    assert chosen["c"].codec == "bits"


def test_a_site_that_the_usual_codec_cannot_code_has_another() -> None:
    assert choose({"a": options(ans=9), "b": options(ans=9), "c": options(bits=10)})["c"].codec == "bits"
    assert choose({}) == {}


def test_sites_of_a_codec_of_their_own_keep_it() -> None:
    whole = content(5, 3)
    first = next(iter(whole.sites))
    sites = {**whole.sites, first: replace(whole.sites[first], codec=CODECS["huffman"]())}
    with PackedFile.from_bytes(pack(replace(whole, sites=sites))) as file:
        assert file.sites[first].codec == "huffman"


def test_hundreds_of_sites() -> None:
    whole = content(1, 300)
    assert len(pack(whole)) <= min(len(pack(whole, codec)) for codec in GENERAL)
