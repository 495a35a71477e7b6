"""The report of a packed file, tensor by tensor: every figure is computed from the bytes that were written.

This module does not import torch, so that ``compress inspect`` starts at once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from textwrap import wrap
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.content import Codebook, SharedTensor, Table
from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.errors import printable
from compressor.formats.file.entries import RawEntry, SiteEntry, shown
from compressor.formats.file.reader import PackedFile
from compressor.report.origin import Origin
from compressor.report.provenance import Provenance, read_provenance, rule_of
from compressor.report.schema import with_units
from compressor.report.table import Row, html_table, legend_of, markdown_table, text_table
from compressor.report.weight_stats import MANY_ZEROS, Values, WeightSpace, entropy, gap_coded_bytes

__all__ = ["Report", "Totals"]

FLOATING = ("F64", "F32", "F16", "BF16")
DTYPE_ORDER = list(ITEM_SIZES)  # safetensors stores wide dtypes first
UNNAMED = "a norm, position, bias or buffer; shared only by a rule that names it"
UNTOUCHED = "untouched: all tensors that share nothing"
MAX_ROWS, MAX_REASONS = 10, 4  # tensors, and reasons for tensors left alone, in a table that does not show everything
WEIGHT_FIXING = "wfn"  # the scheme whose paper counts weights without zeros and down-sampling layers


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


class Report:
    """Sizes, entropies and errors of a packed file.

    Args:
        rows: one per shared tensor, in the file's order.
        totals: of the whole file.
        weight_space: all shared weights together.
        gap_coded: bytes that the indices would take in Deep Compression's form, computed; None if zeros are few.
        origin: what the file says about itself: model, recipe, preprocessing, accuracy, the tensors left alone and why.
        left: all floating tensors of two and more dimensions that are not shared, and why.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        totals: Totals,
        weight_space: WeightSpace,
        gap_coded: int | None,
        origin: Origin,
        left: Mapping[str, str],
    ) -> None:
        self.rows, self.totals, self.origin, self.left = list(rows), totals, origin, dict(left)
        self.weight_space, self.gap_coded = weight_space, gap_coded

    @classmethod
    def of(cls, file: PackedFile) -> Report:
        """Computes the report of an open packed file.

        Raises:
            FormatError: the file or its provenance is malformed.
        """
        provenance = read_provenance(file)
        rows, values, gap_coded = [], [], 0
        users = [sum(site.book == number for site in file.sites.values()) for number in range(len(file.books))]
        for position, name in enumerate(file.sites):
            shared = file.shared(name)
            book = file.books[shared.book]
            histogram = _histogram(shared, book)
            values.append(Values.of(name, shared, book, histogram))
            rows.append(_row(file, provenance, position, shared, book, histogram, users[shared.book], values[-1].zeros))
            gap_coded += _gap_coded(rows[-1], shared, book, histogram)
        sparse = any(row.zeros > MANY_ZEROS for row in rows)
        totals = _totals(file, provenance, rows)
        left = {**provenance.left, **_unnamed(file, provenance)}
        origin = Origin.of(file, provenance)
        return cls(rows, totals, WeightSpace.of(values), gap_coded if sparse else None, origin, left)

    @property
    def provenance(self) -> Provenance:
        """What the file says about how it was made."""
        return self.origin.made

    def __str__(self) -> str:
        return f"{self.heading()}\n\n{self.table()}"

    def __repr__(self) -> str:
        return f"<Report: {self.brief()}>"

    def _repr_html_(self) -> str:
        """Returns the heading and the table for a notebook."""
        return f"<pre>{escape(self.heading())}</pre>{html_table(self.rows)}<pre>{escape(self.summary())}</pre>"

    def brief(self) -> str:
        """Returns the result in a few words: the model, bytes before and after, and accuracy where it is known."""
        model, top1, t = self.origin.model, self.provenance.top1, self.totals
        name = "" if model is None else f"{model['name']}, "
        accuracy = "" if top1 is None else f", top-1 {100 * top1.packed:.1f} %"
        return f"{name}{t.dense:,} -> {t.file:,} bytes, {t.ratio:.2f} times smaller{accuracy}"

    def heading(self, width: int = 120) -> str:
        """Returns what the file is and how it was made, as text no wider than ``width``."""
        return self.origin.lines(width)

    def to_json(self) -> str:
        """Returns all figures as one JSON document with a schema version, and their units: docs/json.md."""
        return json.dumps(with_units(self.to_dict()), indent=2)

    def to_dict(self) -> dict[str, Any]:
        """Returns all figures as JSON-ready values."""
        return {
            "model": self.origin.model,
            "hub": self.origin.hub,
            "preprocessing": dict(self.origin.preprocessing) or None,
            "recipe": dict(self.origin.recipe) or None,
            "sites": [{**asdict(row), "shape": list(row.shape)} for row in self.rows],
            "left": self.left,
            "totals": asdict(self.totals),
            "weight_space": asdict(self.weight_space),
            "gap_coded": self.gap_coded,
            "provenance": self.provenance.model_dump(exclude_none=True),
        }

    def to_markdown(self) -> str:
        """Returns the table of all tensors and the totals as Markdown."""
        return f"{markdown_table(self.rows)}\n\n{self.summary()}"

    def table(self, width: int = 120, everything: bool = False, how: str = "table(everything=True)") -> str:
        """Returns the table and the totals as text no wider than ``width``; columns are dropped until it fits.

        Args:
            width: the most characters of a line.
            everything: whether all tensors and details are shown rather than the largest tensors only.
            how: by which the reader asks for everything.
        """
        largest = sorted(self.rows, key=lambda row: -row.indices)[: None if everything else MAX_ROWS]
        shown = [row for row in self.rows if row in largest]
        more = [f"({len(self.rows) - len(shown)} more: {how})"] if len(shown) < len(self.rows) else []
        left = [f"left alone: {name}: {reason}" for name, reason in self.left.items()]
        if len(left) > MAX_REASONS and not everything:
            left = [f"{len(left)} tensors left alone: {how} says why"]
        notes = [line for note in [*more, *left] for line in wrap(note, width, subsequent_indent="  ")]
        details = [self.details(width)] if everything else []
        text, columns = text_table(shown, width)
        legend = wrap("; ".join([*legend_of(columns), UNTOUCHED]), width, subsequent_indent="  ") if shown else []
        return "\n".join([text, *notes, *legend, self.summary(width), *details])

    def summary(self, width: int = 120) -> str:
        """Returns the totals as text no wider than ``width``: the size of the file, its parts and its parameters."""
        t, unique = self.totals, self.weight_space.unique
        names = "indices", "codebooks", "untouched", "header", "checksums"
        parts = " + ".join(f"{name} {getattr(t, name):,}" for name in names)
        size = f"whole file  {t.dense:,} -> {t.file:,} bytes ({t.ratio:.2f}x) = {parts}"
        parameters = f"{t.parameters:,} parameters at {t.bits_per_parameter:.3f} bits, {unique:,} unique weight values"
        return "\n".join(line for text in (size, parameters) for line in wrap(text, width, subsequent_indent=" " * 12))

    def details(self, width: int = 120) -> str:
        """Returns figures over all shared weights together, as papers count them, as text no wider than ``width``."""
        w = self.weight_space
        figures = [f"{w.unique:,} values, entropy {w.entropy:.3f} bits"]
        if any(row.scheme == WEIGHT_FIXING for row in self.rows):
            nonzero = f"{w.unique_nonzero:,} values, {w.entropy_nonzero:.3f} bits"
            figures.append(f"without zeros and down-sampling {nonzero}")
        figures.append(f"{w.power_terms:.2f} powers of two a weight")
        texts = [f"shared weights  {'; '.join(figures)}"]
        if self.gap_coded is not None:
            texts.append(f"gap-coded as in Deep Compression  indices {self.gap_coded:,} bytes (computed, not stored)")
        return "\n".join(line for text in texts for line in wrap(text, width, subsequent_indent=" " * 12))


