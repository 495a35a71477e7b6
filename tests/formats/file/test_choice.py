"""codec="auto" gives the smallest file there is, header and padding counted: all choices are tried."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from compressor.formats.codecs.registry import CODECS
from compressor.formats.content import Content, SharedTensor, Table
from compressor.formats.file.reader import PackedFile
from compressor.formats.file.writer import pack

GENERAL = ("ans", "bits", "classes", "huffman")


def content(seed: int, sites: int) -> Content:
    """Sites of a few to some hundred indices, of which one codeword is rather frequent."""
    random = np.random.default_rng(seed)
    shared, books = {}, []
    for number in range(sites):
        codewords, count = int(random.integers(2, 18)), int(2 ** random.uniform(1, 9))
        indices = np.where(random.random(count) < random.random(), 0, random.integers(0, codewords, count))
        shared[f"layer{number}.weight"] = SharedTensor((count,), number, indices.astype(np.uint8))
        books.append(Table.of(np.arange(codewords)))
    return Content(shared, tuple(books), provenance={"padding": "x" * int(random.integers(0, 8))})


def sizes_of_all_choices(whole: Content) -> list[int]:
    sizes = []
    for codecs in product(GENERAL, repeat=len(whole.sites)):
        named = zip(whole.sites.items(), codecs, strict=True)
        sites = {name: replace(site, codec=CODECS[codec]()) for (name, site), codec in named}
        sizes.append(len(pack(replace(whole, sites=sites))))
    return sizes


@pytest.mark.parametrize("seed", range(40))
def test_auto_is_the_smallest(seed: int) -> None:
    whole = content(seed, 1 + seed % 4)
    assert len(pack(whole)) == min(sizes_of_all_choices(whole))


def test_a_byte_is_not_worth_another_codec_in_the_header() -> None:
    """By streams alone the second would take huffman: one byte fewer, and 13 characters more in the header."""
    spread = np.arange(64, dtype=np.uint8) % 16
    peaked = np.where(np.arange(64) < 24, 0, spread).astype(np.uint8)
    sites = {"a": SharedTensor((64,), 0, spread), "b": SharedTensor((64,), 0, peaked)}
    whole = Content(sites, (Table.of(range(16)),))
    with PackedFile.from_bytes(pack(whole)) as file:
        assert {name: (site.codec, site.size) for name, site in file.sites.items()} == {
            "a": ("bits", 32), "b": ("bits", 32),
        }  # fmt: skip
    assert len(pack(whole)) == min(sizes_of_all_choices(whole))


def test_sites_of_a_codec_of_their_own_keep_it() -> None:
    whole = content(5, 3)
    first = next(iter(whole.sites))
    sites = {**whole.sites, first: replace(whole.sites[first], codec=CODECS["huffman"]())}
    with PackedFile.from_bytes(pack(replace(whole, sites=sites))) as file:
        assert file.sites[first].codec == "huffman"


def test_hundreds_of_sites() -> None:
    whole = content(1, 300)
    assert len(pack(whole)) <= min(len(pack(whole, codec)) for codec in GENERAL)
