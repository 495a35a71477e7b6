"""Tensors of a packed file as nodes of an ONNX graph: small integers, a table, and what looks them up."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from compressor.formats.codecs.bitpacking import pack_bits
from compressor.formats.content import Codebook, Grid, SharedTensor, Table, index_dtype, index_shape
from compressor.formats.dtypes import to_storage

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

__all__ = ["HIGHEST", "OPSET", "Lookup", "index_bytes"]

OPSET = 18
"""The opset that is enough for all but integers of fewer than eight bits."""

HIGHEST = 25
"""The opset that has all of them."""

_SMALL = {2: ("UINT2", 25), 4: ("UINT4", 21)}
"""ONNX's types of fewer than eight bits, and the opset that has them."""

_KINDS = {"F32": "FLOAT", "F16": "FLOAT16", "BF16": "BFLOAT16"}
"""ONNX's names of the float dtypes."""

_LARGEST_TABLE = 256  # codewords of a grid that are stored; those of a larger one are computed


def index_bytes(count: int, codewords: int) -> int:
    """Returns the bytes that the indices of a tensor take.

    >>> index_bytes(1000, 16), index_bytes(1000, 5), index_bytes(1000, 300)
    (500, 375, 2000)
    """
    width = max(1, (codewords - 1).bit_length())
    return -(-count // 8) * width if width <= 8 else count * np.dtype(index_dtype(codewords)).itemsize


class Lookup:
    """Nodes and constants that compute tensors of a packed file.

    Args:
        highest: the highest opset that may be used; types that are newer are made up for by arithmetic.
        arithmetic: whether indices may be computed from packed ones; if not, they take four or eight bits.

    Attributes:
        nodes: the nodes, in an order in which they can run.
        constants: what they read.
        opset: the least opset that has all their operators and types.
    """

    def __init__(self, highest: int = HIGHEST, arithmetic: bool = True) -> None:
        self._highest, self._arithmetic = highest, arithmetic
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.opset = OPSET
        self._tables: dict[int, str] = {}

    def shared(self, name: str, site: SharedTensor, book: Codebook, number: int) -> None:
        """Adds what computes a shared tensor, as ``content.decode`` does.

        Args:
            name: of the result.
            site: the tensor.
            book: its codebook.
            number: of the codebook, whose table is stored once for all sites that use it.
        """
        scope = f"{name}/packed"
        if isinstance(book, Grid) and book.count > _LARGEST_TABLE:
            weights = self._evenly_spaced(scope, site, book)
        else:
            weights = self._from_table(scope, site, book, number)
        for operator, values in (("Mul", site.scale), ("Add", site.offset)):
            if values is not None:
                weights = self._op(operator, weights, self._per_entry(f"{scope}/{operator}", values, site))
        if site.dtype != "F32":
            self._cast(weights, site.dtype)
        self.nodes[-1].output[0] = name

    def stored(self, name: str, values: NDArray[np.float32], stored: str, dtype: str) -> None:
        """Adds an untouched tensor that is stored in another float dtype than its own."""
        self._cast(self._raw(f"{name}/stored", _KINDS[stored], values.shape, to_storage(values, stored)), dtype)
        self.nodes[-1].output[0] = name

    def constant(self, name: str, value: float, shape: Sequence[int]) -> None:
        """Adds a float32 tensor all of whose entries are the same."""
        one = self._constant(f"{name}/value", np.float32(value))
        self._op("Expand", one, self._shape(shape), output=name)

    def integers(self, name: str, values: NDArray[np.int64]) -> None:
        """Adds whole numbers, from 0 on, as the smallest type that has them; equal ones are stored once."""
        narrow = values.astype(index_dtype(int(values.max()) + 1))
        digest = hashlib.sha256(narrow.tobytes()).hexdigest()[:16]
        shape = "x".join(map(str, values.shape))
        self._op("Cast", self._constant(f"packed/integers.{shape}.{digest}", narrow), output=name, to="INT64")

    def two_values(self, name: str, values: NDArray[np.float32]) -> bool:
        """Adds a tensor of at most two values, in a bit an entry; returns False, and adds none, for another."""
        found, indices = np.unique(values.reshape(-1).view(np.uint32), return_inverse=True)
        if len(found) > 2 or not self._arithmetic:
            return False
        table = Table(found.view(np.float32).reshape(1, -1, 1))
        self.shared(name, SharedTensor(values.shape, 0, indices.astype(np.uint8)), table, -1 - len(self._tables))
        return True

    def alias(self, name: str, tied: str) -> None:
        """Adds another name of a tensor."""
        self._op("Identity", tied, output=name)

    def slice(self, name: str, stack: str, place: int) -> None:
        """Adds a tensor that is a slice of another along axis 0."""
        self._op("Gather", stack, self._constant(f"{name}/place", np.int64(place)), output=name, axis=0)

    # -- shared tensors

    def _from_table(self, scope: str, site: SharedTensor, book: Codebook, number: int) -> str:
        """Returns the codewords of all indices in the shape of the tensor, float32."""
        books, codewords, length = book.shape
        axes = index_shape(site.shape, length, site.vector_axis)
        indices = self._indices(scope, site.indices, codewords, axes)
        if books > 1:
            starts = self._per_entry(f"{scope}/book", np.arange(books, dtype=np.int64) * codewords, site)
            if length > 1:  # all entries of a row of vectors are in one group, along another axis than theirs
                order = [*(axis for axis in range(len(site.shape)) if axis != site.vector_axis), site.vector_axis]
                starts = self._op("Transpose", starts, perm=order)
            indices = self._op("Add", indices, starts)
        table = self._table(number, book)
        if length == 1:
            return self._op("Gather", table, indices, axis=0)
        rows = self._op("Gather", table, indices, axis=0)  # [..., vectors, length]
        rows = self._reshape(rows, (*axes[:-1], axes[-1] * length))
        if axes[-1] * length > site.shape[site.vector_axis]:
            rows = self._head(rows, site.shape[site.vector_axis], axis=len(axes) - 1)
        order = list(range(len(axes) - 1))
        order.insert(site.vector_axis, len(axes) - 1)
        return self._op("Transpose", rows, perm=order)

    def _evenly_spaced(self, scope: str, site: SharedTensor, grid: Grid) -> str:
        """Returns ``start + index * step``, computed in float64 and rounded once, as the file says."""
        indices = self._op("Cast", self._indices(scope, site.indices, grid.count, site.shape), to="DOUBLE")
        product = self._op("Mul", indices, self._constant(f"{scope}/step", np.float64(grid.step)))
        total = self._op("Add", product, self._constant(f"{scope}/start", np.float64(grid.start)))
        return self._cast(total, "F32")

    def _table(self, number: int, book: Codebook) -> str:
        """Returns the table of a codebook, float32[B * K] or float32[B * K, d]; each is stored once."""
        if number not in self._tables:
            books, codewords, length = book.shape
            values = book.expand().reshape((books * codewords, length) if length > 1 else -1)
            dtype = book.dtype if isinstance(book, Table) else "F32"
            self._tables[number] = self._floats(f"packed/codebook.{number}", values, dtype)
        return self._tables[number]

    def _indices(self, scope: str, indices: NDArray[Any], codewords: int, shape: Sequence[int]) -> str:
        """Returns indices in a shape, int64: integers of ONNX's smallest type, or packed in bytes."""
        width = max(1, (codewords - 1).bit_length())
        if not self._arithmetic and width < 8:
            width = 4 if width <= 4 else 8
        kind, opset = _SMALL.get(width, ("", 0))
        if kind and opset <= self._highest:
            self.opset = max(self.opset, opset)
            stored = self._raw(f"{scope}/indices", kind, shape, pack_bits(indices, width))
        elif width >= 8:
            stored = self._constant(f"{scope}/indices", indices.reshape(shape))
        else:
            return self._unpacked(scope, indices, width, shape)
        return self._op("Cast", stored, to="INT64")

    def _unpacked(self, scope: str, indices: NDArray[Any], width: int, shape: Sequence[int]) -> str:
        """Returns indices of a width that no type has: eight of them are the digits of a number of that many bytes."""
        groups = -(-len(indices) // 8)
        data = pack_bits(np.pad(indices, (0, groups * 8 - len(indices))), width)
        octets = self._op("Cast", self._raw(f"{scope}/indices", "UINT8", (groups, width), data), to="INT64")
        places = self._constant(f"packed/octets.{width}", np.int64(1) << 8 * np.arange(width)[:, None])
        digits = self._constant(f"packed/digits.{width}", np.int64(1) << width * np.arange(8))
        numbers = self._op("MatMul", octets, places)  # ONNX Runtime's ReduceSum of int64 rounds
        base = self._constant(f"packed/base.{width}", np.int64(1 << width))
        fields = self._reshape(self._op("Mod", self._op("Div", numbers, digits), base), (-1,))
        fields = self._head(fields, len(indices), axis=0) if groups * 8 > len(indices) else fields
        return self._reshape(fields, shape)

    def _per_entry(self, scope: str, per_group: NDArray[Any], site: SharedTensor) -> str:
        """Returns one value a group in a shape that broadcasts over the tensor; repeats them only for blocks."""
        if site.block is None:
            sizes = [-1 if axis == site.axis else 1 for axis in range(len(site.shape))]
            return self._group_values(scope, per_group, site, tuple(sizes))
        count, blocks = math.prod(site.shape), len(per_group)
        column = self._group_values(scope, per_group, site, (-1, 1))
        spread = self._op("Expand", column, self._shape((blocks, site.block)))
        flat = self._reshape(spread, (-1,))
        flat = self._head(flat, count, axis=0) if blocks * site.block > count else flat
        return self._reshape(flat, site.shape)

    def _group_values(self, scope: str, values: NDArray[Any], site: SharedTensor, shape: tuple[int, ...]) -> str:
        shaped = values.reshape(shape)
        if shaped.dtype != np.float32:
            return self._constant(scope, shaped)
        return self._floats(scope, shaped, site.scale_dtype)

    # -- nodes and constants

    def _op(self, operator: str, *inputs: str, output: str = "", **attributes: Any) -> str:
        """Adds a node, and returns the name of its output."""
        from onnx import TensorProto, helper

        if isinstance(attributes.get("to"), str):
            attributes["to"] = TensorProto.DataType.Value(attributes["to"])
        output = output or f"packed/{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], **attributes))
        return output

    def _cast(self, value: str, dtype: str) -> str:
        return self._op("Cast", value, to=_KINDS[dtype])

    def _reshape(self, value: str, shape: Sequence[int]) -> str:
        return self._op("Reshape", value, self._shape(shape))

    def _head(self, value: str, size: int, axis: int) -> str:
        """Returns the first ``size`` entries along an axis."""
        bounds = [self._constant(f"packed/number.{number}", np.array([number])) for number in (0, size, axis)]
        return self._op("Slice", value, *bounds)

    def _shape(self, shape: Sequence[int]) -> str:
        return self._constant(f"packed/shape.{'x'.join(map(str, shape))}", np.array(shape, np.int64))

    def _constant(self, name: str, values: Any) -> str:
        """Adds a constant of numpy's own dtypes, once for each name."""
        from onnx import numpy_helper

        self.constants.setdefault(name, numpy_helper.from_array(np.asarray(values), name))
        return name

    def _floats(self, name: str, values: NDArray[np.float32], dtype: str) -> str:
        """Adds a constant as the float dtype that stores it, and returns its values in float32."""
        stored = self._raw(name, _KINDS[dtype], values.shape, to_storage(values, dtype))
        return stored if dtype == "F32" else self._cast(stored, "F32")

    def _raw(self, name: str, kind: str, shape: Sequence[int], data: bytes) -> str:
        """Adds a constant by its bytes."""
        from onnx import TensorProto

        tensor = TensorProto(name=name, data_type=TensorProto.DataType.Value(kind), dims=shape, raw_data=data)
        self.constants.setdefault(name, tensor)
        return name
