"""Packed inference: layers whose weight stays packed in memory, and is expanded each time it is read.

Packed is bits for each index; or where a codec generates them the codebook alone, and then linear layers and
convolutions never have all of the weight.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from compressor.formats.codecs.base import Stream
from compressor.formats.codecs.bitpacking import pack_bits
from compressor.formats.content import SharedTensor, Table
from compressor.formats.file.reader import PackedFile
from compressor.formats.inference.generated import Generated
from compressor.formats.inference.virtual_weight import ComputedWeight, VirtualWeight

__all__ = ["PackedWeight", "install", "read_packed"]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LAYERS = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)
_WHOLE_ROWS = {4: torch.float32, 8: torch.int64, 16: torch.complex128}  # gathered as one element, three times as fast


class PackedWeight(ComputedWeight):
    """A weight as packed indices and codebook; ``forward`` expands it, bit for bit as ``record.decode`` does.

    Args:
        site: the shared tensor.
        codebook: float32[B, K, d], mirrored codewords included; sites may hold the same tensor.

    Its buffers are ``indices`` (uint8, ceil(log2 K) bits each, lowest first, zero padding to a whole number of
    groups), ``codebook``, and float32[groups] or None: ``scale``, ``offset``.

    Example:
        >>> site = SharedTensor((2, 2), book=0, indices=np.array([0, 1, 1, 0], np.uint8))
        >>> packed = PackedWeight(site, torch.tensor([-1.0, 2.0]).view(1, 2, 1))
        >>> packed(torch.empty(0)).tolist()
        [[-1.0, 2.0], [2.0, -1.0]]
    """

    indices: Tensor
    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, site: SharedTensor, codebook: Tensor) -> None:
        super().__init__()
        books, codewords, length = codebook.shape
        self.dtype = DTYPES[site.dtype]
        self.site = replace(site, indices=np.empty(0, np.uint8), scale=None, offset=None, codec=None)
        if length == 1:  # scalars lie in C order: vectors of one along the last axis
            self.site = replace(self.site, vector_axis=len(site.shape) - 1)
        self.bits = (codewords - 1).bit_length()
        # as many indices as a byte holds are looked up at once, unless each needs the book of its own group
        self.run = max(1, 8 // max(1, self.bits)) if books == 1 else 1
        self.runs = -(-len(site.indices) // self.run)
        self.register_buffer("indices", _padded(pack_bits(site.indices, self.bits), self.run * self.bits))
        self.register_buffer("codebook", codebook)
        self.register_buffer("scale", None if site.scale is None else torch.from_numpy(site.scale))
        self.register_buffer("offset", None if site.offset is None else torch.from_numpy(site.offset))

    def forward(self, like: Tensor) -> Tensor:
        """Give the weight in the dtype of ``like``, on the device of the buffers."""
        weight = self._laid_out(self._looked_up())
        if self.scale is not None:
            weight = weight * self._spread(self.scale)
        if self.offset is not None:
            weight = weight + self._spread(self.offset)
        return weight.to(self.dtype).to(like.dtype)

    @property
    def _rows(self) -> tuple[int, ...]:
        """The shape with the axis that vectors lie along last."""
        shape, axis = self.site.shape, self.site.vector_axis
        return (*shape[:axis], *shape[axis + 1 :], shape[axis])

    def _looked_up(self) -> Tensor:
        """Give the codewords of all indices, float32, with what was padded at the end."""
        fields = _unpack(self.indices, self.run * self.bits, self.runs)
        books, codewords, length = self.codebook.shape
        if books == 1:
            return _take_rows(_run_table(self.codebook[0], self.run, self.bits), fields)
        *rows, along = self._rows
        shape = (*rows, -(-along // length))
        first = self._spread(torch.arange(0, books * codewords, codewords, dtype=torch.int32, device=fields.device))
        if length > 1:  # groups lie along another axis than the vectors: any entry of a vector tells its group
            first = first.movedim(self.site.vector_axis, -1)
        return _take_rows(self.codebook.view(-1, length), (fields.view(shape) + first).view(-1))

    def _laid_out(self, values: Tensor) -> Tensor:
        """Put the codewords in the shape of the tensor."""
        length = self.codebook.shape[2]
        *rows, along = self._rows
        if length == 1:
            return values.view(-1)[: math.prod(self.site.shape)].view(self.site.shape)
        per_row = -(-along // length) * length
        kept = values.view(-1)[: math.prod(rows) * per_row].view(*rows, per_row)[..., :along]
        return kept.movedim(-1, self.site.vector_axis).contiguous()

    def _spread(self, per_group: Tensor) -> Tensor:
        """Lay one value per group over the tensor."""
        shape, axis, block = self.site.shape, self.site.axis, self.site.block
        if block is not None:
            return per_group.repeat_interleave(block)[: math.prod(shape)].view(shape)
        return per_group.view([-1 if place == axis else 1 for place in range(len(shape))])


def read_packed(file: PackedFile, model: nn.Module) -> dict[str, ComputedWeight]:
    """Read the shared tensors that ``model`` can hold packed, by all their names; tied ones are the same object.

    Those of linear, convolution, embedding and attention layers, where packed is smaller than dense.
    """
    users = Counter(entry.book for entry in file.sites.values())
    books: dict[int, Tensor] = {}
    packed: dict[str, ComputedWeight] = {}
    for name, entry in file.sites.items():
        names = [name, *(alias for alias, tied in file.aliases.items() if tied == name)]
        if all(isinstance(_owner(model, path)[0], _LAYERS) for path in names):
            weight: ComputedWeight | None = _virtual(file, name)
            if weight is None:
                if entry.book not in books:
                    books[entry.book] = torch.from_numpy(file.book(entry.book).expand())
                weight = PackedWeight(file.shared(name), books[entry.book])
            if _size(weight, users[entry.book]) < math.prod(entry.shape) * DTYPES[entry.dtype].itemsize:
                packed.update(dict.fromkeys(names, weight))
    return packed


def _virtual(file: PackedFile, name: str) -> VirtualWeight | None:
    """Give the weight of a site that consists of a codebook of scalars and nothing else; None for others."""
    site, book = file.shared(name, indices=False), file.book(file.sites[name].book)
    grouped = site.scale is not None or site.offset is not None or book.shape[::2] != (1, 1)
    if site.codec is None or grouped or not isinstance(book, Table):
        return None
    stream = Stream(name, math.prod(site.shape), book.shape[1])
    source = Generated(site.codec, stream, site.shape, DTYPES[site.dtype])
    return VirtualWeight(source, torch.from_numpy(book.values.reshape(-1)), book.mirrored)


def install(packed: Mapping[str, ComputedWeight], model: nn.Module) -> None:
    """Put packed weights in the place of the dense ones of ``model``, and freeze what else it learns."""
    model.requires_grad_(False)  # else autograd would keep the expanded weights for a backward pass
    done = set()
    for name, weight in packed.items():
        owner, attribute = _owner(model, name)
        if (owner, attribute) not in done:  # a layer may have two names
            _parametrize(weight, owner, attribute)
            done.add((owner, attribute))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _size(weight: ComputedWeight, sharers: int) -> int:
    """Count the bytes of a packed weight, with its part of the codebook."""
    own = sum(tensor.nbytes for name, tensor in weight.named_buffers() if name != "codebook")
    return own + weight.codebook.nbytes // sharers


def _parametrize(weight: ComputedWeight, owner: nn.Module, attribute: str) -> None:
    """Put an empty buffer, which follows ``.to()``, in the place of the dense tensor, and expand from there."""
    dense: Tensor = getattr(owner, attribute)
    like = torch.empty(0, dtype=weight.dtype) if dense.is_meta else dense.detach().new_empty(0)
    delattr(owner, attribute)
    owner.register_buffer(attribute, like)
    parametrize.register_parametrization(owner, attribute, weight.to(like.device), unsafe=True)


def _padded(data: bytes, width: int) -> Tensor:
    """Fill up with zeros to whole groups of eight fields, which are ``width`` bytes."""
    size = -(-len(data) // width) * width if width else 0
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return torch.from_numpy(padded)


def _unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """Give int32[count]: the ``width``-bit fields of ``packed``, lowest bit first, for widths 0 to 24.

    >>> _unpack(torch.tensor([0b10001101, 2, 0], dtype=torch.uint8), 3, 3).tolist()
    [5, 1, 2]
    """
    if width == 0:
        return torch.zeros(count, dtype=torch.int32, device=packed.device)
    if width == 8:
        return packed[:count].int()
    octets = packed.view(-1, width).int()
    fields = []
    for position in range(8):
        byte, shift = divmod(position * width, 8)
        field = octets[:, byte]
        for extra in range(1, -(-(shift + width) // 8)):
            field = field | octets[:, byte + extra] << 8 * extra
        fields.append(field >> shift & (1 << width) - 1)
    return torch.stack(fields, 1).view(-1)[:count]


def _run_table(codebook: Tensor, run: int, bits: int) -> Tensor:
    """Give float32[2 ** (run * bits), run * d]: the codewords of every combination of ``run`` indices.

    >>> _run_table(torch.tensor([[0.5], [2.0]]), 2, 1).tolist()
    [[0.5, 0.5], [2.0, 0.5], [0.5, 2.0], [2.0, 2.0]]
    """
    if run == 1:
        return codebook
    combinations = torch.arange(1 << run * bits, device=codebook.device).unsqueeze(1)
    indices = combinations >> torch.arange(0, run, device=codebook.device) * bits & (1 << bits) - 1
    return codebook[indices.clamp_(max=len(codebook) - 1)].view(len(indices), -1)


def _take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Give ``table[rows]`` as float32[n * columns], rows of few columns moved as one element each."""
    whole = _WHOLE_ROWS.get(4 * table.shape[1])
    if whole is None:
        return table.index_select(0, rows).view(-1)
    return table.view(whole).view(-1).index_select(0, rows).view(torch.float32)
