"""Read a packed file: every check first, then only what is asked for. No torch in here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.base import Stream, codec_class
from compressor.formats.content import Codebook, Content, Indices, RawTensor, SharedTensor, decode, finish_decode
from compressor.formats.dtypes import from_storage, to_storage
from compressor.formats.errors import FileError, FormatError, MissingError, did_you_mean
from compressor.formats.file.codebooks import TableEntry, read_table
from compressor.formats.file.entries import SiteEntry, check_raw
from compressor.formats.file.parts import MAX_MEMORY, PackedParts, Sizes
from compressor.formats.file.source import Source

__all__ = ["MAX_MEMORY", "PackedFile", "Sizes"]

_log = logging.getLogger(__name__)
_DENORMAL = float(np.finfo(np.float32).tiny)


class PackedFile(PackedParts):
    """A packed file, opened and checked; parts are read, verified and decoded when asked for.

    Args:
        source: where its bytes are.
        label: what messages call it.
        max_memory: refuse files whose tensors take more bytes than this when decoded.

    Raises:
        UnsupportedError: another kind of file, a newer version, an unknown codec.
        FormatError, IntegrityError: a damaged or hostile file.

    Example:
        >>> from compressor.formats.file.writer import pack
        >>> from compressor.formats.content import Content, Table
        >>> site = SharedTensor((2, 2), book=0, indices=np.array([0, 1, 1, 0], np.uint8))
        >>> with PackedFile.from_bytes(pack(Content({"fc.weight": site}, (Table.of([-1, 2]),)))) as file:
        ...     file.tensor("fc.weight").tolist()
        [[-1.0, 2.0], [2.0, -1.0]]
    """

    def __init__(self, source: Source, label: str, max_memory: int = MAX_MEMORY) -> None:
        super().__init__(source, label, max_memory)
        self._books: dict[int, Codebook] = {}
        self._ascending = {site.book for site in self.sites.values() if codec_class(site.codec).general}

    def _site(self, name: str) -> SiteEntry:
        if name not in self.sites:
            raise MissingError(f"{self.label}: no shared tensor {name!r}.{did_you_mean(name, self.sites)}")
        return self.sites[name]

    def _indices(self, site: SiteEntry) -> Indices:
        stream = Stream(site.name, site.count, site.codewords)
        indices: Indices = codec_class(site.codec)().decode(self._part(("indices", site.name)), stream)
        return indices

    def _book(self, number: int) -> Codebook:
        if number not in self._books:
            entry = self.book_entries[number]
            if isinstance(entry, TableEntry):
                data = self._part(("codebook", number))
                table = read_table(data, entry, f"codebook {number}", number in self._ascending)
                if 0 < np.abs(table.values).max() < _DENORMAL:
                    what = f"{self.label}: codebook {number}: all values are below {_DENORMAL:.2g} (denormal)"
                    _log.warning("%s, which some processors take for 0", what)
                self._books[number] = table
            else:
                self._books[number] = entry
        return self._books[number]

    def _per_group(self, kind: str, site: SiteEntry, dtype: str | None) -> NDArray[np.float32] | None:
        if dtype is None:
            return None
        values = from_storage(self._part((kind, site.name)), dtype)
        if not np.isfinite(values).all():
            raise FormatError(f"{kind} of {site.name!r} is not finite")
        return values

    def _shared(self, site: SiteEntry, indices: Indices) -> SharedTensor:
        """Make the record of a site; its codec is named only where that codec generates the indices."""
        codec, found = None, codec_class(site.codec)
        if not found.general:
            stream = Stream(site.name, site.count, site.codewords)
            codec = found.of(self._part(("indices", site.name)), stream)
        return SharedTensor(
            site.shape, site.book, indices, site.dtype, site.axis, site.block,
            scale=self._per_group("scale", site, site.scale),
            offset=self._per_group("offset", site, site.offset),
            scale_dtype=site.scale or site.offset or "F32",
            vector_axis=site.vector_axis,
            codec=codec,
        )  # fmt: skip

    @property
    def books(self) -> tuple[Codebook, ...]:
        """All codebooks."""
        return tuple(self.book(number) for number in range(len(self.book_entries)))

    def book(self, number: int) -> Codebook:
        """Decode one codebook."""
        with self._named():
            return self._book(number)

    @property
    def raw_names(self) -> tuple[str, ...]:
        """Names of the untouched tensors."""
        return tuple(self.untouched)

    def indices(self, name: str) -> Indices:
        """Decode the indices of a site, uint[count]."""
        site = self._site(name)
        with self._named():
            return self._indices(site)

    def shared(self, name: str, indices: bool = True) -> SharedTensor:
        """Give a site as the record it was written from; without ``indices``, none are decoded and it has none."""
        site = self._site(name)
        with self._named():
            return self._shared(site, self._indices(site) if indices else np.empty(0, np.uint8))

    def tensor(self, name: str) -> NDArray[Any]:
        """Decode a site to its weights, as ``record.decode`` does; BF16 as uint16 bit patterns."""
        site = self._site(name)
        with self._named():
            book = self._book(site.book)
            if book.shape[::2] != (1, 1):
                return decode(self._shared(site, self._indices(site)), book)
            stream = Stream(site.name, site.count, site.codewords)
            data = self._part(("indices", name))
            weights = codec_class(site.codec)().lookup(data, stream, book.expand().reshape(-1))
            return finish_decode(weights, self._shared(site, np.empty(0, np.uint8)))

    def raw(self, name: str) -> RawTensor:
        """Give an untouched tensor, expanded from the dtype it is stored in."""
        if name not in self.untouched:
            raise MissingError(f"{self.label}: no untouched tensor {name!r}.{did_you_mean(name, self.untouched)}")
        entry = self.untouched[name]
        with self._named():
            data = self._part(("untouched", name))
            check_raw(data, entry.dtype, f"untouched {name!r}")
        if entry.stored == entry.dtype:
            return RawTensor(entry.dtype, entry.shape, bytes(data))
        return RawTensor(
            entry.dtype, entry.shape, to_storage(from_storage(data, entry.stored), entry.dtype), entry.stored
        )

    def content(self) -> Content:
        """Decode everything."""
        return Content(
            {name: self.shared(name) for name in self.sites},
            self.books,
            {name: self.raw(name) for name in self.untouched},
            self.aliases, self.model, self.preprocessing, self.recipe, self.provenance,
        )  # fmt: skip

    def check(self) -> list[FileError]:
        """Decode everything and list what is wrong with every part."""
        probes: list[Callable[[], object]] = [partial(self.book, number) for number in range(len(self.book_entries))]
        probes += [partial(self.shared, name) for name in self.sites]
        probes += [partial(self.raw, name) for name in self.untouched]
        errors = []
        for probe in probes:
            try:
                probe()
            except FileError as error:
                errors.append(error)
        return errors
