"""The choice of codecs with which a whole file is smallest, its header counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from compressor.formats.codecs.base import Codec, Stream
from compressor.formats.content import Indices

__all__ = ["Option", "choose", "encode_each", "text_size"]

_SLACK = 64
"""Bytes by which an option may exceed the shortest of its site: more than another codec can ever save in the header."""

_ALIGNMENT = 8  # bytes that the header is padded to

Chosen = dict[str, "Option"]


@dataclass(frozen=True)
class Option:
    """One way to store the indices of a site.

    Args:
        codec: the id of the codec.
        data: what it writes.
    """

    codec: str
    data: bytes

    @property
    def text(self) -> int:
        """The characters that differ between the options of a site: the codec's id, and the size in digits."""
        return len(self.codec) + len(str(len(self.data)))


def encode_each(codecs: Sequence[Codec], indices: Indices, stream: Stream) -> list[Option]:
    """Returns the options that may be part of the smallest file, the shortest first.

    Codecs are tried in the order of their lower bounds, and none whose bound exceeds the best size by ``_SLACK``.
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
        if not options or bounds[codec.id] <= min(len(option.data) for option in options) + _SLACK:
            options.append(Option(codec.id, codec.encode(indices, stream)))
    options.sort(key=lambda option: (len(option.data), option.codec))
    return [option for option in options if len(option.data) <= len(options[0].data) + _SLACK]


def text_size(chosen: Mapping[str, Option]) -> int:
    """Returns the characters of the header that depend on the choice: of the sites, and of the list ``requires``."""
    required = {option.codec for option in chosen.values()}
    return sum(option.text for option in chosen.values()) + sum(len(r"\"\",") + len(codec) for codec in required)


def choose(options: Mapping[str, Sequence[Option]], file_size: Callable[[Mapping[str, Option]], int]) -> Chosen:
    """Returns one option for each site, such that the file is smallest.

    A shorter stream may take a longer codec's id, one more codec in ``requires``, or eight bytes more of padded header.
    For each set of codecs and each remainder of the size of the header, dynamic programming finds the cheapest choice;
    the smallest of these files is taken.

    Args:
        options: the options of each site.
        file_size: returns the size of the file with a choice.
    """
    if all(len(found) == 1 for found in options.values()):
        return {name: found[0] for name, found in options.items()}
    free = sorted({option.codec for found in options.values() if len(found) > 1 for option in found})
    subsets = [set(chosen) for size in range(1, len(free) + 1) for chosen in combinations(free, size)]
    return min((chosen for subset in subsets for chosen in _cheapest(options, subset)), key=file_size)


def _cheapest(options: Mapping[str, Sequence[Option]], codecs: set[str]) -> Iterator[Chosen]:
    """Yields the cheapest choice among some codecs for each remainder of the characters it takes in the header.

    A site of one option keeps it. Nothing is yielded where another site has no option among the codecs.
    """
    reached: dict[int, tuple[int, tuple[object, ...]]] = {0: (0, ())}  # cost, and options linked from the last back
    for found in options.values():
        allowed = [option for option in found if len(found) == 1 or option.codec in codecs]
        extended: dict[int, tuple[int, tuple[object, ...]]] = {}
        for remainder, (cost, before) in reached.items():
            for option in allowed:
                after, total = (remainder + option.text) % _ALIGNMENT, cost + option.text + len(option.data)
                if after not in extended or total < extended[after][0]:
                    extended[after] = total, (option, before)
        reached = extended
    for _, linked in reached.values():
        yield dict(zip(options, _unlinked(linked), strict=True))


def _unlinked(linked: tuple[object, ...]) -> list[Option]:
    """Returns linked options, the first one first."""
    chosen: list[Option] = []
    while linked:
        option, linked = linked  # type: ignore[assignment]
        assert isinstance(option, Option)
        chosen.append(option)
    return chosen[::-1]
