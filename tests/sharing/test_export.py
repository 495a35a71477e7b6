"""The canonical form that all schemes hand to the file, value by value."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats.content import Table
from compressor.schemes.kmeans import KMeans
from compressor.sharing.export import export_codebook, export_rows, export_scalars
from compressor.sharing.group import Group
from tests.helpers.groups import fitted


def group_of(*shape: int, dtype: torch.dtype = torch.float32, pruned: Tensor | None = None) -> Group:
    return fitted(KMeans(codewords=2), torch.linspace(-1, 1, shape[0] * shape[1]).view(shape).to(dtype), pruned=pruned)


def scalars(group: Group, codebook: list[float], indices: list[int]) -> tuple[str, list[float], list[int]]:
    """Returns dtype and values of the exported codebook, and the indices."""
    (site,) = group.sites
    index = torch.tensor(indices, dtype=torch.int32).view(site.tensor.shape)
    exported = export_scalars(group, torch.tensor(codebook), {site: index})
    (book,), tensor = exported.books, exported.tensors[site.name]
    assert isinstance(book, Table)
    return book.dtype, book.values.reshape(-1).tolist(), tensor.indices.tolist()


def test_codewords_ascend_and_indices_follow() -> None:
    found = scalars(group_of(1, 6), [2.0, -1.0, 0.5], [0, 1, 2, 2, 1, 0])
    assert found == ("F32", [-1.0, 0.5, 2.0], [2, 0, 1, 1, 0, 2])


def test_codewords_that_are_equal_are_one() -> None:
    found = scalars(group_of(1, 5), [2.0, -0.0, 2.0, 0.0, -1.0], [0, 1, 2, 3, 4])
    assert found == ("F32", [-1.0, 0.0, 2.0], [2, 1, 2, 1, 0])


def test_codewords_that_the_dtype_of_the_weights_makes_equal_are_one() -> None:
    step = 2.0**-10  # from 1 to the next number of float16
    codebook = [1 + step, 1 + step / 4, 1.0, -1.0]
    assert scalars(group_of(1, 4, dtype=torch.float16), codebook, [0, 1, 2, 3]) == (
        "F16", [-1.0, 1.0, 1 + step], [2, 1, 1, 0],
    )  # fmt: skip
    assert scalars(group_of(1, 4), codebook, [0, 1, 2, 3]) == ("F32", [-1.0, 1.0, 1 + step / 4, 1 + step], [3, 2, 1, 0])


def test_pruned_weights_have_the_codeword_zero_whatever_their_index() -> None:
    group = group_of(1, 4, pruned=torch.tensor([False, True, False, True]))
    assert scalars(group, [2.0, -1.0], [0, 0, 1, -1]) == ("F32", [-1.0, 0.0, 2.0], [2, 1, 0, 1])
    assert scalars(group, [2.0, 0.0], [0, 0, 1, 1]) == ("F32", [0.0, 2.0], [1, 0, 0, 0])


def test_slices_ascend_each_by_itself() -> None:
    exported = export_slices(
        group_of(2, 4),
        torch.tensor([[2.0, 1.0, 3.0], [-1.0, -0.0, -2.0]]),
        torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]], dtype=torch.int32),
    )
    (book,), (tensor,) = exported.books, exported.tensors.values()
    assert isinstance(book, Table)
    assert book.values.tolist() == [[[1.0], [2.0], [3.0]], [[-2.0], [-1.0], [0.0]]]
    assert str(book.values[1, 2, 0]) == "0.0"
    assert (tensor.axis, tensor.indices.tolist()) == (0, [1, 0, 2, 1, 1, 2, 0, 2])


def test_slices_with_pruned_weights_have_a_zero_each() -> None:
    pruned = torch.tensor([[True, False], [False, True]])
    exported = export_slices(
        group_of(2, 2, pruned=pruned), torch.tensor([[2.0, 1.0], [-1.0, -2.0]]), torch.zeros(2, 2, dtype=torch.int32)
    )
    (book,), (tensor,) = exported.books, exported.tensors.values()
    assert isinstance(book, Table)
    assert book.values.tolist() == [[[0.0], [1.0], [2.0]], [[-2.0], [-1.0], [0.0]]]
    assert tensor.indices.tolist() == [0, 2, 1, 2]
