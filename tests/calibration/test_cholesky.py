"""Cholesky factors in place: those of the library, without another matrix."""

from __future__ import annotations

import pytest
import torch

from compressor.calibration.cholesky import column_major, factorise


def positive(groups: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(groups, 2 * size, size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    return rows.mT @ rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("upper", [False, True])
def test_factors_are_those_of_the_library(dtype: torch.dtype, upper: bool) -> None:
    matrices = positive(3, 20, dtype)
    kept = matrices.clone()
    factors = column_major(matrices)
    place = factors.data_ptr()
    assert factorise(factors, upper)
    torch.testing.assert_close(factors, torch.linalg.cholesky(kept, upper=upper))
    assert factors.data_ptr() == place
    assert torch.equal(matrices, kept)


@pytest.mark.parametrize("wrong", [-1.0, torch.nan, torch.inf])
def test_one_matrix_without_a_factor_is_told(wrong: float) -> None:
    matrices = positive(3, 5, torch.float64)
    matrices[1, 2, 2] = wrong
    assert not factorise(column_major(matrices))
