"""An ONNX file whose shared tensors stay tables and small integers."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from compressor.deployment.packed_model import PackedModel
from compressor.deployment.registry import register
from compressor.deployment.target import Target
from compressor.formats.dtypes import ITEM_SIZES, from_storage
from compressor.formats.errors import UnsupportedError, UsageError
from compressor.formats.file.reader import PackedFile
from compressor.targets.onnx_lookup import HIGHEST, OPSET, Lookup, index_bytes

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Onnx"]

_NODE = 128  # bytes that a node takes with its names
_LARGEST = 1 << 32  # whole numbers below it take fewer bytes than eight
_OVERHEAD = 4 * _NODE  # bytes that a lookup takes besides its values


@register
@dataclass(frozen=True)
class Onnx(Target):
    """An ONNX file whose shared weights stay indices and tables, for ONNX Runtime and what reads its files.

    Args:
        dense: writes all weights as floats, for a runtime that is to find nothing but what PyTorch's exporter writes.
        opset: the highest that the runtime knows, 18 to 25; types that are newer are made up for by arithmetic.
    """

    id: ClassVar[str] = "onnx"
    suffix: ClassVar[str] = ".onnx"
    packages: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript", "onnxruntime")
    install: ClassVar[str] = "timm-compressor[onnx]"
    limits: ClassVar[str] = (
        "a smaller file, not a faster one: ONNX Runtime expands the weights when it loads them; indices take whole "
        "bits, and those that a codec generates are written out; images have one size"
    )

    dense: bool = False
    opset: int = HIGHEST

    def __post_init__(self) -> None:
        if not isinstance(self.opset, int) or not OPSET <= self.opset <= HIGHEST:
            raise UsageError(f"target 'onnx': opset {self.opset!r}, expected {OPSET} to {HIGHEST}")

    def build(self, model: PackedModel) -> bytes:
        """Returns the file, for batches of any size."""
        lookup = Lookup() if self.dense else _lookup(model.file, self.opset)
        computed = {name for node in lookup.nodes for name in node.output}
        exported = _slimmed(_exported(model, lookup.opset), computed)
        if not self.dense:
            _narrow(lookup, exported)
        _insert(lookup, exported)
        data: bytes = exported.SerializeToString(deterministic=True)
        return data

    def difference(self, written: Path, model: PackedModel) -> float:
        """Returns the difference of ONNX Runtime's logits."""
        import onnxruntime
        import torch

        images, _ = model.compared
        session = onnxruntime.InferenceSession(written.read_bytes(), providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        return model.difference(torch.from_numpy(logits))

    def usage(self, path: Path, packed: Path) -> str:
        """Returns the line of Python that gives the logits."""
        del packed
        return f'onnxruntime.InferenceSession({str(path)!r}).run(None, {{"images": images}})'


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
    """Returns a model without what it says of the source code, with constants folded but for those that are named."""
    from onnx import helper
    from onnxscript import optimizer

    graph = exported.graph
    kept = {tensor.name: tensor for tensor in graph.initializer if tensor.name in names}
    for tensor in kept.values():  # what comes from outside is not folded
        graph.initializer.remove(tensor)
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    exported = optimizer.optimize(exported)
    graph = exported.graph
    for value in [value for value in graph.input if value.name in kept]:
        graph.input.remove(value)
    del graph.value_info[:], graph.metadata_props[:], exported.metadata_props[:]
    for each in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        each.doc_string = ""
        del each.metadata_props[:]
    return exported


def _lookup(file: PackedFile, highest: int) -> Lookup:
    """Returns what computes the tensors of a file that are smaller so than as floats."""
    lookup, computed = Lookup(highest), {}
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
    """Moves large constants of whole numbers, such as indices of relative positions, into a lookup."""
    from onnx import TensorProto, numpy_helper

    constants = exported.graph.initializer
    for tensor in [tensor for tensor in constants if tensor.data_type == TensorProto.INT64]:
        values = numpy_helper.to_array(tensor)
        if values.nbytes > _OVERHEAD and values.min() >= 0 and values.max() < _LARGEST:
            lookup.integers(tensor.name, values)
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
