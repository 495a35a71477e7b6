"""Packed inference: layers whose weight stays packed in memory and is expanded each time it is read.

A packed weight is a codebook and a few bits for each index. Where a codec generates the indices it is the codebook
alone; then linear layers and convolutions never expand the whole weight.
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
from compressor.formats.dtypes import ITEM_SIZES
from compressor.formats.file.reader import PackedFile
from compressor.formats.inference.generated import Generated
from compressor.formats.inference.virtual_weight import ComputedWeight, VirtualWeight
from compressor.formats.torch_tensors import TORCH_DTYPES

__all__ = ["PackedWeight", "install", "read_packed"]

_LAYERS = (nn.Linear, _ConvNd, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)
_ROW_DTYPES = {4: torch.float32, 8: torch.int64, 16: torch.complex128}  # by bytes: see _take_rows


class PackedWeight(ComputedWeight):
    """A weight as packed indices and codebook, which ``forward`` expands bit for bit as ``content.decode`` does.

    Args:
        site: the shared tensor.
        codebook: float32[B, K, d], mirrored codewords included; several sites may use the same tensor.

    Attributes:
        indices: uint8 buffer, ceil(log2 K) bits an index, lowest first, padded with zeros.
        codebook: float32[B, K, d] buffer.
        scale: float32[groups] buffer, or None.
        offset: float32[groups] buffer, or None.
        bits: the bits of an index.
        indices_per_lookup: the number of indices that one lookup in a table of their combinations expands.
        lookups: the number of such lookups for the whole weight.

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
        self.dtype = TORCH_DTYPES[site.dtype]
        self.site = replace(site, indices=np.empty(0, np.uint8), scale=None, offset=None, codec=None)
        if length == 1:  # scalars are in C order, as vectors of length 1 along the last axis are
            self.site = replace(self.site, vector_axis=len(site.shape) - 1)
        self.bits = (codewords - 1).bit_length()
        # All indices of a byte are looked up at once, unless each needs the book of its group.
        self.indices_per_lookup = max(1, 8 // max(1, self.bits)) if books == 1 else 1
        self.lookups = -(-len(site.indices) // self.indices_per_lookup)
        packed = _padded(pack_bits(site.indices, self.bits), self.indices_per_lookup * self.bits)
        self.register_buffer("indices", packed)
        self.register_buffer("codebook", codebook)
        self.register_buffer("scale", None if site.scale is None else torch.from_numpy(site.scale))
        self.register_buffer("offset", None if site.offset is None else torch.from_numpy(site.offset))

    def forward(self, like: Tensor) -> Tensor:
        """Returns the weight in the dtype of ``like``, on the device of the buffers."""
        weight = self._reshape(self._look_up())
        if self.scale is not None:
            weight = weight * self._per_entry(self.scale)
        if self.offset is not None:
            weight = weight + self._per_entry(self.offset)
        return weight.to(self.dtype).to(like.dtype)

    @property
    def _moved_shape(self) -> tuple[int, ...]:
        """The shape of the tensor with the axis that vectors lie along last."""
        shape, axis = self.site.shape, self.site.vector_axis
        return (*shape[:axis], *shape[axis + 1 :], shape[axis])

    def _look_up(self) -> Tensor:
        """Returns the codewords of all indices, float32[n * d], followed by those of the padding."""
        fields = _unpack(self.indices, self.indices_per_lookup * self.bits, self.lookups)
        books, codewords, length = self.codebook.shape
        if books == 1:
            return _take_rows(_lookup_table(self.codebook[0], self.indices_per_lookup, self.bits), fields)
        *rows, row_size = self._moved_shape
        shape = (*rows, -(-row_size // length))
        starts = torch.arange(0, books * codewords, codewords, dtype=torch.int32, device=fields.device)
        start = self._per_entry(starts)
        if length > 1:  # all entries of a row are in one group, so that the last axis broadcasts
            start = start.movedim(self.site.vector_axis, -1)
        return _take_rows(self.codebook.view(-1, length), (fields.view(shape) + start).view(-1))

    def _reshape(self, values: Tensor) -> Tensor:
        """Returns looked-up codewords in the shape of the tensor, without padding."""
        length = self.codebook.shape[2]
        *rows, row_size = self._moved_shape
        if length == 1:
            return values.view(-1)[: math.prod(self.site.shape)].view(self.site.shape)
        padded_size = -(-row_size // length) * length
        entries = values.view(-1)[: math.prod(rows) * padded_size].view(*rows, padded_size)[..., :row_size]
        return entries.movedim(-1, self.site.vector_axis).contiguous()

    def _per_entry(self, per_group: Tensor) -> Tensor:
        """Returns one value per group in a shape that broadcasts over the tensor; repeats them only for blocks."""
        shape, axis, block = self.site.shape, self.site.axis, self.site.block
        if block is not None:
            return per_group.repeat_interleave(block)[: math.prod(shape)].view(shape)
        return per_group.view([-1 if position == axis else 1 for position in range(len(shape))])


def read_packed(file: PackedFile, model: nn.Module, virtual: bool = True) -> dict[str, ComputedWeight]:
    """Returns the packed weights of the shared tensors that a model can hold packed.

    These are the tensors of linear, convolution, embedding and attention layers that are smaller packed than dense.

    Args:
        file: the packed file.
        model: a model with the tensors of the file.
        virtual: whether indices that a codec generates are generated while the model computes; if not, they are kept
            packed as others are.

    Returns:
        A weight for each name, aliases included; the names of tied tensors have the same object.
    """
    users = Counter(entry.book for entry in file.sites.values())
    books: dict[int, Tensor] = {}
    packed: dict[str, ComputedWeight] = {}
    for name, entry in file.sites.items():
        if name not in file.slices:
            continue  # a stack of small tensors
        names = [name, *(alias for alias, tied in file.aliases.items() if tied == name)]
        if all(isinstance(_owner(model, path)[0], _LAYERS) for path in names):
            weight: ComputedWeight | None = _virtual(file, name) if virtual else None
            if weight is None:
                if entry.book not in books:
                    books[entry.book] = torch.from_numpy(file.book(entry.book).expand())
                weight = PackedWeight(file.shared(name), books[entry.book])
            if _size(weight, users[entry.book]) < math.prod(entry.shape) * ITEM_SIZES[entry.dtype]:
                packed.update(dict.fromkeys(names, weight))
    return packed


def _virtual(file: PackedFile, name: str) -> VirtualWeight | None:
    """Returns the virtual weight of a site that is one table of scalars and generated indices; None for others."""
    site, book = file.shared(name, indices=False), file.book(file.sites[name].book)
    grouped = site.scale is not None or site.offset is not None or book.shape[::2] != (1, 1)
    if site.codec is None or grouped or not isinstance(book, Table):
        return None
    stream = Stream(name, math.prod(site.shape), book.shape[1])
    source = Generated(site.codec, stream, site.shape, TORCH_DTYPES[site.dtype])
    return VirtualWeight(source, torch.from_numpy(book.values.reshape(-1)), book.mirrored)


def install(packed: Mapping[str, ComputedWeight], model: nn.Module) -> None:
    """Replaces dense weights of a model by packed ones, and freezes all other parameters.

    Args:
        packed: a weight for each name, as ``read_packed`` returns them.
        model: the model, which is changed.
    """
    model.requires_grad_(False)  # otherwise autograd keeps the expanded weights for a backward pass
    replaced = set()
    for name, weight in packed.items():
        owner, attribute = _owner(model, name)
        if (owner, attribute) not in replaced:  # one layer may have two names
            _parametrize(weight, owner, attribute)
            replaced.add((owner, attribute))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Returns the module that has a tensor, and the name of the attribute."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _size(weight: ComputedWeight, sharers: int) -> int:
    """Returns the bytes of a packed weight, with its share of a codebook that ``sharers`` sites use."""
    size = sum(tensor.nbytes for name, tensor in weight.named_buffers() if name != "codebook")
    return size + weight.codebook.nbytes // sharers


def _parametrize(weight: ComputedWeight, owner: nn.Module, attribute: str) -> None:
    """Replaces a dense tensor by an empty buffer, which follows ``.to()``, and parametrises it by the packed weight."""
    dense: Tensor = getattr(owner, attribute)
    like = torch.empty(0, dtype=weight.dtype) if dense.is_meta else dense.detach().new_empty(0)
    delattr(owner, attribute)
    owner.register_buffer(attribute, like)
    parametrize.register_parametrization(owner, attribute, weight.to(like.device), unsafe=True)


def _padded(data: bytes, width: int) -> Tensor:
    """Returns bytes as uint8, padded with zeros to whole groups of eight fields, which take ``width`` bytes."""
    size = -(-len(data) // width) * width if width else 0
    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return torch.from_numpy(padded)


def _unpack(packed: Tensor, width: int, count: int) -> Tensor:
    """Returns int32[count], the ``width``-bit fields of uint8 ``packed``, lowest bit first, for widths 0 to 24.

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


def _lookup_table(codebook: Tensor, count: int, bits: int) -> Tensor:
    """Returns float32[2 ** (count * bits), count * d], the codewords of each combination of ``count`` indices.

    >>> _lookup_table(torch.tensor([[0.5], [2.0]]), 2, 1).tolist()
    [[0.5, 0.5], [2.0, 0.5], [0.5, 2.0], [2.0, 2.0]]
    """
    if count == 1:
        return codebook
    combinations = torch.arange(1 << count * bits, device=codebook.device).unsqueeze(1)
    indices = combinations >> torch.arange(0, count, device=codebook.device) * bits & (1 << bits) - 1
    return codebook[indices.clamp_(max=len(codebook) - 1)].view(len(indices), -1)


def _take_rows(table: Tensor, rows: Tensor) -> Tensor:
    """Returns ``table[rows]`` as float32[n * columns]; a row of 4, 8 or 16 bytes is moved as one element.

    PyTorch moves elements three times as fast as rows.
    """
    row_dtype = _ROW_DTYPES.get(4 * table.shape[1])
    if row_dtype is None:
        return table.index_select(0, rows).view(-1)
    return table.view(row_dtype).view(-1).index_select(0, rows).view(torch.float32)
