"""The nodes of a lookup compute what the file's own decoder does, bit for bit, for every kind of shared tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from compressor.formats.content import Codebook, Grid, SharedTensor, Table, decode, index_shape
from compressor.targets.onnx_lookup import OPSET, Lookup, index_bytes
from tests.formats.test_content import RECORDS, indices, normal

onnx = pytest.importorskip("onnx", reason="needs the extra [onnx]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the extra [onnx]")


def run(lookup: Lookup, *names: str) -> list[NDArray[Any]]:
    """Computes float tensors by ONNX Runtime; those of BF16 as float32."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    casts = [helper.make_node("Cast", [name], [f"{name}!"], to=kind) for name in names]
    outputs = [helper.make_tensor_value_info(f"{name}!", kind, None) for name in names]
    constants = list(lookup.constants.values())
    graph = helper.make_graph([*lookup.nodes, *casts], "lookup", [], outputs, constants)
    opsets = [helper.make_opsetid("", lookup.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(None, {})
    return found


def expected(site: SharedTensor, book: Codebook) -> NDArray[np.float32]:
    weights = decode(site, book)
    if site.dtype == "BF16":
        return (weights.astype(np.uint32) << 16).view(np.float32)
    return weights.astype(np.float32)


@pytest.mark.parametrize("record", RECORDS)
def test_a_lookup_gives_what_the_file_decodes_to(record: str) -> None:
    content, lookup = RECORDS[record](), Lookup()
    for name, site in content.sites.items():
        lookup.shared(name, site, content.books[site.book], site.book)
    for (name, site), found in zip(content.sites.items(), run(lookup, *content.sites), strict=True):
        np.testing.assert_array_equal(found, expected(site, content.books[site.book]), name)


@pytest.mark.parametrize("codewords", [1, 2, 3, 4, 7, 16, 17, 64, 65, 256, 257])
@pytest.mark.parametrize("count", [7, 64])
def test_indices_of_any_width_take_as_many_bytes_as_foretold(codewords: int, count: int) -> None:
    site, book, lookup = SharedTensor((count,), 0, indices(count, codewords)), Table.of(normal(codewords)), Lookup()
    lookup.shared("w", site, book, 0)
    np.testing.assert_array_equal(run(lookup, "w")[0], expected(site, book))
    stored = len(lookup.constants["w/packed/indices"].raw_data)
    assert 0 <= index_bytes(count, codewords) - stored <= 4  # eighths of a last byte are rounded up
    assert lookup.opset == {3: 25, 4: 25, 16: 21}.get(codewords, OPSET)


@pytest.mark.parametrize(("highest", "kinds"), [(18, [2, 2]), (21, [2, 21]), (25, [25, 21])])
def test_types_beyond_the_highest_opset_are_not_used(highest: int, kinds: list[int]) -> None:
    """2 is UINT8, 21 UINT4 and 25 UINT2; the bytes of the constants are the same."""
    lookup, sites = Lookup(highest), {}
    for name, codewords in (("two", 4), ("four", 16)):
        sites[name] = SharedTensor((64,), codewords, indices(64, codewords)), Table.of(normal(codewords))
        lookup.shared(name, *sites[name], codewords)
    for found, (site, book) in zip(run(lookup, *sites), sites.values(), strict=True):
        np.testing.assert_array_equal(found, expected(site, book))
    stored = [lookup.constants[f"{name}/packed/indices"] for name in sites]
    assert [tensor.data_type for tensor in stored] == kinds
    assert [len(tensor.raw_data) for tensor in stored] == [16, 32]
    assert lookup.opset == highest


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("axis", [0, 2])
def test_vectors_with_books_scales_and_offsets_by_axis(dtype: str, axis: int) -> None:
    shape, length = (4, 7, 3), 3
    count = int(np.prod(index_shape(shape, length, 1)))
    values = np.sort(normal(shape[axis], 5, length), axis=1)
    site = SharedTensor(
        shape, 0, indices(count, 5), dtype=dtype, axis=axis, scale=normal(shape[axis]), offset=normal(shape[axis]),
        vector_axis=1,
    )  # fmt: skip
    lookup = Lookup()
    lookup.shared("w", site, Table(values), 0)
    np.testing.assert_array_equal(run(lookup, "w")[0], expected(site, Table(values)))


def test_a_book_of_blocks_and_a_table_that_two_tensors_use() -> None:
    values = Table(np.sort(normal(3, 4, 1), axis=1), "F32")
    sites = {name: SharedTensor((5, 4), 0, indices(20, 4, seed), block=8) for seed, name in enumerate("ab")}
    lookup = Lookup()
    for name, site in sites.items():
        lookup.shared(name, site, values, 0)
    for site, found in zip(sites.values(), run(lookup, *sites), strict=True):
        np.testing.assert_array_equal(found, expected(site, values))
    assert [name for name in lookup.constants if "codebook" in name] == ["packed/codebook.0"]


def test_a_large_grid_is_computed_and_not_stored() -> None:
    lookup, grid = Lookup(), Grid(-1.1, 0.3, 1 << 12)
    site = SharedTensor((8, 8), 0, indices(64, 1 << 12))
    lookup.shared("w", site, grid, 0)
    np.testing.assert_array_equal(run(lookup, "w")[0], expected(site, grid))
    assert max(len(constant.raw_data) for constant in lookup.constants.values()) == 128  # the indices, of 16 bits


def test_other_tensors() -> None:
    lookup, half = Lookup(), normal(6).astype(np.float16).astype(np.float32)
    lookup.stored("stored", half, "F16", "F32")
    lookup.constant("ones", 1.0, (2, 3))
    lookup.slice("row", "ones", 1)
    lookup.alias("again", "stored")
    for name in ("places", "same"):
        lookup.integers(name, np.arange(300)[:, None])
    mask = np.where(np.arange(20) % 3, np.float32(-100), np.float32(-0.0)).reshape(4, 5)
    assert lookup.two_values("mask", mask)
    assert not lookup.two_values("many", normal(9))
    assert not Lookup(arithmetic=False).two_values("mask", mask)
    assert run(lookup, "mask")[0].tobytes() == mask.tobytes()
    assert len(lookup.constants["mask/packed/indices"].raw_data) == 3
    stored, ones, row, again, places, same = run(lookup, "stored", "ones", "row", "again", "places", "same")
    np.testing.assert_array_equal(places, np.arange(300)[:, None])
    np.testing.assert_array_equal(same, places)
    assert [tensor.data_type for name, tensor in lookup.constants.items() if "integers" in name] == [
        onnx.TensorProto.UINT16
    ]
    np.testing.assert_array_equal(stored, half)
    np.testing.assert_array_equal(again, half)
    np.testing.assert_array_equal(ones, np.ones((2, 3)))
    np.testing.assert_array_equal(row, np.ones(3))
