"""What a packed file holds, tensor by tensor: every figure is computed from the bytes that were written.

Nothing here imports torch, so that ``compress inspect`` answers at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.reader import PackedFile
from compressor.formats.record import Codebook, SharedTensor, Table, decode
from compressor.provenance import Provenance, read_provenance, rule_of
from compressor.tables import Row, markdown_table, text_table

__all__ = ["Report", "Totals"]

SCHEMA_VERSION = 1
FLOATING = ("F64", "F32", "F16", "BF16")
DTYPE_ORDER = list(ITEM_SIZES)  # safetensors lays wide dtypes first
LARGEST, FEW = 10, 4  # rows shown, and reasons for what was left alone, unless all are asked for


@dataclass(frozen=True)
class Totals:
    """The whole file. Sizes in bytes; ``file`` is exactly the sum of the five parts after it."""

    dense: int
    file: int
    indices: int
    codebooks: int
    untouched: int
    header: int
    checksums: int
    ratio: float
    parameters: int
    bits_per_parameter: float
    unique_weights: int


class Report:
    """Sizes, entropies and errors of a packed file.

    Args:
        rows: one per shared tensor, in the file's order.
        totals: of the whole file.
        provenance: what the file says of its making: seed, accuracy, what was left alone and why.
    """

    def __init__(self, rows: Sequence[Row], totals: Totals, provenance: Provenance) -> None:
        self.rows, self.totals, self.provenance = list(rows), totals, provenance

    @classmethod
    def of(cls, file: PackedFile) -> Report:
        """Read the figures off an open packed file."""
        made = read_provenance(file)
        rows, values = [], []
        users = [sum(site.book == number for site in file.sites.values()) for number in range(len(file.books))]
        for position, name in enumerate(file.sites):
            shared = file.shared(name)
            book = file.books[shared.book]
            histogram = _histogram(shared, book)
            values.append(_values_used(shared, book, histogram))
            rows.append(_row(file, made, position, shared, book, histogram, users[shared.book]))
        unique = len(np.unique(np.concatenate(values))) if values else 0
        return cls(rows, _totals(file, made, rows, unique), made)

    def __str__(self) -> str:
        return self.table()

    def to_json(self) -> str:
        """Give all figures as one JSON document with a schema version."""
        return json.dumps(self.to_dict(), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """Give all figures as JSON-ready values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "sites": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "left": self.provenance.left,
            "totals": asdict(self.totals),
            "provenance": self.provenance.model_dump(exclude_none=True),
        }

    def to_markdown(self) -> str:
        """Give the table of all tensors and the totals as Markdown."""
        return f"{markdown_table(self.rows)}\n\n{self.summary()}"

    def table(self, width: int = 120, everything: bool = False) -> str:
        """Give the table as text no wider than ``width`` characters, the largest tensors only unless ``everything``.

        Columns are dropped from the least telling on until it fits.
        """
        largest = sorted(self.rows, key=lambda row: -row.indices)[: None if everything else LARGEST]
        shown = [row for row in self.rows if row in largest]
        more = [f"({len(self.rows) - len(shown)} more: --all)"] if len(shown) < len(self.rows) else []
        left = [f"left alone: {name}: {reason}" for name, reason in self.provenance.left.items()]
        few = left if everything or len(left) <= FEW else [f"{len(left)} tensors left alone: --all says why"]
        notes = [line for note in [*more, *few] for line in wrap(note, width, subsequent_indent="  ")]
        return "\n".join([text_table(shown, width), *notes, self.summary(width)])

    def summary(self, width: int = 120) -> str:
        """Give the totals as text no wider than ``width``: the whole file, what it consists of, what it holds."""
        t = self.totals
        parts = "codebooks", "untouched", "header", "checksums"
        split = " + ".join([f"indices {t.indices:,}", *(f"{part} {getattr(t, part):,}" for part in parts)])
        whole = f"whole file  {t.dense:,} -> {t.file:,} bytes ({t.ratio:.2f}x) = {split}"
        held = (
            f"{t.parameters:,} parameters at {t.bits_per_parameter:.3f} bits, {t.unique_weights:,} unique weight values"
        )
        return "\n".join(line for text in (whole, held) for line in wrap(text, width, subsequent_indent=" " * 12))


