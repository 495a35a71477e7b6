"""The ONNX program of a packed model: what PyTorch's exporter writes, with lookups in place of the shared tensors."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from compressor.deployment.packed_model import PackedModel
from compressor.formats.dtypes import ITEM_SIZES, from_storage
from compressor.formats.errors import UnsupportedError
from compressor.formats.file.reader import PackedFile
from compressor.targets.onnx_lookup import Lookup, index_bytes

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["add_tensors", "onnx_program"]

_NODE = 128  # bytes that a node takes with its names
_LARGEST = 1 << 32  # whole numbers below it take fewer bytes than eight
_OVERHEAD = 4 * _NODE  # bytes that a lookup takes besides its values


def onnx_program(model: PackedModel, lookup: Lookup) -> ModelProto:
    """Returns the program of a model, for batches of any size, whose tensors a lookup computes as far as it can.

    Raises:
        UnsupportedError: PyTorch's exporter gives none.
    """
    computed = {name for node in lookup.nodes for name in node.output}
    exported = _slimmed(_exported(model, lookup.opset), computed)
    if computed:
        _narrow(lookup, exported)
    _insert(lookup, exported)
    return exported


def _exported(model: PackedModel, opset: int) -> ModelProto:
    """Returns the dense model as PyTorch's exporter writes it, with all tensors under their names."""
    import torch
    from onnx import helper

    program = torch.onnx.export(
        model.dense, (model.inputs(2),), dynamo=True, optimize=False, verbose=False, opset_version=opset,
        input_names=["images"], output_names=["logits"], dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )  # fmt: skip
    if program is None:
        raise UnsupportedError(f"{model.path}: PyTorch's exporter gave no ONNX program for this model")
    exported: ModelProto = program.model_proto
    exported.ir_version = helper.find_min_ir_version_for(exported.opset_import)
    return exported


def _slimmed(exported: ModelProto, names: set[str]) -> ModelProto:
    """Returns a model without what it says of the source code, and without the constants that are named.

    Small constants are folded. Large ones are not: a table that is looked up once would become all that it gives.
    """
    from onnx import TensorProto, helper
    from onnxscript import optimizer

    graph, kept = exported.graph, {}
    for tensor in [tensor for tensor in graph.initializer if tensor.name in names or tensor.ByteSize() > _OVERHEAD]:
        kept[tensor.name] = TensorProto.FromString(tensor.SerializeToString())
        graph.initializer.remove(tensor)
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    exported = optimizer.optimize(exported)  # which does not know what comes from outside
    graph = exported.graph
    for value in [value for value in graph.input if value.name in kept]:
        graph.input.remove(value)
    used = {name for node in graph.node for name in node.input}
    graph.initializer.extend(tensor for name, tensor in kept.items() if name in used - names)
    del graph.value_info[:], graph.metadata_props[:], exported.metadata_props[:]
    for each in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        each.doc_string = ""
        del each.metadata_props[:]
    return exported


def add_tensors(lookup: Lookup, file: PackedFile) -> Lookup:
    """Adds to a lookup what computes the tensors of a file that are smaller so than as floats, and returns it."""
    computed: dict[str, str] = {}
    users = Counter(site.book for site in file.sites.values())
    for number, (name, site) in enumerate(file.sites.items()):
        book = file.book(site.book)
        size = index_bytes(site.count, site.codewords) + 4 * math.prod(book.shape) // users[site.book]
        if size + _OVERHEAD < math.prod(site.shape) * ITEM_SIZES[site.dtype]:
            computed[name] = name if name in file.slices else f"packed/stack.{number}"
            lookup.shared(computed[name], file.shared(name), book, site.book)
    for name, (holder, place) in file.slices.items():
        if place is not None and holder in computed:
            lookup.slice(name, computed[holder], place)
    for name, raw in file.untouched.items():
        if raw.value is not None and raw.dtype == "F32" and 4 * math.prod(raw.shape) > _NODE:
            lookup.constant(name, raw.value, raw.shape)
        elif raw.value is None and math.prod(raw.shape) * (ITEM_SIZES[raw.dtype] - ITEM_SIZES[raw.stored]) > _NODE:
            values = from_storage(file.raw(name).data, raw.dtype).reshape(raw.shape)
            lookup.stored(name, values, raw.stored, raw.dtype)
    for alias, name in file.aliases.items():
        lookup.alias(alias, name)
    return lookup


def _narrow(lookup: Lookup, exported: ModelProto) -> None:
    """Moves large constants that a model computes into a lookup: relative positions, and masks of two values."""
    from onnx import TensorProto, numpy_helper

    constants = exported.graph.initializer
    for tensor in [tensor for tensor in constants if tensor.ByteSize() > _OVERHEAD]:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.INT64 and values.min() >= 0 and values.max() < _LARGEST:
            lookup.integers(tensor.name, values)
        elif tensor.data_type != TensorProto.FLOAT or not lookup.two_values(tensor.name, values):
            continue
        constants.remove(tensor)


def _insert(lookup: Lookup, exported: ModelProto) -> None:
    """Puts the nodes and constants of a lookup that a model needs before its own."""
    graph = exported.graph
    needed = {name for node in graph.node for name in node.input}
    needed -= {tensor.name for tensor in graph.initializer}
    kept = []
    for node in reversed(lookup.nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    own = list(graph.node)
    del graph.node[:]
    graph.node.extend([*reversed(kept), *own])
    graph.initializer.extend(tensor for name, tensor in lookup.constants.items() if name in needed)
