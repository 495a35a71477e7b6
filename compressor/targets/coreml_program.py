"""Core ML programs by coremltools: a traced model whose constants become palettes, and palettes read back."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from compressor.targets.coreml_palette import Palette

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["convert", "read_palettes"]

_MODEL, _WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights"
_DATE = "com.github.apple.coremltools.conversion_date"

Key = tuple[tuple[int, ...], bytes]
"""Shape and bytes of a tensor."""


def convert(model: nn.Module, image: Tensor, palettes: Mapping[str, Palette], half: bool) -> dict[str, bytes]:
    """Returns the files of an ``.mlpackage``, by their paths in it.

    Args:
        model: the dense model, float32; it is not changed.
        image: a batch of one.
        palettes: what is stored in place of tensors of ``model``, by their names in its state dict.
        half: whether constants are rounded to float16, and it computes with these.
    """
    state = model.state_dict()
    by_value = {_key(state[name].numpy()): found for name, found in palettes.items()}
    with _quiet():
        import coremltools

        pipeline = coremltools.PassPipeline()
        pipeline.insert_pass(0, _pass())  # before constants are folded into one another
        pipeline.set_options(_pass(), {"palettes": by_value})
        converted = coremltools.convert(
            _traced(model, image, {name for name, tensor in state.items() if _key(tensor.numpy()) in by_value}),
            inputs=[coremltools.TensorType(name="images", shape=tuple(image.shape))],
            outputs=[coremltools.TensorType(name="logits")],
            minimum_deployment_target=coremltools.target.iOS18,
            compute_precision=coremltools.precision.FLOAT16 if half else coremltools.precision.FLOAT32,
            pass_pipeline=pipeline,
            skip_model_load=True,
        )
        del converted.user_defined_metadata[_DATE]
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder, "net.mlpackage")
            converted.save(str(package))
            files = [path for path in package.rglob("*") if path.is_file()]
            return _same_again({path.relative_to(package).as_posix(): path.read_bytes() for path in files})


def read_palettes(package: Path) -> list[Palette]:
    """Returns all palettes of an ``.mlpackage``, their tables as float32."""
    with _quiet():
        import coremltools
        from coremltools.converters.mil.frontend.milproto.load import load

        spec = coremltools.utils.load_spec(str(package / _MODEL))
        program = load(spec, spec.specificationVersion, str(package / _WEIGHTS))
    found = []
    for function in program.functions.values():
        for op in function.find_ops(op_type="constexpr_lut_to_dense"):
            axis = 0 if op.vector_axis is None else int(op.vector_axis.val)
            found.append(Palette(op.indices.val, op.lut.val.astype(np.float32), axis))
        for op in function.find_ops(op_type="constexpr_lut_to_sparse"):
            mask = op.indices_mask.val.astype(bool)
            found.append(Palette(op.indices_nonzero_data.val, op.lut.val.astype(np.float32), mask=mask))
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what coremltools says of versions, of what is missing off a Mac, and of its progress to itself."""
    logger = logging.getLogger("coremltools")
    was, logger.disabled = logger.disabled, True
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was


def _key(values: Any) -> Key:
    return values.shape, values.tobytes()


def _traced(model: nn.Module, image: Tensor, shared: set[str]) -> Any:
    """Returns a traced program in which sizes are numbers, and what depends on no input has been computed.

    coremltools fails with sizes that are computed, and with operators that a model uses only before the first image.
    """
    import torch

    module: Any = torch.export.export(model, (image,)).module()
    constants: dict[torch.fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr" and node.target not in shared:
            constants[node] = functools.reduce(getattr, node.target.split("."), module)
        elif node.op == "call_function" and all(each in constants for each in node.all_input_nodes):
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), constants.__getitem__)
            constants[node] = node.target(*arguments[0], **arguments[1])
    for number, (node, value) in enumerate(constants.items()):
        if node.op == "call_function" and isinstance(value, torch.Tensor) and not node.users.keys() <= constants.keys():
            module.register_buffer(f"folded_{number}", value)
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(module.graph.get_attr(f"folded_{number}"))
    module.graph.eliminate_dead_code()
    module.recompile()
    return torch.jit.trace(module, image, check_trace=False)


@functools.cache
def _pass() -> str:
    """Registers the pass that puts palettes in place of constants, and returns its name."""
    from coremltools.converters.mil.mil.passes.graph_pass import AbstractGraphPass
    from coremltools.converters.mil.mil.passes.pass_registry import register_pass

    @register_pass(namespace="timm_compressor")
    class store_palettes(AbstractGraphPass):  # type: ignore[misc] # noqa: N801
        palettes: Mapping[Key, Palette] = {}

        def apply(self, program: Any) -> None:
            for function in program.functions.values():
                for op in list(function.find_ops(op_type="const")):
                    values = op.outputs[0].val
                    palette = self.palettes.get(_key(values)) if isinstance(values, np.ndarray) else None
                    if palette is not None:
                        with function:
                            _replace(function, op, palette)

    return "timm_compressor::store_palettes"


def _replace(function: Any, const: Any, palette: Palette) -> None:
    """Puts a palette in place of a constant."""
    from coremltools.converters.mil import Builder

    place = {"before_op": const, "name": const.name}
    indices = palette.indices.astype(_integers(palette.bits))
    if palette.mask is not None:
        mask = palette.mask.astype(_integers(1))
        kept = Builder.constexpr_lut_to_sparse(
            indices_mask=mask, indices_nonzero_data=indices, lut=palette.table, before_op=const
        )
        weights = Builder.constexpr_sparse_to_dense(mask=kept[0], nonzero_data=kept[1], **place)
    else:
        axis = {"vector_axis": palette.vector_axis} if palette.table.shape[-1] > 1 else {}
        weights = Builder.constexpr_lut_to_dense(indices=indices, lut=palette.table, **axis, **place)
    function.replace_uses_of_var_after_op(anchor_op=const, old_var=const.outputs[0], new_var=weights)
    function.remove_ops([const])


def _integers(bits: int) -> Any:
    """Returns coremltools' dtype of integers of so many bits."""
    from coremltools.converters.mil.mil import types

    return types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}"))


def _same_again(files: dict[str, bytes]) -> dict[str, bytes]:
    """Returns the files of a package with nothing random in them: names by content, and maps in order."""
    import coremltools

    spec = coremltools.proto.Model_pb2.Model.FromString(files[_MODEL])
    manifest = files["Manifest.json"].decode()
    for name, entry in json.loads(manifest)["itemInfoEntries"].items():
        manifest = manifest.replace(name, str(uuid.uuid5(uuid.NAMESPACE_URL, entry["path"])))
    ordered = json.dumps(json.loads(manifest), indent=2, sort_keys=True).encode()
    return {**files, _MODEL: spec.SerializeToString(deterministic=True), "Manifest.json": ordered}
