"""Settling: after training, weights get shorter codes until the file has the size that was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from compressor.sharing.code_length import CodeLength, lengths_of

__all__ = ["settle", "shorter"]

TIGHT = 0.998  # of the target: what is cut beyond it costs accuracy
AIM = 0.999  # of the target: what the search tries to reach
LEAN = 0.1  # of how far a master weight is off its codeword, which tells between errors that cost the same
LEAST_COST = 1e-8  # of the mean: weights that no image has reached would otherwise be moved all at once, or none
PASSES = 24
INTERPOLATED = 8  # of PASSES; a power law may go on missing the target, so then the rest is halved
LEAST_STEP, MOST_STEP = 4.0, 64.0  # times, from one price to the next until the target is between two
ALIKE = 1.001  # times from a price that cuts too few bytes to one that cuts enough: bytes jump there
LEAST_CUT = 0.1  # bytes that a price is taken to cut, where it cuts none
LEAST_SHARE = 0.05  # of what is between two prices, that the next one cuts off


def settle(
    lengths: Sequence[CodeLength],
    target: int,
    size: int,
    size_of: Callable[[], int],
    curvature: Callable[[str], Tensor] | None = None,
) -> int:
    """Moves weights to codewords of shorter codes until the file is at most the target; returns its bytes.

    Each is moved where that costs less than the bits it saves, by ``shorter``, at the least price of a bit at which
    the file is small enough.

    Args:
        lengths: of the groups that may change; none may, where all are frozen.
        target: bytes of the file.
        size: bytes of the file as it is.
        size_of: returns the bytes of the file, were the model packed now.
        curvature: returns that of a tensor by its name, float[shape]; None: squared errors cost alike everywhere.
    """
    if size <= target or not lengths:
        return size
    masters = [length.master.clone() for length in lengths]
    codes = [lengths_of(length.counts()) for length in lengths]
    costs = _costs(lengths, curvature)

    def size_at(price: float) -> int:
        for length, master, code, cost in zip(lengths, masters, codes, costs, strict=True):
            least, step = length.grid
            numbers = shorter(master.float() / step, cost, code, least, price)
            length.master.copy_(numbers.double() * step)
        return size_of()

    price, wanted = lengths[0].price, size - AIM * target
    low, high = (0.0, 0.0), (math.inf, math.inf)  # prices, and bytes that they cut: too few, enough
    for passes in range(1, PASSES + 1):
        found = size_at(price)
        if TIGHT * target <= found <= target:
            return found
        cut = max(float(size - found), LEAST_CUT)
        low, high = (low, (price, cut)) if found <= target else ((price, cut), high)
        if high[0] <= ALIKE * low[0]:
            break
        price = _between(low, high, wanted, halve=passes >= INTERPOLATED)
    return size_at(price if high[0] == math.inf else high[0])  # if none was enough, codes are as short as they get


def _costs(lengths: Sequence[CodeLength], curvature: Callable[[str], Tensor] | None) -> list[Tensor]:
    """Returns what an error of one step costs in each group, float[shape] or a scalar, and nowhere nothing."""
    found = []
    for length in lengths:
        (site,), (_, step) = length.group.sites, length.grid
        known = torch.ones(()) if curvature is None else curvature(site.name)
        found.append(known.to(length.master.device) * step**2 / 2)
    mean = sum(float(cost.sum()) for cost in found) / sum(cost.numel() for cost in found)
    return [cost.clamp(min=LEAST_COST * mean or 1.0) for cost in found]


def _between(low: tuple[float, float], high: tuple[float, float], wanted: float, halve: bool) -> float:
    """Returns a price between two that cut too few bytes and enough, by a power law; beyond one where that is all."""
    if high[0] == math.inf:
        return low[0] * min(max(wanted / low[1], LEAST_STEP), MOST_STEP)
    if low[0] == 0:
        return high[0] / min(max(high[1] / wanted, LEAST_STEP), MOST_STEP)
    share = 0.5 if halve else math.log(wanted / low[1]) / math.log(high[1] / low[1])
    return low[0] * math.pow(high[0] / low[0], min(max(share, LEAST_SHARE), 1 - LEAST_SHARE))


def shorter(weights: Tensor, costs: Tensor, code: Tensor, least: int, price: float) -> Tensor:
    """Returns for each weight that one of three codewords at which error and bits cost least.

    They are the nearest one, q, the next one towards zero, and that of the shortest code, mostly zero. The network
    computes with q, so errors are measured from there: training lets weights that matter rest just outside the border
    to a shorter code, where the price has drawn them, so how near a master weight is to it says little. It decides
    between equal costs.

    Args:
        weights: float32[shape], master weights in steps of the grid.
        costs: float[shape] or a scalar, of a squared error of one step.
        code: float64[K], the length of the code of each number from ``least`` on, in bits.
        least: the first number of the grid.
        price: of a bit.

    Returns:
        Their numbers of steps, float32[shape].

    Example:
        >>> code = torch.tensor([9.0, 4.0, 1.0, 4.0, 9.0])
        >>> shorter(torch.tensor([1.0, 1.0, 2.0]), torch.tensor([5.0, 1.0, 1.0]), code, -2, 0.4).tolist()
        [1.0, 0.0, 1.0]
    """
    shortest = torch.full_like(weights, least + int(code.argmin()))
    code, nearest = code.to(weights), weights.round()
    seen_at = nearest + LEAN * (weights - nearest)
    best, least_cost = nearest, torch.full_like(weights, math.inf)
    for number in (nearest, nearest - nearest.sign(), shortest):
        bits = code[(number - least).long().clamp(0, len(code) - 1)]
        cost = costs * (seen_at - number).square() + price * bits
        best, least_cost = torch.where(cost < least_cost, number, best), torch.minimum(cost, least_cost)
    return best
