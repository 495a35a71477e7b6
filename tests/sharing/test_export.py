"""The canonical form that all schemes hand to the file, value by value."""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats.content import Table, decode
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


def test_rows_ascend_each_by_itself() -> None:
    exported = export_rows(
        group_of(2, 4),
        torch.tensor([[2.0, 1.0, 3.0], [-1.0, -0.0, -2.0]]),
        torch.tensor([[0, 1, 2, 0], [3, 4, 5, 4]], dtype=torch.int32),
        row=4,
    )
    (book,), (tensor,) = exported.books, exported.tensors.values()
    assert isinstance(book, Table)
    assert book.values.tolist() == [[[1.0], [2.0], [3.0]], [[-2.0], [-1.0], [0.0]]]
    assert str(book.values[1, 2, 0]) == "0.0"
    assert (tensor.axis, tensor.block, tensor.indices.tolist()) == (0, None, [1, 0, 2, 1, 1, 2, 0, 2])


def test_rows_of_several_slices_are_blocks_of_which_the_last_is_shorter() -> None:
    positions = torch.tensor([[0, 1], [1, 1], [3, 2]], dtype=torch.int32)
    exported = export_rows(group_of(3, 2), torch.tensor([[2.0, 1.0], [-1.0, -2.0]]), positions, row=4)
    (tensor,) = exported.tensors.values()
    assert (tensor.axis, tensor.block, tensor.indices.tolist()) == (None, 4, [1, 0, 0, 0, 0, 1])
    assert decode(tensor, exported.books[0]).tolist() == [[2.0, 1.0], [1.0, 1.0], [-2.0, -1.0]]


def test_rows_with_pruned_weights_have_a_zero_each() -> None:
    pruned = torch.tensor([[True, False], [False, True]])
    positions = torch.tensor([[0, 0], [2, 2]], dtype=torch.int32)
    exported = export_rows(group_of(2, 2, pruned=pruned), torch.tensor([[2.0, 1.0], [-1.0, -2.0]]), positions, row=2)
    (book,), (tensor,) = exported.books, exported.tensors.values()
    assert isinstance(book, Table)
    assert book.values.tolist() == [[[0.0], [1.0], [2.0]], [[-2.0], [-1.0], [0.0]]]
    assert tensor.indices.tolist() == [0, 2, 1, 2]


def test_vectors_ascend_by_their_first_numbers_and_equal_ones_are_one() -> None:
    group = group_of(4, 3)
    codebook = torch.tensor([[1.0, 5.0], [1.0, -0.0], [-1.0, 9.0], [1.0, 0.0]])
    exported = export_codebook(group, codebook, {group.sites[0]: torch.tensor([0, 1, 2, 3, 2, 1])})
    (book,), (tensor,) = exported.books, exported.tensors.values()
    assert isinstance(book, Table)
    assert book.values.tolist() == [[[-1.0, 9.0], [1.0, 0.0], [1.0, 5.0]]]
    assert tensor.indices.tolist() == [2, 1, 0, 1, 0, 1]
    assert decode(tensor, book).T.tolist() == [[1, 5, 1, 0], [-1, 9, 1, 0], [-1, 9, 1, 0]]


def test_factors_are_stored_in_bfloat16_and_leave_the_codebook_its_digits() -> None:
    group = group_of(2, 2, dtype=torch.bfloat16)
    site, codebook = group.sites[0], torch.tensor([[1.0 + 2.0**-20], [2.0]])
    indices = {site: torch.tensor([[0, 1], [1, 0]])}
    for factor, axis in ((torch.tensor([[0.5], [3.0]]), 0), (torch.tensor(4.0), None)):
        exported = export_codebook(group, codebook, indices, {site: factor})
        (book,), (tensor,) = exported.books, exported.tensors.values()
        assert isinstance(book, Table)
        assert (book.dtype, book.values[0, 0, 0], tensor.axis) == ("F32", 1.0 + 2.0**-20, axis)
        assert tensor.scale is not None
        assert (tensor.scale_dtype, tensor.scale.tolist()) == ("BF16", factor.reshape(-1).tolist())
