"""Error feedback, against a twin that re-optimises all weights that are still free after each rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.calibration.error_feedback import error_feedback, inverse_factor, is_dead
from compressor.sharing.curvature import LayerView

ROWS, COLUMNS = 4, 6
VIEW = LayerView((ROWS, COLUMNS))


def twin(weights: Tensor, moment: Tensor, pruned: Tensor | None = None) -> Tensor:
    """Returns the weights just before they were rounded: each the optimum given those rounded before it.

    The cost of errors E is ``E (H + d) E^T`` for d a tenth of the mean of H's diagonal. Of the columns F that are fixed
    and R that are free, the optimum has ``E_R = -E_F (H + d)_FR (H + d)_RR^-1``.
    """
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    before = weights.double().clone()
    for row in range(len(weights)):
        dense = weights[row].double()
        final = dense.clone()
        for j in range(len(moment)):
            if j:
                errors = final[:j] - dense[:j]
                final[j:] = dense[j:] - torch.linalg.solve(damped[j:, j:], damped[j:, :j] @ errors)
            before[row, j] = final[j]
            final[j] = 0 if pruned is not None and pruned[row, j] else final[j].float().round()
    return before


def problem(seed: int, positions: int = 30) -> tuple[Tensor, Tensor]:
    """Returns weights in steps, and the moments of inputs most of whose variance is common."""
    random = torch.Generator().manual_seed(seed)
    common = torch.randn(positions, 1, generator=random, dtype=torch.float64)
    inputs = 2 * common + torch.randn(positions, COLUMNS, generator=random, dtype=torch.float64)
    return torch.randn(ROWS, COLUMNS, generator=random), inputs.T @ inputs


def cost(errors: Tensor, moment: Tensor) -> float:
    return float((errors.double() @ moment * errors.double()).sum())


def rounded(weights: Tensor, _: Tensor) -> Tensor:
    return weights.round()


@pytest.mark.parametrize("seed", range(8))
def test_each_weight_is_the_optimum_given_those_before_it(seed: int) -> None:
    weights, moment = problem(seed)
    result = error_feedback(weights, VIEW, [moment[None]], rounded)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, twin(weights, moment).float(), rtol=1e-5, atol=1e-5)


def test_pruned_weights_are_zero_to_those_after_them() -> None:
    weights, moment = problem(3)
    pruned = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)) < 0.4
    result = error_feedback(weights, VIEW, [moment[None]], rounded, pruned)
    torch.testing.assert_close(result, twin(weights, moment, pruned).float(), rtol=1e-5, atol=1e-5)
    plain = weights.round().masked_fill(pruned, 0)
    assert cost(result.round().masked_fill(pruned, 0) - weights, moment) < cost(plain - weights, moment)


def test_correlated_inputs_make_up_for_errors_and_others_lose_little() -> None:
    plain = fed = 0.0
    for seed in range(20):
        weights, moment = problem(seed)
        plain += cost(weights.round() - weights, moment)
        fed += cost(error_feedback(weights, VIEW, [moment[None]], rounded).round() - weights, moment)
    assert fed < plain / 3
    plain = fed = 0.0
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        weights, inputs = torch.randn(ROWS, COLUMNS, generator=random), torch.randn(200, COLUMNS, generator=random)
        moment = (inputs.T @ inputs).double()
        one_plain = cost(weights.round() - weights, moment)
        one_fed = cost(error_feedback(weights, VIEW, [moment[None]], rounded).round() - weights, moment)
        assert one_fed < 1.3 * one_plain
        plain, fed = plain + one_plain, fed + one_fed
    assert fed < 1.01 * plain


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest() -> None:
    weights, _ = problem(0)
    moment = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert torch.equal(error_feedback(weights, VIEW, [moment[None]], rounded), weights)


def test_by_hand() -> None:
    """H + d is [[2.2, 1.9], [1.9, 2.2]]; the error 0.4 of the first becomes 0.4 * 1.9 / 2.2 of the second."""
    moment = torch.tensor([[[2.0, 1.9], [1.9, 2.0]]], dtype=torch.float64)
    result = error_feedback(torch.tensor([[0.4, 0.4]]), LayerView((1, 2)), [moment], rounded)
    torch.testing.assert_close(result, torch.tensor([[0.4, 0.4 + 0.4 * 1.9 / 2.2]]))


def test_the_factor_is_that_of_the_inverse_of_damped_moments() -> None:
    _, moment = problem(5)
    upper = inverse_factor(moment[None])[0]
    assert torch.equal(upper, upper.triu())
    damped = moment + 0.1 * moment.diagonal().mean() * torch.eye(COLUMNS)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(COLUMNS, dtype=torch.float64))


def test_inputs_that_are_always_zero_get_zero_and_leave_the_others_alone() -> None:
    weights, moment = problem(2)
    alive = [0, 1, 3, 5]
    smaller = moment[alive][:, alive]
    with_dead = torch.zeros_like(moment)
    with_dead[torch.tensor(alive)[:, None], torch.tensor(alive)] = smaller
    assert is_dead(with_dead[None])[0].tolist() == [False, False, True, False, True, False]
    result = error_feedback(weights, VIEW, [with_dead[None]], rounded)
    assert result[:, [2, 4]].abs().max() == 0
    torch.testing.assert_close(result[:, alive], twin(weights[:, alive], smaller).float(), rtol=1e-5, atol=1e-5)


def test_moments_of_fewer_positions_than_inputs() -> None:
    weights, moment = problem(4, positions=2)
    assert torch.linalg.matrix_rank(moment) == 2
    for dtype in (torch.float64, torch.float32):
        result = error_feedback(weights, VIEW, [moment[None].to(dtype)], rounded)
        torch.testing.assert_close(result, twin(weights, moment).float(), rtol=1e-3, atol=1e-3)
    inputs = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    wide = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))
    result = error_feedback(wide, LayerView((2, 300)), [(inputs.T @ inputs)[None]], rounded)
    assert result.isfinite().all()
    assert ((result.round() - wide) @ inputs.T).square().sum() < ((wide.round() - wide) @ inputs.T).square().sum() / 50


def test_moments_that_are_all_zero_say_that_no_weight_matters() -> None:
    weights, moment = problem(0)
    assert error_feedback(weights, VIEW, [torch.zeros_like(moment)[None]], rounded).tolist() == [[0.0] * 6] * 4


def test_moments_that_cannot_be_factorised_leave_each_weight_to_itself() -> None:
    weights, _ = problem(0)
    indefinite = torch.full((1, COLUMNS, COLUMNS), 1e6).double()
    indefinite.diagonal(dim1=1, dim2=2).fill_(1.0)
    assert torch.equal(error_feedback(weights, VIEW, [indefinite], rounded), weights)


@pytest.mark.parametrize("columns", [COLUMNS, 128, 129, 300])
def test_rounding_the_result_gives_what_was_decided(columns: int) -> None:
    random = torch.Generator().manual_seed(columns)
    weights = torch.randn(3, columns, generator=random)
    inputs = torch.randn(50, columns, generator=random).cumsum(1)
    codebook = torch.tensor([-1.3, -0.4, 0.1, 0.7, 1.6])
    decided = torch.full((3 * columns,), torch.nan)
    seen: list[int] = []

    def note(values: Tensor, positions: Tensor) -> Tensor:
        decided[positions] = codebook[(values[:, None] - codebook).abs().argmin(1)]
        seen.extend(positions.tolist())
        return decided[positions]

    result = error_feedback(weights, LayerView((3, columns)), [(inputs.T @ inputs)[None]], note)
    nearest = codebook[(result.reshape(-1, 1) - codebook).abs().argmin(1)]
    assert torch.equal(nearest, decided)
    assert seen == [row * columns + column for column in range(columns) for row in range(3)]


def test_blocks_of_columns_are_one_problem() -> None:
    """More columns than a block has, of double precision, against the twin."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 140, generator=random)
    inputs = torch.randn(400, 140, generator=random, dtype=torch.float64).cumsum(1)
    moment = inputs.T @ inputs
    result = error_feedback(weights, LayerView((1, 140)), [moment[None]], rounded)
    torch.testing.assert_close(result, twin(weights, moment).float(), rtol=1e-4, atol=1e-4)


