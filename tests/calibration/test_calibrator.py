"""What the calibrator measures, against sums over images, positions and classes that are written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from compressor.calibration.calibrator import Calibrator
from compressor.formats.errors import UsageError
from compressor.rng import random_state
from compressor.sharing.curvature import Curvature
from compressor.sharing.sites import Site, find_tensors
from tests.helpers.calibrators import calibrator, images, network


def measured(one: Calibrator, compressed: dict[str, Tensor] | None = None) -> dict[str, Curvature]:
    return {site.name: curvature for site, curvature in one.measure(one.sites, compressed or {}).items()}


def diagonals(one: Calibrator) -> dict[str, Tensor]:
    return {site.name: one.diagonal(site) for site in one.sites}


def squares_of_inputs(model: Any, inputs: Tensor) -> dict[str, Tensor]:
    """Returns the mean over images of the sum over positions of x x^T, [G, d, d], by loops over all of them."""
    sums: dict[str, Tensor] = {}
    values = inputs
    with torch.no_grad():
        for number, layer in enumerate(model):
            if isinstance(layer, nn.Conv2d):
                padded = functional.pad(values, [int(layer.padding[0])] * 4)
                (height, width), stride = layer.kernel_size, layer.stride[0]
                channels = layer.in_channels // layer.groups
                total = torch.zeros(layer.groups, *[channels * height * width] * 2, dtype=torch.float64)
                for image in padded.double():
                    for group in range(layer.groups):
                        part = image[group * channels : (group + 1) * channels]
                        for top in range(0, image.shape[1] - height + 1, stride):
                            for left in range(0, image.shape[2] - width + 1, stride):
                                patch = part[:, top : top + height, left : left + width].reshape(-1)
                                total[group] += torch.outer(patch, patch)
                sums[f"{number}.weight"] = total / len(inputs)
            elif isinstance(layer, nn.Linear):
                sums[f"{number}.weight"] = torch.stack([torch.outer(x, x) for x in values.double()]).mean(0)[None]
            values = layer(values)
    return sums


def fisher(model: Any, inputs: Tensor) -> dict[str, Tensor]:
    """Returns sum_k p_k (dL_k / dy_o)^2 of each output o, averaged over images and positions, class by class."""
    totals: dict[str, Tensor] = {}
    for image in inputs:
        answers = {}
        values = image[None]
        for number, layer in enumerate(model):
            values = layer(values)
            if isinstance(layer, nn.Conv2d | nn.Linear):
                answers[f"{number}.weight"] = values
        logarithms = values.log_softmax(1)[0]
        for label in range(len(logarithms)):
            gradients = torch.autograd.grad(-logarithms[label], list(answers.values()), retain_graph=True)
            for name, gradient in zip(answers, gradients, strict=True):
                rows = gradient.double().transpose(0, 1).flatten(1)
                total = float(logarithms[label].detach().exp()) * rows.square().mean(1) / len(inputs)
                totals[name] = totals.get(name, torch.zeros(())) + total
    return totals


def test_moments_are_means_over_images_of_sums_over_positions() -> None:
    model, inputs = network(), images(70)  # two batches
    expected = squares_of_inputs(model, inputs)
    found = measured(calibrator(model, inputs))
    assert found.keys() == expected.keys()
    for name, curvature in found.items():
        (moment,) = curvature.moments
        torch.testing.assert_close(moment, expected[name], rtol=1e-5, atol=1e-6)
        assert curvature.target is None
        assert curvature.view is not None


def test_inputs_that_are_always_zero_are_not_measured() -> None:
    """Of a 3 x 3 kernel on a single pixel, all but the middle meets padding."""
    model: Any = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Flatten(), nn.Linear(3, 2))
    inputs = torch.randn(20, 2, 1, 1)
    curvature = measured(calibrator(model, inputs))["0.weight"]
    flat = inputs[:, :, 0, 0]
    (moment,) = curvature.moments
    torch.testing.assert_close(moment[0].float(), flat.T @ flat / 20, rtol=1e-5, atol=1e-6)
    assert curvature.view is not None
    assert curvature.view.matrices(torch.arange(54).view(3, 2, 3, 3))[0].tolist() == [[4, 13], [22, 31], [40, 49]]
    assert curvature.diagonal[..., 1, 1].min() > 0
    assert curvature.diagonal.sum() == pytest.approx(float(curvature.diagonal[..., 1, 1].sum()))


def test_a_layer_that_is_given_nothing_but_zeros_is_measured_whole() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    curvature = measured(calibrator(model, torch.zeros(20, 3)))["0.weight"]
    (moment,) = curvature.moments
    assert torch.equal(moment, torch.zeros(1, 3, 3, dtype=torch.float64))


def test_diagonals_are_moments_times_the_fisher_information_of_the_outputs() -> None:
    """Signs are drawn: with each of 12 images 100 times, a few per cent off."""
    model, inputs = network(), images(12)
    squares, gradients = squares_of_inputs(model, inputs), fisher(model, inputs)
    found = diagonals(calibrator(model, inputs.repeat(100, 1, 1, 1)))
    assert found.keys() == gradients.keys()
    for name, diagonal in found.items():
        columns = squares[name].diagonal(dim1=1, dim2=2)  # of each group
        rows = gradients[name].view(len(columns), -1, 1)
        assert diagonal.dtype == torch.float32
        expected = (rows * columns[:, None, :]).reshape(diagonal.shape).float()
        torch.testing.assert_close(diagonal, expected, rtol=0.15, atol=0)


def test_of_a_single_output_the_diagonal_is_exact() -> None:
    """The squared gradient of the hidden outputs is the squared weight of the layer above, whatever the signs."""
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        model[0].bias.zero_()
        model[1].weight.copy_(torch.tensor([[3.0, -0.5]]))
    inputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])  # mean squares 5 and 2; of the hidden outputs 5 and 8
    found = diagonals(calibrator(model, inputs))
    assert found["0.weight"].tolist() == [[45.0, 18.0], [1.25, 0.5]]
    assert found["1.weight"].tolist() == [[5.0, 8.0]]


class Positions(nn.Module):
    """Adds an embedding to its inputs, and multiplies by the weight of a layer that it does not call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places = nn.Embedding(4, 3)
        self.head = nn.Linear(12, 3, bias=False)
        self.spare = nn.Linear(3, 3, bias=False)
        self.matrix = nn.Parameter(torch.randn(3, 3))

    def forward(self, images: Tensor) -> Tensor:
        hidden = images + self.places(torch.arange(4))
        return functional.linear(hidden.tanh().flatten(1), self.head.weight) @ self.matrix


