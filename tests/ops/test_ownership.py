"""A gradient that a backward pass is given stays as it is: others may see it, and what they see has to be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from compressor import Compressor, Policy, Rule
from compressor.ops.gather_scatter import frozen_lookup
from compressor.ops.relative_distance import frozen_lookup_with_distance
from compressor.schemes.ttq import ternary

SHAPE = (64, 32, 3, 3)  # large enough for the buffer pool
IMAGES = torch.randn(2, 32, 8, 8, generator=torch.Generator().manual_seed(0))
INDICES = torch.randint(-1, 3, SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.int8)
CODEBOOK = torch.tensor([-1.0, 0.0, 1.0])
SCALES = torch.tensor([0.5, 0.25])
Op = Callable[[Tensor], Tensor]


def inq(master: Tensor) -> Tensor:
    return frozen_lookup(master, CODEBOOK, INDICES)


def wfn(master: Tensor) -> Tensor:
    """With the regulariser, whose slopes are added to the gradient."""
    measured = torch.zeros(2, dtype=torch.float64)
    weight, distance = frozen_lookup_with_distance(master, CODEBOOK, INDICES, 0.1, measured)
    return weight + (0.5 * distance).float()


def ttq(master: Tensor) -> Tensor:
    return ternary(master, SCALES, (INDICES + 1).clamp(max=2).int())


def master_weight() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(SHAPE, requires_grad=True)


def expected(op: Op, gradient: Tensor) -> Tensor:
    """Returns the gradient of the master weight for a gradient of the weight that nobody else has."""
    master = master_weight()
    op(master).backward(gradient.clone(memory_format=torch.contiguous_format))
    assert master.grad is not None
    return master.grad


class Keeping(Function):
    """The identity, whose backward pass keeps what it returns."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: list[Any], view: Callable[[Tensor], Any]) -> Tensor:
        ctx.kept, ctx.view = kept, view
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        computed = gradient * 1
        ctx.kept.append((ctx.view(computed), ctx.view(computed.clone())))
        return computed, None, None


def convolved(weight: Tensor) -> Tensor:
    return functional.conv2d(IMAGES, weight).square().sum()


ops = pytest.mark.parametrize("op", [inq, wfn, ttq])
kinds = pytest.mark.parametrize("way", ["machine code", "stock operators"])


@pytest.fixture(autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "way" in request.fixturenames and request.getfixturevalue("way") == "stock operators":
        for module in ("gather_scatter", "nearest", "relative_distance_kernel"):
            monkeypatch.setattr(f"compressor.ops.{module}.compiled_kernel", lambda *args, **kwargs: None)
        monkeypatch.setattr("compressor.ops.nearest.available", lambda: False)


@ops
@kinds
def test_a_gradient_of_the_caller_stays_as_it_is(op: Op, way: str) -> None:
    gradient = torch.randn(SHAPE)
    before, master = gradient.clone(), master_weight()
    torch.autograd.backward(op(master), gradient)
    assert torch.equal(gradient, before)
    assert master.grad is not None
    assert master.grad.data_ptr() != gradient.data_ptr()


@ops
@pytest.mark.parametrize(
    "view", [lambda whole: whole, torch.Tensor.detach, lambda whole: whole[1:2], torch.Tensor.numpy]
)
def test_a_gradient_that_another_function_keeps_stays_as_it_is(op: Op, view: Callable[[Tensor], Any]) -> None:
    kept: list[Any] = []
    convolved(Keeping.apply(op(master_weight()), kept, view)).backward()
    ((seen, before),) = kept
    assert torch.equal(torch.as_tensor(seen), torch.as_tensor(before))


@ops
def test_a_hook_keeps_what_it_was_given(op: Op) -> None:
    seen: list[Tensor] = []
    copies: list[Tensor] = []
    weight = op(master_weight())
    weight.register_hook(lambda gradient: seen.append(gradient) or copies.append(gradient.clone()))  # type: ignore[func-returns-value]
    weight.retain_grad()
    convolved(weight).backward()
    assert weight.grad is not None
    assert torch.equal(seen[0], copies[0])
    assert torch.equal(weight.grad, copies[0])


@ops
def test_gradients_that_are_asked_for_are_both_right(op: Op) -> None:
    master = master_weight()
    weight = op(master)
    of_weight, of_master = torch.autograd.grad(convolved(weight), [weight, master])
    alone = weight.detach().clone().requires_grad_()
    (wanted,) = torch.autograd.grad(convolved(alone), alone)
    assert torch.equal(of_weight, wanted)
    assert torch.equal(of_master, expected(op, wanted))


@ops
def test_a_retained_graph_has_the_same_gradients_again(op: Op) -> None:
    master = master_weight()
    loss = convolved(op(master))
    first, second = (torch.autograd.grad(loss, master, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@ops
def test_two_that_share_a_gradient_both_have_it(op: Op) -> None:
    """Autograd gives both addends of a sum the same tensor."""
    first, second = master_weight(), torch.zeros(SHAPE, requires_grad=True)
    output = op(first) + second
    gradient = torch.randn(SHAPE)
    output.backward(gradient)
    assert second.grad is not None
    assert torch.equal(second.grad, gradient)
    one, other = master_weight(), master_weight()
    (op(one) + op(other)).backward(gradient)
    assert one.grad is not None
    assert other.grad is not None
    assert torch.equal(one.grad, expected(op, gradient))
    assert torch.equal(other.grad, one.grad)


@ops
@kinds
def test_a_gradient_may_lie_anyhow_in_memory(op: Op, way: str) -> None:
    """That of a sum is one number, seen as many; that of a transposed weight has its strides."""
    for gradient in (torch.ones(1).expand(SHAPE), torch.randn(SHAPE[::-1]).permute(3, 2, 1, 0)):
        master = master_weight()
        op(master).backward(gradient)
        assert master.grad is not None
        torch.testing.assert_close(master.grad, expected(op, gradient))  # sums differ by rounding


@ops
def test_a_gradient_in_mixed_precision_is_right(op: Op) -> None:
    master = master_weight()
    weight = op(master)
    weight.retain_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = convolved(weight).float()
    loss.backward()
    assert weight.grad is not None
    assert master.grad is not None
    assert torch.equal(master.grad, expected(op, weight.grad))


@pytest.mark.parametrize("scheme", ["inq", "wfn", "ttq"])
def test_gradients_of_several_steps_add_up(scheme: str) -> None:
    """Where a gradient is there already, autograd adds to it in place: it must be nobody else's."""
    torch.manual_seed(0)
    rule = Rule("*.weight", scheme, bits=4) if scheme == "inq" else Rule("*.weight", scheme)
    job = Compressor(nn.Sequential(nn.Linear(200, 100)), Policy([rule]), teacher=None, copy=False).prepare()
    job.attach(torch.optim.SGD(job.param_groups(1e-2)), 100)
    batches = torch.randn(2, 8, 200)
    parameters = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    alone = [torch.autograd.grad(job.model(batch).square().sum(), parameters, allow_unused=True) for batch in batches]
    for batch in batches:
        job.model(batch).square().sum().backward()
    for parameter, one, other in zip(parameters, *alone, strict=True):
        if one is not None:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, one + other)