def test_ranges_of_columns_are_problems_of_their_own() -> None:
    weights, moment = problem(6)
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    result = error_feedback(weights, VIEW, [moment[None, part, part] for part in parts], rounded)
    expected = torch.cat([twin(weights[:, part], moment[part, part]) for part in parts], dim=1)
    torch.testing.assert_close(result, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("view", [LayerView((4, 3, 2), groups=2), LayerView((6, 2, 2), groups=2, inputs_first=True)])
def test_groups_are_problems_of_their_own(view: LayerView) -> None:
    weights = torch.randn(view.shape, generator=torch.Generator().manual_seed(9))
    moments = torch.stack([problem(seed)[1] for seed in (0, 1)])
    result = view.matrices(error_feedback(weights, view, [moments], rounded))
    assert result.shape == (2, 2, 6)
    for group in range(2):
        expected = twin(view.matrices(weights)[group], moments[group])
        torch.testing.assert_close(result[group], expected.float(), rtol=1e-5, atol=1e-5)


def test_the_arguments_are_left_alone() -> None:
    weights, moment = problem(1)
    before = weights.clone(), moment.clone()
    error_feedback(weights, VIEW, [moment[None]], rounded, torch.zeros(ROWS, COLUMNS, dtype=torch.bool))
    assert torch.equal(weights, before[0])
    assert torch.equal(moment, before[1])