def test_of_tensors_that_no_layer_is_called_with_it_is_the_mean_squared_gradient() -> None:
    """Those of BEiT's attention are such. The gradient is that of a batch of 64 images, of 250 batches."""
    model = Positions()
    inputs = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0))
    sites = [site for site in find_tensors(model) if not site.name.startswith("spare")]
    tensors = [site.tensor for site in sites]
    expected = {site.name: torch.zeros(site.tensor.shape) for site in sites}
    for image in inputs:
        logarithms = model(image[None]).log_softmax(1)[0]
        probabilities = logarithms.exp().tolist()
        for label in range(3):
            gradients = torch.autograd.grad(logarithms[label], tensors, retain_graph=True)
            for site, gradient in zip(sites, gradients, strict=True):
                expected[site.name] += probabilities[label] * gradient.square() / len(inputs)
    one = calibrator(model, inputs.repeat(2000, 1, 1), "")
    for name, diagonal in diagonals(one).items():
        if name == "spare.weight":  # the loss does not depend on it
            assert 0 < float(diagonal.min()) == float(diagonal.max()) < 1e-5
        else:
            torch.testing.assert_close(diagonal, expected[name], rtol=0.5, atol=0.05 * float(expected[name].max()))
            assert float(diagonal.mean()) == pytest.approx(float(expected[name].mean()), rel=0.2)
    for curvature in measured(one).values():
        assert curvature.view is None
        assert list(curvature.moments) == []


