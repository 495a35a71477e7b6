"""The choice of codecs: for each site the shortest stream, where a codec of its own is worth naming."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.content import Indices

__all__ = ["Option", "choose", "encode_each"]

_NAMING = 2
"""Bytes that a site takes in the deflated metadata, about, where its codec is not the one that most have."""


@dataclass(frozen=True)
class Option:
    """One way to store the indices of a site.

    Args:
        codec: the id of the codec.
        data: what it writes.
    """

    codec: str
    data: bytes


def encode_each(codecs: Sequence[Codec], indices: Indices, stream: Stream) -> list[Option]:
    """Returns the options that may be chosen, the shortest first.

    Codecs are tried in the order of their lower bounds, and none whose bound exceeds the best size by ``_NAMING``.
    """
    if len(codecs) == 1:
        return [Option(codecs[0].id, codecs[0].encode(indices, stream))]
    histogram = np.bincount(indices, minlength=stream.codewords)
    bounds = {
        codec.id: -1.0 if codec.places else float((codec.code_lengths(histogram) * histogram).sum()) / 8 - 1
        for codec in codecs
    }
    options: list[Option] = []
    for codec in sorted(codecs, key=lambda codec: bounds[codec.id]):
        if not options or bounds[codec.id] <= min(len(option.data) for option in options) + _NAMING:
            options.append(Option(codec.id, codec.encode(indices, stream)))
    return sorted(options, key=lambda option: (len(option.data), option.codec))


def choose(options: Mapping[str, Sequence[Option]]) -> dict[str, Option]:
    """Returns one option for each site: the shortest, unless that saves no more than naming another codec costs.

    What the deflated metadata will take is known only when all is chosen. Per site it is a byte or two more for a codec
    that few sites have.

    Args:
        options: the options of each site, the shortest first.
    """
    usual = [codec for codec, _ in Counter(found[0].codec for found in options.values()).most_common(1)]
    chosen = {}
    for name, found in options.items():
        alike = [option for option in found if option.codec in usual]
        close = alike and len(alike[0].data) <= len(found[0].data) + _NAMING
        chosen[name] = alike[0] if close else found[0]
    return chosen