def _unnamed(file: PackedFile, provenance: Provenance) -> dict[str, str]:
    """Returns the reason of each floating tensor of two and more dimensions that no rule of the policy could match."""
    matrices = (name for name, raw in file.untouched.items() if raw.dtype in FLOATING and len(raw.shape) > 1)
    return {printable(name): UNNAMED for name in matrices if printable(name) not in provenance.left}


def _histogram(shared: SharedTensor, book: Codebook) -> NDArray[np.int64]:
    return np.bincount(shared.indices, minlength=book.shape[1])


def _row(
    file: PackedFile,
    provenance: Provenance,
    position: int,
    shared: SharedTensor,
    book: Codebook,
    histogram: NDArray[np.int64],
    users: int,
    zeros: float,
) -> Row:
    entry = list(file.sites.values())[position]
    weights = math.prod(entry.shape)
    book_bytes = _book_bytes(shared, book) // users  # a codebook of several tensors is divided evenly
    overhead = file.site_overhead(entry.name)
    rule, scheme = rule_of(file, provenance, position)
    return Row(
        site=shown(entry.name),
        shape=entry.shape,
        weights=weights,
        scheme=scheme,
        bits=max(book.shape[1] - 1, 0).bit_length(),
        used=int((histogram > 0).sum()),
        allowed=book.shape[1],
        zeros=zeros,
        entropy=entropy(histogram) * entry.count / max(weights, 1),  # a tensor may have none
        codec=entry.codec,
        coded=8 * entry.size / max(weights, 1),
        indices=entry.size,
        codebook=book_bytes,
        overhead=overhead,
        ratio=weights * ITEM_SIZES[entry.dtype] / (entry.size + book_bytes + overhead),
        sqnr=provenance.sqnr[position] if position < len(provenance.sqnr) else None,
        rule=rule,
    )