def test_the_seed_decides() -> None:
    model, inputs = network(), images()
    first, again, other = (diagonals(calibrator(model, inputs, seed=seed)) for seed in (1, 1, 2))
    for name, diagonal in first.items():
        assert torch.equal(diagonal, again[name])
        assert not torch.equal(diagonal, other[name])


class InPlace(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.relu_()


@pytest.mark.parametrize("training", [True, False])
def test_model_and_generators_stay_as_they_were(training: bool) -> None:
    model: Any = nn.Sequential(
        nn.BatchNorm2d(2), nn.Conv2d(2, 4, 2), nn.Dropout(0.5), InPlace(), nn.Flatten(), nn.Linear(64, 3)
    ).train(training)
    model[0].eval()
    model[1].requires_grad_(False)
    calls: list[None] = []
    model[1].register_forward_pre_hook(lambda *_: calls.append(None))

    def state() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers()]
        return [
            [(tensor.detach().clone(), tensor.requires_grad, tensor.grad, tensor._version) for tensor in tensors],
            [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()],
            random_state(), torch.is_grad_enabled(),
        ]  # fmt: skip

    before, inputs = state(), images()
    kept = inputs.clone()
    measured(calibrator(model, inputs), {"1.weight": torch.zeros_like(model[1].weight)})
    with pytest.raises(UsageError):
        calibrator(model, images(size=6))
    assert all(np.array_equal(new, old) for new, old in zip(tree_leaves(state()), tree_leaves(before), strict=True))
    assert torch.equal(inputs, kept)
    assert len(calls) == 4  # the first pass, the dense and the compressed one, and the one that fails


def test_it_works_inside_no_grad_and_inference_of_frozen_models() -> None:
    model, inputs = network(), images()
    expected = diagonals(calibrator(model, inputs))
    with torch.no_grad():
        inside = diagonals(calibrator(model.requires_grad_(False), inputs))
    assert all(torch.equal(inside[name], diagonal) for name, diagonal in expected.items())


def test_later_layers_are_measured_on_what_the_compressed_ones_before_them_give() -> None:
    model, inputs = network(), images(40)
    one, coarse = calibrator(model, inputs), (4 * model[0].weight.detach()).round() / 4
    found = measured(one, {"0.weight": coarse})
    with torch.no_grad():
        model[0].weight.copy_(coarse)
    for name, moment in squares_of_inputs(model, inputs).items():
        torch.testing.assert_close(found[name].moments[0], moment, rtol=1e-5, atol=1e-6)
    assert torch.equal(found["2.weight"].diagonal, diagonals(one)["2.weight"])


def test_the_dense_weights_count_whatever_the_model_holds() -> None:
    model, inputs = network(), images()
    expected = measured(calibrator(model, inputs))
    sites = [site for site in find_tensors(model) if site.name.endswith("weight")]
    dense = {site.name: site.tensor.detach().clone() for site in sites}
    for site in sites:
        site.tensor.data.zero_()
    found = {site.name: one for site, one in Calibrator(model, sites, inputs, dense).measure(sites, {}).items()}
    for name, curvature in expected.items():
        assert torch.equal(found[name].moments[0], curvature.moments[0])
        assert torch.equal(found[name].diagonal, curvature.diagonal)


def test_moments_of_the_dense_model_are_measured_when_they_are_read() -> None:
    one = calibrator(network(), images())
    expected = measured(one)
    for site in one.sites:
        found = one.of_dense(site)
        assert len(found.moments) == 1
        assert torch.equal(found.moments[0], expected[site.name].moments[0])
        assert [torch.equal(a, b) for a, b in zip(found.moments, found.moments, strict=True)] == [True]
        assert torch.equal(found.diagonal, expected[site.name].diagonal)
        assert found.target is None


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.late = nn.Linear(3, 2)
        self.unused = nn.Linear(3, 3)
        self.early = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        answer: Tensor = self.late(input=self.early(self.early(inputs).tanh()))
        return answer