def _histogram(shared: SharedTensor, book: Codebook) -> NDArray[np.int64]:
    return np.bincount(shared.indices, minlength=book.shape[1])


def _values_used(shared: SharedTensor, book: Codebook, histogram: NDArray[np.int64]) -> NDArray[np.float32]:
    """Give the distinct values of a tensor; the codewords used tell them unless each group has its own."""
    books, _, length = book.shape
    if books == 1 and length == 1 and shared.scale is None and shared.offset is None:
        return book.expand().reshape(-1)[histogram > 0]
    return np.unique(decode(shared, book)).astype(np.float32)


def _zeros(shared: SharedTensor, book: Codebook, histogram: NDArray[np.int64]) -> float:
    weights = math.prod(shared.shape)
    if book.shape[0] == 1 and book.shape[2] == 1 and shared.offset is None and shared.scale is None:
        return int(histogram[book.expand().reshape(-1) == 0].sum()) / weights
    return 1 - int(np.count_nonzero(decode(shared, book))) / weights


def _entropy(histogram: NDArray[np.int64]) -> float:
    share = histogram[histogram > 0] / histogram.sum()
    return float(-(share * np.log2(share)).sum()) + 0.0


def _row(
    file: PackedFile,
    made: Provenance,
    position: int,
    shared: SharedTensor,
    book: Codebook,
    histogram: NDArray[np.int64],
    users: int,
) -> Row:
    entry = list(file.sites.values())[position]
    weights = math.prod(entry.shape)
    book_bytes = _book_bytes(shared, book) // users  # a book several tensors share is split evenly
    overhead = file.site_overhead(entry.name)
    rule, scheme = rule_of(file, made, position)
    return Row(
        site=entry.name,
        shape=entry.shape,
        weights=weights,
        scheme=scheme,
        bits=max(book.shape[1] - 1, 0).bit_length(),
        used=int((histogram > 0).sum()),
        allowed=book.shape[1],
        zeros=_zeros(shared, book, histogram),
        entropy=_entropy(histogram) * entry.count / weights,
        codec=entry.codec,
        coded=8 * entry.size / weights,
        indices=entry.size,
        codebook=book_bytes,
        overhead=overhead,
        ratio=weights * ITEM_SIZES[entry.dtype] / (entry.size + book_bytes + overhead),
        sqnr=made.sqnr[position] if position < len(made.sqnr) else None,
        rule=rule,
    )


def _book_bytes(shared: SharedTensor, book: Codebook) -> int:
    table = book.values.size * ITEM_SIZES[book.dtype] if isinstance(book, Table) else 0
    spread = sum(part.size for part in (shared.scale, shared.offset) if part is not None)
    return table + spread * ITEM_SIZES[shared.scale_dtype]


def _totals(file: PackedFile, made: Provenance, rows: Sequence[Row], unique: int) -> Totals:
    sizes = file.sizes()
    weights = sum(row.weights for row in rows)
    kept = sum(math.prod(raw.shape) for raw in file.untouched.values() if raw.dtype in FLOATING)
    parameters = weights + kept if made.parameters is None else made.parameters
    dense = dense_size(file)
    return Totals(
        dense=dense,
        file=sizes.file,
        indices=sizes.indices,
        codebooks=sizes.codebooks,
        untouched=sizes.untouched,
        header=sizes.header,
        checksums=sizes.checksums,
        ratio=dense / sizes.file,
        parameters=parameters,
        bits_per_parameter=8 * sizes.file / max(parameters, 1),
        unique_weights=unique,
    )


def dense_size(file: PackedFile) -> int:
    """Give the bytes of the plain ``.safetensors`` file that would hold the same tensors dense."""
    tensors = [(name, e.dtype, e.shape) for entries in (file.sites, file.untouched) for name, e in entries.items()]
    header, offset = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-DTYPE_ORDER.index(t[1]), t[0])):
        end = offset + math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset
