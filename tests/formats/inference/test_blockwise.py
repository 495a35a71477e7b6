"""Layers computed a block of output channels at a time: results and gradients of the dense matrix, without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from compressor.formats.inference.generated import Generated
from compressor.formats.inference.virtual_weight import VirtualTensor
from tests.helpers.blocks import blocks_of, never_whole, source_of

__all__ = ["never_whole"]


def both_ways(
    shape: tuple[int, ...], compute: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, bias: Tensor
) -> None:
    """Compare output and all gradients, float64, with those of the weight as an ordinary tensor."""
    torch.manual_seed(0)
    source, codebook = source_of(shape), torch.randn(10, dtype=torch.float64)
    found = []
    for virtual in (True, False):
        leaves = [one.clone().requires_grad_() for one in (codebook, x, bias)]
        indices = source.indices(0, source.stream.count, x.device)
        weight = (
            VirtualTensor(source, leaves[0], torch.float64)
            if virtual
            else leaves[0].index_select(0, indices).view(shape)
        )
        output = compute(leaves[1], weight, leaves[2])
        gradient = torch.randn(output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        found.append([output.detach(), *torch.autograd.grad(output, leaves, gradient, allow_unused=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def doubles(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    batch=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
    block=st.sampled_from([1, 7, 20, 1000]),
    biased=st.booleans(),
)
def test_linear(inputs: int, outputs: int, batch: tuple[int, ...], block: int, biased: bool) -> None:
    def compute(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x, weight, bias if biased else None)

    with pytest.MonkeyPatch.context() as patch:
        blocks_of(block, patch)
        both_ways((outputs, inputs), compute, doubles(*batch, inputs), doubles(outputs))


CONVOLUTIONS: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], tuple[int, ...], dict[str, Any]]] = {
    "1d": ((6, 4, 3), functional.conv1d, (2, 4, 9), {"padding": 1}),
    "2d": ((6, 4, 3, 2), functional.conv2d, (2, 4, 7, 6), {"stride": (2, 1), "dilation": 2}),
    "3d": ((5, 2, 2, 2, 2), functional.conv3d, (1, 2, 4, 4, 4), {}),
    "without a batch": ((6, 4, 3, 3), functional.conv2d, (4, 5, 5), {"padding": 1}),
    "same": ((6, 4, 2, 2), functional.conv2d, (2, 4, 5, 5), {"padding": "same"}),
    "grouped": ((12, 3, 3, 3), functional.conv2d, (2, 9, 5, 5), {"groups": 3}),
    "depthwise": ((8, 1, 3, 3), functional.conv2d, (2, 8, 5, 5), {"groups": 8, "padding": "same"}),
}


@pytest.mark.parametrize("block", [1, 20, 80, 1000])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_convolution(kind: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, convolve, inputs, options = CONVOLUTIONS[kind]
    blocks_of(block, monkeypatch)
    both_ways(shape, lambda x, weight, bias: convolve(x, weight, bias, **options), doubles(*inputs), doubles(shape[0]))


OTHERS: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "arithmetic": ((4, 6), lambda x, weight, bias: x @ (weight - weight.mean()).T / weight.std() + bias),
    "keywords": ((4, 6), lambda x, weight, bias: functional.linear(input=x, weight=weight, bias=bias)),
    "standardised": (
        (4, 6),
        lambda x, weight, bias: x @ functional.batch_norm(weight.view(1, 4, -1), None, None, training=True)[0].T + bias,
    ),
    "transposed": ((6, 4, 3), lambda x, weight, bias: functional.conv_transpose1d(x.T[None], weight, bias)),
    "rows": ((9, 4), lambda x, weight, bias: functional.embedding(torch.tensor([3, 0, 3]), weight) + bias + x.sum()),
    "input": ((6, 4), lambda x, weight, bias: functional.linear(weight, x.view(-1, 4)[:4], bias)),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_whatever_else_reads_it_sees_an_ordinary_weight(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks_of(7, monkeypatch)
    shape, compute = OTHERS[kind]
    both_ways(shape, compute, doubles(4, 6), doubles(4))


def test_what_it_says_of_itself_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generated, "expand", None)
    weight = VirtualTensor(source_of((3, 4)), torch.zeros(10, requires_grad=True), torch.float32)
    assert (weight.shape, weight.size(1), weight.dim(), weight.numel()) == ((3, 4), 4, 2, 12)
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.float32, "cpu", True)


def test_one_block_gives_the_bits_of_the_dense_layer() -> None:
    source, codebook = source_of((96, 80), 100, torch.float32), torch.randn(100)
    x, bias = torch.randn(5, 80), torch.randn(96)
    weight = VirtualTensor(source, codebook, torch.float32)
    assert torch.equal(functional.linear(x, weight, bias), functional.linear(x, weight.expand_weights(), bias))


def test_saves_input_and_codebook_for_the_backward_pass(never_whole: None) -> None:
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    def count(inputs: int, outputs: int) -> int:
        codebook = torch.randn(100, requires_grad=True)
        weight = VirtualTensor(source_of((outputs, inputs), 100, torch.float32), codebook, torch.float32)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = functional.linear(torch.randn(8, inputs, requires_grad=True), weight, torch.zeros(outputs))
        output.sum().backward()
        return sum(tensor.numel() for tensor in saved)

    assert count(64, 32) == 8 * 64 + 100 + 32
    assert count(64, 512) == 8 * 64 + 100 + 512, "nothing grows with the weights"


def test_autocast_computes_as_with_a_dense_weight() -> None:
    source, x = source_of((16, 24), 10, torch.float32), torch.randn(4, 24)
    codebook = torch.randn(10, requires_grad=True)
    weight, bias = VirtualTensor(source, codebook, torch.float32), torch.randn(16)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [functional.linear(x, one, bias) for one in (weight, weight.expand_weights())]
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(output.float().square().sum(), [codebook])[0] for output in outputs]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-1)


def test_dtypes_must_agree_as_ever() -> None:
    weight = VirtualTensor(source_of((3, 4), dtype=torch.float32), torch.zeros(10), torch.float32)
    with pytest.raises(RuntimeError, match="same dtype"):
        functional.linear(doubles(2, 4), weight)