def test_a_layer_that_is_called_twice_meets_the_inputs_of_both_calls() -> None:
    model, inputs = Twice(), torch.randn(20, 3)
    with torch.no_grad():
        both = torch.cat([inputs, model.early(inputs).tanh()]).double()
    one = calibrator(model, inputs)
    found = measured(one)
    torch.testing.assert_close(found["early.weight"].moments[0][0], both.T @ both / 20, rtol=1e-5, atol=1e-6)
    present = measured(one, {"early.weight": torch.zeros(3, 3)})
    bias = model.early.bias.detach()
    with torch.no_grad():
        second = bias.tanh().double()
    both = inputs.double().T @ inputs.double() / 20 + torch.outer(second, second)
    torch.testing.assert_close(present["early.weight"].moments[0][0], both, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        present["late.weight"].moments[0][0], torch.outer(bias, bias).double(), rtol=1e-5, atol=1e-6
    )


def test_tensors_come_in_the_order_in_which_they_are_called() -> None:
    one = calibrator(Twice(), torch.randn(20, 3))
    assert [site.name for site in one.in_order()] == ["early.weight", "late.weight", "unused.weight"]
    assert [[site.name for site in portion] for portion in one.site_chunks()] == [
        ["early.weight"], ["late.weight"], ["unused.weight"],
    ]  # fmt: skip


def test_a_deep_network_is_measured_in_a_limited_number_of_passes() -> None:
    model: Any = nn.Sequential(*[nn.Linear(3, 3) for _ in range(130)])
    inputs = torch.randn(16, 3)

    def sizes(one: Calibrator) -> list[int]:
        return [len(portion) for portion in one.site_chunks()]

    one = calibrator(model, inputs)
    assert sizes(one) == [3] * 43 + [1]
    assert [site.name for portion in one.site_chunks() for site in portion] == [
        f"{number}.weight" for number in range(130)
    ]
    assert sizes(calibrator(model, inputs, memory=2 * 2 * 3 * 3 * 8)) == [2] * 65  # two copies of 3 x 3 doubles


def test_little_memory_leads_to_ranges_of_columns_and_less_to_the_diagonal() -> None:
    model: Any = nn.Sequential(nn.Linear(40, 4))
    inputs = torch.randn(30, 40)
    (whole,) = measured(calibrator(model, inputs))["0.weight"].moments
    one = calibrator(model, inputs, memory=2 * 40 * 16 * 8)
    found = measured(one)["0.weight"]
    assert [tuple(moment.shape) for moment in found.moments] == [(1, 16, 16), (1, 16, 16), (1, 8, 8)]
    for moment, part in zip(found.moments, (slice(0, 16), slice(16, 32), slice(32, 40)), strict=True):
        torch.testing.assert_close(moment, whole[:, part, part])
    less = measured(calibrator(model, inputs, memory=2 * 40 * 16 * 8 - 1))["0.weight"]
    assert less.view is None
    assert list(less.moments) == []
    assert torch.equal(less.diagonal, found.diagonal)
    drifted = measured(one, {"0.weight": torch.zeros(4, 40)})["0.weight"].target
    torch.testing.assert_close(drifted, model[0].weight.detach())  # the inputs of the first layer stay the same


def test_half_precision_models_are_measured() -> None:
    model, inputs = network(), images(40)
    expected = measured(calibrator(model, inputs))
    for name, curvature in measured(calibrator(model.bfloat16(), inputs)).items():
        torch.testing.assert_close(curvature.moments[0], expected[name].moments[0], rtol=0.1, atol=0.02)
        assert curvature.diagonal.dtype == torch.float32


def test_logits_of_each_position_are_samples() -> None:
    """A 1x1 convolution of single outputs: the squared gradient is 1 everywhere."""
    found = calibrator(nn.Sequential(nn.Conv2d(2, 1, 1, bias=False)), torch.ones(16, 2, 3, 3))
    assert diagonals(found)["0.weight"].flatten().tolist() == [9.0, 9.0]


def test_sites_may_be_few() -> None:
    model = network()
    sites: list[Site] = [site for site in find_tensors(model) if site.name == "2.weight"]
    one = Calibrator(model, sites, images(), {"2.weight": sites[0].tensor.detach()})
    assert [site.name for site in one.measure(sites, {})] == ["2.weight"]
    assert list(diagonals(one)) == ["2.weight"]