def _gap_coded(row: Row, shared: SharedTensor, book: Codebook, histogram: NDArray[np.int64]) -> int:
    """Returns a tensor's size in Deep Compression's form in bytes; its size in the file if zeros are few."""
    zero = np.flatnonzero(book.expand().reshape(-1) == 0)
    scalars = book.shape[0] == 1 and book.shape[2] == 1 and shared.offset is None
    if row.zeros <= MANY_ZEROS or not scalars or len(zero) != 1:
        return row.indices
    return gap_coded_bytes(shared, int(zero[0]), histogram)


def _book_bytes(shared: SharedTensor, book: Codebook) -> int:
    table = book.values.size * ITEM_SIZES[book.dtype] if isinstance(book, Table) else 0
    per_group = sum(values.size for values in (shared.scale, shared.offset) if values is not None)
    return table + per_group * ITEM_SIZES[shared.scale_dtype]


def _totals(file: PackedFile, provenance: Provenance, rows: Sequence[Row]) -> Totals:
    sizes = file.sizes()
    weights = sum(row.weights for row in rows)
    untouched = sum(math.prod(raw.shape) for raw in file.untouched.values() if raw.dtype in FLOATING)
    parameters = weights + untouched if provenance.parameters is None else provenance.parameters
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
    )


def dense_size(file: PackedFile) -> int:
    """Returns the size in bytes of the plain ``.safetensors`` file that would hold the same tensors dense."""
    entries: dict[str, SiteEntry | RawEntry] = {**file.sites, **file.untouched}
    tensors = []
    for name, (entry, place) in file.slices.items():  # a stack holds tensors that have a header of their own there
        held = entries[entry]
        tensors.append((name, held.dtype, held.shape if place is None else held.shape[1:]))
    header, offset = {}, 0
    for name, dtype, shape in sorted(tensors, key=lambda t: (-DTYPE_ORDER.index(t[1]), t[0])):
        end = offset + math.prod(shape) * ITEM_SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // 8) * 8 + offset
