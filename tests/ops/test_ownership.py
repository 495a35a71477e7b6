"""A gradient is written to only where nobody else has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional

from compressor.ops.ownership import own

IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SPOILT = 77.015625  # which no bfloat16 is
Pass = Callable[[Tensor, list[Any]], None]


class Owning(Function):
    """The identity, whose backward pass takes the gradient for its own, if it is, and spoils it."""

    was_own: list[bool]

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.view_as(weight), weight.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, companion: Tensor) -> Tensor:
        mine = own(gradient, companion)
        Owning.was_own.append(mine is gradient)
        given = mine.clone()
        mine.fill_(SPOILT)
        return given


def owned(weight: Tensor) -> Tensor:
    result: Tensor = Owning.apply(weight)[0]
    return result


class Keeping(Function):
    """The identity, whose backward pass keeps what it gives."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: list[Any], how: Callable[[Tensor], Any]) -> Tensor:
        ctx.kept, ctx.how = kept, how
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        made = gradient * 1
        ctx.kept.append(ctx.how(made))
        return made, None, None


def convolved(weight: Tensor) -> Tensor:
    return functional.conv2d(IMAGES, weight).square().sum()


def alone(weight: Tensor, kept: list[Any]) -> None:
    convolved(owned(weight)).backward()


def used_twice(weight: Tensor, kept: list[Any]) -> None:
    owning = owned(weight)
    (convolved(owning) + convolved(owning)).backward()


def retained(weight: Tensor, kept: list[Any]) -> None:
    owning = owned(weight)
    owning.retain_grad()
    convolved(owning).backward()
    kept.append(owning.grad)


def graph_retained(weight: Tensor, kept: list[Any]) -> None:
    loss = convolved(owned(weight))
    loss.backward(retain_graph=True)
    loss.backward()


def mixed_precision(weight: Tensor, kept: list[Any]) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = convolved(owned(weight)).float()
    loss.backward()


def to_two_addends(weight: Tensor, kept: list[Any]) -> None:
    (owned(weight) + weight).square().sum().backward()


def to_two_that_own(weight: Tensor, kept: list[Any]) -> None:
    (owned(weight) + owned(weight)).square().sum().backward()


def one_number_for_all(weight: Tensor, kept: list[Any]) -> None:
    owned(weight).sum().backward()


def seen_by_a_hook(weight: Tensor, kept: list[Any]) -> None:
    owning = owned(weight)
    owning.register_hook(kept.append)
    convolved(owning).backward()


def seen_as_a_view(weight: Tensor, kept: list[Any]) -> None:
    flat = owned(weight).view(8, -1)
    flat.register_hook(kept.append)
    flat.square().sum().backward()


def asked_for(weight: Tensor, kept: list[Any]) -> None:
    owning = owned(weight)
    kept += torch.autograd.grad(convolved(owning), [owning, weight])


def given(weight: Tensor, kept: list[Any]) -> None:
    kept.append(torch.randn_like(weight))
    torch.autograd.backward(owned(weight), kept[0])


def kept_by_a_function(weight: Tensor, kept: list[Any]) -> None:
    convolved(Keeping.apply(owned(weight), kept, lambda made: made)).backward()


def kept_as_detached(weight: Tensor, kept: list[Any]) -> None:
    convolved(Keeping.apply(owned(weight), kept, torch.Tensor.detach)).backward()


def kept_as_a_part(weight: Tensor, kept: list[Any]) -> None:
    convolved(Keeping.apply(owned(weight), kept, lambda made: made[1:2])).backward()


def kept_as_an_array(weight: Tensor, kept: list[Any]) -> None:
    convolved(Keeping.apply(owned(weight), kept, torch.Tensor.numpy)).backward()


SPOILS = [alone, used_twice, retained, graph_retained, mixed_precision]
SPARES = [
    to_two_addends, to_two_that_own, one_number_for_all, seen_by_a_hook, seen_as_a_view, asked_for, given,
    kept_by_a_function, kept_as_detached, kept_as_a_part, kept_as_an_array,
]  # fmt: skip


@pytest.mark.parametrize("run", SPOILS + SPARES)
def test_nobody_else_sees_what_is_written_to_a_gradient(run: Pass) -> None:
    Owning.was_own = []
    torch.manual_seed(0)
    weight = torch.randn(8, 4, 3, 3, requires_grad=True)
    kept: list[Any] = []
    run(weight, kept)
    assert all(not (torch.as_tensor(seen) == SPOILT).any() for seen in kept)
    assert weight.grad is None or not (weight.grad == SPOILT).any()
    assert Owning.was_own[0] == (run in SPOILS)  # of two, the second may own what the first has let go


def test_a_version_that_does_not_tell_means_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C, "_storage_Use_Count")
    Owning.was_own = []
    alone(torch.randn(8, 4, 3, 3, requires_grad=True), [])
    assert Owning.was_own == [False]
