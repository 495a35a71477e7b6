"""Error feedback: weights are rounded one column at a time, and those to come make up for the errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from compressor.calibration.cholesky import column_major, factorise
from compressor.sharing.curvature import Curvature, LayerView
from compressor.sharing.group_state import GroupState
from compressor.sharing.sites import Site

__all__ = ["Round", "compensate", "error_feedback", "inverse_factor", "is_dead"]

Round = Callable[[Tensor, Tensor], Tensor]
"""Rounds weights, float32[n], given their positions in the flat tensor, int64[n].

They are a whole column: what one input meets, in the order of the output channels.
"""

DAMPING = 0.1  # of the mean of the diagonal, added to it: docs/decisions/0020
MORE_DAMPING = 3.0  # times, until the matrix can be factorised
ENOUGH_DAMPING = 100.0  # the columns are then all but independent
DEAD = 1e-9  # of the mean of the diagonal: the moment of an input that is always zero
CHUNK = 128  # columns between two products of matrices


def compensate(
    group: GroupState, curvature: Mapping[Site, Curvature] | None, rounding: Callable[[Site], Round]
) -> None:
    """Replaces the master weights of a group by those whose rounded values cost least; pruned ones round to zero.

    Where no moments are known they become the target, if there is one. The rounded master weights are the result: a
    scheme that takes the nearest codeword needs no more, and training goes on from them.

    Args:
        group: whose master weights are replaced.
        curvature: of its sites; None: it was not measured, and nothing is replaced.
        rounding: returns the rounding of a site.
    """
    if curvature is None:
        return
    for site in group.sites:
        measured, master = curvature[site], group.master_weight(site)
        weights = (master.detach() if measured.target is None else measured.target).float()
        if measured.view is not None and measured.moments:
            pruned = group.pruned(site) if group.has_zeros else None
            weights = error_feedback(weights, measured.view, measured.moments, rounding(site), pruned)
        with torch.no_grad():
            master.copy_(weights)


def error_feedback(
    weights: Tensor, view: LayerView, moments: Sequence[Tensor], rounded: Round, pruned: Tensor | None = None
) -> Tensor:
    """Returns weights that round to what costs least.

    With U the upper Cholesky factor of the inverse of H, the columns j are gone through in order; the error
    ``(w_j - rounded(w_j)) / U_jj`` times row j of U is taken from the columns after j. Inputs that are always zero get
    weights of zero, which costs nothing. See ``Curvature`` for H.

    Args:
        weights: float32[shape].
        view: how they are matrices.
        moments: H of each range of columns, float[G, d, d].
        rounded: the rounding.
        pruned: bool[shape], the weights that are zero whatever ``rounded`` says; None: none.

    Returns:
        float32[shape], the weights just before they were rounded.

    Example:
        >>> moments = [torch.tensor([[[2.0, 1.9], [1.9, 2.0]]])]  # two inputs that are all but equal
        >>> weights = torch.tensor([[0.4, 0.4]])
        >>> error_feedback(weights, LayerView((1, 2)), moments, lambda w, _: w.round()).round().tolist()
        [[0.0, 1.0]]

    Reference: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", ICLR 2023, equation 2 and section 3.3; here
    a coder follows, so the step is chosen by a price and the grid has no ends.
    """
    matrices = view.matrices(weights)
    numbers = torch.arange(weights.numel(), device=weights.device, dtype=_least_int(weights.numel()))
    positions = view.matrices(numbers.view(weights.shape))
    zero = None if pruned is None else view.matrices(pruned)
    result = torch.empty_like(matrices)
    start = 0
    for moment in moments:
        columns = slice(start, start := start + moment.shape[-1])
        fixed = None if zero is None else zero[..., columns]
        _feed_back(matrices[..., columns], positions[..., columns], moment, rounded, fixed, result[..., columns])
    return view.tensor(result)


def _least_int(numbers: int) -> torch.dtype:
    """Returns the dtype for so many numbers: those of a layer are held for as long as it is rounded."""
    return torch.int32 if numbers <= torch.iinfo(torch.int32).max else torch.int64


def _feed_back(
    weights: Tensor, positions: Tensor, moment: Tensor, rounded: Round, zero: Tensor | None, before: Tensor
) -> None:
    """Sets ``before``, float32[G, rows, d], to the weights of one range of columns just before rounding."""
    dead = is_dead(moment)
    factor = inverse_factor(moment)
    work = weights.to(factor.dtype).masked_fill(dead[:, None], 0)
    for start in range(0, work.shape[-1], CHUNK):
        columns = slice(start, min(start + CHUNK, work.shape[-1]))
        chunk, upper = work[..., columns], factor[:, columns, columns].contiguous()
        errors = torch.empty_like(chunk)
        for j in range(chunk.shape[-1]):
            column = before[..., start + j] = chunk[..., j].clone()
            value = rounded(column.float().reshape(-1), positions[..., start + j].reshape(-1).long()).view(column.shape)
            if zero is not None:
                value = value.masked_fill(zero[..., start + j], 0)
            errors[..., j] = (column - value) / upper[:, j, j, None]
            chunk[..., j + 1 :] -= errors[..., j, None] * upper[:, j, None, j + 1 :]
        work[..., columns.stop :] -= errors @ factor[:, columns, columns.stop :]


def is_dead(moment: Tensor) -> Tensor:
    """Returns which inputs are always zero, bool[G, d], of their second moments, float[G, d, d]."""
    diagonal = moment.diagonal(dim1=1, dim2=2)
    return diagonal <= DEAD * diagonal.mean(dim=1, keepdim=True)


def inverse_factor(moment: Tensor) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of damped moments, [G, d, d].

    Damping is raised until both factorisations succeed: with fewer positions than inputs the moments are singular.
    """
    diagonal = moment.diagonal(dim1=1, dim2=2)
    dead = is_dead(moment)
    mean = diagonal.sum(dim=1, keepdim=True) / (~dead).sum(dim=1, keepdim=True).clamp(min=1)
    mean = torch.where(mean > 0, mean, 1.0)
    alive = torch.where(dead, mean, diagonal)
    damping = DAMPING
    while damping < ENOUGH_DAMPING:
        factor = column_major(moment)
        factor.diagonal(dim1=1, dim2=2).copy_(alive + damping * mean)
        if factorise(factor) and factorise(torch.cholesky_inverse(factor, out=factor), upper=True):
            return factor
        damping *= MORE_DAMPING
    return torch.diag_embed((alive + mean).rsqrt())
